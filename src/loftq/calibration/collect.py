"""Second moments of the inputs of every matrix, collected block by block.

``H = E[x xᵀ]`` over all tokens, or its diagonal: products in float32, sums in float64. There is no padding: rows of one
length make a batch. Matrices that get the very same input share one sum.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loftq.architecture import skeleton
from loftq.architecture.experts import FIRST, packable_stacks
from loftq.calibration.blocks import Blocks, Call, Output, Records, Stopped, stack_of, tensors_in
from loftq.calibration.processes import Processes
from loftq.errors import UsageError, quoted
from loftq.formats.stack_statistics import MOST, PARTS, StackGroup
from loftq.formats.statistics import Group
from loftq.nn.experts import watched
from loftq.numerics import Metric, Moments

BATCH_TOKENS = 4096  # so many that reading a block's weights costs little beside its products
HELD_EVERY = 4  # every fourth row is held out
NOT_FINITE = "its inputs are not finite; try a model in float32"

Row = Mapping[str, Sequence[int]]  # input_ids, and whatever else of its length the tokenizer gives
Begin = Callable[[int], Callable[[], object]]  # called with the number of steps; returns what each is told to


@dataclass(frozen=True)
class Batch:
    """Rows of one length, all of them fitted or all held out."""

    inputs: dict[str, Tensor]
    held: bool

    @property
    def rows(self) -> int:
        return len(self.inputs["input_ids"])


def batches(rows: Sequence[Row], model: nn.Module, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """``rows`` as the model takes them, without padding; every fourth is held out.

    Args:
        tokens: of a batch at most, or one row.
    """
    alike: dict[tuple[bool, int], list[Row]] = {}
    for i, row in enumerate(rows):
        alike.setdefault((i % HELD_EVERY == HELD_EVERY - 1, len(row["input_ids"])), []).append(row)
    made = []
    for (held, length), mine in sorted(alike.items(), key=lambda item: item[0]):
        size = max(1, tokens // length)
        made += [Batch(_tensors(mine[i : i + size], model), held) for i in range(0, len(mine), size)]
    return made


def _tensors(rows: Sequence[Row], model: Any) -> dict[str, Tensor]:
    device = model.get_input_embeddings().weight.device
    made = {name: torch.tensor([list(row[name]) for row in rows], device=device) for name in rows[0]}
    ids = made["input_ids"]
    made["attention_mask"] = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)  # classes with a head have it
        made["decoder_input_ids"] = prepare(ids) if prepare else _shifted(ids, model.config)
    return made


def _shifted(ids: Tensor, config: Any) -> Tensor:
    """What a decoder reads that is to write ``ids``."""
    starts = (config.decoder_start_token_id, config.bos_token_id, config.pad_token_id, 0)
    start = next(s for s in starts if s is not None)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


class Sums:
    """``Σ x xᵀ``, or ``Σ x²``, over tokens.

    Attributes:
        total: the sum, float64; without axes while there is nothing in it.
        tokens: how many it is of.
    """

    def __init__(self, kind: str) -> None:
        self._full, self.total, self.tokens = kind == "full", torch.zeros((), dtype=torch.float64), 0

    def add_up(self, processes: Processes) -> None:
        """Make it the sum over the tokens of all processes."""
        self.total = processes.sum(self.total)
        self.tokens = int(processes.sum(torch.tensor(self.tokens)))

    def add(self, x: Tensor, rows: int) -> None:
        """Add an input ``(…, in)`` of a batch of ``rows``.

        One that all rows have in common, such as relative positions, counts for each of them: sums then do not
        depend on how rows are put into batches.
        """
        times = rows if x.ndim > 2 and len(x) == 1 else 1
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if not self.tokens:
            shape = (flat.shape[1],) * (2 if self._full else 1)
            self.total = torch.zeros(shape, dtype=torch.float64, device=x.device)
        product = flat.T @ flat if self._full else flat.double().square().sum(0)
        self.total.add_(product, alpha=times)
        self.tokens += times * len(flat)

    def metric(self) -> Metric:
        """The mean, float32. The sum is given up for it."""
        return Metric(self.total.div_(self.tokens).float().cpu())


@dataclass
class _Shared:
    """Matrices with the same input; the first of them has the hook.

    Attributes:
        last: the event after which nothing more comes; None for matrices outside of blocks.
    """

    modules: list[str]
    last: int | None
    sums: tuple[Sums, Sums]

    @property
    def begun(self) -> bool:
        """Whether there are tokens in it."""
        return any(part.tokens for part in self.sums)

    def add_up(self, processes: Processes) -> None:
        for part in self.sums:
            part.add_up(processes)

    def groups(self) -> list[Group]:
        """What was collected; nothing without a token to fit."""
        fit, held = self.sums
        if not fit.tokens:
            return []
        metric = fit.metric()
        moments = Moments(metric, held.metric() if held.tokens else metric, fit.tokens)
        return [Group(tuple(self.modules), moments, held.tokens).checked(NOT_FINITE)]


class RoutedSums:
    """``Σ x xᵀ``, or ``Σ x²``, for every expert of a stack, over the tokens that are routed to it.

    Whole ones of all experts are kept as long as these are not more numbers than :data:`MOST`; beyond that their
    diagonals, and the whole sum of all experts together.

    Args:
        inside: whether the features are each expert's own, so that those of two experts are not added up.
    """

    def __init__(self, kind: str, experts: int, inside: bool) -> None:
        self.tokens, self._kind, self._inside = [0] * experts, kind, inside
        self._sums = self._mean = torch.zeros((), dtype=torch.float64)

    def add_up(self, processes: Processes) -> None:
        """Make them the sums over the tokens of all processes."""
        self._sums, self._mean = processes.sum(self._sums), processes.sum(self._mean)
        self.tokens = processes.sum(torch.tensor(self.tokens)).tolist()

    def add(self, x: Tensor, ends: Tensor) -> None:
        """Add inputs ``(tokens, in)`` sorted by expert.

        Args:
            ends: for every expert, the number of the row after its last.
        """
        flat, count, n = x.detach().float(), len(self.tokens), x.shape[1]
        whole = self._kind == "full" and count * n * n <= MOST
        if not sum(self.tokens):
            self._sums = torch.zeros(count, n, *([n] if whole else []), dtype=torch.float64, device=x.device)
            if self._kind == "full" and not whole and not self._inside:
                self._mean = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        start = 0
        for e, end in enumerate(ends.tolist()):
            if end > start:
                part = flat[start:end]
                self._sums[e].add_(part.T @ part if whole else part.double().square().sum(0))
                if self._mean.ndim:
                    self._mean.add_(part.T @ part)
                self.tokens[e] += end - start
            start = end

    def means(self) -> dict[str, Tensor]:
        """Of every expert, and of all together, float32. The sums are given up for them."""
        total = sum(self.tokens)
        together = self._mean if self._mean.ndim else self._sums.sum(0)
        if self._inside:
            diagonal = together.diagonal() if together.ndim == 2 else together
            together = diagonal.mean().reshape(1)
        counts = torch.tensor(self.tokens, dtype=torch.float64, device=self._sums.device).clamp(min=1)
        self._sums.div_(counts.reshape(-1, *[1] * (self._sums.ndim - 1)))
        return {"columns": self._sums.float().cpu(), "mean": (together / total).float().cpu()}


@dataclass
class _Routed:
    """A module of experts, and the sums of its stacks."""

    owner: str
    stacks: dict[str, tuple[RoutedSums, RoutedSums]]
    last: int | None

    @property
    def begun(self) -> bool:
        """Whether there are tokens in it."""
        return any(sum(part.tokens) for both in self.stacks.values() for part in both)

    def add_up(self, processes: Processes) -> None:
        for both in self.stacks.values():
            for part in both:
                part.add_up(processes)

    def groups(self) -> list[StackGroup]:
        """What was collected; nothing of a stack without a token to fit."""
        found = []
        for name, both in self.stacks.items():
            parts, tokens = {}, {}
            for part, sums in zip(PARTS, both, strict=True):
                tokens[part] = sums.tokens
                if sum(sums.tokens):
                    parts |= {f"{part}.{what}": tensor for what, tensor in sums.means().items()}
            if sum(tokens[PARTS[0]]):
                found.append(StackGroup(f"{self.owner}.{name}", parts, tokens).checked(NOT_FINITE))
        return found


@dataclass
class _Survey:
    """What one row told: the block of every event, what every matrix was given when, and what every block was given."""

    events: list[str] = field(default_factory=list)
    seen: dict[str, list[tuple]] = field(default_factory=dict)  # matrix -> (event, which tensor) of every call
    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose inputs count, by name: products, not lookups."""
    found = {name: model.get_submodule(name) for name in skeleton.adaptable(model)}
    return {name: module for name, module in found.items() if not isinstance(module, nn.Embedding)}


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Modules of experts -> their stacks."""
    found: dict[str, list[str]] = {}
    for stack in sorted(packable_stacks(model)):
        owner, _, name = stack.rpartition(".")
        found.setdefault(owner, []).append(name)
    return found


@dataclass(frozen=True)
class Step:
    """What is there after an event.

    Attributes:
        event: its number; None for what lies outside of blocks.
        groups: those that were given their last input.
        states: what every batch's :class:`Records` keep, from which collecting can go on; None where sums go on too.
    """

    event: int | None
    groups: list[Group | StackGroup]
    states: list[dict[str, dict[int, Output]]] | None = None


def collect(
    model: nn.Module, rows: Sequence[Row], kind: str, begin: Begin | None = None, tokens: int = BATCH_TOKENS
) -> Iterator[list[Group | StackGroup]]:
    """The groups of block after block, as :func:`steps` has them."""
    return (step.groups for step in steps(model, rows, kind, begin, tokens))


def steps(
    model: nn.Module,
    rows: Sequence[Row],
    kind: str,
    begin: Begin | None = None,
    tokens: int = BATCH_TOKENS,
    *,
    after: Step | None = None,
    processes: Processes | None = None,
) -> Iterator[Step]:
    """Block after block, and at last what lies outside of blocks; a block's groups are done before the next begins.

    Args:
        model: of transformers, its blocks in memory or on disk. A block's weights are read once for all batches.
        kind: ``full`` or ``diagonal``.
        begin: told the number of steps, a step being a block for a batch.
        after: a step of an earlier call, with states, to go on from.
        processes: that share the batches; all of them get the groups of all batches.

    Raises: UsageError for a model that cannot be run block by block; NumericalError for inputs that are not finite.
    """
    made = batches(rows, model, tokens)
    made = made if processes is None else processes.share(made)
    blocks = Blocks(model)
    with blocks.entered():
        survey, whole = _surveyed(model, blocks, batches(rows[:1], model)[0])
        events, first = range(len(survey.events)), 0
        advance = begin((len(events) + 1) * len(made)) if begin else lambda: None
        shared, experts = _groups(model, survey, kind), _experts(model, survey, kind)
        records = [Records(whole) for _ in made]
        if after is not None and after.event is not None and after.states is not None:
            first, records = after.event + 1, [Records(whole, kept) for kept in after.states]
            for event in events[:first]:
                _finished(shared, event)
                _finished(experts, event)
                for _ in made:
                    advance()
        for event in (*events[first:], None):
            with contextlib.nullcontext() if event is None else blocks.held(survey.events[event]):
                for batch, kept in zip(made, records, strict=True):
                    _run(model, blocks, shared, experts, batch, kept, event)
                    advance()
            if processes is not None:
                for one in (*shared, *experts):
                    if one.last == event:
                        one.add_up(processes)
            groups = [*_finished(shared, event), *_finished(experts, event)]
            begun = any(one.begun for one in (*shared, *experts))
            yield Step(event, groups, None if begun else [kept.kept for kept in records])


def _finished(shared: list[Any], event: int | None) -> list[Any]:
    """Groups of those that got their last input in ``event``; they leave ``shared``, and their sums the memory."""
    done = [s for s in shared if s.last == event]
    shared[:] = [s for s in shared if s.last != event]
    groups = []
    while done:
        groups += done.pop(0).groups()
    return groups


def _run(
    model: nn.Module,
    blocks: Blocks,
    shared: list[_Shared],
    experts: list[_Routed],
    batch: Batch,
    records: Records,
    event: int | None,
) -> None:
    """Run one event for a batch; or, after all events, what lies outside of blocks."""
    running = event is None

    def route(one: _Routed, name: str, x: Tensor, ends: Tensor) -> None:
        if running and name in one.stacks:
            one.stacks[name][batch.held].add(x, ends)

    def take(one: _Shared, module: nn.Module, args: tuple) -> None:
        if running:
            one.sums[batch.held].add(args[0], batch.rows)

    def handle(call: Call) -> Output:
        nonlocal running
        if event is None or call.event < event:
            return records.get(call)
        running = True
        records.put(call, call.run())
        raise Stopped("the event is done")

    hooks = {model.get_submodule(s.modules[0]): functools.partial(take, s) for s in shared}
    with contextlib.ExitStack() as left:
        left.enter_context(_hooked(hooks))
        for one in experts:
            left.enter_context(watched(model.get_submodule(one.owner), functools.partial(route, one)))
        blocks.forward(batch.inputs, handle)


@contextlib.contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    """Functions called with a module and its arguments before it runs; before the forward is left at the head, too."""
    handles = [module.register_forward_pre_hook(hook, prepend=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _surveyed(model: nn.Module, blocks: Blocks, batch: Batch) -> tuple[_Survey, frozenset[str]]:
    """One row through the whole model, and the stacks of which more than the last output is needed."""
    survey = _Survey()
    current: int | None = None
    alive: list[Tensor] = []  # so that no other tensor gets the same address

    def look(name: str, module: nn.Module, args: tuple) -> None:
        x: Tensor = args[0]
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x._version)
        alive.append(x)
        survey.seen.setdefault(name, []).append((current, key))

    def handle(call: Call) -> Output:
        nonlocal current
        survey.events.append(call.block)
        survey.inputs.append([t.clone() for t in tensors_in(call.inputs)])
        current, outside = call.event, len(alive)
        output = call.run()
        current = None
        del alive[outside:]
        survey.outputs.append(output)
        return output

    looked = {**matrices(model), **{owner: model.get_submodule(owner) for owner in stacks(model)}}
    with _hooked({module: functools.partial(look, name) for name, module in looked.items()}):
        blocks.forward(batch.inputs, handle)
    whole: frozenset[str] = frozenset()
    strays = _strays(blocks, batch, survey, whole)
    if strays:
        whole = frozenset(strays)
        if _strays(blocks, batch, survey, whole):
            raise UsageError(
                f"{type(model).__name__} cannot be run block by block: the blocks of {quoted(strays[0])} do not follow "
                "one another"
            )
    return survey, whole


def _strays(blocks: Blocks, batch: Batch, survey: _Survey, whole: frozenset[str]) -> list[str]:
    """Stacks with a block that is given something else when the calls before it return what was recorded."""
    records, found = Records(whole), []
    for event in range(len(survey.events)):

        def handle(call: Call, event: int = event) -> Output:
            if call.event < event:
                return records.get(call)
            given = list(tensors_in(call.inputs))
            same = len(given) == len(survey.inputs[event]) and all(map(_same, given, survey.inputs[event]))
            if not same:
                found.append(stack_of(call.block))
            records.put(call, survey.outputs[event])
            raise Stopped("the next event has a forward of its own")

        blocks.forward(batch.inputs, handle)
    return list(dict.fromkeys(found))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def _groups(model: nn.Module, survey: _Survey, kind: str) -> list[_Shared]:
    """Matrices that were given the same tensors in the same events, and when they are given their last."""
    members: dict[tuple, list[str]] = {}
    for name in matrices(model):
        calls = survey.seen.get(name)
        members.setdefault(tuple(calls) if calls else (name,), []).append(name)
    return [_Shared(names, _last(names[0], survey), (Sums(kind), Sums(kind))) for names in members.values()]


def _experts(model: nn.Module, survey: _Survey, kind: str) -> list[_Routed]:
    """Modules of experts, with sums for their stacks."""
    made = []
    for owner, names in stacks(model).items():
        sums = {}
        for name in names:
            count = len(model.get_parameter(f"{owner}.{name}"))
            fit, held = (RoutedSums(kind, count, name not in FIRST) for _ in PARTS)
            sums[name] = (fit, held)
        made.append(_Routed(owner, sums, _last(owner, survey)))
    return made


def _last(name: str, survey: _Survey) -> int | None:
    """The event in which a module gets its last input; None if that is outside of blocks."""
    events = [event for event, _ in survey.seen.get(name, [])] or _events_of(name, survey.events)
    return None if None in events or not events else max(events)


def _events_of(name: str, events: Iterable[str]) -> list[int]:
    """The events of the block that a matrix lies in: an expert that the surveyed row did not reach."""
    return [event for event, block in enumerate(events) if name.startswith(f"{block}.")]
