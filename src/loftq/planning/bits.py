"""What ``--bits`` says: a width, patterns of widths, or an average."""

import math
from collections.abc import Mapping

from loftq import codes
from loftq.codes import BITS
from loftq.errors import UsageError, option, quoted
from loftq.planning.patterns import Rules, parse_rules
from loftq.planning.policy import DENSE


def bits_rules(text: str, code: str, stacks: Mapping[str, int]) -> Rules[float]:
    """``--bits``: a width, patterns, or, unless the code is a trellis, a decimal average by the paper's rule.

    The paper's mixed precision (section 4.4; LoftQ's code): with an average of ``a`` bits, the first
    ``int(L * (a - 2) / 2)`` of a stack's ``L`` layers have 4 bits, everything else 2.
    """
    average = None if code == "trellis" else _average(text)
    if average is None:
        return parse_rules(option("bits"), text, _width)
    if not 2 <= average <= 4:
        raise UsageError(
            f"{option('bits')} {quoted(text)}: an average must lie between 2.0 and 4.0 (the first layers "
            "get 4 bits, the rest 2); below 2 bits there are the trellis's, such as 1.5"
        )
    rules = []
    for stack, length in stacks.items():
        first = int(length * (average - 2) / 2)
        if first:
            rules.append((f"{stack}.0-{first - 1}", 4))
    if average > 2 and not rules:
        raise UsageError(
            f"{option('bits')} {quoted(text)}: an average gives whole layers 4 bits, and {_first_step(stacks)}; "
            "give that, or a pattern such as 'layers.0=4,2'"
        )
    return Rules(tuple(rules), 2)


def _first_step(stacks: Mapping[str, int]) -> str:
    """The least average above 2 that the longest stack of layers can have."""
    longest = max(stacks, key=stacks.__getitem__, default=None)
    if longest is None:
        return "this model has no stack of layers, so that it is 2 or 4"
    least = math.ceil(1000 * (2 + 2 / stacks[longest])) / 1000
    return f"with the {stacks[longest]} of {quoted(longest)} it is 2 or at least {least}"


def widths(bits: str) -> set[float]:
    """What ``--bits`` may give, but for what it leaves dense: every width of its patterns, both of an average."""
    if _average(bits) is not None:
        return {2, 4}
    rules = parse_rules(option("bits"), bits, _width)
    return {rules.default, *(width for _, width in rules.rules)} - {DENSE}


def _average(bits: str) -> float | None:
    """The number, if it is a decimal one, and none below 2 that a trellis has; -1 for what is no number."""
    if "." not in bits or "=" in bits:
        return None
    try:
        average = float(bits)
    except ValueError:
        return -1.0
    return None if average < 2 and average in codes.get("trellis").widths else average


def _width(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = -1.0
    if width not in (*BITS, DENSE, *codes.get("trellis").widths):
        raise UsageError(
            f"{option('bits')}: {quoted(text) or repr(text)} is not a width; wanted 2, 3, 4, 8, 16 (leave dense), "
            "sixteenths up to 4 for a trellis, such as 1.5, an average such as 2.5, or patterns such as "
            "'layers.0-3=4,2'"
        )
    return int(width) if width == int(width) else width
