"""Verbs on what was trained: merge."""

from typing import Annotated

import typer

from loftq.cli.app import app
from loftq.cli.options import Directory, Output, quiet_transformers
from loftq.errors import quoted
from loftq.report.bars import Bar

AdapterOf = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="DIR|none",
        help="An adapter that PEFT wrote, or a run of `loftq train`; none: the quantized weights alone. "
        "Default: the directory's own initialization.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of loftq.")]


@app.command()
def merge(
    directory: Directory,
    output: Output,
    adapter: AdapterOf = None,
    dtype: Annotated[
        str, typer.Option(help="Of the matrices: bfloat16, float16 or float32. Vectors stay as they are.")
    ] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Largest file: 500MB, 2GB.")] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Make a plain dense checkpoint of the quantized weights and an adapter, one matrix in memory at a time."""
    from loftq.export.merge import MergeOptions
    from loftq.export.merge import merge as run
    from loftq.planning import parse_size

    quiet_transformers()
    options = MergeOptions(
        adapter=adapter,
        dtype=dtype,
        max_shard_bytes=parse_size("--max-shard-size", max_shard_size),
        overwrite=overwrite,
    )
    with Bar("merge", "tensor") as bar:
        made = run(directory, output, options, bar.begin)
    size = sum(f["size"] for f in made["files"].values()) / 1e6
    print(f"{quoted(output, 400)}: {len(made['files'])} files, {size:.1f} MB, {dtype}")
