"""Names of modules and tensors: their order, and the endings by which PEFT selects them."""

from collections.abc import Iterable


def target_suffixes(chosen: Iterable[str], others: Iterable[str]) -> tuple[list[str], list[str]]:
    """Shortest endings, of at least two parts, that select the chosen modules; and which others they select too.

    The others are all named modules, not only those that an adapter fits: PEFT fails on a block that is selected. They
    are to be excluded by name, and there are some only where a whole chosen name is the ending of another.

    PEFT selects modules whose name ends with one of these. Two parts at the least, so that a layer of a task
    head that is added later (``classification_head.out_proj``) is not caught by a name as short as ``out_proj``.
    """
    owners: dict[str, list[str]] = {}  # an ending -> the others that have it
    for other in others:
        for ending in _endings(other):
            owners.setdefault(ending, []).append(other)
    suffixes, excluded = set(), set()
    for name in chosen:
        free = next((e for e in _endings(name) if e not in owners and (e.count(".") or e == name)), name)
        suffixes.add(free)
        excluded.update(owners.get(free, ()))
    return sorted(suffixes, key=natural), sorted(excluded, key=natural)


def _endings(name: str) -> list[str]:
    """``a.b.c`` -> ``c``, ``b.c``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that counts: layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def routers_among(modules: Iterable[str]) -> set[str]:
    """Modules that choose experts: below a ``router`` at any depth, and a ``gate`` or what lies in one beside experts.

    A ``gate`` with layers in it may be a gated projection too, where there are no experts.
    """
    modules = set(modules)
    split = [name.split(".") for name in modules]
    mixtures = {".".join(parts[:i]) for parts in split for i, part in enumerate(parts) if "expert" in part}
    return {
        ".".join(parts)
        for parts in split
        if "router" in parts
        or parts[-1] == "gate"
        or any(part == "gate" and ".".join(parts[:i]) in mixtures for i, part in enumerate(parts))
    }
