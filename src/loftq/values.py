"""Values of numpy and torch, as Python and the command line have them."""

import numbers
import sys
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A number or text of numpy as Python's, a dtype or device of torch by its name; all else as it is.

    >>> plain(np.int64(4)), plain(torch.bfloat16), plain(torch.device("cuda", 1))
    (4, 'bfloat16', 'cuda:1')
    """
    if type(value) in (bool, int, float, str):
        return value
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy and isinstance(value, (numpy.bool_, numpy.str_)):
        return value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if torch and isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    return value


def plain_inside(value: Any) -> Any:
    """:func:`plain` for all that lists, arrays and mappings hold."""
    if isinstance(value, Mapping):
        return {plain(key): plain_inside(inner) for key, inner in value.items()}
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.ndarray):
        return value.tolist()
    return [plain_inside(inner) for inner in value] if isinstance(value, (list, tuple)) else plain(value)
