"""Emitters: LLVM code for scalars and vectors alike, of which the intrinsics of `simd` are made.

A vector holds one register of the host. Storage dtypes go by name, as in `simd`.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from . import runtime

X86 = platform.machine().lower() in ("x86_64", "amd64")
_features = runtime.cpu_features()
REGISTER_BYTES = 64 if "avx512f" in _features else 32 if "avx2" in _features else 16
"""Bytes of one vector register."""
REGISTERS = 32 if "avx512f" in _features or "neon" in _features else 16
AMX = "amx-bf16" in _features and REGISTER_BYTES == 64
"""Whether pairs of bfloat16 are multiplied on tile registers."""
PAIRS = {"avx512bf16", "sse4a"} <= _features and REGISTER_BYTES == 64
"""Whether `dot_pairs_value` pays: Intel's takes two cycles, half the rate of float32 multiply-adds."""
TABLES = X86 and REGISTER_BYTES == 64
"""Whether registers serve as tables of one number for each lane."""
BYTES = "avx512vnni" in _features and REGISTER_BYTES == 64
"""Whether integers of 8 and 16 bits are multiplied as they are."""
NIBBLES = BYTES and "avx512vbmi" in _features
"""Whether, besides, bytes and pairs of them are looked up anywhere in a register."""
DESCRIPTION = f"{REGISTER_BYTES * 8}-bit vectors, {REGISTERS} registers" + ", AMX" * AMX

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))

LOWEST = {np.float32: -127.0, np.float64: -1023.0}
"""The exponent whose field is 0."""
# 2**x on [-1/2, 1/2], minimax in the relative error: 3.9e-9 and 1.8e-17.
EXP2 = {
    np.float32: (1.0, 0.6931472253950111, 0.24022651084117294, 0.05550297314199325, 0.009618030782505154,
                 0.0013410000966100157, 0.00015469731977475548),
    np.float64: (1.0, 0.6931471805599457, 0.24022650695910097, 0.05550410866479039, 0.009618129107607003,
                 0.0013333558153439966, 0.0001540353044157213, 1.5252727385193868e-05, 1.3215442675329823e-06,
                 1.0180647659234139e-07, 7.072570412814423e-09, 4.078071929588337e-10),
}  # fmt: skip

# The same to 1.6e-07, for weights that are rounded to bfloat16 but add up in float32.
EXP2_SHORT = (1.0, 0.6931469440460205, 0.24022120237350464,
              0.05550713092088699, 0.009675540961325169, 0.0013276472454890609)  # fmt: skip

# (2**x - 1) / x on [-1/32, 1/32], and on [-1/16, 1/16]: 2**x to 1.6e-9 and 3e-18; the short one to 4.3e-7.
EXP2_STEP: dict[Any, tuple[float, ...]] = {
    np.float32: (0.6931471805599453, 0.24023428, 0.0555041),
    np.float64: (0.6931471805599453, 0.24022650695911516, 0.05550410866480235, 0.00961812908517851,
                 0.0013333558238952554, 0.00015404521949619993, 1.525184429016982e-05),
    "short": (0.6931882800931597, 0.2402478723792032),
}  # fmt: skip

# ln(2) in two parts: a few times the first is exact.
LN2 = {np.float32: (0.693138122558594, 9.0580006145e-06),
       np.float64: (6.93147180369123816490e-01, 1.90821492927058770002e-10)}  # fmt: skip
# log((1 + s) / (1 - s)) = 2 s + s * (z * these), z = s * s: 2**-34 and 2**-58.
LOG = {
    np.float32: (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841),
    np.float64: (0.6666666666666735, 0.3999999999940942, 0.2857142874366239, 0.22222198432149784,
                 0.1818357216161805, 0.15313837699209373, 0.14798198605116586),
}  # fmt: skip


def suffix(t: Any) -> str:
    """How LLVM spells a type in an intrinsic's name."""
    if isinstance(t, ir.VectorType):
        return f"v{t.count}{suffix(t.element)}"
    return {"float": "f32", "double": "f64", "half": "f16"}.get(str(t), str(t))


def call(b: ir.IRBuilder, name: str, *args: Any) -> Any:
    """Call the LLVM intrinsic `name` on arguments of one type. (`declare_intrinsic` knows no vectors.)"""
    t = args[0].type
    fn = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(t, [a.type for a in args]), f"llvm.{name}.{suffix(t)}"
    )
    return b.call(fn, args)


def const(t: Any, x: Any) -> ir.Constant:
    """A constant of a scalar type, or the same in every lane."""
    return ir.Constant(t, [x] * t.count if isinstance(t, ir.VectorType) else x)


def splat_value(b: ir.IRBuilder, t: Any, x: Any) -> Any:
    """A vector of type t with the scalar x in every lane."""
    undefined = ir.Constant(t, ir.Undefined)
    first = b.insert_element(undefined, x, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, t.count), [0] * t.count))


def pointer(b: ir.IRBuilder, address: Any, t: Any) -> Any:
    return b.inttoptr(address, t.as_pointer())


def load_value(b: ir.IRBuilder, p: Any) -> Any:
    t = p.type.pointee
    return b.load(p, align=align(t))


def load_at(b: ir.IRBuilder, address: Any, shift: int, t: Any) -> Any:
    """What lies so many bytes behind an address."""
    return load_value(b, pointer(b, b.add(address, const(I64, shift)), t))


def store_value(b: ir.IRBuilder, x: Any, p: Any) -> None:
    b.store(x, p, align=align(x.type))


def align(t: Any) -> int:
    element = t.element if isinstance(t, ir.VectorType) else t
    return {"float": 4, "double": 8, "half": 2}.get(str(element)) or element.width // 8


def fma_value(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    # Without the instruction, llvm.fma would call libm once per lane.
    return call(b, "fma" if "fma" in _features or "neon" in _features else "fmuladd", x, y, z)


def quotient_value(b: ir.IRBuilder, x: Any, y: Any, inverse: Any) -> Any:
    """x / y, where ``inverse = 1 / y`` is known, to half a unit and a bit: dividing takes 16 cycles."""
    first = b.fmul(x, inverse)
    mended = fma_value(b, fma_value(b, b.fneg(first), y, x), inverse, first)
    return b.select(b.fcmp_ordered("==", mended, mended), mended, first)  # what is left of inf is NaN


def transpose_values(b: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """The columns of a square of vectors: in each step pairs of rows swap blocks of half the size."""
    rows, n = list(rows), len(rows)
    half = n // 2
    while half:
        low = [c if not c & half else n + c - half for c in range(n)]
        high = [c + half if not c & half else n + c for c in range(n)]
        for i in range(n):
            if not i & half:
                x, y = rows[i], rows[i + half]
                for at, lanes_ in ((i, low), (i + half, high)):
                    rows[at] = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, n), lanes_))
        half //= 2
    return rows


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def dot_pairs_value(b: ir.IRBuilder, total: Any, x: Any, y: Any) -> Any:
    """total + x0 * y0 + x1 * y1 for the two bfloat16 that each 32-bit lane of x and y holds (AVX512-BF16)."""
    pairs = ir.VectorType(_Bfloat(), 32)
    fn = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(total.type, [total.type, pairs, pairs]), "llvm.x86.avx512bf16.dpbf16ps.512"
    )
    return b.call(fn, [total, b.bitcast(x, pairs), b.bitcast(y, pairs)])


def narrow_halves_value(b: ir.IRBuilder, low: Any, high: Any) -> Any:
    """The bits of bfloat16 numbers, those of low before those of high (AVX512-BF16); denormals become 0."""
    t = ir.VectorType(_Bfloat(), 32)
    fn = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(t, [low.type, low.type]), "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    )
    return b.bitcast(b.call(fn, [high, low]), ir.VectorType(I16, 32))


def prefetch_value(b: ir.IRBuilder, address: Any, locality: int = 3) -> None:
    """Ask for the cache line of an address, which may lie anywhere; 3 is for all caches, 2 not the first."""
    p = pointer(b, address, I8)
    hint = ir.FunctionType(ir.VoidType(), [p.type, I32, I32, I32])
    fn = cgutils.get_or_insert_function(b.module, hint, "llvm.prefetch.p0")
    b.call(fn, [p, *(ir.Constant(I32, n) for n in (0, locality, 1))])  # for reading, data


def upper_value(b: ir.IRBuilder, x: Any) -> Any:
    """float32 x cut to a bfloat16."""
    it = int_type(x.type)
    return b.bitcast(b.and_(b.bitcast(x, it), const(it, -0x10000)), x.type)


def rest_value(b: ir.IRBuilder, x: Any) -> Any:
    """What `upper_value` cuts off, of a float16 a bfloat16 too; 0 of inf and NaN."""
    low = b.fsub(x, upper_value(b, x))
    return b.select(b.fcmp_ordered("==", low, low), low, const(x.type, 0.0))


def greater_value(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """max(x, y), and y where x is NaN: one instruction on x86."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def int_type(t: Any) -> Any:
    """The integer type of the same width, lane by lane."""
    if isinstance(t, ir.VectorType):
        return ir.VectorType(int_type(t.element), t.count)
    return {"float": I32, "double": I64}[str(t)]


def _is_single(t: Any) -> bool:
    return suffix(t).endswith("f32")


def exp2_floor(dtype: Any) -> float:
    """The exponent from which down 2**x is 0."""
    return LOWEST[dtype] + TABLES


def _whole(b: ir.IRBuilder, x: Any) -> Any:
    """The whole number nearest to x, which is small."""
    if "avx2" in _features or "neon" in _features:
        return call(b, "rint", x)
    # SSE2 has no such instruction, and rint would call libm once per lane.
    magic = const(x.type, 1.5 * 2.0 ** (23 if suffix(x.type).endswith("f32") else 52))
    return b.fsub(b.fadd(x, magic), magic)


def _times_power(b: ir.IRBuilder, p: Any, n: Any) -> Any:
    """p * 2**n for a whole number n from `LOWEST`, which gives 0, to the power that is inf."""
    t = p.type
    bits, bias = (23, 127) if _is_single(t) else (52, 1023)
    # The sum has the exponent's field in its lowest bits. (AVX2 cannot convert float64 to integers, and
    # AVX-512's vscalefps takes some 150 cycles where its result is below the normal numbers.)
    field = b.bitcast(b.fadd(n, const(t, 1.5 * 2.0**bits + bias)), int_type(t))
    return b.fmul(p, b.bitcast(b.shl(field, const(field.type, bits)), t))


def exp2_product_value(b: ir.IRBuilder, x: Any, c: Any, floor: Any, short: bool = False) -> Any:
    """2**(x * c) for c > 0, where x * c <= 127; 0 from `floor` down, NaN stays NaN.

    The product is never rounded as a whole: only its distance from a whole number is, which is small, or from
    a multiple of 1/16 or 1/8 whose power a register keeps. `short` is for weights that become bfloat16.
    """
    t = x.type
    it = int_type(t)
    single = _is_single(t)
    bits, bias = (23, 127) if single else (52, 1023)
    if TABLES and isinstance(t, ir.VectorType):
        step = t.count.bit_length() - 1
        # Added to this, a product is rounded to a multiple and has its number in the lowest bits: those of
        # the multiple's fraction choose a power, the others are added to the exponent's field.
        magic = const(t, 1.5 * 2.0 ** (bits - step))
        shifted = fma_value(b, x, c, magic)
        f = fma_value(b, x, c, b.fneg(b.fsub(shifted, magic)))
        number = b.bitcast(shifted, it)
        powers = 2.0 ** (np.arange(t.count) / t.count)
        fields = powers.astype(np.float32 if single else np.float64).view(np.int32 if single else np.int64)
        table = [int(x) - (i << (bits - step)) for i, x in enumerate(fields)]
        power = b.add(permute_value(b, ir.Constant(it, table), number), b.shl(number, const(it, bits - step)))
        power = b.bitcast(power, t)
        rest = b.fmul(f, _horner(b, f, EXP2_STEP["short" if short else np.float32 if single else np.float64]))
        y = fma_value(b, power, rest, power)
        return b.select(b.fcmp_unordered(">", x, floor), y, const(t, 0.0))
    polynomial = EXP2_SHORT if short else EXP2[np.float32 if single else np.float64]
    above = b.select(b.fcmp_ordered("<", x, floor), floor, x)
    # Added to this, a product is rounded to a whole number and has the exponent's field in its lowest bits.
    magic = const(t, 1.5 * 2.0**bits + bias)
    shifted = fma_value(b, above, c, magic)
    f = fma_value(b, above, c, b.fneg(b.fsub(shifted, magic)))
    y = b.fmul(_horner(b, f, polynomial), b.bitcast(b.shl(b.bitcast(shifted, it), const(it, bits)), t))
    return b.select(b.fcmp_ordered("<=", x, floor), const(t, 0.0), y) if TABLES else y


def permute_value(b: ir.IRBuilder, table: Any, index: Any) -> Any:
    """The number of the table, a vector of integers, that the lowest bits of each index say (AVX-512)."""
    kind = "si" if table.type.element == I32 else "di"
    fn = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(table.type, [table.type] * 2), f"llvm.x86.avx512.permvar.{kind}.512"
    )
    return b.call(fn, [table, index])


def exp_value(b: ir.IRBuilder, x: Any) -> Any:
    """e**x for x <= 0 and inf, to one unit in the last place; NaN stays NaN."""
    t = x.type
    dtype, high = (np.float32, 128.25) if _is_single(t) else (np.float64, 1024.25)
    for sign, limit in (("<", LOWEST[dtype]), (">", high)):
        limit = const(t, limit * np.log(2))
        x = b.select(b.fcmp_ordered(sign, x, limit), limit, x)
    n = _whole(b, b.fmul(x, const(t, 1 / np.log(2))))
    for part in LN2[dtype]:
        x = fma_value(b, n, const(t, -part), x)
    return _times_power(b, _horner(b, x, [c / np.log(2) ** k for k, c in enumerate(EXP2[dtype])]), n)


def log_value(b: ir.IRBuilder, x: Any) -> Any:
    """The natural logarithm of normal numbers, 0, inf and NaN, to one unit in the last place."""
    t = x.type
    it = int_type(t)
    dtype, bits, root = (
        (np.float32, 23, 0x3F3504F3) if suffix(t).endswith("f32") else (np.float64, 52, 0x3FE6A09E667F3BCD)
    )
    # x = 2**k * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
    pattern = b.bitcast(x, it)
    k = b.ashr(b.sub(pattern, const(it, root)), const(it, bits))
    f = b.fsub(b.bitcast(b.sub(pattern, b.shl(k, const(it, bits))), t), const(t, 1.0))
    k = b.sitofp(k, t)
    high, low = (const(t, part) for part in LN2[dtype])
    s = b.fdiv(f, b.fadd(f, const(t, 2.0)))
    z = b.fmul(s, s)
    half = b.fmul(b.fmul(f, f), const(t, 0.5))
    small = fma_value(b, s, fma_value(b, z, _horner(b, z, LOG[dtype]), half), b.fmul(k, low))
    y = fma_value(b, k, high, b.fsub(f, b.fsub(half, small)))
    y = b.select(b.fcmp_ordered("==", x, const(t, 0.0)), const(t, float("-inf")), y)
    return b.select(b.fcmp_unordered(">=", x, const(t, float("inf"))), x, y)


def _horner(b: ir.IRBuilder, x: Any, coefficients: Any) -> Any:
    """The polynomial with these coefficients, lowest first."""
    *others, p = (const(x.type, c) for c in coefficients)
    for c in reversed(others):
        p = fma_value(b, p, x, c)
    return p


def tanh_value(b: ir.IRBuilder, x: Any) -> Any:
    """tanh through e**(2|x|) - 1, which keeps the relative accuracy of small x."""
    t = x.type
    size = call(b, "fabs", x)
    limit = const(t, 10.0 if _is_single(t) else 20.0)  # from there on tanh rounds to 1
    size = b.select(b.fcmp_ordered(">", size, limit), limit, size)
    exponent = b.fmul(size, const(t, 2 / np.log(2)))
    n = _whole(b, exponent)
    f = b.fsub(exponent, n)
    power = _times_power(b, const(t, 1.0), n)
    # e**(2|x|) - 1 = power * (f * p) + (power - 1)
    fraction = _horner(b, f, EXP2[np.float32 if _is_single(t) else np.float64][1:])
    e = fma_value(b, power, b.fmul(f, fraction), b.fsub(power, const(t, 1.0)))
    return call(b, "copysign", b.fdiv(e, b.fadd(e, const(t, 2.0))), x)


def widen_value(b: ir.IRBuilder, x: Any, storage: str) -> Any:
    """Numbers as stored (float16 and bfloat16 as their 16 bits) -> float32 or float64."""
    if storage in ("float32", "float64"):
        return x
    it, ft = _like(x.type, I32), _like(x.type, ir.FloatType())
    if storage == "bfloat16":
        return b.bitcast(b.shl(b.zext(x, it), const(it, 16)), ft)
    if "f16c" in _features:
        return b.fpext(b.bitcast(x, _like(x.type, ir.HalfType())), ft)
    bits = b.zext(x, it)
    sign = b.shl(b.and_(bits, const(it, 0x8000)), const(it, 16))
    size = b.and_(bits, const(it, 0x7FFF))
    # Shifted into float32's fields the exponent is 112 too small, for denormals too.
    number = b.bitcast(b.fmul(b.bitcast(b.shl(size, const(it, 13)), ft), const(ft, 2.0**112)), it)
    special = b.select(b.icmp_unsigned(">=", size, const(it, 0x7C00)), const(it, 0x7F800000), const(it, 0))
    return b.bitcast(b.or_(b.or_(number, special), sign), ft)


def narrow_value(b: ir.IRBuilder, x: Any, storage: str) -> Any:
    """float32 or float64 -> numbers as stored, rounded to nearest even."""
    if storage in ("float32", "float64"):
        return x
    t, ht, it = x.type, _like(x.type, I16), _like(x.type, I32)
    if storage == "float16" and "f16c" in _features:
        return b.bitcast(b.fptrunc(x, _like(t, ir.HalfType())), ht)
    bits = b.bitcast(x, it)
    if storage == "bfloat16":
        return b.trunc(b.lshr(round_bits(b, x, 16), const(it, 16)), ht)
    sign = b.and_(b.lshr(bits, const(it, 16)), const(it, 0x8000))
    size = b.and_(bits, const(it, 0x7FFFFFFF))
    normal = b.lshr(
        b.add(b.sub(size, const(it, 112 << 23)), b.add(const(it, 0xFFF), _bit(b, size, 13))), const(it, 13)
    )
    # Adding 0.5 puts the unit of float16's denormals, 2**-24, at the last bit of float32.
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(size, t), const(t, 0.5)), it), const(it, 0x3F000000))
    half = b.select(b.icmp_unsigned("<", size, const(it, 113 << 23)), tiny, normal)
    half = b.select(b.icmp_unsigned(">=", size, const(it, 143 << 23)), const(it, 0x7C00), half)
    half = b.select(b.icmp_unsigned(">", size, const(it, 0x7F800000)), const(it, 0x7E00), half)
    return b.trunc(b.or_(half, sign), ht)


def _bit(b: ir.IRBuilder, bits: Any, n: int) -> Any:
    return b.and_(b.lshr(bits, const(bits.type, n)), const(bits.type, 1))


def round_bits(b: ir.IRBuilder, x: Any, dropped: int) -> Any:
    """The bits of float32 x after rounding to nearest even at bit `dropped`; NaN stays a (quiet) NaN."""
    it = int_type(x.type)
    bits = b.bitcast(x, it)
    rounded = b.add(bits, b.add(const(it, (1 << (dropped - 1)) - 1), _bit(b, bits, dropped)))
    return b.select(b.fcmp_unordered("uno", x, x), b.or_(bits, const(it, 1 << 22)), rounded)


def _like(t: Any, element: Any) -> Any:
    return ir.VectorType(element, t.count) if isinstance(t, ir.VectorType) else element


def stored(storage: str) -> Any:
    """LLVM's type of a number in memory."""
    return {"float32": ir.FloatType(), "float64": ir.DoubleType()}.get(storage, I16)


def pause_value(b: ir.IRBuilder) -> None:
    """What a thread does while it waits for another; nothing where there is no such instruction."""
    if X86:
        pause = ir.FunctionType(ir.VoidType(), [])
        b.call(cgutils.get_or_insert_function(b.module, pause, "llvm.x86.sse2.pause"), [])


def loop_values(b: ir.IRBuilder, count: Any, first: list[Any], body: Any) -> list[Any]:
    """The values after `count` rounds, at least one, of ``body(values, round)``."""
    before, head, after = b.block, b.append_basic_block("round"), b.append_basic_block("rounds_done")
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(I64)
    running = [b.phi(value.type) for value in first]
    result = body(running, k)
    following = b.add(k, const(I64, 1))
    for phi, start, later in zip([k, *running], [const(I64, 0), *first], [following, *result], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(later, b.block)
    b.cbranch(b.icmp_signed("<", following, count), head, after)
    b.position_at_end(after)
    return result


def phi_value(b: ir.IRBuilder, incoming: list[tuple[Any, Any]]) -> Any:
    """The value of whichever of these (value, block) the control comes from."""
    phi = b.phi(incoming[0][0].type)
    for value, block in incoming:
        phi.add_incoming(value, block)
    return phi
