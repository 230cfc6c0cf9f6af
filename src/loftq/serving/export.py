"""``loftq export``: a quantized directory in the files of other software, with exactly its codes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.checkpoint.produce import Files, produce
from loftq.errors import option
from loftq.formats import fsio
from loftq.formats.belongings import licence
from loftq.options import check_choice
from loftq.report.card import exported_card
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base
from loftq.serving.merge import Begin, open_both, sources_of
from loftq.version import __version__


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make.

    Attributes:
        to: the files of which software.
        adapter: as for a merge.
        tokenizer_rule: llama.cpp's name of how the tokenizer cuts words, where it is not known.
    """

    to: str
    adapter: str | None = None
    tokenizer_rule: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_choice(option("to"), self.to, tuple(TARGETS))


# Writes into a directory; gives the files, and the commands that run them.
Write = Callable[[Path, Begin], tuple[Files, list[str]]]


def _gguf(base: Base, adapter: Adapter | None, options: ExportOptions) -> Write:
    from loftq.serving import gguf

    family = gguf.check(base, adapter)

    def write(place: Path, begin: Begin) -> tuple[Files, list[str]]:
        made = gguf.write(place, base, adapter, family, options.tokenizer_rule, begin)
        return made, gguf.commands(adapter is not None)

    return write


def _compressed(base: Base, adapter: Adapter | None, options: ExportOptions) -> Write:
    from loftq.serving import compressed

    scales = compressed.check(base, adapter)

    def write(place: Path, begin: Begin) -> tuple[Files, list[str]]:
        return compressed.write(place, base, adapter, scales, begin), compressed.commands(adapter)

    return write


TARGETS: dict[str, Callable[[Base, Adapter | None, ExportOptions], Write]] = {
    "gguf": _gguf,
    "compressed-tensors": _compressed,
}


def export(directory: Path, output: Path, options: ExportOptions, begin: Begin) -> dict[str, Any]:
    """Export into the directory ``output``; what its ``loftq_export.json`` says, with the ``commands`` that run it.

    Raises: InputError for a code, a family or an adapter that the files cannot hold exactly; ConflictError if
        ``output`` is taken; UsageError if a package is missing.
    """
    base, adapter = open_both(directory, options.adapter)
    write = TARGETS[options.to](base, adapter, options)
    places, read = sources_of(base, adapter)
    identity = {
        **read,
        "options": {"verb": "export", "to": options.to, "tokenizer_rule": options.tokenizer_rule},
        "loftq": __version__,
    }
    commands: list[str] = []

    def fill(place: Path) -> Files:
        made, told = write(place, begin)
        commands.extend(told)
        card = exported_card(base.manifest, identity, told, licence(base.directory / "README.md"))
        return {**made, "README.md": fsio.write_atomic(place / "README.md", [card.encode()])}

    return produce(output, identity, places, options.overwrite, fill, lambda: {"commands": commands})
