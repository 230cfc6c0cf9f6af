"""Squared gradients of the loss for every weight: their means over the rows and the columns of each matrix.

LQ-LoRA (arXiv 2311.12023) weighs the error of a weight by ``F = E[(dL/dw)²]``. With one factor for each column and one
for each row, that is a metric with a closed form. Squares are of the gradients of single samples, so a batch is one
row. The whole model is in memory, and one gradient at a time.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loftq.architecture import skeleton
from loftq.architecture.experts import FIRST, stack_kind
from loftq.architecture.kinds import kind_of
from loftq.calibration.blocks import accepted
from loftq.calibration.collect import Batch, Begin, Row, batches, matrices, stacks
from loftq.errors import UsageError
from loftq.formats.stack_statistics import PARTS, StackGroup
from loftq.formats.statistics import Group
from loftq.numerics import Metric, Moments, oriented

NOT_FINITE = "its gradients are not finite"
MASKED_EVERY = 7  # about 15 % of the tokens, as BERT was trained


def collect_fisher(
    model: nn.Module, rows: Sequence[Row], mask_token: int | None = None, begin: Begin | None = None
) -> list[Group | StackGroup]:
    """The groups of all matrices, and stacks of experts, that have a gradient, one for each.

    Args:
        model: a language model, in memory.
        mask_token: of the tokenizer, for a masked language model.
        begin: told the number of rows.

    Raises: UsageError for a model without the loss of a language model; NumericalError for gradients that are not
        finite.
    """
    label = labeler(model, mask_token)
    made = batches(rows, model, tokens=1)
    advance = begin(len(made)) if begin else lambda: None
    head = skeleton.output_head(model)
    sums = {n: (_Squares(), _Squares()) for n, m in matrices(model).items() if m is not head}
    experts = [f"{owner}.{name}" for owner, names in stacks(model).items() for name in names]
    sums |= {name: (_Squares(), _Squares()) for name in experts}
    taken = frozenset(accepted(model))
    with _gradients(model, sums) as choose:
        for batch in made:
            choose(batch.held)
            inputs = {k: v for k, v in label(batch).items() if k in taken}
            model(**inputs).loss.backward()
            advance()
    tokens = [sum(b.inputs["input_ids"].numel() for b in made if b.held == held) for held in (False, True)]
    make = {name: _stack_group if name in experts else _group for name in sums}
    return [group for name, pair in sums.items() if (group := make[name](name, *pair, *tokens))]


def labeler(model: nn.Module, mask_token: int | None) -> Callable[[Batch], dict[str, Tensor]]:
    """What turns a batch into the arguments of a forward with a loss. UsageError for a class that has none."""
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    if name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return lambda batch: {**batch.inputs, "labels": batch.inputs["input_ids"]}
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return lambda batch: {**batch.inputs, "labels": batch.inputs["input_ids"], "use_cache": False}  # type: ignore[dict-item]
    if name not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        raise UsageError(
            f"fisher needs the loss of a language model, and {name} has none; take full or diagonal, or a checkpoint "
            "with its language-modelling head"
        )
    if mask_token is None:
        raise UsageError(f"fisher masks tokens for {name}, and the tokenizer has no mask token; take full or diagonal")
    return lambda batch: _masked(batch.inputs, mask_token)


def _masked(inputs: dict[str, Tensor], mask_token: int) -> dict[str, Tensor]:
    """Every seventh token hidden, and to be told."""
    ids = inputs["input_ids"]
    length = ids.shape[1]
    hidden = torch.arange(length, device=ids.device) % MASKED_EVERY == min(MASKED_EVERY, length) // 2
    labels = torch.where(hidden, ids, torch.full_like(ids, -100))
    return {**inputs, "input_ids": torch.where(hidden, torch.full_like(ids, mask_token), ids), "labels": labels}


class _Squares:
    """Sums of the squared gradients of matrices ``(out, in)``, one or a stack: over rows, ``(n, in)``, over columns.

    Attributes:
        reached: of each matrix, how many gradients were not zero, as those of an expert without tokens are.
    """

    def __init__(self) -> None:
        self.columns = self.rows = self.reached = torch.zeros(())
        self.samples = 0

    def add(self, gradients: Iterable[Tensor]) -> None:
        squares = (gradient.double().square() for gradient in gradients)
        columns, rows = zip(*((square.mean(0).cpu(), square.mean(1).cpu()) for square in squares), strict=True)
        self.columns, self.rows = self.columns + torch.stack(columns), self.rows + torch.stack(rows)
        self.reached = self.reached + torch.stack([one.any() for one in columns])
        self.samples += 1

    def metric(self) -> Metric:
        """Of one matrix, the means over all samples."""
        return Metric((self.columns[0] / self.samples).float(), (self.rows[0] / self.samples).float())

    def means(self, inside: bool) -> dict[str, Tensor]:
        """Of each of a stack, over the samples that reached it, and of all together."""
        counts = self.reached.clamp(min=1)[:, None]
        mean = self.columns.sum(0) / self.reached.sum()
        mean = mean.mean().reshape(1) if inside else mean
        return {"columns": (self.columns / counts).float(), "mean": mean.float(), "rows": (self.rows / counts).float()}


@contextlib.contextmanager
def _gradients(model: nn.Module, sums: dict[str, tuple[_Squares, _Squares]]) -> Iterator[Callable[[bool], None]]:
    """Gradients of the matrices alone, each taken in and forgotten as soon as it is there."""
    part = False
    wanted = {p: p.requires_grad for p in model.parameters()}
    training = model.training

    def choose(held: bool) -> None:
        nonlocal part
        part = held

    def hook(pair: tuple[_Squares, _Squares], kind: str) -> Callable[[Tensor], None]:
        def take(parameter: Any) -> None:
            gradients = parameter.grad if parameter.ndim == 3 else parameter.grad[None]
            pair[part].add(oriented(kind, gradient) for gradient in gradients)
            parameter.grad = None

        return take

    with contextlib.ExitStack() as left:
        left.callback(model.train, training)
        model.eval()
        for parameter, before in wanted.items():
            left.callback(parameter.requires_grad_, before)
            parameter.requires_grad_(False)
        for name, pair in sums.items():
            weight, kind = _weight(model, name)
            weight.requires_grad_(True)
            left.callback(weight.register_post_accumulate_grad_hook(hook(pair, kind)).remove)
        left.enter_context(torch.enable_grad())
        yield choose


def _weight(model: nn.Module, name: str) -> tuple[Any, str]:
    """The weight of a module, or the stack of experts of that name, and its kind."""
    owner, _, leaf = name.rpartition(".")
    stack = model.get_submodule(owner)._parameters.get(leaf)
    if stack is not None:
        return stack, stack_kind(model.get_submodule(owner), name, stack)[0]
    module: Any = model.get_submodule(name)
    return module.weight, kind_of(module)


def _stack_group(stack: str, fit: _Squares, held: _Squares, *tokens: int) -> StackGroup | None:
    """Tokens of an expert are those of the samples that reached it."""
    parts: dict[str, Tensor] = {}
    counts: dict[str, list[int]] = {}
    for part, squares, all_tokens in zip(PARTS, (fit, held), tokens, strict=True):
        reached = squares.reached.tolist() if squares.samples else []
        counts[part] = [round(all_tokens * n / squares.samples) for n in reached]
        if any(counts[part]):
            parts |= {f"{part}.{k}": v for k, v in squares.means(not stack.endswith(FIRST)).items()}
    if not any(counts[PARTS[0]]):
        return None
    counts[PARTS[1]] = counts[PARTS[1]] or [0] * len(counts[PARTS[0]])
    return StackGroup(stack, parts, counts).checked(NOT_FINITE)


def _group(name: str, fit: _Squares, held: _Squares, tokens: int, held_tokens: int) -> Group | None:
    if not fit.samples or not fit.columns.any():
        return None
    metric = fit.metric()
    heard = bool(held.samples and held.columns.any())
    moments = Moments(metric, held.metric() if heard else metric, tokens)
    return Group((name,), moments, held_tokens if heard else 0).checked(NOT_FINITE)
