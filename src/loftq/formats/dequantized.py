"""Checkpoints that are published in 4 or 8 bits, read as the dense ones that they stand for.

Two plain rules, both ``W = code · scale``; rows are dequantized as they are read, a few at a time:

* FP8: ``T`` in 8-bit floats beside ``T_scale_inv`` (DeepSeek-V3, Qwen3-FP8) or ``T_scale`` (compressed-tensors, FBGEMM,
  ModelOpt), one scale for each tile, row, expert or tensor. Both names are of a factor, the first in spite of its name.
* MXFP4 (gpt-oss): ``T_blocks`` ``(experts, out, in / 32, 16)``, two FP4 values to a byte, the lower half first, beside
  ``T_scales`` ``(experts, out, in / 32)``, exponents of 2. ``T`` is the model's ``(experts, in, out)``.

The numbers are those of transformers, which dequantizes the same files if it is asked to.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq.errors import InputError, quoted
from loftq.formats.regular import CHUNK, shown
from loftq.formats.source import Checkpoint
from loftq.formats.tensorfile import DTYPES, TensorInfo, tensor_bytes

if TYPE_CHECKING:
    from loftq.planning import Made

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4")  # whose files may follow the rules
SCALES = ("_scale_inv", "_scale")  # of a tensor of 8-bit floats
OF_INPUTS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")
SHORT, EXPONENTS = ("F8_E4M3", "F8_E5M2"), "U8"  # dtypes of codes; of scales that are powers of 2
SCALE_DTYPES = ("F32", "BF16", "F16", EXPONENTS)
MX_BLOCK, BIAS, NOT_A_NUMBER = 32, 127, 255  # of MXFP4; of E8M0
ROWS = 256  # dequantized at a time
# FP4 (E2M1), by its four bits: a sign, two of exponent, one of mantissa.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Scaled:
    """A dense tensor and the two that it is made of.

    Attributes:
        tile: rows and columns that share a scale.
    """

    dense: TensorInfo
    codes: TensorInfo
    scales: TensorInfo
    tile: tuple[int, int]

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        """Rows of the dense tensor, seen as a matrix of its last axis.

        Raises: InputError for a scale that is not finite, or below zero.
        """
        if self.dense.shape == self.codes.shape:
            return self._tiles(stored, start, stop)
        inner = self.dense.shape[-2]  # whole experts, since their rows are columns in the file
        first = start // inner
        experts = [self._expert(stored, e) for e in range(first, -(-stop // inner))]
        return torch.cat(experts)[start - first * inner : stop - first * inner]

    def _tiles(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        height, width = self.dense.shape[-2:]
        down, across = -(-height // self.tile[0]), -(-width // self.tile[1])
        place = torch.arange(start, stop)
        line = place // height * down + place % height // self.tile[0]
        begin, end = int(line[0]), int(line[-1]) + 1
        flat = stored.rows(self.scales.name, begin * across, end * across, columns=1)
        scales = self._checked(flat).reshape(-1, across)
        column = torch.arange(width) // self.tile[1]
        codes = stored.rows(self.codes.name, start, stop, columns=width)
        made = torch.empty(codes.shape, dtype=self.dense.torch_dtype)
        for i in range(0, len(codes), ROWS):
            part = slice(i, i + ROWS)
            made[part] = codes[part].float() * scales[line[part] - begin][:, column]
        return made

    def _expert(self, stored: Checkpoint, expert: int) -> Tensor:
        _, columns, rows = self.dense.shape
        groups = columns // MX_BLOCK
        blocks = stored.rows(self.codes.name, expert * rows, (expert + 1) * rows, columns=columns // 2)
        flat = stored.rows(self.scales.name, expert * rows, (expert + 1) * rows, columns=groups)
        scales = self._checked(flat)[:, :, None]
        values = torch.tensor(FP4)
        pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)  # of every byte
        made = torch.empty(rows, columns, dtype=self.dense.torch_dtype)
        for i in range(0, rows, ROWS):
            part = blocks[i : i + ROWS]
            found = pairs.index_select(0, part.flatten().int()).view(len(part), groups, MX_BLOCK)
            made[i : i + ROWS] = found.mul_(scales[i : i + ROWS]).view(len(part), columns)
        return made.T

    def _checked(self, scales: Tensor) -> Tensor:
        """The factors that scales stand for."""
        if self.scales.dtype == EXPONENTS:
            wrong = scales == NOT_A_NUMBER
            factors = torch.ldexp(torch.ones(scales.shape), scales.int() - BIAS)
        else:
            factors = scales.float()
            wrong = ~(factors.isfinite() & (factors >= 0))
        if wrong.any():
            got = "NaN" if self.scales.dtype == EXPONENTS else f"{float(factors[wrong][0]):g}"
            what = (
                f"{int(wrong.sum())} of {wrong.numel()} scales of {quoted(self.dense.name)} are unusable, such as {got}"
            )
            raise _wrong(self.scales, f"{what}; wanted finite numbers, none negative")
        return factors


class Dequantized(Checkpoint):
    """The dense tensors of a checkpoint some of whose tensors have scales. Its files are those of the stored one."""

    def __init__(self, stored: Checkpoint, scaled: Iterable[Scaled], left_out: set[str]) -> None:
        vars(self).update(vars(stored))
        self._stored = stored
        self._scaled = {s.dense.name: s for s in scaled}
        gone = left_out | {t.name for s in self._scaled.values() for t in (s.codes, s.scales)}
        rest = {name: info for name, info in stored.tensors.items() if name not in gone}
        self.tensors = dict(sorted((rest | {name: s.dense for name, s in self._scaled.items()}).items()))

    def read(self, name: str, made: "Made" = ()) -> Tensor:
        if made or name not in self._scaled:
            return super().read(name, made)
        shape = self.tensors[name].shape
        return self.rows(name, 0, math.prod(shape[:-1])).reshape(shape)

    def rows(self, name: str, start: int, stop: int, columns: int | None = None) -> Tensor:
        if name in self._scaled and columns is None:
            return self._scaled[name].rows(self._stored, start, stop)
        return super().rows(name, start, stop, columns)

    def chunks(self, name: str) -> Iterator[memoryview]:
        if name not in self._scaled:
            yield from super().chunks(name)
            return
        raw = tensor_bytes(self.read(name))
        yield from (raw[start : start + CHUNK] for start in range(0, len(raw), CHUNK))


def dense(checkpoint: Checkpoint, config: Mapping[str, Any] | None, dtype: str) -> Checkpoint:
    """The checkpoint as a dense one, if it follows the rules; as it is, if nothing in it has scales.

    Args:
        config: the ``quantization_config`` beside it.
        dtype: safetensors' name of what the dequantized tensors are to have.

    Raises: InputError for scales that are missing, or of a dtype or shape that fits no rule.
    """
    config = config or {}
    if config.get("transform_config"):
        raise InputError(
            f"{shown(checkpoint.directory)}: quantization_config has a transform_config: its weights are rotated, and "
            "are not the model's; start from the full-precision checkpoint"
        )
    tensors = checkpoint.tensors
    scaled = [*_floats(tensors, _asked_tile(config), dtype), *_blocks(tensors, dtype)]
    if not scaled:
        return checkpoint
    return Dequantized(checkpoint, scaled, {name for name in tensors if name.rpartition(".")[2] in OF_INPUTS})


def _floats(tensors: Mapping[str, TensorInfo], asked: tuple[int, int] | None, dtype: str) -> Iterator[Scaled]:
    found = {
        name: next((name + ending for ending in SCALES if name + ending in tensors), None)
        for name, info in tensors.items()
        if info.dtype in SHORT and not name.endswith(SCALES) and len(info.shape) > 1
    }
    for name, info in tensors.items():
        stem = name.removesuffix(SCALES[0])
        if stem != name and stem not in found:
            there = f"{quoted(stem)} of {tensors[stem].dtype}" if stem in tensors else f"no {quoted(stem)}"
            raise _wrong(info, f"{quoted(name)} is beside {there}; wanted one of {SHORT[0]}")
    if not any(found.values()):  # cast without scales: the plan tells which cannot be quantized
        return
    for name, scale in found.items():
        if scale is None:
            missing = f"{quoted(name)} is of {tensors[name].dtype}, and its scales are missing"
            raise _wrong(tensors[name], f"{missing}; wanted {quoted(name + SCALES[0])} or {quoted(name + SCALES[1])}")
        shape = tensors[name].shape
        tile = _tile(tensors[name], _of(tensors[scale], SCALE_DTYPES), asked)
        yield Scaled(_info(tensors[name], name, dtype, shape), tensors[name], tensors[scale], tile)


def _blocks(tensors: Mapping[str, TensorInfo], dtype: str) -> Iterator[Scaled]:
    for name, blocks in tensors.items():
        stem = name.removesuffix("_blocks")
        if stem == name or len(blocks.shape) != 4:
            continue
        if f"{stem}_scales" not in tensors:
            raise _wrong(blocks, f"{quoted(name)} has no {quoted(stem + '_scales')} beside it")
        scales = _of(tensors[f"{stem}_scales"], (EXPONENTS,))
        experts, rows, groups, half = _of(blocks, ("U8",)).shape
        if half != MX_BLOCK // 2:
            raise _wrong(blocks, f"{quoted(name)} is {list(blocks.shape)}; wanted blocks of {MX_BLOCK // 2} bytes")
        if scales.shape != (experts, rows, groups):
            wanted = f"wanted {[experts, rows, groups]} for {quoted(name)}"
            raise _wrong(scales, f"{quoted(scales.name)} is {list(scales.shape)}; {wanted}")
        yield Scaled(_info(blocks, stem, dtype, (experts, groups * MX_BLOCK, rows)), blocks, scales, (1, MX_BLOCK))


def _info(stored: TensorInfo, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize, 0, 0, stored.file)


def _of(info: TensorInfo, dtypes: tuple[str, ...]) -> TensorInfo:
    if info.dtype not in dtypes:
        raise _wrong(info, f"{quoted(info.name)} is of {info.dtype}; wanted one of {', '.join(dtypes)}")
    return info


def _asked_tile(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The tile that a configuration names for all weights, if it does."""
    groups = config.get("config_groups")
    of_groups = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    named = [g.get("block_structure") for g in of_groups if isinstance(g, dict) and g.get("strategy") == "block"]
    tiles = [config.get("weight_block_size"), *(named if len(named) == len(of_groups) else ())]
    for tile in tiles:
        if isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile):
            return tile[0], tile[1]
    return None


def _tile(weight: TensorInfo, scales: TensorInfo, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale, by the shapes of both; those of a configuration have to fit."""
    *lead, rows, columns = weight.shape
    count = math.prod(scales.shape)
    if asked:
        grid = (*lead, -(-rows // asked[0]), -(-columns // asked[1]))
        if scales.shape == grid or count == math.prod(grid) == 1:
            return asked
        wanted = f"wanted {list(grid)}, tiles of {list(asked)}"
    else:
        whole = [(*lead, 1, 1), (*lead, 1), tuple(lead)]
        each = [(*lead, rows, 1), (*lead, rows)]
        if scales.shape in each and rows > 1:
            return 1, columns
        if scales.shape in whole or (not lead and count == 1):
            return rows, columns
        if len(scales.shape) == len(weight.shape) and scales.shape[:-2] == tuple(lead):
            down, across = scales.shape[-2:]
            if down and across and rows % down == 0 and columns % across == 0:
                return rows // down, columns // across
        wanted = "wanted one for each tensor, expert, row or tile"
    got = f"{quoted(scales.name)} is {list(scales.shape)} for {quoted(weight.name)} of {list(weight.shape)}"
    raise _wrong(scales, f"{got}; {wanted}")


def _wrong(info: TensorInfo, problem: str) -> InputError:
    return InputError(f"{shown(info.file)}: {problem}; fetch the file again, or start from a full-precision checkpoint")
