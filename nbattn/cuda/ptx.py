"""Every PTX instruction that kernels use, as a function that Numba's CUDA target compiles to it.

A warp's 32 threads hold a matrix together, each some elements of it in registers: its fragment. Fragments
are `cuda.local.array`s whose every index is a constant once loops are unrolled: NVVM keeps them in registers
then. So fragments are passed as an array and the index of their first element. Addresses are integers: of
shared memory 32 bits, of global memory 64.

`tests/warp.py` has the same names in NumPy, for all threads of a block at once. Kernels take either as
`isa`: what is tested there is the source that is compiled here.
"""

# mypy: disable-error-code="empty-body"

import math
from functools import cache
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import register_jitable

from .ptx_bytes import bytes_01, bytes_02, bytes_13, bytes_23, nibbles
from .ptx_lines import F32, I8, I32, asm, boolean, element, emitted, float32, int32, int64, one_line

__all__ = [
    "bytes_01", "bytes_02", "bytes_13", "bytes_23", "cuda", "float32", "int32", "int64", "nibbles",
]  # fmt: skip

jit = register_jitable(inline="always")


# --- the loop, the thread, the block ------------------------------------------------------------------------


class _LoopId(ir.values.NamedValue):
    """``distinct !{self, !{!"llvm.loop.unroll.full"}}``, which llvmlite has no way to say."""

    name_prefix = "!"

    def __init__(self, parent: Any, hint: Any, name: str) -> None:
        super().__init__(parent, ir.MetaDataType(), name=name)
        self.hint = hint
        parent.metadata.append(self)

    def descr(self, buf: Any) -> None:
        buf += (f"distinct !{{ {self.get_reference()}, {self.hint.get_reference()} }}", "\n")

    def _get_reference(self) -> str:
        return self.name_prefix + str(self.name)


def _unroll(context: Any, b: Any, _: Any, values: Any) -> None:
    if not hasattr(b, "loops_to_unroll"):
        b.loops_to_unroll = []
        branch = b.branch

        def marked(target: Any) -> Any:
            # The innermost marked loop's way back leads to a block that is done, and lies before the mark.
            instruction, blocks, pending = branch(target), b.function.blocks, b.loops_to_unroll
            back = pending and target.is_terminated and blocks.index(target) <= blocks.index(pending[-1])
            if back:
                hint = b.module.add_metadata([ir.MetaDataString(b.module, "llvm.loop.unroll.full")])
                instruction.set_metadata("llvm.loop", _LoopId(b.module, hint, str(len(b.module.metadata))))
                pending.pop()
            return instruction

        b.branch = marked
    b.loops_to_unroll.append(b.block)


unroll = emitted(
    "unroll", "First in a loop's body: it is unrolled in full, ``llvm.loop.unroll.full``.", types.void, {},
    _unroll,
)  # fmt: skip


@one_line("mov.u32 $0, %tid.x;", "=r")
def thread() -> int32:
    """The thread's number in its block: ``mov.u32 d, %tid.x;``"""


@one_line("mov.u32 $0, %tid.x;", "=r", stays=True)
def reread_thread() -> int32:
    """`thread`, read where it stands: the compiler keeps no register for it or what follows from it."""


@one_line("mov.u32 $0, %ctaid.x;", "=r")
def block() -> int32:
    """The block's number: ``mov.u32 d, %ctaid.x;``"""


@one_line("mov.u32 $0, %ctaid.x;", "=r", stays=True)
def reread_block() -> int32:
    """`block`, read where it stands."""


@one_line("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", stays=True)
def same(x: int32) -> int32:
    """x, which is the same in all threads, so that the compiler knows: ``shfl.sync.idx.b32 d, x, 0, 31, ~0;``

    Where a branch may part a warp for all that it knows, it makes calls of shuffles and votes.
    """


@one_line("div.u32 $0, $1, $2;", "=r,r,r")
def quotient(x: int32, y: int32) -> int32:
    """Of numbers that are not negative: ``div.u32 d, x, y;``"""


@one_line("bar.sync 0;", "", stays=True)
def barrier() -> None:
    """All threads of the block meet, and see each other's shared memory: ``bar.sync 0;``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $1, 0; bar.red.or.pred p, 0, p; selp.b32 $0, 1, 0, p; }",
    "=r,r",
    stays=True,
)
def barrier_any(x: boolean) -> boolean:
    """`barrier`, and whether x holds in any thread: ``bar.red.or.pred p, 0, q;``"""


@one_line("bar.warp.sync 0xffffffff;", "", stays=True)
def warp_barrier() -> None:
    """All threads of the warp meet: ``bar.warp.sync 0xffffffff;``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }",
    "=r,r",
    stays=True,
)
def any_lane(x: boolean) -> boolean:
    """Whether x holds in any thread of the warp: ``vote.sync.any.pred p, q, ~0;``"""


# --- shared memory ------------------------------------------------------------------------------------------


def _shared(context: Any, b: Any, _: Any, values: Any) -> Any:
    name = "nbattn_shared"
    memory = b.module.globals.get(name)
    if memory is None:
        memory = ir.GlobalVariable(b.module, ir.ArrayType(I8, 0), name, addrspace=3)
        memory.linkage, memory.align = "external", 1024
    return b.ptrtoint(memory, I32)


shared_memory = emitted(
    "shared_memory",
    "The address of the block's dynamic shared memory: ``.extern .shared .align 1024 .b8 memory[];``",
    int32, {}, _shared,
)  # fmt: skip


@one_line("cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;", "r,l,r", stays=True)
def copy_async(shared: int32, address: int64, size: int32) -> None:
    """Start to copy 16 bytes, of which all from `size` (0 to 16) on are zeros and not read.

    ``cp.async.cg.shared.global.L2::128B [shared], [address], 16, size;``
    """


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.ca.shared.global [$0], [$1], 4, $2; }",
    "r,l,r,r",
    stays=True,
)
def copy_word_async(shared: int32, address: int64, size: int32, wanted: boolean) -> None:
    """`copy_async` of 4 bytes: ``@p cp.async.ca.shared.global [shared], [address], 4, size;``"""


@one_line("cp.async.commit_group;", "", stays=True)
def commit_copies() -> None:
    """The thread's copies so far are a group: ``cp.async.commit_group;``"""


@one_line("cp.async.wait_group 0;", "", stays=True)
def wait_copies() -> None:
    """Wait for the thread's own copies; others' are there after a `barrier`: ``cp.async.wait_group 0;``"""


@cache
def wait_older(left: int) -> Any:
    """A function that waits for the thread's groups of copies but so many: ``cp.async.wait_group left;``"""

    @one_line(f"cp.async.wait_group {left};", "", stays=True)
    def wait() -> None: ...

    return wait


@one_line("ld.shared.b32 $0, [$1];", "=r,r", stays=True)
def load_shared(address: int32) -> int32:
    """``ld.shared.b32 d, [address];``"""


@one_line("ld.shared.f32 $0, [$1];", "=f,r", stays=True)
def load_shared_float(address: int32) -> float32:
    """``ld.shared.f32 d, [address];``"""


@one_line("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.shared.b32 [$0], $1; }", "r,r,r", stays=True)
def store_shared(address: int32, x: int32, wanted: boolean) -> None:
    """``@p st.shared.b32 [address], x;``"""


@one_line("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.shared.f32 [$0], $1; }", "r,f,r", stays=True)
def store_shared_float(address: int32, x: float32, wanted: boolean) -> None:
    """``@p st.shared.f32 [address], x;``"""


@one_line("red.shared.or.b32 [$0], $1;", "r,r", stays=True)
def or_shared(address: int32, x: int32) -> None:
    """Set the bits of x, whatever other threads set: ``red.shared.or.b32 [address], x;``"""


def _ldmatrix(name: str, suffix: str, about: str) -> Any:
    line = f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16"

    def emit(context: Any, b: Any, kinds: Any, values: list[Any]) -> None:
        fragment, index, address = values
        words = asm(b, [I32] * 4, [address], f"{line} {{$0,$1,$2,$3}}, [$4];", "=r,=r,=r,=r,r", stays=True)
        for k, word in enumerate(words):
            b.store(word, element(context, b, kinds[0], fragment, index, k))

    arguments = {"fragment": None, "index": int64, "address": int32}
    about = f"{about}\n\n    ``{line} {{d0, d1, d2, d3}}, [address];``\n    "
    return emitted(name, about, types.void, arguments, emit)


load_matrices = _ldmatrix("load_matrices", "", """Four 8 x 8 matrices of 16 bits -> fragment[index:index + 4].

    Lane i gives the address of row i % 8 of matrix i // 8, and gets of each matrix the elements
    (i // 4, 2 * (i % 4)) and the next.""")  # fmt: skip
load_matrices_turned = _ldmatrix("load_matrices_turned", ".trans", "`load_matrices`, each transposed.")


# --- products -----------------------------------------------------------------------------------------------


def _mma(shape: str, kind: str, a_words: int, b_words: int) -> Any:
    line = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"

    def emit(context: Any, b: Any, kinds: Any, values: list[Any]) -> None:
        c, ci, x, xi, y, yi = values
        places = [element(context, b, kinds[0], c, ci, k) for k in range(4)]
        words = [b.load(element(context, b, kinds[2], x, xi, k)) for k in range(a_words)]
        words += [b.load(element(context, b, kinds[4], y, yi, k)) for k in range(b_words)]
        numbers = iter(range(8 + len(words)))
        operands = (",".join(f"${next(numbers)}" for _ in range(n)) for n in (4, a_words, b_words, 4))
        text = f"{line} {', '.join(f'{{{x}}}' for x in operands)};"
        constraints = "=f,=f,=f,=f," + "r," * len(words) + "0,1,2,3"
        results = asm(b, [F32] * 4, words + [b.load(p) for p in places], text, constraints, stays=False)
        for value, place in zip(results, places, strict=True):
            b.store(value, place)

    about = f"""c[ci:ci + 4] += a[ai:ai + {a_words}] @ b[bi:bi + {b_words}], sums in float32.

    ``{line} c, a, b, c;``
    """
    arguments = {"c": None, "ci": int64, "a": None, "ai": int64, "b": None, "bi": int64}
    return emitted(f"multiply_{kind}", about, types.void, arguments, emit)


multiply_f16 = _mma("m16n8k16", "f16", 4, 2)
multiply_bf16 = _mma("m16n8k16", "bf16", 4, 2)
multiply_tf32 = _mma("m16n8k8", "tf32", 4, 2)


# --- numbers ------------------------------------------------------------------------------------------------


@one_line("ex2.approx.ftz.f32 $0, $1;", "=f,f")
def exp2(x: float32) -> float32:
    """2 to the x, to 2**-22 of it: ``ex2.approx.ftz.f32 d, x;``"""


@one_line("lg2.approx.ftz.f32 $0, $1;", "=f,f")
def log2(x: float32) -> float32:
    """``lg2.approx.ftz.f32 d, x;``"""


@one_line("rcp.approx.ftz.f32 $0, $1;", "=f,f")
def reciprocal(x: float32) -> float32:
    """``rcp.approx.ftz.f32 d, x;``"""


@one_line("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")
def fma(x: float32, y: float32, z: float32) -> float32:
    """x * y + z, rounded once: ``fma.rn.f32 d, x, y, z;``"""


@one_line("max.f32 $0, $1, $2;", "=f,f,f")
def maximum(x: float32, y: float32) -> float32:
    """The larger; of a NaN and a number the number: ``max.f32 d, x, y;``"""


@one_line("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f")
def pack_f16(low: float32, high: float32) -> int32:
    """Two numbers rounded to float16, `low` in the lower half: ``cvt.rn.f16x2.f32 d, high, low;``"""


@one_line("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
def pack_bf16(low: float32, high: float32) -> int32:
    """Two numbers rounded to bfloat16, `low` in the lower half: ``cvt.rn.bf16x2.f32 d, high, low;``"""


@one_line("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }", "=f,r")
def low_f16(word: int32) -> float32:
    """The float16 in the lower half: ``cvt.f32.f16 d, l;``"""


@one_line("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }", "=f,r")
def high_f16(word: int32) -> float32:
    """The float16 in the upper half: ``cvt.f32.f16 d, h;``"""


@one_line("{ .reg .b32 x; shl.b32 x, $1, 16; mov.b32 $0, x; }", "=f,r")
def low_bf16(word: int32) -> float32:
    """The bfloat16 in the lower half: ``shl.b32 d, word, 16;``"""


@one_line("{ .reg .b32 x; and.b32 x, $1, 0xffff0000; mov.b32 $0, x; }", "=f,r")
def high_bf16(word: int32) -> float32:
    """The bfloat16 in the upper half: ``and.b32 d, word, 0xffff0000;``"""


@one_line("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r")
def top_halves(x: int32, y: int32) -> int32:
    """Of two float32's words the upper halves, bfloat16 that are no larger: ``prmt.b32 d, x, y, 0x7632;``"""


@one_line(
    "{ .reg .pred p; .reg .b32 t; .reg .f32 x, y; and.b32 t, $1, 0xffff0000; mov.b32 x, $1; mov.b32 y, t; "
    "sub.f32 x, x, y; setp.nan.f32 p, x, x; selp.f32 x, 0f00000000, x, p; mov.b32 $0, x; }",
    "=r,r",
)
def below_half(x: int32) -> int32:
    """The word of a float32 less its upper half, 0 where that is none: ``sub.f32 d, x, x & 0xffff0000;``"""


@one_line("and.b32 $0, $1, 0xffffe000;", "=f,f", stays=True)
def cut(x: float32) -> float32:
    """x without its last 13 bits, which tf32 lacks: ``and.b32 d, x, 0xffffe000;``

    ``cvt.rna.tf32.f32`` rounds, in four instructions.
    """


@one_line("mov.b32 $0, $1;", "=r,f")
def word_of(x: float32) -> int32:
    """The bits of a float32: ``mov.b32 d, x;``"""


@one_line("mov.b32 $0, $1;", "=f,r")
def number_of(word: int32) -> float32:
    """The float32 of these bits: ``mov.b32 d, word;``"""


@one_line("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", stays=True)
def exchange(x: float32, distance: int32) -> float32:
    """x of the lane whose number differs by these bits: ``shfl.sync.bfly.b32 d, x, distance, 31, ~0;``"""


@one_line("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", stays=True)
def exchange_word(x: int32, distance: int32) -> int32:
    """`exchange` of a word."""


@jit
def tanh(x):
    """libdevice's, to some ulp (``tanh.approx`` has 2**-11)."""
    return math.tanh(x)


def _select(context: Any, b: Any, _: Any, values: list[Any]) -> Any:
    return b.select(*values)


def _choice(name: str, kind: Any) -> Any:
    about = "x where the condition holds, else y: ``selp.b32 d, x, y, p;``"
    return emitted(name, about, kind, {"condition": boolean, "x": kind, "y": kind}, _select)


select, select_int = _choice("select", float32), _choice("select_int", int32)


@one_line("xor.b32 $0, $1, $2;", "=r,r,r", stays=True)
def flip(x: int32, y: int32) -> int32:
    """``xor.b32 d, x, y;`` where it stands: the compiler keeps no register for it."""


@one_line("min.s32 $0, $1, $2;", "=r,r,r")
def smaller(x: int32, y: int32) -> int32:
    """``min.s32 d, x, y;``"""


@one_line("max.s32 $0, $1, $2;", "=r,r,r")
def larger(x: int32, y: int32) -> int32:
    """``max.s32 d, x, y;``"""


# --- global memory ------------------------------------------------------------------------------------------


@one_line("ld.global.b64 $0, [$1];", "=l,l", stays=True)
def load_int64(address: int64) -> int64:
    """``ld.global.b64 d, [address];``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }", "=&r,l,r", stays=True
)
def load_word(address: int64, wanted: boolean) -> int32:
    """The word at the address where `wanted`, else 0: ``@p ld.global.b32 d, [address];``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }", "=&f,l,r", stays=True
)
def load_float(address: int64, wanted: boolean) -> float32:
    """The number at the address where `wanted`, else 0: ``@p ld.global.b32 d, [address];``"""


@one_line(
    "{ .reg .pred p; .reg .b16 x; setp.ne.b32 p, $2, 0; mov.b16 x, 0; @p ld.global.b16 x, [$1]; "
    "cvt.u32.u16 $0, x; }", "=r,l,r", stays=True,
)  # fmt: skip
def load_half(address: int64, wanted: boolean) -> int32:
    """16 bits at the address where `wanted`, else 0: ``@p ld.global.b16 d, [address];``"""


@one_line(
    "{ .reg .pred p; .reg .b16 x; setp.ne.b32 p, $2, 0; mov.b16 x, 0; @p ld.global.u8 x, [$1]; "
    "cvt.u32.u16 $0, x; }", "=r,l,r", stays=True,
)  # fmt: skip
def load_byte(address: int64, wanted: boolean) -> int32:
    """The byte at the address where `wanted`, else 0: ``@p ld.global.u8 d, [address];``"""


@one_line("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }", "l,f,r", stays=True)
def store_float(address: int64, x: float32, wanted: boolean) -> None:
    """``@p st.global.f32 [address], x;``"""


@one_line(
    "{ .reg .pred p; .reg .b16 x; setp.ne.b32 p, $2, 0; cvt.u16.u32 x, $1; @p st.global.b16 [$0], x; }",
    "l,r,r", stays=True,
)  # fmt: skip
def store_half(address: int64, x: int32, wanted: boolean) -> None:
    """The lower 16 bits: ``@p st.global.b16 [address], x;``"""


@one_line(
    "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $2, 0; ld.shared.v4.b32 {a, b, c, d}, [$1]; "
    "@p st.global.v4.b32 [$0], {a, b, c, d}; }", "l,r,r", stays=True,
)  # fmt: skip
def copy_out(address: int64, shared: int32, wanted: boolean) -> None:
    """16 bytes of shared memory to global memory: ``ld.shared.v4.b32``, ``@p st.global.v4.b32``"""


@one_line("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1; }", "l,r,r", stays=True)
def store_word(address: int64, x: int32, wanted: boolean) -> None:
    """``@p st.global.b32 [address], x;``"""


@one_line(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; @p atom.global.add.u32 $0, [$1], $2; }",
    "=&r,l,r,r", stays=True,
)  # fmt: skip
def add_global(address: int64, x: int32, wanted: boolean) -> int32:
    """Add to a word where `wanted`: what it was, else 0. ``@p atom.global.add.u32 d, [address], x;``"""


@one_line("fence.acq_rel.gpu;", "", stays=True)
def fence() -> None:
    """What the thread wrote before, or saw, other blocks see before what it writes next.

    ``fence.acq_rel.gpu;``
    """
