"""Vector operations: a Numba type whose values are LLVM vectors, and the intrinsics on it.

A vector holds `lanes(dtype)` numbers: one register of the host. Addresses are plain integers in bytes; loads
and stores need no alignment. Storage dtypes go by name: "float32", "float64", "float16", "bfloat16"; kernels
see only float32 and float64, and convert where they load and store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .emitters import (
    I8,
    I32,
    I64,
    REGISTER_BYTES,
    align,
    call,
    const,
    exp2_product_value,
    exp_value,
    fma_value,
    greater_value,
    int_type,
    load_value,
    log_value,
    narrow_value,
    pointer,
    prefetch_value,
    rest_value,
    round_bits,
    splat_value,
    store_value,
    stored,
    tanh_value,
    transpose_values,
    upper_value,
    widen_value,
)


class Vector(types.Type):
    """One register of `lanes` numbers."""

    def __init__(self, dtype: Any, lanes: int) -> None:
        self.dtype = dtype
        self.lanes = lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(
            dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), fe_type.lanes)
        )


def lanes(dtype: Any) -> int:
    """How many numbers of this dtype fill one vector."""
    return REGISTER_BYTES // np.dtype(dtype).itemsize


def vector(dtype: Any) -> Vector:
    """The Numba type of a vector of this dtype (a Numba scalar type)."""
    return Vector(dtype, REGISTER_BYTES * 8 // dtype.bitwidth)


def _compute(storage: str) -> Any:
    return types.float64 if storage == "float64" else types.float32


def loads(storage: str) -> tuple[Any, Any, Any, Any]:
    """(load, store, get, put) for numbers stored so: vectors and single numbers, converted on the way.

    ``load(address) -> vector``, ``store(address, vector)``, ``get(address) -> number``,
    ``put(address, number)``.
    """
    number = _compute(storage)
    element = stored(storage)

    def make(numba_type: Any, t: Any) -> tuple[Any, Any]:
        @intrinsic
        def read(typingctx: Any, address: Any) -> Any:
            def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
                return widen_value(b, load_value(b, pointer(b, args[0], t)), storage)

            return numba_type(types.int64), codegen

        @intrinsic
        def write(typingctx: Any, address: Any, x: Any) -> Any:
            def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
                store_value(b, narrow_value(b, args[1], storage), pointer(b, args[0], t))
                return context.get_dummy_value()

            return types.void(types.int64, numba_type), codegen

        return read, write

    load, store = make(vector(number), ir.VectorType(element, vector(number).lanes))
    get, put = make(number, element)
    return load, store, get, put


def streaming(storage: str) -> Any:
    """A store that goes past the caches; its address must be a multiple of the vector's bytes as stored."""
    number = _compute(storage)

    @intrinsic
    def stream(typingctx: Any, address: Any, x: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x = narrow_value(b, args[1], storage)
            target = pointer(b, args[0], x.type)
            stored = b.store(x, target, align=x.type.count * align(x.type))
            stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
            return context.get_dummy_value()

        return types.void(types.int64, vector(number)), codegen

    return stream


def turns(storage: str) -> tuple[Any, Any]:
    """(turn_in, turn_out): transpose a square of vectors of numbers stored so.

    ``turn_in(source, source_row, target, target_row, factor)`` widens its numbers and multiplies them;
    ``turn_out(source, source_row, target, target_row)`` narrows. Rows are so many bytes apart.
    """
    number = _compute(storage)
    count = vector(number).lanes

    def make(scaled: bool) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, source_row, target, target_row, *factor = args
            t = ir.VectorType(stored(storage) if scaled else context.get_value_type(number), count)
            columns = transpose_values(b, [load_value(b, pointer(b, _row(b, source, source_row, r), t))
                                           for r in range(count)])  # fmt: skip
            for r, x in enumerate(columns):
                if scaled:
                    x = widen_value(b, x, storage)
                    x = b.fmul(x, splat_value(b, x.type, factor[0]))
                else:
                    x = narrow_value(b, x, storage)
                store_value(b, x, pointer(b, _row(b, target, target_row, r), x.type))
            return context.get_dummy_value()

        return codegen

    @intrinsic
    def turn_in(
        typingctx: Any, source: Any, source_row: Any, target: Any, target_row: Any, factor: Any
    ) -> Any:
        return types.void(*[types.int64] * 4, number), make(True)

    @intrinsic
    def turn_out(typingctx: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
        return types.void(*[types.int64] * 4), make(False)

    return turn_in, turn_out


def _row(b: ir.IRBuilder, address: Any, row: Any, r: int) -> Any:
    return b.add(address, b.mul(row, const(I64, r)))


def _elementwise(emit: Any, arity: int) -> Any:
    """An intrinsic on `arity` vectors (or numbers) of one type."""
    if arity == 1:

        @intrinsic
        def one(typingctx: Any, x: Any) -> Any:
            return x(x), lambda context, b, signature, args: emit(b, *args)

        return one
    if arity == 2:

        @intrinsic
        def two(typingctx: Any, x: Any, y: Any) -> Any:
            return x(x, x), lambda context, b, signature, args: emit(b, *args)

        return two

    if arity == 3:

        @intrinsic
        def three(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
            return x(x, x, x), lambda context, b, signature, args: emit(b, *args)

        return three

    @intrinsic
    def four(typingctx: Any, x: Any, y: Any, z: Any, rest: Any) -> Any:
        return x(x, x, x, x), lambda context, b, signature, args: emit(b, *args)

    return four


same = _elementwise(lambda b, x: x, 1)
absolute = _elementwise(lambda b, x: call(b, "fabs", x), 1)
round_down = _elementwise(lambda b, x: call(b, "floor", x), 1)
round_near = _elementwise(lambda b, x: call(b, "rint", x), 1)
add = _elementwise(lambda b, x, y: b.fadd(x, y), 2)
sub = _elementwise(lambda b, x, y: b.fsub(x, y), 2)
mul = _elementwise(lambda b, x, y: b.fmul(x, y), 2)
div = _elementwise(lambda b, x, y: b.fdiv(x, y), 2)
fma = _elementwise(fma_value, 3)
greater = _elementwise(greater_value, 2)
exp2_product = _elementwise(exp2_product_value, 3)
exp2_product_short = _elementwise(lambda b, x, c, low: exp2_product_value(b, x, c, low, short=True), 3)
smaller = _elementwise(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y), 2)
exp = _elementwise(exp_value, 1)
log = _elementwise(log_value, 1)
tanh = _elementwise(tanh_value, 1)
round_bfloat16 = _elementwise(
    lambda b, x: b.bitcast(b.and_(round_bits(b, x, 16), const(int_type(x.type), -0x10000)), x.type), 1
)
if_above = _elementwise(lambda b, x, y, margin: b.select(b.fcmp_ordered(">", x, b.fadd(y, margin)), x, y), 3)
"""x where it is above y by more than the margin, else y."""
if_equal = _elementwise(lambda b, x, y, z, rest: b.select(b.fcmp_ordered("==", x, y), z, rest), 4)
if_at_most = _elementwise(lambda b, x, y, z, rest: b.select(b.fcmp_ordered("<=", x, y), z, rest), 4)
nan_if_unordered = _elementwise(
    lambda b, x, y, rest: b.select(b.fcmp_unordered("uno", x, y), const(x.type, float("nan")), rest), 3
)
"""NaN where x or y is, else the rest."""
upper = _elementwise(upper_value, 1)
rest = _elementwise(rest_value, 1)
finite_or_zero = _elementwise(
    lambda b, x: b.select(b.fcmp_ordered("==", x, const(x.type, float("-inf"))), const(x.type, 0.0), x), 1
)
"""0 in place of -inf: the maximum that a row without any key subtracts."""


@intrinsic
def all_ones(typingctx: Any, x: Any) -> Any:
    """Whether every lane is 1."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        other = b.fcmp_unordered("!=", args[0], const(args[0].type, 1.0))
        bits = ir.IntType(args[0].type.count)
        return b.icmp_unsigned("==", b.bitcast(other, bits), bits(0))

    return types.boolean(x), codegen


@intrinsic
def any_above(typingctx: Any, x: Any, y: Any) -> Any:
    """Whether x is above y in any lane."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        above = b.fcmp_ordered(">", *args)
        bits = ir.IntType(above.type.count)
        return b.icmp_unsigned("!=", b.bitcast(above, bits), bits(0))

    return types.boolean(x, x), codegen


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """A vector with the number x in every lane."""
    t = vector(x)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return splat_value(b, context.get_value_type(t), args[0])

    return t(x), codegen


def _across(emit: Any) -> Any:
    """An intrinsic that joins the lanes of a vector by halves and leaves the result in every lane."""

    @intrinsic
    def join(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x = args[0]
            count = x.type.count
            distance = count // 2
            while distance:
                order = [i ^ distance for i in range(count)]
                x = emit(b, x, b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, count), order)))
                distance //= 2
            return x

        return x(x), codegen

    return join


across_max = _across(greater_value)
across_sum = _across(lambda b, x, y: b.fadd(x, y))


@intrinsic
def where(typingctx: Any, address: Any, x: Any, y: Any) -> Any:
    """x where the byte at an address (one per lane) is not 0, else y."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, x, y = args
        t = ir.VectorType(I8, x.type.count)
        present = b.icmp_unsigned("!=", load_value(b, pointer(b, address, t)), const(t, 0))
        return b.select(present, x, y)

    return x(types.int64, x, x), codegen


@intrinsic
def outside(typingctx: Any, s: Any, j: Any, low: Any, high: Any) -> Any:
    """s where low <= j < high, else -inf; `low` and `high` are addresses of one integer per lane."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, position, *addresses = args
        it = int_type(x.type)
        first, last = (load_value(b, pointer(b, a, it)) for a in addresses)
        here = splat_value(b, it, b.trunc(position, it.element) if it.element.width < 64 else position)
        seen = b.and_(b.icmp_signed("<=", first, here), b.icmp_signed("<", here, last))
        return b.select(seen, x, const(x.type, float("-inf")))

    return s(s, types.int64, types.int64, types.int64), codegen


@intrinsic
def put_where_above(typingctx: Any, address: Any, x: Any, y: Any, j: Any, rest: Any) -> Any:
    """Where x is above y, the integer at the address, of one for each lane, becomes rest + j.

    `j` is a vector of whole numbers, `rest` an integer.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, x, y, j, rest = args
        it = int_type(x.type)
        place = pointer(b, address, it)
        here = b.add(
            b.fptosi(j, it), splat_value(b, it, b.trunc(rest, it.element) if it.element.width < 64 else rest)
        )
        store_value(b, b.select(b.fcmp_ordered(">", x, y), here, load_value(b, place)), place)
        return context.get_dummy_value()

    return types.void(types.int64, x, x, x, types.int64), codegen


def scalars(number: Any) -> tuple[Any, Any]:
    """(get, put) of one number of a Numba type at an address, as it is."""

    @intrinsic
    def get(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return load_value(b, pointer(b, args[0], context.get_value_type(number)))

        return number(types.int64), codegen

    @intrinsic
    def put(typingctx: Any, address: Any, x: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            store_value(b, args[1], pointer(b, args[0], context.get_value_type(number)))
            return context.get_dummy_value()

        return types.void(types.int64, number), codegen

    return get, put


def _prefetch(locality: int) -> Any:
    """``prefetch(address)``: ask for the cache line of an address, which may lie anywhere."""

    @intrinsic
    def prefetch(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            prefetch_value(b, args[0], locality)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


prefetch, prefetch_aside = _prefetch(3), _prefetch(2)
"""Into all caches, and into all but the first, where what is needed late would not stay."""


@intrinsic
def fetch_add(typingctx: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address, atomically; its value before."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", pointer(b, args[0], I64), ir.Constant(I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


def record(fields: Any) -> Any:
    """An intrinsic that reads an address as a record with these NumPy fields."""
    from numba.np.numpy_support import from_struct_dtype

    t = from_struct_dtype(np.dtype(fields))

    @intrinsic
    def view(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_value_type(t))

        return t(types.int64), codegen

    return view
