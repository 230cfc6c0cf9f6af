"""An adapter that PEFT wrote, as what it does to the weights: ``W + s · B @ A``, and tensors that replace others.

Only what is exactly that is taken. Options of PEFT that change more are refused by their names, those of a later PEFT
too: every option that is not known here must have the value that switches it off.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.adapters.bases import WEIGHTS
from loftq.architecture import skeleton
from loftq.errors import InputError, UsageError, listed, option, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.picklefile import read_pickle_tensors
from loftq.formats.regular import local_path, shown
from loftq.formats.tensorfile import read_header, read_tensor
from loftq.numerics import SWAPPED, oriented_shape
from loftq.serving.base import Base, Dense
from loftq.spec import scaling

CONFIG = "adapter_config.json"
HELD = 4  # tensors of an adapter's stacks in memory: two stacks of a layer, whose experts are written in turn
FACTORS = re.compile(r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B)")
# Options of PEFT's LoRA that say nothing of the product, or are read here.
KNOWN = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "init_lora_weights", "task_type"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias"),
    *("lora_dropout", "fan_in_fan_out", "base_model_name_or_path", "revision", "inference_mode", "peft_type"),
    *("peft_version", "auto_mapping", "runtime_config", "loftq_config", "eva_config", "ensure_weight_tying"),
    *("megatron_core", "qalora_group_size"),  # of others that are switched off
    "target_parameters",
}
# Initializations that leave the weight under the adapter as it is.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "loftq")


@dataclass(frozen=True)
class Factors:
    """Of one module: ``s · B @ A`` is added to its weight ``(out, in)``, ``s · bias`` to its bias.

    ``a`` and ``b`` are names of the adapter's tensors. Those that are ``swapped`` are the other way round: an
    embedding's table gets ``s · (B @ A).T``. Those of a stack hold the factors of all ``experts``:
    ``A (experts·rank, in)`` expert after expert, ``B (out, rank·experts)`` rank after rank.
    """

    a: str
    b: str
    rank: int
    scaling: float
    swapped: bool = False
    bias: str = ""
    experts: int = 0


@dataclass(frozen=True)
class Adapter:
    """An adapter of a base: what it adds, and what it puts in the place of other tensors.

    Attributes:
        factors: tensor of the base -> what is added to it.
        biases: tensor of the base -> of which factors the bias is added to it.
        replaced: tensor of the base -> the adapter's tensor.
        new: parameter of a head that the base lacks -> the adapter's tensor.
    """

    directory: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    factors: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, Factors] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    _last: dict[str, Tensor] = field(default_factory=dict)  # of stacks, which are asked for expert by expert

    def add_to(self, weight: Tensor, tensor: Dense, expert: int | None = None) -> Tensor:
        """``weight``, oriented as :meth:`Base.read` gives it, with what the adapter does to it, in float32."""
        if tensor.name in self.biases:
            factors = self.biases[tensor.name]
            return weight.float() + factors.scaling * self.read(factors.bias).float()
        if tensor.name not in self.factors:
            return weight
        b, a, s = self.product(tensor.name, expert)
        return weight.float().addmm_(b, a, alpha=s)

    def product(self, name: str, expert: int | None = None) -> tuple[Tensor, Tensor, float]:
        """``B (out, rank)``, ``A (rank, in)`` in float32, and ``s``, for the weight ``name``, or one of its experts."""
        factors = self.factors[name]
        if factors.experts:
            assert expert is not None
            a, b = self.part(factors.a), self.part(factors.b)
            a, b = a.unflatten(0, (factors.experts, -1))[expert], b.unflatten(1, (-1, factors.experts))[..., expert]
        else:
            a, b = self.read(factors.a), self.read(factors.b)
        b, a = (a.T, b.T) if factors.swapped else (b, a)
        return b.float(), a.float(), factors.scaling

    def refuse_more_than_linear(self, form: str, converter: str = "", experts: bool = False) -> None:
        """InputError if it is more than LoRA of linear layers, and of ``experts``, which is all that ``form`` holds."""
        linear = [n for n, factors in self.factors.items() if (experts if factors.experts else not factors.swapped)]
        others = [n for n in self.factors if n not in linear]
        more = [*self.replaced, *self.new, *self.biases, *others]
        if more:
            raise InputError(
                f"{shown(self.directory)}: {listed(more, 3)}: {form} holds LoRA of linear layers only; merge it"
                + (f", and convert that with {converter}" if converter else "")
            )

    def part(self, name: str) -> Tensor:
        """A tensor that is asked for again soon: kept until those of another layer are."""
        if name not in self._last:
            while len(self._last) >= HELD:
                del self._last[next(iter(self._last))]
            self._last[name] = self.read(name)
        return self._last[name]

    @property
    def served_rank(self) -> int:
        """The least rank that vLLM can be told that holds them all."""
        ranks = max((factors.rank for factors in self.factors.values()), default=8)
        return next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512, ranks) if rank >= ranks)

    def digests(self) -> dict[str, str]:
        """SHA-256 of its two files."""
        names = (name for name in (CONFIG, *WEIGHTS) if (self.directory / name).is_file())
        return {name: fsio.sha256_file(self.directory / name).sha256 for name in names}


def place_of(given: Path) -> Path:
    """The directory with the adapter: ``given``, or ``adapter`` in a run of ``loftq train``."""
    given = local_path(option("adapter"), given)
    for place in (given, given / "adapter"):
        if (place / CONFIG).is_file():
            return place
    inner = sorted(path.parent.name for path in given.glob(f"*/{CONFIG}")) if given.is_dir() else []
    which = f"{'one of ' if len(inner) > 1 else ''}{listed(inner)} in it"
    cure = which if inner else "what PEFT's save_pretrained wrote, or a run"
    wrong = f"no adapter: there is no {CONFIG}" if given.exists() else "no such directory"
    raise InputError(f"{shown(given)}: {wrong}; name {cure}")


def open_adapter(directory: Path, base: Base) -> Adapter:
    """Open an adapter for ``base``; weights are read later.

    Raises: InputError for an adapter of another model, or that does more than add ``s · B @ A``.
    """
    config = strict_json.load_object(directory / CONFIG)
    _refuse_others(directory / CONFIG, config)
    adapter = Adapter(directory, config, *_tensors(directory))
    parts: dict[str, dict[str, str]] = {}
    for name in adapter.shapes:
        bare = name.removeprefix("base_model.model.")
        if found := FACTORS.fullmatch(bare):
            parts.setdefault(found["module"], {})[found["part"]] = name
        elif ".lora_" in bare or "token_adapter" in bare:
            raise InputError(f"{shown(directory)}: {quoted(name)}: more than LoRA's A and B; only plain LoRA is taken")
        elif ".base_layer." not in bare or not _is_of_base(adapter, base, bare.replace(".base_layer.", "."), name):
            _place_whole(adapter, base, bare.replace(".base_layer.", "."), name)
    for module, held in parts.items():
        _place_factors(adapter, base, module, held)
    if not parts and not adapter.replaced and not adapter.new:
        raise InputError(f"{shown(directory)}: an adapter without tensors; save it again")
    return adapter


def _refuse_others(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{shown(path)}: peft_type is {quoted(config.get('peft_type'))}; only LORA can be merged")
    more = sorted(name for name, value in config.items() if value and name not in KNOWN)
    if more:
        raise InputError(
            f"{shown(path)}: {listed(more, 3)}: the adapter is more than s · B @ A; only plain LoRA is taken. "
            "PEFT's merge_and_unload() merges it, if it can be merged at all"
        )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise InputError(
            f"{shown(path)}: init_lora_weights {quoted(config['init_lora_weights'])} changed the weights under the "
            "adapter; convert it first, with path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )


def _tensors(directory: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes by name, and how a tensor is read."""
    plain, pickled = (directory / name for name in WEIGHTS)
    if plain.is_file() or not pickled.is_file():
        file = read_header(plain)
        shapes = {name: info.shape for name, info in file.tensors.items()}
        return shapes, lambda name: read_tensor(file.tensors[name], file.stamp)
    tensors = read_pickle_tensors(pickled)
    return {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__


def _is_of_base(adapter: Adapter, base: Base, parameter: str, name: str) -> bool:
    """Whether a tensor is what the base has too: PEFT writes the whole of a table that it adapts, packed or not.

    Raises: InputError for the codes, or the scales, of another base.
    """
    module, _, leaf = parameter.rpartition(".")
    found = base.parameter(f"{module}.weight")
    if found is None or found.matrix is None:
        return False
    stored = f"{found.matrix.name.removesuffix('weight')}{leaf}"
    if all(e.name != stored or e.shape != adapter.shapes[name] for e in base.layout.entries(found.matrix)):
        return False
    theirs, ours = adapter.read(name), base.checkpoint.read(stored)
    if torch.equal(theirs.float(), ours.float()):
        return True
    if leaf == "weight" and ours.is_floating_point():
        return False
    raise InputError(f"{shown(adapter.directory)}: {quoted(name)} is not what the base has; is it of another model?")


def _place_whole(adapter: Adapter, base: Base, parameter: str, name: str) -> None:
    """A tensor that was trained whole."""
    found = base.parameter(parameter)
    if found is None:
        if held := base.tied_to(parameter):
            if adapter.config.get("ensure_weight_tying"):
                return  # the same as what replaces the tensor that it is tied to
            raise _tied(adapter, parameter, held)
        adapter.new[parameter] = name
        return
    _refuse_tied(adapter, found)
    if adapter.shapes[name] != found.shape:
        raise InputError(
            f"{shown(adapter.directory)}: {quoted(parameter)} has shape {adapter.shapes[name]}, in the base "
            f"{found.shape}: its vocabulary was resized, or it is of another model; merge it with PEFT, on the "
            "model that was resized alike"
        )
    adapter.replaced[found.name] = name


def _place_factors(adapter: Adapter, base: Base, module: str, held: dict[str, str]) -> None:
    where = f"{shown(adapter.directory)}: {quoted(module)}"
    embedding = "embedding_A" in held
    ours, theirs = (held.get(f"embedding_{x}" if embedding else f"{x}.weight", "") for x in "AB")
    stack = _stack_under(adapter, base, module)
    found = base.parameter(stack or f"{module}.weight")
    if found is None:
        if adapter.config.get("ensure_weight_tying") and base.tied_to(f"{module}.weight"):
            return
        if tied := base.tied_to(f"{module}.weight"):
            raise _tied(adapter, module, tied)
        raise InputError(f"{where}: the base has no such weight; is the adapter of another model?")
    if found.kind not in ("linear", "conv1d", "embedding") and not (stack and found.experts):
        what = "a parameter" if found.kind in ("", "parameter", "other") else found.kind
        told = "only layers and stacks of experts are taken; merge it with PEFT: merge_and_unload()"
        raise InputError(f"{where}: LoRA on {what} of the base; {told}")
    _refuse_tied(adapter, found)
    a, b = (adapter.shapes.get(name, ()) for name in (ours, theirs))
    rows, columns = oriented_shape(found.kind, found.shape[-2:])
    many, swapped = max(1, found.experts), found.kind in SWAPPED
    rank = a[0] // many if a else 0
    inner, outer = (rows, columns) if swapped else (columns, rows)
    if (a, b) != ((many * rank, inner), (outer, many * rank)):
        raise InputError(f"{where}: A {a} and B {b} do not fit a weight of {rows}x{columns}; of another model?")
    s = _scaling(adapter, stack or module, rank)
    factors = Factors(ours, theirs, rank, s, swapped, held.get("B.bias", ""), found.experts)
    adapter.factors[found.name] = factors
    if factors.bias:
        bias = base.parameter(f"{module}.bias")
        if bias is None:
            raise InputError(f"{where}: lora_bias, and the layer has no bias to add it to")
        adapter.biases[bias.name] = factors


def _stack_under(adapter: Adapter, base: Base, module: str) -> str:
    """The Parameter that a layer of PEFT is of, by the name of the module that it wraps; empty for an ordinary layer.

    PEFT puts one layer around a module for each Parameter that is targeted, in the order of the Parameters.
    """
    targets = adapter.config.get("target_parameters") or ()
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    depth = module.removeprefix(owner).count(".base_layer")
    for spelled in skeleton.spellings(owner, str(base.model.base_model_prefix)) if targets else ():
        try:
            names = [f"{spelled}.{name}" for name in base.model.get_submodule(spelled)._parameters]
        except AttributeError:
            continue
        wrapped = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
        if depth < len(wrapped):
            return wrapped[-1 - depth]
    return ""


def _scaling(adapter: Adapter, module: str, rank: int) -> float:
    """By PEFT's rule: the first pattern that the module's name ends with."""
    from peft.utils.other import get_pattern_key

    config = adapter.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    wanted = ranks.get(get_pattern_key(list(ranks), module), config.get("r"))
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha"))
    if wanted != rank or not isinstance(alpha, (int, float)):
        told = f"rank {quoted(wanted)} and alpha {quoted(alpha)} for {quoted(module)}, whose A has rank {rank}"
        raise InputError(f"{shown(adapter.directory / CONFIG)}: {told}; the two files are not of one adapter")
    try:
        return scaling(alpha, rank, bool(config.get("use_rslora")))
    except UsageError as e:
        raise InputError(f"{shown(adapter.directory / CONFIG)}: {e}") from e


def _refuse_tied(adapter: Adapter, found: Dense) -> None:
    if found.role.tied and not adapter.config.get("ensure_weight_tying"):
        raise _tied(adapter, found.runtime, listed(found.role.tied))


def _tied(adapter: Adapter, name: str, other: str) -> InputError:
    return InputError(
        f"{shown(adapter.directory)}: {quoted(name)} is tied to {quoted(other)}, and the adapter is of one of the two: "
        "merged, it would change both; keep the adapter apart, or train with ensure_weight_tying=True"
    )


def own_files(adapter: Adapter) -> Iterator[Path]:
    """The files of the tokenizer beside the adapter, if there is one: training may have changed the chat template."""
    if (adapter.directory / "tokenizer_config.json").is_file():
        for path in sorted(adapter.directory.iterdir()):
            if path.is_file() and path.name.startswith(TOKENIZER):
                yield path


TOKENIZER = (
    *("tokenizer", "vocab", "merges", "tekken", "spiece", "spm", "sentencepiece"),
    *("special_tokens_map", "added_tokens", "chat_template"),
)
