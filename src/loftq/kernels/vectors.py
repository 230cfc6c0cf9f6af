"""Vectors of sixteen float32 values for the compiled CPU kernels: read, looked up, computed with, and stored.

Compilers turn a loop over a table into sixteen loads. Every x86 processor of the last ten years looks sixteen values up
in a register, in one instruction (AVX-512) or in two to five (AVX2); elsewhere they are loaded one by one. All else is
LLVM's portable arithmetic on vectors, which it splits into registers of the size that there is. Nothing is contracted
but sums of products.

Places are counted in elements from the beginning of an array in row-major order; no bound is checked.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

LANES = 16
operation: Any = intrinsic  # for type checkers: kernels give all arguments but the first
of_constants: Any = intrinsic(prefer_literal=True)
BYTE, SHORT, WORD, LONG, REAL = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
MULTIPLY_ADD = "llvm.fmuladd.v16f32"
WORDS, REALS, HALF = ir.VectorType(WORD, LANES), ir.VectorType(REAL, LANES), ir.VectorType(REAL, LANES // 2)


class Vector(types.Type):
    """Sixteen float32 values."""


class Vectors(types.Type):
    """Some vectors."""

    def __init__(self, count: int) -> None:
        super().__init__(f"float32x16x{count}")
        self.count = count


vector = Vector("float32x16")


@register_model(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, REALS)


@register_model(Vectors)
class _VectorsModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.ArrayType(REALS, kind.count))


@operation
def spread(typing: Any, value: Any) -> Any:
    """A float32 value in all lanes."""

    return vector(types.float32), lambda context, builder, signature, values: _spread(builder, values[0], REALS)


@operation
def subtract(typing: Any, a: Any, b: Any) -> Any:
    return vector(vector, vector), lambda context, builder, signature, values: builder.fsub(*values)


@operation
def multiply(typing: Any, a: Any, b: Any) -> Any:
    return vector(vector, vector), lambda context, builder, signature, values: builder.fmul(*values)


@of_constants
def zeros(typing: Any, count: Any) -> Any:
    """So many vectors of zeros; a constant."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    kind = Vectors(count.literal_value)
    return kind(count), lambda context, builder, signature, values: ir.Constant(context.get_value_type(kind), None)


@operation
def add_products(typing: Any, sums: Any, values: Any, array: Any, at: Any, stride: Any) -> Any:
    """``sums[t] + values * array[at + t * stride:]`` for every one of the sums, sixteen values of a float32 array each.

    In one instruction and with one rounding where the processor has it.
    """

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        sums, values, array, at, stride = given
        for t in range(signature.args[0].count):
            place = builder.add(at, builder.mul(stride, stride.type(t)))
            x = _load(builder, _place(context, builder, signature.args[2], array, place, REAL), REALS)
            added = _call(builder, MULTIPLY_ADD, REALS, [values, x, builder.extract_value(sums, t)])
            sums = builder.insert_value(sums, added, t)
        return sums

    return sums(sums, values, array, at, stride), build


@operation
def add_scaled(typing: Any, sums: Any, parts: Any, scale: Any) -> Any:
    """``sums[t] + parts[t] * scale`` for every one."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        sums, parts, scale = given
        for t in range(signature.args[0].count):
            terms = [builder.extract_value(parts, t), scale, builder.extract_value(sums, t)]
            sums = builder.insert_value(sums, _call(builder, MULTIPLY_ADD, REALS, terms), t)
        return sums

    return sums(sums, sums, vector), build


@operation
def add_totals(typing: Any, array: Any, at: Any, stride: Any, sums: Any) -> Any:
    """``array[at + t * stride]`` grows by the sum of the sixteen lanes of ``sums[t]``, added by halves."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        array, at, stride, sums = given
        for t in range(signature.args[3].count):
            left, width = builder.extract_value(sums, t), LANES
            while width > 1:
                width //= 2
                low, high = (builder.shuffle_vector(left, left, _constants(range(k, k + width))) for k in (0, width))
                left = builder.fadd(low, high)
            place = builder.add(at, builder.mul(stride, stride.type(t)))
            place = _place(context, builder, signature.args[0], array, place, REAL)
            builder.store(builder.fadd(builder.load(place), builder.extract_element(left, WORD(0))), place)
        return context.get_dummy_value()

    return types.void(array, at, stride, sums), build


@operation
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """A vector, or one float32 value, to place ``at``: of a uint16 array as the bits of bfloat16, ties to even."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, at, value = values
        if signature.args[0].dtype == types.uint16:
            value = _to_bfloat16(builder, value)
        element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
        place = _place(context, builder, signature.args[0], array, at, element)
        align = 2 if element == SHORT else 4
        builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=align)
        return context.get_dummy_value()

    return types.void(array, at, vector if value is vector else types.float32), build


def _to_bfloat16(builder: Any, value: Any) -> Any:
    shape = (lambda kind: ir.VectorType(kind, LANES)) if isinstance(value.type, ir.VectorType) else (lambda kind: kind)
    bits = builder.bitcast(value, shape(WORD))
    constant = {n: _constants([n] * LANES) if bits.type != WORD else WORD(n) for n in (1, 16, 0x7FFF)}
    odd = builder.and_(builder.lshr(bits, constant[16]), constant[1])
    rounded = builder.add(builder.add(bits, constant[0x7FFF]), odd)
    return builder.trunc(builder.lshr(rounded, constant[16]), shape(SHORT))


@of_constants
def look_up(typing: Any, table: Any, packed: Any, at: Any, bits: Any) -> Any:
    """The values of sixteen codes.

    Args:
        table: float32: the value of every code; of less than 4 bits, all again up to sixteen.
        packed: bytes, the first code in the lowest bits of the first.
        at: where the codes begin.
        bits: of a code; a constant.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    width = bits.literal_value

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        table, packed, at = values[:3]
        table = _place(context, builder, signature.args[0], table, at.type(0), REAL)
        packed = _place(context, builder, signature.args[1], packed, at, BYTE)
        words, features = _words(builder, packed, width), _features(context)
        if width > 4 or "+avx2" not in features:
            return _loaded_one_by_one(builder, table, words, width)
        if "+avx512f" not in features:
            return _looked_up_by_halves(builder, table, _codes(builder, words), width)
        nibbles = width == 4 and "+avx512vbmi" in features
        codes = _nibbles(builder, packed) if nibbles else _codes(builder, words)
        name = "llvm.x86.avx512.permvar.sf.512"  # reads the low 4 bits of every index
        return _call(builder, name, REALS, [_load(builder, table, REALS), codes])

    return vector(table, packed, at, bits), build


@operation
def fetch(typing: Any, packed: Any, at: Any) -> Any:
    """Ask memory for the bytes at place ``at``, which may lie behind the end: they will be read soon."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        packed, at = values
        place = _place(context, builder, signature.args[0], packed, at, BYTE)
        _call(builder, "llvm.prefetch.p0i8", ir.VoidType(), [place, WORD(0), WORD(3), WORD(1)])
        return context.get_dummy_value()

    return types.void(packed, at), build


@operation
def bits_at(typing: Any, packed: Any, at: Any) -> Any:
    """Eight bytes from place ``at`` on, as one number."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, at = values
        return _load(builder, _place(context, builder, signature.args[0], array, at, BYTE), LONG)

    return types.uint64(packed, at), build


@operation
def take(typing: Any, table: Any, indices: Any, at: Any) -> Any:
    """The float32 values of ``table`` with sixteen indices, from place ``at`` of an array of uint16 on.

    Four indices are one load: loads are what limits it.
    """

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        table, indices, at = values
        table = _place(context, builder, signature.args[0], table, at.type(0), REAL)
        indices = _place(context, builder, signature.args[1], indices, at, SHORT)
        found = ir.Constant(REALS, ir.Undefined)
        for lane in range(LANES):
            if lane % 4 == 0:
                four = _load(builder, builder.gep(indices, [WORD(lane)]), LONG)
            index = builder.and_(builder.lshr(four, LONG(16 * (lane % 4))), LONG(0xFFFF))
            found = builder.insert_element(found, builder.load(builder.gep(table, [index])), WORD(lane))
        return found

    return vector(table, indices, at), build


def _features(context: Any) -> list[str]:
    """What the processor that is compiled for has, as LLVM names it."""
    return context.codegen().magic_tuple()[2].split(",")


def _words(builder: Any, packed: Any, width: int) -> list[tuple[Any, int]]:
    """For every lane a word of the packed bytes, and how many bits its code is shifted there."""
    reach = -(-LANES * width // 32)  # words that all codes lie in
    per, found = LANES // reach, []
    for k in range(reach):
        begin = per * width // 8 * k
        early = max(0, begin + 4 - LANES * width // 8)  # bytes by which a word would go beyond the last code
        word = _load(builder, builder.gep(packed, [WORD(begin - early)]), WORD)
        found += [(word, lane * width + 8 * early) for lane in range(per)]
    return found


def _codes(builder: Any, words: list[tuple[Any, int]]) -> Any:
    """The words of all lanes, every code in the lowest bits, with others above it."""
    found = ir.Constant(WORDS, ir.Undefined)
    for word in dict(words):
        mine = [LANES * (words[lane][0] is word) + lane for lane in range(LANES)]
        found = builder.shuffle_vector(found, _spread(builder, word, WORDS), _constants(mine))
    return builder.lshr(found, _constants([shift for _, shift in words]))


def _nibbles(builder: Any, packed: Any) -> Any:
    """:func:`_codes` of 4 bits by AVX-512 VBMI, which has any eight bits of a word of 64 in any byte."""
    kind = ir.VectorType(BYTE, 4 * LANES)
    long = _spread(builder, _load(builder, packed, LONG), ir.VectorType(LONG, LANES // 2))
    places = ir.Constant(kind, [4 * lane if k == 0 else 0 for lane in range(LANES) for k in range(4)])
    found = _call(builder, "llvm.x86.avx512.pmultishift.qb.512", kind, [places, builder.bitcast(long, kind)])
    return builder.bitcast(found, WORDS)


def _looked_up_by_halves(builder: Any, table: Any, codes: Any, width: int) -> Any:
    """By AVX2, which looks eight values up in a register of eight, and reads the low 3 bits of every index."""
    parts = []
    for at in (0, LANES // 2):
        part = builder.shuffle_vector(codes, codes, _constants(range(at, at + LANES // 2)))
        found = []
        for begin in (0, LANES // 2)[: 2 if width > 3 else 1]:
            eight = _load(builder, builder.gep(table, [WORD(begin)]), HALF)
            found.append(_call(builder, "llvm.x86.avx2.permps", HALF, [eight, part]))
        if width > 3:
            sign = builder.shl(part, _constants([28] * (LANES // 2)))
            second = builder.icmp_signed("<", sign, _constants([0] * (LANES // 2)))
            found = [builder.select(second, found[1], found[0])]
        parts += found
    return builder.shuffle_vector(*parts, _constants(range(LANES)))


def _loaded_one_by_one(builder: Any, table: Any, words: list[tuple[Any, int]], width: int) -> Any:
    found = ir.Constant(REALS, ir.Undefined)
    for lane, (word, shift) in enumerate(words):
        code = builder.and_(builder.lshr(word, WORD(shift)), WORD(2**width - 1))
        value = builder.load(builder.gep(table, [builder.zext(code, LONG)]))
        found = builder.insert_element(found, value, WORD(lane))
    return found


@operation
def real(typing: Any, stored: Any) -> Any:
    """A stored scale or zero point as float32: uint16 the bits of bfloat16, int16 those of float16, uint8 a number."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (value,) = values
        if stored == types.float32:
            return value
        if stored == types.uint8:
            return builder.uitofp(value, REAL)
        word = builder.zext(value, WORD)
        if stored == types.uint16:
            return builder.bitcast(builder.shl(word, WORD(16)), REAL)
        if "+f16c" in _features(context):
            return builder.fpext(builder.bitcast(value, ir.HalfType()), REAL)
        exponent, fraction = builder.and_(word, WORD(0x7C00)), builder.and_(word, WORD(0x3FF))
        normal = builder.add(builder.shl(builder.and_(word, WORD(0x7FFF)), WORD(13)), WORD(112 << 23))
        small = builder.bitcast(builder.fmul(builder.uitofp(fraction, REAL), REAL(2.0**-24)), WORD)
        size = builder.select(builder.icmp_unsigned("==", exponent, WORD(0)), small, normal)
        sign = builder.shl(builder.and_(word, WORD(0x8000)), WORD(16))
        return builder.bitcast(builder.or_(size, sign), REAL)

    return types.float32(stored), build


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, WORD(0))
    return builder.shuffle_vector(one, one, _constants([0] * kind.count))


def _constants(values: Sequence[int] | range) -> Any:
    return ir.Constant(ir.VectorType(WORD, len(values)), list(values))


def _call(builder: Any, name: str, result: Any, values: Sequence[Any]) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any, element: Any) -> Any:
    """A pointer to an array's element."""
    memory = context.make_array(kind)(context, builder, array).data
    return builder.gep(builder.bitcast(memory, element.as_pointer()), [at])


def _load(builder: Any, pointer: Any, kind: Any) -> Any:
    """From anywhere: an array of float32 lies at a multiple of four bytes, codes at any byte."""
    align = 1 if kind in (WORD, LONG) else 4
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)
