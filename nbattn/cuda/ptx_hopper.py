"""The PTX instructions of Hopper GPUs alone (sm_90a), as `ptx` has those of all.

``wgmma`` multiplies matrices for a warpgroup, four warps: the left one in shared memory or in registers, the
right one in shared memory, the sums in registers. A matrix in shared memory is a descriptor of 64 bits. The
instructions run on while the warps do; a wait says whose sums are meant, so that no use of them moves above.

Tiles come from global memory by tensor maps (TMA): one thread asks for a box, and an mbarrier's phase ends
when the arrivals and bytes that it was told of have come.
"""

# mypy: disable-error-code="empty-body"

from typing import Any

from llvmlite import ir
from llvmlite.ir.values import ArgumentAttributes
from numba.cuda import cgutils, types

from .compiler import MAP_WORDS
from .ptx_lines import F32, I32, I64, asm, boolean, element, emitted, float32, int32, int64, one_line

# --- products -----------------------------------------------------------------------------------------------


def _operands(first: int, count: int) -> str:
    return "{" + ",".join(f"${i}" for i in range(first, first + count)) + "}"


def _multiply(b: Any, sums: list[Any], left: list[Any], right: Any, add: Any, kind: str, turned: int) -> None:
    """sums (+)= left @ right; sums as places in memory."""
    n, words = len(sums), len(left)
    in_registers = words > 1
    left_text = _operands(n, words) if in_registers else f"${n}"
    flags = f"{turned}" if in_registers else f"0, {turned}"
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, ${n + words + 1}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{2 * n}k16.f32.{kind}.{kind} "
        f"{_operands(0, n)}, {left_text}, ${n + words}, p, 1, 1, {flags}; }}"
    )
    constraints = ["=f"] * n + ["r" if in_registers else "l"] * words + ["l", "r", *map(str, range(n))]
    arguments = [*left, right, add, *(b.load(place) for place in sums)]
    results = asm(b, [F32] * n, arguments, text, ",".join(constraints), stays=True)
    for value, place in zip(results, sums, strict=True):
        b.store(value, place)


def product(kind: str, columns: int) -> Any:
    """``f(c, a, b, add)``: c = a @ b.T for 64 rows of a, `columns` rows of b and 16 columns of both.

    a and b are descriptors. Where `add` holds, the product is added to c instead.
    ``wgmma.mma_async.sync.aligned.m64nNk16.f32.kind.kind c, a, b, add, 1, 1, 0, 0;``
    """

    def emit(context: Any, b: Any, kinds: Any, values: list[Any]) -> None:
        c, left, right, add = values
        sums = [element(context, b, kinds[0], c, ir.Constant(I64, 0), k) for k in range(columns // 2)]
        _multiply(b, sums, [left], right, b.zext(add, I32), kind, 0)

    arguments = {"c": None, "a": int64, "b": int64, "add": boolean}
    return emitted("product", product.__doc__, types.void, arguments, emit)


def product_of_registers(kind: str, columns: int) -> Any:
    """``f(c, a, ai, b)``: c += a @ b for 64 rows, a's fragment a[ai:ai + 4], and b's 16 rows of `columns`.

    ``wgmma.mma_async.sync.aligned.m64nNk16.f32.kind.kind c, {a0, a1, a2, a3}, b, 1, 1, 1, 1;``
    """

    def emit(context: Any, b: Any, kinds: Any, values: list[Any]) -> None:
        c, left, at, right = values
        sums = [element(context, b, kinds[0], c, ir.Constant(I64, 0), k) for k in range(columns // 2)]
        words = [b.load(element(context, b, kinds[1], left, at, k)) for k in range(4)]
        _multiply(b, sums, words, right, ir.Constant(I32, 1), kind, 1)

    arguments = {"c": None, "a": None, "ai": int64, "b": int64}
    return emitted("product_of_registers", product_of_registers.__doc__, types.void, arguments, emit)


def _tied(name: str, about: str | None, text: str, count: int) -> Any:
    """A function of an array whose numbers are known only after it, for all that the compiler knows."""

    def emit(context: Any, b: Any, kinds: Any, values: list[Any]) -> None:
        places = [element(context, b, kinds[0], values[0], ir.Constant(I64, 0), k) for k in range(count)]
        constraints = ",".join(["=f"] * count + [str(k) for k in range(count)])
        results = asm(b, [F32] * count, [b.load(p) for p in places], text, constraints, stays=True)
        for value, place in zip(results, places, strict=True):
            b.store(value, place)

    return emitted(name, about, types.void, {"c": None}, emit)


def settled(count: int) -> Any:
    """``f(c)``: what computes the `count` numbers of c stays before it. No instruction."""
    return _tied("settled", settled.__doc__, "", count)


def wait_products(count: int, left: int) -> Any:
    """``f(c)``: wait until at most `left` groups of products run; c's `count` sums are there then.

    ``wgmma.wait_group.sync.aligned left;``
    """
    return _tied("wait_products", wait_products.__doc__, f"wgmma.wait_group.sync.aligned {left};", count)


@one_line("wgmma.fence.sync.aligned;", "", stays=True)
def fence_registers() -> None:
    """Registers that were written may be products' now: ``wgmma.fence.sync.aligned;``"""


@one_line("wgmma.commit_group.sync.aligned;", "", stays=True)
def commit_products() -> None:
    """The products so far are a group: ``wgmma.commit_group.sync.aligned;``"""


@one_line("{ .reg .pred p; setp.lt.f32 p, $0, 0f00000000; @p bar.sync 15, 128; }", "f", stays=True)
def after(x: float32) -> None:
    """What follows stays behind x, which is never below 0: ``@p bar.sync 15, 128;``, p being x < 0.

    ptxas moves a wait for products above arithmetic that does not need them, which was to be done meanwhile.
    A barrier it leaves in place, even one that is never come to.
    """


# --- a warpgroup's registers --------------------------------------------------------------------------------


def _set_registers(name: str, direction: str, count: int) -> Any:
    about = f"``setmaxnreg.{direction}.sync.aligned.u32 {count};``"

    def emit(context: Any, b: Any, _: Any, values: list[Any]) -> None:
        asm(b, [], [], f"setmaxnreg.{direction}.sync.aligned.u32 {count};", "", stays=True)

    return emitted(name, about, types.void, {}, emit)


def fewer_registers(count: int) -> Any:
    """``f()``: a thread gives back all registers but so many; each of a warpgroup must."""
    return _set_registers("fewer_registers", "dec", count)


def more_registers(count: int) -> Any:
    """``f()``: a thread takes registers until it has so many, once others have given them back."""
    return _set_registers("more_registers", "inc", count)


# --- barriers of some warps ---------------------------------------------------------------------------------


@one_line("bar.sync $0, $1;", "r,r", stays=True)
def meet(number: int32, threads: int32) -> None:
    """So many threads meet at barrier `number`: ``bar.sync number, threads;``"""


@one_line("bar.arrive $0, $1;", "r,r", stays=True)
def announce(number: int32, threads: int32) -> None:
    """Count among those who `meet` there, and go on: ``bar.arrive number, threads;``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; bar.red.or.pred p, $1, $2, p; selp.b32 $0, 1, 0, p; }",
    "=r,r,r,r", stays=True,
)  # fmt: skip
def meet_any(number: int32, threads: int32, x: boolean) -> boolean:
    """`meet`, and whether x holds in any thread: ``bar.red.or.pred p, number, threads, q;``"""


@one_line("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p mbarrier.init.shared::cta.b64 [$0], $1; }", "r,r,r",
       stays=True)  # fmt: skip
def start_barrier(address: int32, count: int32, wanted: boolean) -> None:
    """An mbarrier whose phases end after so many arrivals: ``@p mbarrier.init.shared::cta.b64``"""


@one_line("fence.mbarrier_init.release.cluster;", "", stays=True)
def fence_barriers() -> None:
    """mbarriers are there for copies too, once threads have met: ``fence.mbarrier_init.release.cluster;``"""


@one_line("{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.arrive.shared::cta.b64 _, [$0]; }", "r,r",
       stays=True)  # fmt: skip
def arrive(address: int32, wanted: boolean) -> None:
    """``@p mbarrier.arrive.shared::cta.b64 _, [address];``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1; }",
    "r,r,r", stays=True,
)  # fmt: skip
def expect(address: int32, size: int32, wanted: boolean) -> None:
    """`arrive`, and the phase waits for so many bytes: ``mbarrier.arrive.expect_tx.shared::cta.b64``"""


@one_line(
    "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra done; bra again; "
    "done: }", "r,r", stays=True,
)  # fmt: skip
def wait_phase(address: int32, parity: int32) -> None:
    """Wait for the end of the phase of this parity, which is 0 for the first; before it, 1 has ended.

    ``mbarrier.try_wait.parity.shared::cta.b64 p, [address], parity;`` until p
    """


# --- tiles --------------------------------------------------------------------------------------------------


class _Untyped(ArgumentAttributes):
    """NVVM's dialect for Hopper has `byval` without its type."""

    _known = {**ArgumentAttributes._known, "byval": False}  # noqa: RUF012


def _map(number: int) -> Any:
    """The address of a kernel's tensor map, which stays in the memory of its parameters.

    The argument becomes what ``const __grid_constant__ CUtensorMap`` is in CUDA C++.
    """

    def emit(context: Any, b: Any, _: Any, values: Any) -> Any:
        function, module = b.function, b.module
        kind = ir.ArrayType(I64, MAP_WORDS).as_pointer()
        # Arguments are counted from the one that says where a result goes, which kernels lose.
        indices = [i for i, argument in enumerate(function.args) if argument.type == kind]
        argument = function.args[indices[number]]
        if "byval" not in argument.attributes:
            for i in indices:
                function.args[i].attributes = _Untyped(("byval",))
                function.args[i].attributes.align = 64
            # One note for all: of several the compiler takes the last.
            places = module.add_metadata([ir.Constant(I32, i) for i in indices])
            note = module.add_metadata([function, ir.MetaDataString(module, "grid_constant"), places])
            cgutils.get_or_insert_named_metadata(module, "nvvm.annotations").add(note)
        return b.ptrtoint(argument, I64)

    return emitted(f"map_{number}", _map.__doc__, int64, {}, emit)


query_map, key_map, value_map = map(_map, range(3))


@one_line("{ .reg .pred p; setp.ne.b32 p, $1, 0; @p prefetch.tensormap [$0]; }", "l,r", stays=True)
def prefetch_map(address: int64, wanted: boolean) -> None:
    """``@p prefetch.tensormap [address];``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $7, 0; @p cp.async.bulk.tensor.4d.shared::cluster.global.tile"
    ".mbarrier::complete_tx::bytes [$0], [$1, {$3, $4, $5, $6}], [$2]; }", "r,l,r,r,r,r,r,r", stays=True,
)  # fmt: skip
def load_tile(
    shared: int32, tensor_map: int64, barrier: int32, x: int32, y: int32, z: int32, w: int32, wanted: boolean
) -> None:
    """Start to copy the map's box at these places; its bytes count at the mbarrier. Beyond ends are zeros.

    ``@p cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
    [shared], [tensor_map, {x, y, z, w}], [barrier];``
    """


@one_line("fence.proxy.async.shared::cta;", "", stays=True)
def fence_shared() -> None:
    """What the thread wrote to shared memory is there for products too: ``fence.proxy.async.shared::cta;``"""
