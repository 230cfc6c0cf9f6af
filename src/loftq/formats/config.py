"""``quantization_config`` in ``config.json``: which modules are packed, and how."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loftq.errors import InputError, UsageError, listed, quoted
from loftq.spec import QuantSpec, from_dict

FORMAT_VERSION = 2  # of a checkpoint with a trellis or stacks of experts; all others are of version 1
MANIFEST = "loftq_manifest.json"  # of a quantized directory, written last
EXPORTED = "loftq_export.json"  # of what was made from one
FOR_ORIGINAL = "lora-for-original"  # the export that is an adapter of the original


@dataclass(frozen=True)
class PackedGroup:
    """Modules, and stacks of experts by the names of their Parameters, that are stored in the same way."""

    quant: QuantSpec
    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.modules, *self.parameters)


def quantization_config(
    modules: Iterable[tuple[str, QuantSpec]], bits: float, stacks: Iterable[tuple[str, QuantSpec]] = ()
) -> dict[str, Any]:
    """The JSON object for ``config.json``; one group per distinct spec, in order of first use.

    Its version is the lowest that has all that is there, so that older readers refuse only what they cannot read.
    """
    groups: dict[QuantSpec, dict[str, list[str]]] = {}
    for kind, named in (("modules", modules), ("parameters", stacks)):
        for name, quant in named:
            groups.setdefault(quant, {"modules": []}).setdefault(kind, []).append(name)
    tables, stacked = _tables(groups), any("parameters" in names for names in groups.values())
    return {
        "quant_method": "loftq",
        "format_version": FORMAT_VERSION if tables or stacked else 1,
        "bits": bits,
        **({"levels": tables} if tables else {}),
        "groups": [{**quant.to_dict(), **names} for quant, names in groups.items()],
    }


def _tables(quants: Iterable[QuantSpec]) -> dict[str, str]:
    """The tables of levels that the object carries, by name."""
    return {name: table for quant in quants for name, table in quant.codebook.tables(quant.width).items()}


def read_groups(config: Any) -> list[PackedGroup]:
    """Groups of a ``quantization_config``. InputError for a newer format or fields that are not known."""
    if not isinstance(config, dict):
        raise InputError(f"quantization_config: wanted an object, got {quoted(repr(config))}")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"quantization_config: format_version is {quoted(repr(version))}, this loftq reads 1 to {FORMAT_VERSION}; "
            "upgrade loftq"
        )
    known = {"quant_method", "format_version", "bits", "groups", *(["levels"] if version > 1 else [])}
    unknown = sorted(set(config) - known)
    if unknown:
        raise InputError(f"quantization_config: unknown field(s) {listed(unknown)}; written by a newer loftq?")
    written = config.get("groups")
    if not isinstance(written, list) or not written:
        raise InputError(f"quantization_config: 'groups' must be a list that is not empty, got {quoted(repr(written))}")
    groups = [_group(fields) for fields in written]
    counts = Counter(name for group in groups for name in group.names)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise InputError(f"quantization_config: in two groups: {listed(twice)}")
    _check_tables(config.get("levels", {}), _tables(group.quant for group in groups), version)
    return groups


def _check_tables(given: Any, ours: dict[str, str], version: int) -> None:
    """InputError for levels that are not those of this package, by which the weights would be others."""
    if ours and version == 1:
        raise InputError("quantization_config: format_version 1 has no trellis; make the checkpoint again")
    if given != ours:
        held = given if isinstance(given, dict) else {}
        wrong = sorted(name for name in {*held, *ours} if held.get(name) != ours.get(name))
        raise InputError(
            f"quantization_config: levels: {listed(wrong)}: not the table of this loftq; make the checkpoint again"
        )


def _group(written: Any) -> PackedGroup:
    modules = written.get("modules") if isinstance(written, dict) else None
    parameters = written.get("parameters", []) if isinstance(written, dict) else None
    for names in (modules, parameters):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError("quantization_config: every group needs a list of module names under 'modules'")
    try:
        quant = from_dict(QuantSpec, {k: v for k, v in written.items() if k not in ("modules", "parameters")})
    except (UsageError, TypeError) as e:  # TypeError: a field without default is missing
        raise InputError(f"quantization_config: a group cannot be read: {e}") from e
    return PackedGroup(quant, tuple(modules or ()), tuple(parameters or ()))
