"""``loftq export``: a quantized directory in the files of other software, with exactly its codes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.checkpoint.produce import Files, produce
from loftq.errors import InputError, UsageError, listed, option
from loftq.formats import fsio
from loftq.formats.belongings import licence
from loftq.formats.layouts import why_not_served
from loftq.formats.regular import shown
from loftq.options import check_choice, check_fields, default
from loftq.planning.containers import CONTAINERS
from loftq.report.card import exported_card
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base
from loftq.serving.merge import Begin, open_both, sources_of
from loftq.serving.options import Exporting
from loftq.version import __version__


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make: the files of which software, and options of :class:`Exporting`."""

    to: str
    adapter: str | None = default("adapter", Exporting)
    tokenizer_rule: str | None = default("tokenizer_rule", Exporting)
    converter: str | None = default("converter", Exporting)
    block_type: str | None = default("block_type", Exporting)
    overwrite: bool = default("overwrite", Exporting)

    def __post_init__(self) -> None:
        check_choice(option("to"), self.to, tuple(TARGETS))
        check_fields(self, option, Exporting)
        given = {name: getattr(self, name) for name in ("tokenizer_rule", "converter", "block_type")}
        odd = [option(name) for name, value in given.items() if value is not None]
        if odd and self.to != "gguf":
            raise UsageError(f"{listed(odd)} only for {option('to', 'gguf')}; leave out, or export to it")

    def identity(self) -> dict[str, Any]:
        """What of it decides about the bytes; what is not given is not in it, so that earlier outputs are known."""
        more = {} if self.converter is None else {"converter": fsio.sha256_file(Path(self.converter)).sha256}
        more |= {} if self.block_type is None else {"block_type": self.block_type}
        return {"verb": "export", "to": self.to, "tokenizer_rule": self.tokenizer_rule, **more}


# Writes into a directory and gives the files; and the commands that run them.
Way = tuple[Callable[[Path, Begin], Files], list[str]]


def _gguf(base: Base, adapter: Adapter | None, options: ExportOptions) -> Way:
    from loftq.serving import gguf
    from loftq.serving.blocks import block_for

    rule, preferred, told = options.tokenizer_rule, options.block_type or "", gguf.commands(adapter is not None)
    blocks = {block_for(matrix, preferred).name for matrix in base.matrices}  # without one, no converter helps
    if preferred and preferred not in blocks:
        raise UsageError(
            f"{option('block_type', preferred)} is for 2 bits in blocks of 256, and no matrix of "
            f"{shown(base.directory)} has these; leave it out"
        )
    if options.converter is not None:
        from loftq.serving import converted

        converter = Path(options.converter)
        converted.check(base, adapter, converter)
        return lambda place, begin: converted.write(place, base, adapter, converter, rule, preferred, begin), told
    family = gguf.check(base, adapter, preferred)
    return lambda place, begin: gguf.write(place, base, adapter, family, rule, preferred, begin), told


def _compressed(base: Base, adapter: Adapter | None, options: ExportOptions) -> Way:
    from loftq.serving import compressed

    scales = compressed.check(base, adapter)
    told = compressed.commands(base, adapter)
    return lambda place, begin: compressed.write(place, base, adapter, scales, begin), told


def _mlx(base: Base, adapter: Adapter | None, options: ExportOptions) -> Way:
    from loftq.serving import mlx

    scales = mlx.check(base, adapter)
    return lambda place, begin: mlx.write(place, base, adapter, scales, begin), mlx.commands(adapter)


def _onnx(base: Base, adapter: Adapter | None, options: ExportOptions) -> Way:
    from loftq.serving import onnx

    onnx.check(base)
    return lambda place, begin: onnx.write(place, base, adapter, begin), onnx.commands()


def _for_original(base: Base, adapter: Adapter | None, options: ExportOptions) -> Way:
    from loftq.serving import for_original

    pair = for_original.check(base, adapter)
    return lambda place, begin: for_original.write(place, base, pair, begin), for_original.commands()


def _per_expert(base: Base, adapter: Adapter | None, options: ExportOptions) -> Way:
    from loftq.serving import per_expert

    checked = per_expert.check(base, adapter)
    return lambda place, begin: per_expert.write(place, base, checked, begin), per_expert.commands(checked)


TARGETS: dict[str, Callable[[Base, Adapter | None, ExportOptions], Way]] = {
    "gguf": _gguf,
    "compressed-tensors": _compressed,
    "mlx": _mlx,
    "onnx": _onnx,
    "lora-for-original": _for_original,
    "per-expert": _per_expert,
}


def export(directory: Path, output: Path, options: ExportOptions, begin: Begin) -> dict[str, Any]:
    """Export into the directory ``output``; what its ``loftq_export.json`` says, with the ``commands`` that run it.

    Raises: InputError for a code, a family or an adapter that the files cannot hold exactly; ConflictError if
        ``output`` is taken; UsageError if a package is missing.
    """
    base, adapter = open_both(directory, options.adapter)
    if options.to in CONTAINERS and (why := why_not_served(base.layout, options.to)):
        raise InputError(f"{shown(base.directory)}: {why}")
    write, commands = TARGETS[options.to](base, adapter, options)
    places, read = sources_of(base, adapter)
    identity = {**read, "options": options.identity(), "loftq": __version__}

    def fill(place: Path) -> Files:
        made = write(place, begin)
        card = exported_card(base.manifest, identity, commands, licence(base.directory / "README.md"))
        return {**made, "README.md": fsio.write_atomic(place / "README.md", [card.encode()])}

    return produce(output, identity, places, options.overwrite, fill, lambda: {"commands": commands})
