"""The verb on models that are quantized already: start."""

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.app import app
from loftq.cli.bars import Bar
from loftq.cli.options import (
    Alpha,
    Rank,
    RankPolicy,
    Revision,
    RsLora,
    policy,
    quiet_transformers,
)


@app.command()
def start(
    base: Annotated[
        str,
        typer.Argument(
            help="The quantized model, a directory or a hub id: by bitsandbytes, GPTQ, AWQ, HQQ, loftq, …",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str, typer.Option(help="The full-precision model that it was made from, a directory or a hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter directory to make.", show_default=False)],
    rank: Rank = "16",
    alpha: Alpha = None,
    rank_policy: RankPolicy = "refuse",
    rslora: RsLora = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Adapters on embedding tables too.")] = False,
    min_coverage: Annotated[float, typer.Option(help="Refuse if less of the layers' weights would be adapted.")] = 0.5,
    calibrate: Annotated[
        Path | None, typer.Option(help="Statistics of the original, by `loftq calibrate`: least error of the outputs.")
    ] = None,
    svd: Annotated[str, typer.Option(help="auto, exact or randomized.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to load the base and to solve: cpu, cuda, cuda:1, …")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seeds the randomized SVD, together with each tensor's name.")] = 0,
    task_type: Annotated[str | None, typer.Option(help="PEFT task type to write into the adapter.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of BASE, if a hub id.")] = None,
    revision: Revision = None,
) -> None:
    """Make the adapter that makes up for the quantization of a model that is quantized already, by whatever method."""
    given = locals()
    from loftq.frozen.replace import FitOptions
    from loftq.frozen.start import StartOptions
    from loftq.frozen.start import start as run
    from loftq.report.tables import print_start
    from loftq.spec import SolveSpec

    quiet_transformers()
    solver = SolveSpec(svd=svd, seed=seed)
    statistics = None
    if calibrate is not None:
        from loftq.calibration.calibrate import statistics_of
        from loftq.sources.checkpoint import resolve

        statistics = statistics_of(calibrate, resolve(weights, revision))
    options = StartOptions(
        policy=policy(given, solve=solver),
        fit=FitOptions(statistics=statistics, svd=solver.svd, seed=solver.seed),
        device=device,
        base_revision=base_revision,
        revision=revision,
        task_type=task_type,
    )
    with Bar() as bar:
        report = run(base, weights, output, options, bar.begin)
    print_start(output, report)
