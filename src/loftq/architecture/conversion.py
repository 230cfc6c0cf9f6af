"""Which source tensors a parameter is made of, where transformers fuses or splits tensors as it loads them.

No list says what its operations do: they are run, on the numbers of the rows in the place of the weights. What they do
with whole rows (stack, concatenate, split, interleave, permute, swap the last two axes) is so known; anything else, and
any that fails, is not followed.
"""

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loftq.architecture import skeleton
from loftq.planning import Made, Piece, Role, of_stack

MOST_PIECES = 256  # of a matrix; rotary embeddings of an old layout have two for each head

Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype, shape
Collected = list[tuple[str, str]]  # tensor, and the pattern that it met, in the order of transformers


def converted_roles(
    model: nn.Module, tensors: Headers
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Role]]:
    """The tensors of a checkpoint with their roles; those that transformers converts as what it makes of them, and
    those that it renames by the names they get, if packed ones would not be found under their own.

    A converter is followed in all its places or in none: one that is used on loading is reversed on saving, wherever
    its patterns fit.
    """
    followed = _follow(model, tensors)
    used = {piece.tensor for _, made in followed.values() for pieces in made for piece in pieces}
    dtypes = {name: tensors[made[0][0].tensor][0] for name, (_, made) in followed.items()}
    shapes = {name: tuple(model.get_parameter(name).shape) for name in followed}
    seen = {n: t for n, t in tensors.items() if n not in used} | {n: (dtypes[n], shapes[n]) for n in followed}
    roles = skeleton.roles(model, seen)
    for name, (converter, made) in followed.items():
        roles[name] = replace(roles[name], made=made, converter=converter)
    rename = skeleton.renamer(model)
    for name in [n for n, role in roles.items() if role.keep == skeleton.RENAMED]:
        role = replace(roles[name], keep="")
        parameter, (dtype, shape) = skeleton.parameter_of(role), seen[name]
        if parameter not in seen and skeleton.finds_packed(rename, parameter, role):
            whole = ((Piece(name, shape, 0, shape[0]),),)
            made = of_stack(name, shape) if len(shape) == 3 else whole
            del roles[name], seen[name]
            seen[parameter], roles[parameter] = (dtype, shape), replace(role, made=made, converter=name)
    return seen, roles


def as_published(model: nn.Module) -> tuple[dict[str, str], dict[str, Made]]:
    """What the family's files have for the parameters of a model: names of those that are only renamed, and of those
    that are held in parts these, by transformers' own way of saving.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters())
    try:
        saved = revert_weight_conversion(model, parameters)  # type: ignore[arg-type]
    except Exception:  # whatever an operation raises that cannot be reversed
        return {}, {}
    names = {id(tensor): name for name, tensor in saved.items()}
    renamed = {name: names[id(p)] for name, p in parameters.items() if id(p) in names}
    parts = {name: ("F32", tuple(t.shape)) for name, t in saved.items() if name not in renamed.values()}
    return renamed, {name: made for name, (_, made) in _follow(model, parts).items()}


def split_parameters(model: nn.Module, tensors: Headers) -> set[str]:
    """Parameters that transformers makes of tensors which it splits into several, such as a fused bias."""
    mapping = skeleton.converters(model)
    rename = skeleton.renamer(model, mapping)
    several = {p for converter in mapping[1] if len(converter.target_patterns) > 1 for p in converter.source_patterns}
    with torch.device("cpu"):  # a model is on the meta device while it loads
        return set(_follow(model, {name: tensors[name] for name in tensors if several and rename(name)[1] in several}))


def _follow(model: nn.Module, tensors: Headers) -> dict[str, tuple[str, Made]]:
    """Parameter -> its converter's number, and of what it is made."""
    found: dict[str, tuple[str, Made]] = {}
    for number, (converter, groups) in enumerate(_collected(model, tensors)):
        own: dict[str, Made] | None = {}
        for key, collected in groups.items():
            made = _made(model, converter, key, collected, tensors)
            others = tensors.keys() - {tensor for tensor, _ in collected}
            if not made or any(name in others or name in found or name in own for name in made):
                own = None
                break
            own |= made
        found |= {name: (str(number), made) for name, made in (own or {}).items()}
    return found


def _collected(model: nn.Module, tensors: Headers) -> Iterator[tuple[Any, dict[str, Collected]]]:
    """Each converter that is used, and for every parameter that it first fills, the tensors that go into it."""
    from transformers.core_model_loading import dot_natural_key

    mapping = skeleton.converters(model)
    rename, rename_other = (skeleton.renamer(model, mapping, as_model=alike) for alike in (True, False))
    by_pattern = {pattern: converter for converter in mapping[1] for pattern in converter.source_patterns}
    used: dict[int, tuple[Any, dict[str, Collected]]] = {}
    for tensor in sorted(tensors, key=dot_natural_key):
        key, pattern = (rename if tensors[tensor][1] == _shape(model, tensor) else rename_other)(tensor)
        if pattern:
            converter = by_pattern[pattern]
            used.setdefault(id(converter), (converter, {}))[1].setdefault(key, []).append((tensor, pattern))
    yield from used.values()


def _made(model: nn.Module, converter: Any, key: str, collected: Collected, tensors: Headers) -> dict[str, Made]:
    """The parameters that a converter makes of the tensors; none if it cannot be followed."""
    headers = [(tensor, *tensors[tensor]) for tensor, _ in collected]
    if len({dtype for _, dtype, _ in headers}) > 1:
        return {}
    for transposed in (False, True):
        if transposed and any(len(shape) < 2 for *_, shape in headers):
            break
        shapes = [_swapped(shape) if transposed else shape for *_, shape in headers]
        labels, ends = _labels(shapes)
        forward = _converted(model, converter, key, collected, labels, transposed)
        backward = _converted(model, converter, key, collected, [ends[-1] - 1 - t for t in labels], transposed)
        made = {}
        for name, rows in forward.items():
            wanted = _shape(model, name)
            mirrored = backward.get(name)
            if wanted is None or rows.shape != _rows_of(wanted) or mirrored is None:
                break
            if not torch.equal(rows, ends[-1] - 1 - mirrored):  # something is computed from the values
                break
            stacks = rows.reshape(wanted[0], -1) if len(wanted) == 3 else rows.reshape(1, -1)
            pieces = [_pieces(stack, ends, headers, transposed) for stack in stacks]
            if max(map(len, pieces)) > MOST_PIECES:
                break
            made[name] = tuple(pieces)
        else:
            return made
    return {}


def _labels(shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[int]]:
    """The rows of all tensors, numbered through; and the number after each tensor's last."""
    labels, count = [], 0
    ends = []
    for shape in shapes:
        rows = _rows_of(shape)
        size = int(torch.Size(rows).numel())
        labels.append(torch.arange(count, count + size).reshape(rows))
        count += size
        ends.append(count)
    return labels, ends


def _rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with one column instead of all."""
    return (*shape[:-1], 1) if len(shape) > 1 else shape


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _shape(model: nn.Module, name: str) -> tuple[int, ...] | None:
    try:
        return tuple(model.get_parameter(name).shape)
    except AttributeError:
        return None


def _converted(
    model: Any, converter: Any, key: str, collected: Collected, labels: list[Tensor], transposed: bool
) -> dict[str, Tensor]:
    """What the converter makes of the labels; nothing if it fails."""
    from transformers.core_model_loading import SkipParameters

    trial = copy.deepcopy(converter)
    for (tensor, pattern), rows in zip(collected, labels, strict=True):
        trial.add_tensor(key, tensor, pattern, rows.transpose(-1, -2) if transposed else rows)
    try:
        result = trial.convert(key, model=model, config=model.config)
    except SkipParameters:
        return {}
    except Exception:  # whatever an operation raises for what is no weight
        return {}
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


def _pieces(
    rows: Tensor, ends: list[int], headers: list[tuple[str, str, tuple[int, ...]]], transposed: bool
) -> tuple[Piece, ...]:
    """Numbered rows as few evenly spaced runs of source tensors."""
    found: list[Piece] = []
    rows = rows.contiguous()
    i, count = 0, len(rows)
    while i < count and len(found) <= MOST_PIECES:
        first = int(rows[i])
        source = bisect_right(ends, first)
        begin = ends[source - 1] if source else 0
        step = int(rows[i + 1]) - first if i + 1 < count else 1
        if step < 1 or first + step >= ends[source]:
            step = 1
        expected = torch.arange(first, first + step * (count - i), step)
        off = (rows[i:] != expected) | (expected >= ends[source])
        length = int(off.int().argmax()) if bool(off.any()) else count - i
        last = first + step * (length - 1)
        tensor, _, shape = headers[source]
        found.append(Piece(tensor, shape, first - begin, last - begin + 1, step, transposed))
        i += length
    return tuple(found)
