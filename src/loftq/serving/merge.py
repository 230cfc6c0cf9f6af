"""``loftq merge``: a plain dense checkpoint of the quantized base and its adapter, one matrix in memory at a time.

The adapter is added to the weights that it was trained on, the dequantized ones, and not to the original's: it makes
up for their error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq.adapters.origins import refuse_other
from loftq.checkpoint.assemble import ADAPTER
from loftq.checkpoint.produce import Files, produce
from loftq.errors import InputError, option
from loftq.formats import fsio, strict_json
from loftq.formats.belongings import licence
from loftq.formats.config import MANIFEST
from loftq.formats.regular import local_path, shown
from loftq.formats.tensorfile import DTYPES, Entry
from loftq.numerics import oriented
from loftq.options import check_fields, check_whole, default
from loftq.report.card import merged_card
from loftq.serving import heads
from loftq.serving.adapter import CONFIG, Adapter, open_adapter, place_of
from loftq.serving.base import Base, Dense, narrowed, open_base
from loftq.serving.options import Merging
from loftq.serving.original import as_original
from loftq.serving.output import LARGEST_FILE, small_files, write_shards
from loftq.spec import STORED
from loftq.version import __version__

NO_ADAPTER = "none"
Begin = Callable[[int], Callable[[], object]]  # called once with the number of tensors; returns what each one calls


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What to make: options of :class:`Merging`, and the size of the largest file."""

    adapter: str | None = default("adapter", Merging)
    dtype: str = default("dtype", Merging)
    max_shard_bytes: int = LARGEST_FILE
    overwrite: bool = default("overwrite", Merging)

    def __post_init__(self) -> None:
        check_fields(self, option, Merging)
        check_whole(option("max_shard_bytes"), self.max_shard_bytes, 1)


def open_both(directory: Path, adapter: str | None) -> tuple[Base, Adapter | None]:
    """A base and the adapter that is asked for, which must be of it."""
    given = local_path("the directory", directory)
    if not (given / MANIFEST).is_file() and any((place / CONFIG).is_file() for place in (given, given / "adapter")):
        cure = f"name the quantized directory that it was trained on, and {option('adapter', str(given))}"
        raise InputError(f"{shown(given)}: an adapter; {cure}")
    base = open_base(given)
    if adapter == NO_ADAPTER:
        return base, None
    if adapter is None:
        return base, open_adapter(base.directory / ADAPTER, base)
    place = place_of(Path(adapter))
    refuse_other(place, base.directory)
    return base, open_adapter(place, base)


def sources_of(base: Base, adapter: Adapter | None) -> tuple[list[Path], dict[str, Any]]:
    """The directories that an export reads, and what of its identity follows from them."""
    if adapter is None:
        return [base.directory], {"base": base.identity, "adapter": None}
    inside = adapter.directory.resolve().parent == base.directory.resolve()
    places = [base.directory] if inside else [base.directory, adapter.directory]
    return places, {"base": base.identity, "adapter": adapter.digests()}


def merge(directory: Path, output: Path, options: MergeOptions, begin: Begin) -> dict[str, Any]:
    """Merge into the directory ``output``; what its ``loftq_export.json`` says.

    Raises: InputError for a directory that is not finished, an adapter that is not of it, or a value that does not fit
        the dtype; ConflictError if ``output`` is taken.
    """
    base, adapter = open_both(directory, options.adapter)
    head = heads.find(base, adapter)
    places, read = sources_of(base, adapter)
    identity = {
        **read,
        "options": {"verb": "merge", "dtype": options.dtype, "max_shard_bytes": options.max_shard_bytes},
        "loftq": __version__,
    }

    def fill(place: Path) -> Files:
        made = _write_weights(place, base, adapter, options, begin)
        config = {**base.config, **head}
        config.pop("quantization_config", None)
        made["config.json"] = fsio.write_json(place / "config.json", strict_json.tagged(_typed(config, options.dtype)))
        made |= small_files(place, base, adapter)
        card = merged_card(base.manifest, identity, licence(base.directory / "README.md"))
        made["README.md"] = fsio.write_atomic(place / "README.md", [card.encode()])
        return made

    return produce(output, identity, places, options.overwrite, fill)


def _write_weights(place: Path, base: Base, adapter: Adapter | None, options: MergeOptions, begin: Begin) -> Files:
    """All tensors, by the names of the original, and those of a head that it lacks."""
    wide = STORED[options.dtype]
    headers, read_original = as_original(base, lambda tensor, expert: _merged(tensor, base, adapter, expert))
    entries = [Entry(name, _dtype(dtype, shape, wide), shape) for name, (dtype, shape) in headers.items()]
    new = {} if adapter is None else adapter.new
    entries += [Entry(name, wide, adapter.shapes[held]) for name, held in new.items()]  # type: ignore[union-attr]
    advance = begin(len(entries))

    def read(entry: Entry) -> Iterator[Tensor]:
        name = entry.name
        for value in [adapter.read(new[name])] if name in new else read_original(name):  # type: ignore[union-attr]
            fits = value.is_floating_point() and entry.dtype in FLOATS
            yield narrowed(value, DTYPES[entry.dtype], name) if fits else value
        advance()

    return write_shards(place, entries, read, options.max_shard_bytes)


FLOATS = (*STORED.values(), "F64")


def _dtype(dtype: str, shape: tuple[int, ...], wide: str) -> str:
    """Matrices in the dtype that is asked for; norms, biases and what is no floating-point number as they are."""
    return wide if dtype in FLOATS and len(shape) > 1 else dtype


def _merged(tensor: Dense, base: Base, adapter: Adapter | None, expert: int | None) -> Tensor:
    """A tensor, or a matrix of a stack, as the model has it, with what the adapter does to it.

    What replaces it may have LoRA too: PEFT writes tables and heads that it adapts beside the factors.
    """
    held = None if adapter is None else adapter.replaced.get(tensor.name)
    if adapter is None or held is None:
        value = base.read(tensor, expert)
    else:
        value = oriented(tensor.kind, adapter.read(held) if expert is None else adapter.part(held)[expert])
    return oriented(tensor.kind, value if adapter is None else adapter.add_to(value, tensor, expert))


def _typed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration, and those nested in it, that says what the matrices are."""
    typed = {name: _typed(value, dtype) if isinstance(value, dict) else value for name, value in config.items()}
    typed.pop("torch_dtype", None)
    return {**typed, "dtype": dtype} if {"dtype", "torch_dtype", "architectures"} & config.keys() else typed
