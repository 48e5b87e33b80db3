"""exp, log, tanh, sin and their like as plain arithmetic, for loops that LLVM is to vectorise.

A call into libm keeps a loop scalar: `math.tanh` over a tile of 96 x 64 scores took 61 us, and this one 2.
Each takes any number and is a few units in the last place from the true value. It is exact as written: a
caller's fast-math does not reach into it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .emitters import (
    EXP2,
    LN2,
    _horner,
    _is_single,
    _times_power,
    _whole,
    call,
    const,
    fma_value,
    int_type,
    log_value,
    tanh_value,
)


def _dtype(t: Any) -> Any:
    return np.float32 if _is_single(t) else np.float64


def _clamp(b: ir.IRBuilder, x: Any, low: float, high: float) -> Any:
    """x within two limits; NaN stays NaN."""
    for sign, limit in (("<", low), (">", high)):
        x = b.select(b.fcmp_ordered(sign, x, const(x.type, limit)), const(x.type, limit), x)
    return x


def _power_of_two(b: ir.IRBuilder, p: Any, n: Any) -> Any:
    """p * 2**n in two steps, so that neither overflows before the product does, nor is rounded twice."""
    half = _whole(b, b.fmul(n, const(n.type, 0.5)))
    return _times_power(b, _times_power(b, p, half), b.fsub(n, half))


def _exp(b: ir.IRBuilder, x: Any) -> Any:
    t, dtype = x.type, _dtype(x.type)
    x = _clamp(b, x, *((-104.0, 89.0) if _is_single(t) else (-746.0, 710.0)))
    n = _whole(b, b.fmul(x, const(t, 1 / math.log(2))))
    for part in LN2[dtype]:
        x = fma_value(b, n, const(t, -part), x)
    return _power_of_two(b, _horner(b, x, [c / math.log(2) ** k for k, c in enumerate(EXP2[dtype])]), n)


def _exp2(b: ir.IRBuilder, x: Any) -> Any:
    x = _clamp(b, x, *((-151.0, 129.0) if _is_single(x.type) else (-1076.0, 1025.0)))
    n = _whole(b, x)
    return _power_of_two(b, _horner(b, b.fsub(x, n), EXP2[_dtype(x.type)]), n)


def _expm1(b: ir.IRBuilder, x: Any) -> Any:
    t, dtype = x.type, _dtype(x.type)
    large = 80.0 if _is_single(t) else 700.0
    f = _clamp(b, x, -large, large)
    n = _whole(b, b.fmul(f, const(t, 1 / math.log(2))))
    for part in LN2[dtype]:
        f = fma_value(b, n, const(t, -part), f)
    power = _times_power(b, const(t, 1.0), n)
    # e**x - 1 = power * (f * p) + (power - 1)
    # The first is 1 to within the error of 2**x, which small x would show.
    p = _horner(b, f, [1.0, *(c / math.log(2) ** k for k, c in enumerate(EXP2[dtype]) if k > 1)])
    small = fma_value(b, power, b.fmul(f, p), b.fsub(power, const(t, 1.0)))
    return b.select(b.fcmp_ordered(">", x, const(t, large)), _exp(b, x), small)


def _log(b: ir.IRBuilder, x: Any) -> Any:
    t = x.type
    tiny, bits = (2.0**-126, 24) if _is_single(t) else (2.0**-1022, 54)
    below = b.fcmp_ordered("<", x, const(t, tiny))
    y = log_value(b, b.select(below, b.fmul(x, const(t, 2.0**bits)), x))
    y = b.fsub(y, b.select(below, const(t, bits * math.log(2)), const(t, 0.0)))
    return b.select(b.fcmp_ordered("<", x, const(t, 0.0)), const(t, float("nan")), y)


def _log2(b: ir.IRBuilder, x: Any) -> Any:
    """The exponent, which is exact, and the logarithm of the rest."""
    t = x.type
    it = int_type(t)
    dtype, mantissa = (np.float32, 23) if _is_single(t) else (np.float64, 52)
    tiny, bits = (2.0**-126, 24) if _is_single(t) else (2.0**-1022, 54)
    below = b.fcmp_ordered("<", x, const(t, tiny))
    y = b.select(below, b.fmul(x, const(t, 2.0**bits)), x)
    root = int(np.array(math.sqrt(0.5), dtype).view(f"i{np.dtype(dtype).itemsize}"))
    pattern = b.bitcast(y, it)
    k = b.ashr(b.sub(pattern, const(it, root)), const(it, mantissa))
    rest = b.bitcast(b.sub(pattern, b.shl(k, const(it, mantissa))), t)
    exponent = b.fsub(b.sitofp(k, t), b.select(below, const(t, float(bits)), const(t, 0.0)))
    z = fma_value(b, log_value(b, rest), const(t, 1 / math.log(2)), exponent)
    special = b.fcmp_unordered(">=", x, const(t, float("inf")))
    z = b.select(special, x, z)
    z = b.select(b.fcmp_ordered("==", x, const(t, 0.0)), const(t, float("-inf")), z)
    return b.select(b.fcmp_ordered("<", x, const(t, 0.0)), const(t, float("nan")), z)


def _log10(b: ir.IRBuilder, x: Any) -> Any:
    return b.fmul(_log(b, x), const(x.type, 1 / math.log(10)))


def _log1p(b: ir.IRBuilder, x: Any) -> Any:
    t = x.type
    one = const(t, 1.0)
    u = b.fadd(one, x)
    lost = b.fsub(x, b.fsub(u, one))
    y = b.fadd(_log(b, u), b.fdiv(lost, u))
    plain = b.or_(b.fcmp_ordered("==", u, const(t, float("inf"))), b.fcmp_ordered("==", u, const(t, 0.0)))
    return b.select(b.fcmp_ordered("==", u, one), x, b.select(plain, _log(b, u), y))


# pi / 2 in three parts: the product of the first two with whole numbers up to 2**20 is exact, also where
# there is no fused multiply-add.
HALF_PI = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
# sin(r) = r + r z (...), cos(r) = 1 - z / 2 + z z (...) with z = r r, |r| <= pi / 4: 2**-58 (fdlibm's).
SIN = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
       2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10)  # fmt: skip
COS = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
       -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11)  # fmt: skip


def sine_and_cosine_value(b: ir.IRBuilder, x: Any) -> tuple[Any, Any]:
    """sin(x) and cos(x) of float64, to one unit in the last place while |x| < 2**30."""
    t, it = x.type, int_type(x.type)
    one, magic = const(t, 1.0), const(t, 1.5 * 2.0**52)
    # The nearest whole number of quarter turns; its last bits are those of the sum.
    shifted = b.fadd(b.fmul(x, const(t, 2 / np.pi)), magic)
    n, bits = b.fsub(shifted, magic), b.bitcast(shifted, it)
    r = x
    for part in HALF_PI:
        r = fma_value(b, n, const(t, -part), r)
    z = b.fmul(r, r)
    sine = fma_value(b, b.fmul(r, z), _horner(b, z, SIN), r)
    half = b.fmul(z, const(t, 0.5))
    rest = b.fsub(one, half)
    lost = b.fsub(b.fsub(one, rest), half)
    cosine = b.fadd(rest, fma_value(b, b.fmul(z, z), _horner(b, z, COS), lost))
    odd = b.icmp_unsigned("!=", b.and_(bits, const(it, 1)), const(it, 0))
    results = []
    for first, second, turned in ((sine, cosine, bits), (cosine, sine, b.add(bits, const(it, 1)))):
        sign = b.shl(b.and_(b.lshr(turned, const(it, 1)), const(it, 1)), const(it, 63))
        chosen = b.bitcast(b.select(odd, second, first), it)
        results.append(b.bitcast(b.xor(chosen, sign), t))
    return results[0], results[1]


def _angle(which: Any) -> Any:
    """sin, cos or tan: float32 through float64, whose reduction is exact for large angles."""

    def emit(b: ir.IRBuilder, x: Any) -> Any:
        wide = b.fpext(x, ir.DoubleType()) if _is_single(x.type) else x
        y = which(b, *sine_and_cosine_value(b, wide))
        return b.fptrunc(y, x.type) if _is_single(x.type) else y

    return emit


def _pow(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """x**y of float32, through float64, which has room for the logarithm's error."""
    t, double = x.type, ir.DoubleType()
    if not _is_single(t):
        return call(b, "pow", x, y)
    one, zero = const(t, 1.0), const(t, 0.0)
    size, exponent = b.fpext(call(b, "fabs", x), double), b.fpext(y, double)
    power = b.fptrunc(_exp(b, b.fmul(exponent, _log(b, size))), t)
    half = _whole(b, b.fmul(y, const(t, 0.5)))
    even = b.fcmp_ordered("==", b.fadd(half, half), y)
    even = b.or_(even, b.fcmp_ordered(">=", call(b, "fabs", y), const(t, 2.0**24)))
    odd = b.fcmp_ordered("==", _whole(b, y), y)
    undefined = b.and_(b.fcmp_ordered("!=", x, zero), b.fcmp_ordered("!=", x, const(t, float("-inf"))))
    rest = b.select(undefined, const(t, float("nan")), power)
    signed = b.select(even, power, b.select(odd, b.fneg(power), rest))
    power = b.select(b.fcmp_ordered("<", call(b, "copysign", one, x), zero), signed, power)
    plain = b.or_(b.fcmp_ordered("==", x, one), b.fcmp_ordered("==", y, zero))
    return b.select(plain, one, power)


EMITTERS: dict[str, Any] = {
    "exp": _exp,
    "exp2": _exp2,
    "expm1": _expm1,
    "log": _log,
    "log2": _log2,
    "log10": _log10,
    "log1p": _log1p,
    "tanh": tanh_value,
    "sin": _angle(lambda b, sine, cosine: sine),
    "cos": _angle(lambda b, sine, cosine: cosine),
    "tan": _angle(lambda b, sine, cosine: b.fdiv(sine, cosine)),
}


def functions(jit: Any, dtype: Any) -> dict[Any, Any]:
    """What takes the place of functions of `math` and NumPy: compiled, for numbers, computing in `dtype`."""
    made: dict[Any, Any] = {}

    def put(function: Any, *names: str) -> None:
        compiled = jit(function)
        made.update(
            (getattr(module, n), compiled) for n in names for module in (math, np) if hasattr(module, n)
        )

    def one(name: str) -> None:
        emit = _intrinsics[name]

        def function(x):
            return emit(dtype(x))

        put(function, name)

    for name in EMITTERS:
        one(name)
    power = _power(types.float64 if dtype is np.float64 else types.float32)

    def raised(x, y):
        return power(x, y)

    def where(condition, x, y):
        return x if condition else y

    def minimum(x, y):
        return x if x < y or x != x else y

    def maximum(x, y):
        return x if x > y or x != x else y

    def clip(x, low, high):
        x = low if x < low else x
        return high if x > high else x

    def float_raised(x, y):
        return power(dtype(x), dtype(y))

    put(float_raised, "pow", "float_power")
    put(raised, "power")  # also numpy.pow
    put(where, "where")
    put(minimum, "minimum")
    put(maximum, "maximum")
    put(clip, "clip")
    return made


def _one(emit: Any) -> Any:
    @intrinsic
    def function(typingctx: Any, x: Any) -> Any:
        return x(x), lambda context, b, signature, args: emit(b, *args)

    return function


_intrinsics = {name: _one(emit) for name, emit in EMITTERS.items()}


def _power(number: Any) -> Any:
    """x**y as a number of the given type."""

    @intrinsic
    def power(typingctx: Any, x: Any, y: Any) -> Any:
        if isinstance(x, types.Integer) and isinstance(y, types.Integer):
            return None  # an int in NumPy, which raises for powers below 0; a kernel could only be wrong

        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return _pow(b, *(context.cast(b, a, t, number) for a, t in zip(args, (x, y), strict=True)))

        return number(x, y), codegen

    return power
