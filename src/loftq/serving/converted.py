"""``loftq export --to gguf --converter PATH``: exact codes for every decoder that llama.cpp's own script knows.

``convert_hf_to_gguf.py`` decides names, metadata, tokenizer, and where the rows of a matrix lie: some are permuted,
split or joined. It runs on a checkpoint of the same shapes in which every quantized matrix holds marks, numbers that
say which row of which matrix this is. So the file that it makes tells where every row of codes belongs, and the codes
are put there. A matrix whose marks come out changed is computed with other numbers than its weights: it is refused.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from loftq.architecture.served import check_model
from loftq.checkpoint.produce import Files
from loftq.errors import InputError, listed, option, quoted
from loftq.formats import fsio, strict_json
from loftq.formats.belongings import belongings
from loftq.formats.regular import shown
from loftq.formats.tensorfile import DTYPES, Entry
from loftq.numerics import oriented, oriented_shape
from loftq.planning import main_dtype
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base, Dense
from loftq.serving.blocks import block_bytes, block_for
from loftq.serving.gguf import PLAIN, LoraPart, array_of, file_type, lora, modelfile
from loftq.serving.gguf_header import Header, gguf, padding
from loftq.serving.merge import Begin
from loftq.serving.original import as_original
from loftq.serving.output import copy, write_shards

DIGITS, BASE = 4, 128  # whole numbers that bfloat16 and float16 hold
PERIOD = DIGITS + 1  # the columns' own mark stands after the digits, so that columns in another order show


@dataclass(frozen=True)
class Portion:
    """Rows of a matrix, or of an expert of a stack, and where they lie in a tensor of the new file."""

    tensor: Dense
    expert: int | None
    rows: Int64[Tensor, " rows"]
    at: Int64[Tensor, " rows"]


@dataclass(frozen=True)
class Gathered:
    """A tensor of the new file, and what it is gathered from; nothing if the script's is copied."""

    name: str
    shape: tuple[int, ...]
    kind: int
    nbytes: int
    sources: tuple[Portion, ...] = ()


def marks(ids: Int64[Tensor, " rows"], columns: int) -> Float[Tensor, "rows columns"]:
    """Rows of marks: the digits of their numbers, over and over, and between them one of the place."""
    digits = torch.stack([ids // BASE**i % BASE for i in range(DIGITS)], 1)
    count = -(-columns // PERIOD)
    places = (torch.arange(count) ** 2 * 37 + torch.arange(count) * 11) % BASE
    whole = torch.cat([digits[:, None].expand(-1, count, -1), places.expand(len(ids), -1)[..., None]], 2)
    return whole.flatten(1)[:, :columns].float()


def read_marks(values: Float[Tensor, "rows columns"]) -> Int64[Tensor, " rows"] | None:
    """The numbers of the rows; None if they are no marks, or have been changed."""
    if values.shape[1] < 2 * PERIOD:
        return None
    digits = values[:, :DIGITS].round().long()
    ids = sum(digits[:, i] * BASE**i for i in range(DIGITS))
    return ids if torch.equal(marks(ids, values.shape[1]), values) else None  # type: ignore[arg-type]


def marked(base: Base, adapter: Adapter | None) -> list[Dense]:
    """What is marked: all that is quantized, and the layers that the adapter adds to."""
    factors = {} if adapter is None else adapter.factors
    return [t for t in base.tensors.values() if t.matrix or t.name in factors]


def check(base: Base, adapter: Adapter | None, converter: Path) -> None:
    """Refuse what cannot be written, before anything is."""
    if not converter.is_file():
        raise InputError(f"{option('converter')} {shown(converter)}: no such file; wanted llama.cpp's {SCRIPT}")
    check_model("gguf", base.model)
    if adapter is not None:
        adapter.refuse_more_than_linear("a GGUF adapter", f"llama.cpp's {SCRIPT}", experts=True)
    narrow = [t.name for t in marked(base, adapter) if t.matrix is None and t.dtype not in PLAIN]
    if narrow:
        raise InputError(f"{listed(narrow, 3)}: GGUF holds none of their dtypes")


SCRIPT = "convert_hf_to_gguf.py"


def write(
    place: Path, base: Base, adapter: Adapter | None, converter: Path, rule: str | None, preferred: str, begin: Begin
) -> Files:
    """``model.gguf`` and ``adapter.gguf`` in a directory.

    Args:
        rule: llama.cpp's name of the tokenizer's rule for cutting words, if the script does not know it.
        preferred: of two types that hold a matrix the one to take.
    """
    work = place.parent / "converter"
    fsio.remove_tree(work)
    fsio.make_dirs(work / "source")
    try:
        firsts = _write_marked(work / "source", base, adapter)
        _run(converter, work, base, rule)
        reader = gguf.GGUFReader(work / "model.gguf")
        gathered = _gathered(reader, firsts, base, preferred)
        advance = begin(len(gathered))
        made = modelfile(place, adapter is not None)
        contents = _contents(reader, gathered, base, preferred, advance)
        made["model.gguf"] = fsio.write_atomic(place / "model.gguf", contents)
        if adapter is not None:
            architecture = reader.fields["general.architecture"].contents()
            added = _lora_parts(gathered, adapter)
            made["adapter.gguf"] = fsio.write_atomic(place / "adapter.gguf", lora(architecture, added))
        return made
    finally:
        fsio.remove_tree(work)


def _write_marked(place: Path, base: Base, adapter: Adapter | None) -> dict[str, int]:
    """The checkpoint with marks; tensor -> the number of its first row."""
    firsts: dict[str, int] = {}
    next_ = 0
    for tensor in marked(base, adapter):
        firsts[tensor.name] = next_
        next_ += _rows(tensor)
    if next_ > BASE**DIGITS:
        raise InputError(f"{quoted(base.directory)}: more than {BASE**DIGITS} rows; only fewer can be marked")

    def value(tensor: Dense, expert: int | None) -> Tensor:
        if tensor.name not in firsts:
            return oriented(tensor.kind, base.read(tensor, expert))
        rows, columns = oriented_shape(tensor.kind, tensor.shape[-2:])
        first = firsts[tensor.name] + (expert or 0) * rows
        return oriented(tensor.kind, marks(torch.arange(first, first + rows), columns))

    headers, read = as_original(base, value)
    entries = [Entry(name, dtype, shape) for name, (dtype, shape) in headers.items()]
    write_shards(place, entries, lambda entry: (one.to(DTYPES[entry.dtype]) for one in read(entry.name)))
    config = {name: value for name, value in base.config.items() if name != "quantization_config"}
    fsio.write_json(place / "config.json", strict_json.tagged(config))
    copy(belongings(base.directory).files, base.directory, place)
    return firsts


def _rows(tensor: Dense) -> int:
    """Of all its matrices."""
    return max(1, tensor.experts) * oriented_shape(tensor.kind, tensor.shape[-2:])[0]


# Runs the script; where the tokenizer's rule is given, the script need not know it.
RUN = """
import runpy, sys
script, rule, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
sys.path.insert(0, script.rpartition("/")[0])
if rule:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: rule
runpy.run_path(script, run_name="__main__")
"""


def _run(converter: Path, work: Path, base: Base, rule: str | None) -> None:
    main = main_dtype({t.name: (t.dtype, t.shape) for t in base.tensors.values()})
    kind = main.lower() if main in PLAIN else "f32"
    arguments = [str(work / "source"), "--outfile", str(work / "model.gguf"), "--outtype", kind]
    command = [sys.executable, "-c", RUN, str(converter.resolve()), rule or "", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if ran.returncode or not (work / "model.gguf").is_file():
        lines = [line for line in ran.stderr.splitlines() if line.strip()] or [f"exit code {ran.returncode}"]
        cure = f"; if it is the tokenizer, name its rule: {option('tokenizer_rule', 'NAME')}"
        raise InputError(f"{shown(converter)}: {quoted(lines[-1], 300)}{'' if rule else cure}")


def _numbers(tensor: Any) -> Int64[Tensor, " rows"] | None:
    """Of all rows of a tensor of a GGUF file; None if they are no marks."""
    if tensor.tensor_type.value not in PLAIN.values() or len(tensor.shape) < 2:
        return None
    found = []
    for rows in tensor.data.reshape(-1, *tensor.data.shape[-2:]):
        raw = torch.from_numpy(np.array(rows))
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            raw = raw.view(torch.uint8).view(torch.bfloat16)
        ids = read_marks(raw.float())
        if ids is None:
            return None
        found.append(ids)
    return torch.cat(found)


def _gathered(reader: Any, firsts: dict[str, int], base: Base, preferred: str) -> list[Gathered]:
    """What becomes of every tensor of the script's file. InputError for marks that it has not kept whole."""
    names, starts = list(firsts), torch.tensor(list(firsts.values()), dtype=torch.int64)
    seen = dict.fromkeys(names, 0)
    gathered = []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        copied = Gathered(tensor.name, shape, int(tensor.tensor_type), tensor.n_bytes)
        ids = _numbers(tensor)
        if ids is None:
            gathered.append(copied)
            continue
        owners = torch.searchsorted(starts, ids, right=True) - 1
        sources = []
        for owner in owners.unique().tolist():
            at = (owners == owner).nonzero()[:, 0]
            sources += _sources(base.tensors[names[owner]], ids[at] - starts[owner], at)
            seen[names[owner]] += len(at)
        gathered.append(_with_sources(copied, sources, preferred))
    lost = [name for name, count in seen.items() if count < _rows(base.tensors[name])]
    if lost:
        raise InputError(
            f"{listed(lost, 3)}: llama.cpp's script leaves them out or changes their numbers, so that it has no place "
            f"for their codes; leave them dense with patterns of {option('bits')}, such as 'NAME=16,4', or merge"
        )
    return gathered


def _sources(tensor: Dense, rows: Tensor, at: Tensor) -> Iterator[Portion]:
    """Rows of a tensor, for each of its matrices."""
    if not tensor.experts:
        yield Portion(tensor, None, rows, at)
        return
    height = _rows(tensor) // tensor.experts
    for expert in (rows // height).unique().tolist():
        its = rows // height == expert
        yield Portion(tensor, expert, rows[its] % height, at[its])


def _with_sources(copied: Gathered, sources: list[Portion], preferred: str) -> Gathered:
    tensors = list({source.tensor.name: source.tensor for source in sources}.values())
    blocks = {block_for(t.matrix, preferred) if t.matrix else None for t in tensors}
    if len(blocks) > 1 or (blocks == {None} and len({t.dtype for t in tensors}) > 1):
        raise InputError(
            f"{listed([t.name for t in tensors], 3)}: of several types, and llama.cpp has them in one tensor, "
            f"{copied.name}; give them the same {option('bits')}"
        )
    (block,) = blocks
    count = int(np.prod(copied.shape))
    if block is None:
        kind = PLAIN[tensors[0].dtype]
        return replace(copied, kind=kind, nbytes=count * (4 if kind == 0 else 2), sources=tuple(sources))
    return replace(copied, kind=block.type, nbytes=count // block.size * block.bytes, sources=tuple(sources))


def _contents(
    reader: Any, gathered: list[Gathered], base: Base, preferred: str, advance: Any
) -> Iterator[bytes | memoryview]:
    header = Header(reader.fields["general.architecture"].contents())
    left_out = {"general.architecture", "general.file_type"}
    for field in reader.fields.values():
        if field.name not in left_out and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            header.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    sizes = [(source.tensor.matrix, one.nbytes) for one in gathered for source in one.sources[:1]]
    header.add_file_type(file_type([(block_for(m, preferred), n) for m, n in sizes if m]))
    for one in gathered:
        header.add(one.name, one.shape, one.kind, one.nbytes)
    yield header.encoded()
    for one, tensor in zip(gathered, reader.tensors, strict=True):
        raw = _bytes(one, base, preferred) if one.sources else np.asarray(tensor.data)
        yield np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data
        yield padding(one.nbytes)
        del raw
        advance()


def _bytes(one: Gathered, base: Base, preferred: str) -> np.ndarray:
    """The tensor as the file has it, its rows out of their matrices."""
    found: np.ndarray | None = None
    for source in one.sources:
        matrix = source.tensor.matrix
        if matrix is None:
            raw = array_of(base.read(source.tensor, source.expert))
        else:
            raw = block_bytes(block_for(matrix, preferred), matrix, base.by_suffix(matrix, source.expert)).numpy()
        if found is None:
            found = np.empty((math.prod(one.shape[:-1]), raw.shape[1]), raw.dtype)
        found[source.at.numpy()] = raw[source.rows.numpy()]
    assert found is not None
    return found


def _lora_parts(gathered: list[Gathered], adapter: Adapter) -> list[LoraPart]:
    """The adapter of every tensor: of several matrices side by side, their ranks added up."""
    found = []
    for one in gathered:
        sources = [source for source in one.sources if source.tensor.name in adapter.factors]
        if not sources:
            continue
        slices = _slices(one, sources)
        ranks = [sum(adapter.factors[source.tensor.name].rank for source in held) for held in slices]
        if len(set(ranks)) > 1:
            raise InputError(f"{quoted(one.name)}: the adapter's rank is not the same for all its matrices; merge it")

        def read(slices: list[list[Portion]] = slices, one: Gathered = one) -> tuple[Tensor, Tensor]:
            pairs = [_product(held, adapter, one.shape[-2]) for held in slices]
            a, b = (torch.stack(factors) for factors in zip(*pairs, strict=True))
            return (a, b) if len(one.shape) > 2 else (a[0], b[0])

        found.append(LoraPart(one.name, one.shape, ranks[0], read))
    return found


def _slices(one: Gathered, sources: list[Portion]) -> list[list[Portion]]:
    """Of every matrix of a tensor what its rows are of."""
    rows = one.shape[-2]
    found: list[list[Portion]] = [[] for _ in range(math.prod(one.shape[:-2]))]
    for source in sources:
        for place in (source.at // rows).unique().tolist():
            its = source.at // rows == place
            found[place].append(replace(source, rows=source.rows[its], at=source.at[its] % rows))
    return found


def _product(sources: list[Portion], adapter: Adapter, rows: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of matrices side by side."""
    products = [adapter.product(source.tensor.name, source.expert) for source in sources]
    b = torch.zeros(rows, sum(len(a) for _, a, _ in products))
    first = 0
    for source, (own, a, s) in zip(sources, products, strict=True):
        b[source.at, first : first + len(a)] = s * own[source.rows]
        first += len(a)
    return torch.cat([a for _, a, _ in products]), b
