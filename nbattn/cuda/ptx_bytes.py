"""The part of `ptx` that makes bfloat16 of stored bytes and of their halves."""

# mypy: disable-error-code="empty-body"

from typing import Any

from .ptx_lines import int32, one_line


def _two_bytes(name: str, i: int, j: int) -> Any:
    # A byte b, its sign turned, in the low bits of 2**23 is 2**23 + 128 + b; and no bfloat16 rounds it.
    text = (
        "{ .reg .b32 u, x, y; .reg .f32 a, b; xor.b32 u, $1, 0x80808080; "
        f"prmt.b32 x, u, 0x4b000000, 0x754{i}; prmt.b32 y, u, 0x4b000000, 0x754{j}; "
        "mov.b32 a, x; mov.b32 b, y; add.f32 a, a, 0fcb000080; add.f32 b, b, 0fcb000080; "
        "mov.b32 x, a; mov.b32 y, b; prmt.b32 $0, x, y, 0x7632; }"
    )

    def bytes_of(word: int32) -> int32: ...

    bytes_of.__name__ = name
    bytes_of.__doc__ = f"The signed bytes {i} and {j} of a word as two bfloat16, by ``prmt`` and ``add.f32``."
    return one_line(text, "=r,r")(bytes_of)


bytes_01, bytes_23 = _two_bytes("bytes_01", 0, 1), _two_bytes("bytes_23", 2, 3)
bytes_02, bytes_13 = _two_bytes("bytes_02", 0, 2), _two_bytes("bytes_13", 1, 3)


@one_line(
    "{ .reg .b32 t, one, away; shr.u32 t, $1, $2; lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; "
    "mov.b32 one, 0x3f803f80; mov.b32 away, 0xc308c308; fma.rn.bf16x2 $0, t, one, away; }",
    "=r,r,r",
)
def nibbles(word: int32, shift: int32) -> int32:
    """Four bits of each half of a word, 8 more than a number, from bit `shift` on, as two bfloat16.

    In the low bits of 128 they are 128 more: ``fma.rn.bf16x2 d, (word >> shift & 0x000f000f) | 0x43004300, 1,
    -136;``
    """
