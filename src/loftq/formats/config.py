"""``quantization_config`` in ``config.json``: which modules are packed, and how."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from loftq.errors import InputError, UsageError, listed, quoted
from loftq.spec import QuantSpec, from_dict

FORMAT_VERSION = 1
MANIFEST = "loftq_manifest.json"  # of a quantized directory, written last
EXPORTED = "loftq_export.json"  # of what was made from one


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


def read_groups(config: Any) -> list[Group]:
    """Groups of a ``quantization_config``. InputError for a newer format or fields that are not known."""
    if not isinstance(config, dict):
        raise InputError(f"quantization_config: wanted an object, got {quoted(repr(config))}")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"quantization_config: format_version is {quoted(repr(version))}, this loftq reads {FORMAT_VERSION}; "
            "upgrade loftq"
        )
    unknown = sorted(set(config) - {"quant_method", "format_version", "bits", "groups"})
    if unknown:
        raise InputError(f"quantization_config: unknown field(s) {listed(unknown)}; written by a newer loftq?")
    written = config.get("groups")
    if not isinstance(written, list) or not written:
        raise InputError(f"quantization_config: 'groups' must be a list that is not empty, got {quoted(repr(written))}")
    groups = [_group(fields) for fields in written]
    counts = Counter(name for group in groups for name in group.modules)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise InputError(f"quantization_config: in two groups: {listed(twice)}")
    return groups


def _group(written: Any) -> Group:
    modules = written.get("modules") if isinstance(written, dict) else None
    if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise InputError("quantization_config: every group needs a list of module names under 'modules'")
    try:
        quant = from_dict(QuantSpec, {k: v for k, v in written.items() if k != "modules"})
    except (UsageError, TypeError) as e:  # TypeError: a field without default is missing
        raise InputError(f"quantization_config: a group cannot be read: {e}") from e
    return Group(quant, tuple(modules))
