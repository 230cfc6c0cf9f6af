"""The calls for people in Python; the command line makes the same ones."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from loftq.nn.convert import convert
from loftq.plan import Policy
from loftq.solve import Solution, solve
from loftq.spec import QuantSpec, SolveSpec
from loftq.workflows.quantize import QuantizeOptions
from loftq.workflows.quantize import quantize as _quantize


def quantize_weight(
    weight: Tensor,
    *,
    bits: int = 4,
    rank: int = 16,
    steps: int = 5,
    code: str = "nf",
    block_size: int = 64,
    scale_dtype: str = "bfloat16",
    double_quant: bool = False,
    order: str = "quantize-first",
    svd: str = "auto",
    seed: int = 0,
    scales: str = "formula",
) -> Solution:
    """LoftQ of one matrix ``(out, in)``: ``weight ≈ dequantize(solution.quantized, spec) + solution.b @ solution.a``.

    >>> solution = quantize_weight(torch.randn(256, 512), bits=2, rank=16)
    >>> solution.errors[solution.kept] < solution.errors[0]
    True

    Raises: UsageError for options that do not fit; NumericalError for values that are not finite.
    """
    quant = QuantSpec(bits=bits, code=code, block_size=block_size, scale_dtype=scale_dtype, double_quant=double_quant)
    return solve(weight, quant, rank, SolveSpec(steps=steps, order=order, svd=svd, seed=seed, scales=scales))


def get_peft_model(model: nn.Module, *, workers: int | None = None, progress: bool = True, **options: Any) -> nn.Module:
    """A loaded full-precision model becomes a ``PeftModel`` with packed layers and the LoftQ start.

    The model is changed in place, layer by layer, so that little more memory is needed than it has already.

    Args:
        model: a transformers model, its weights in memory.
        workers: matrices solved at a time; default one per core.
        options: fields of :class:`Policy`: ``bits=2, rank=16, alpha=32, code="nf", embeddings=True, …``.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("org/model")
        >>> model = loftq.get_peft_model(model, bits=2, rank=16)
        >>> model.print_trainable_parameters()
    """
    policy = make_policy(**options)
    with tqdm(desc="LoftQ", unit=" matrices", disable=not progress) as bar:
        wrapped, _ = convert(model, policy, workers or os.cpu_count() or 1, lambda *_: bar.update())
    return wrapped


def quantize(model: str | Path, output: str | Path, *, format: str = "loftq", **options: Any) -> dict[str, Any]:
    """What ``loftq quantize`` does: stream a checkpoint from disk into a LoftQ checkpoint; its manifest.

    Args:
        model: a local directory or a hub id.
        output: the directory to be made.
        format: ``loftq``, ``dense`` or ``bnb``.
        options: fields of :class:`Policy`, ``steps``, ``order``, ``svd``, ``seed``, ``scales``, ``workers``,
            ``device``, ``overwrite``, ``max_shard_bytes``, ``curves`` (a :class:`pathlib.Path`).
    """
    names = ("workers", "device", "overwrite", "max_shard_bytes", "curves")
    own = {k: options.pop(k) for k in names if k in options}
    return _quantize(str(model), Path(output), QuantizeOptions(policy=make_policy(**options), format=format, **own))


def make_policy(**options: Any) -> Policy:
    """A :class:`Policy` from keywords; numbers may be given as numbers, and the solver's fields beside the others."""
    solver = {k: options.pop(k) for k in ("steps", "order", "svd", "seed", "scales") if k in options}
    for key in ("bits", "rank", "budget", "budget_ranks"):
        if key in options:
            options[key] = str(options[key])
    return Policy(solve=SolveSpec(**solver), **options)
