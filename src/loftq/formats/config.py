"""``quantization_config`` in ``config.json``: which modules are packed, and how."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from loftq.errors import InputError
from loftq.spec import QuantSpec, from_dict

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Group:
    """Modules that are stored in the same way."""

    quant: QuantSpec
    modules: tuple[str, ...]


def quantization_config(modules: Iterable[tuple[str, QuantSpec]], bits: float) -> dict[str, Any]:
    """The JSON object for ``config.json``; one group per distinct spec, in order of first use."""
    groups: dict[QuantSpec, list[str]] = {}
    for module, quant in modules:
        groups.setdefault(quant, []).append(module)
    return {
        "quant_method": "loftq",
        "format_version": FORMAT_VERSION,
        "bits": bits,
        "groups": [{**asdict(quant), "modules": names} for quant, names in groups.items()],
    }


def read_groups(config: dict[str, Any]) -> list[Group]:
    """Groups of a ``quantization_config``. InputError for a newer format or fields that are not known."""
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"quantization_config: format_version is {version!r}, this loftq reads {FORMAT_VERSION}; upgrade loftq"
        )
    unknown = sorted(set(config) - {"quant_method", "format_version", "bits", "groups"})
    if unknown:
        raise InputError(f"quantization_config: unknown field(s) {unknown}; written by a newer loftq?")
    groups = []
    for written in config["groups"]:
        fields = dict(written)
        modules = fields.pop("modules", None)
        if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
            raise InputError("quantization_config: every group needs a list of module names under 'modules'")
        groups.append(Group(from_dict(QuantSpec, fields), tuple(modules)))
    return groups
