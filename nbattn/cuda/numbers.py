"""How kernels read and write the four dtypes: numbers are float32, for float64 float64.

bfloat16 lies in memory as uint16: the upper half of a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numba import cuda

index = np.uint32
"""An index that is never negative, said to the compiler: else each access adds the length where it is."""


def compute_of(storage: str) -> type[np.floating[Any]]:
    """The dtype of arithmetic."""
    return np.float64 if storage == "float64" else np.float32


SIMULATED = "simulator" in cuda.jit.__module__
if find_spec("numba.cuda.cgutils") and not SIMULATED:
    from .ptx import unroll
else:  # Numba's own target and the simulators only run or read the source

    def unroll() -> None:
        """First in a loop's body: the loop is unrolled in full, and what it indexes stays in registers."""


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call."""
    # The simulator calls a decorated one at 20 times the cost.
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


def reader(storage: str) -> Callable[..., Any]:
    """``read(pointer, index)``: an element as a number."""
    number = compute_of(storage)

    @device
    def read(pointer, index):
        return number(pointer[index])

    @device
    def read_bfloat16(pointer, index):
        bits = cuda.local.array(1, np.uint32)
        bits[0] = np.uint32(pointer[index]) << np.uint32(16)
        return bits.view(np.float32)[0]

    return read_bfloat16 if storage == "bfloat16" else read


def writer(storage: str) -> Callable[..., Any]:
    """``write(pointer, index, x)``: a number rounded to an element, to the nearest and ties to even."""

    @device
    def write(pointer, index, x):
        pointer[index] = x

    @device
    def write_bfloat16(pointer, index, x):
        pointer[index] = np.uint16(rounded(x) >> np.uint32(16))

    return write_bfloat16 if storage == "bfloat16" else write


@device
def is_set(pointer, offset, width):
    """Whether one of so many bytes is not 0: an element of a mask, of any integer dtype."""
    found = False
    for i in range(width):
        if pointer[offset + i] != 0:
            found = True
    return found


@device
def rounded(x):
    """The bits of a float32 whose upper half is the nearest bfloat16."""
    number = cuda.local.array(1, np.float32)
    number[0] = x
    bits = number.view(np.uint32)[0]
    if x != x:
        return bits | np.uint32(0x400000)  # a NaN whose lower half alone says so would become infinite
    return bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))


@device
def to_bfloat16(x):
    """The nearest bfloat16, as float32."""
    bits = cuda.local.array(1, np.uint32)
    bits[0] = rounded(x) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)[0]
