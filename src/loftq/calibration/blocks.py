"""A model run block by block: its own forward, with the blocks' outputs recorded and played back.

A *block* is an item of an outermost ModuleList (a layer of an encoder or decoder), an *event* a call of one; events
are counted in the order of calls. To treat event t of a batch, the model's own forward is run, so that it makes masks,
position biases and whatever else a block is given. Calls before t return what was recorded, call t really runs, its
output is recorded, and the forward is left. So one block at a time is needed, and encoder and decoder, a block that is
called many times, or one that hands on more than hidden states need nothing of their own.
"""

import contextlib
import copy
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.architecture import skeleton
from loftq.architecture.configuration import classes, read_config
from loftq.architecture.loading import load_config, load_weights
from loftq.errors import UsageError

DEQUANTIZED = ("fp8", "mxfp4")  # methods of published models that transformers dequantizes as it loads them
Output = Any  # of a block: a tensor, or tensors in tuples, lists and mappings


@dataclass(frozen=True)
class Call:
    """A block being called: which event this is, and how to run it."""

    event: int
    block: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    run: Callable[[], Output]


class Stopped(Exception):
    """Ends a forward whose purpose is fulfilled."""


class Blocks:
    """The blocks of a model, whose calls go through :attr:`handler` while it is entered.

    Attributes:
        names: of all blocks.
        handler: what a call returns; by default, what the block computes.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._model, self.names = model, tuple(blocks_of(model))
        self._modules = {name: modules[name] for name in self.names}
        self._accepted = accepted(model)
        self._events = 0
        self.handler: Callable[[Call], Output] = lambda call: call.run()

    def forward(self, inputs: Mapping[str, Tensor], handler: Callable[[Call], Output] | None = None) -> bool:
        """The model's forward up to its output head; whether it came to its end or to the head."""
        self._events = 0
        self.handler = handler or (lambda call: call.run())
        arguments: dict[str, Any] = {k: v for k, v in inputs.items() if k in self._accepted}
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        try:
            self._model(**arguments)
        except _AtHead:
            return True
        except Stopped:
            return False
        return True

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Put the handler between the model and its blocks. No gradients, no dropout, nothing past the output head."""
        training = self._model.training
        head = skeleton.output_head(self._model)
        with contextlib.ExitStack() as left:
            left.callback(self._model.train, training)
            self._model.eval()
            for name, module in self._modules.items():
                left.callback(_put_back, module, module.__dict__.get("forward"))
                module.forward = functools.partial(self._call, name, module.forward)
            if head is not None:
                left.callback(head.register_forward_pre_hook(_leave_at_head).remove)
            left.enter_context(torch.no_grad())
            yield

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """A block with its weights in memory: where they are on disk, they are read now, and not at every call."""
        found = [(module, hook) for module in self._modules[name].modules() for hook in _offloading(module)]
        for module, hook in found:
            hook.pre_forward(module)
            hook.offload = False
        try:
            yield
        finally:
            for module, hook in found:
                hook.offload = True
                hook.post_forward(module, None)

    def _call(self, name: str, forward: Callable[..., Output], *args: Any, **kwargs: Any) -> Output:
        event, self._events = self._events, self._events + 1
        return self.handler(Call(event, name, (args, kwargs), lambda: forward(*args, **kwargs)))


class Records:
    """Outputs of blocks for one batch: of every stack the last one, or all where the model needs more than that.

    Attributes:
        whole: stacks of which all outputs are kept.
        kept: the outputs, by stack and event.
    """

    def __init__(self, whole: frozenset[str], kept: dict[str, dict[int, Output]] | None = None) -> None:
        self.whole = whole
        self.kept: dict[str, dict[int, Output]] = kept or {}

    def put(self, call: Call, output: Output) -> None:
        stack = stack_of(call.block)
        if stack not in self.whole:
            self.kept[stack] = {}
        self.kept.setdefault(stack, {})[call.event] = output

    def get(self, call: Call) -> Output:
        """A copy of the output of the call, or where only one is kept, of the last call in its stack."""
        kept = self.kept[stack_of(call.block)]
        return copied(kept[call.event] if call.event in kept else next(reversed(kept.values())))


class _AtHead(Exception):
    """The forward has come to the output head, whose logits nobody needs."""


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that read a module's weights before it runs, and drop them again."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)]


def _leave_at_head(*_: Any) -> None:
    raise _AtHead("the output head is reached")


def _put_back(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def blocks_of(model: nn.Module) -> list[str]:
    """Names of all blocks, in the order of the modules."""
    modules = dict(model.named_modules())
    found = (skeleton.stack(modules, name) for name in modules)
    return list(dict.fromkeys(f"{s.name}.{s.index}" for s in found if s))


def stack_of(block: str) -> str:
    """The ModuleList of a block."""
    return block.rpartition(".")[0]


def accepted(model: nn.Module) -> frozenset[str]:
    """Arguments of the model's forward."""
    return frozenset(inspect.signature(type(model).forward).parameters)


def copied(value: Any) -> Any:
    """``value`` with copies of all its tensors: a model may write into what a block returns."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = copied(item)
        return changed
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def load_offloaded(directory: Path, offload: Path, device: str = "cpu") -> nn.Module:
    """The model of a checkpoint with its blocks left on disk: each weight is read when it is used, and dropped again.

    Args:
        offload: an empty directory; a ``.bin`` checkpoint, or weights that transformers fuses, are written there first.
        device: where everything else lies, and where blocks run.

    Raises: InputError for a checkpoint that transformers cannot load.
    """
    places = _places(skeleton.build(directory, quantized=True), device)
    talker = logging.getLogger("accelerate.big_modeling")  # says that parameters are on disk, as they are meant to be
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        return load(directory, device_map=places, offload_folder=str(offload))
    finally:
        talker.setLevel(level)


def load(directory: Path, **options: Any) -> nn.Module:
    """The model of a checkpoint in float32, in its own class. No code that comes with it is run.

    Raises: InputError for one that was published quantized, unless transformers dequantizes it.
    """
    config = load_config(directory)
    published = getattr(config, "quantization_config", None)
    dequantized = False
    if isinstance(published, dict) and published.get("quant_method") in DEQUANTIZED:
        published["dequantize"] = dequantized = True
    values = read_config(directory, quantized=dequantized)
    model_class, _ = classes(directory / "config.json", values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # buffers are no modules, says accelerate
        return load_weights(model_class, directory, config, dtype=torch.float32, **options).eval()


def _places(model: nn.Module, device: str) -> dict[str, str]:
    """``device_map``: every block on disk, everything else on a device, on which accelerate then runs the blocks."""
    blocks = set(blocks_of(model))
    holders = {".".join(b.split(".")[:i]) for b in blocks for i in range(b.count(".") + 1)}
    places = dict.fromkeys(blocks, "disk")
    for holder in holders:
        module = model.get_submodule(holder)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, _ in (*own, *module.named_children()):
            full = f"{holder}.{name}" if holder else name
            if full not in holders and full not in blocks:
                places[full] = device
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no blocks (ModuleLists of layers)")
    return places
