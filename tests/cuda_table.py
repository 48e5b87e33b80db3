"""What the compiler makes of every CUDA kernel: registers, shared memory, spills, and how many blocks fit.

``python tests/cuda_table.py`` compiles all of them and writes the table that the tests compare with. No GPU
is needed, only the compilers that the extra `cuda` brings. With names of architectures, as ``sm_80 sm_90a``,
and of kernels it prints their rows as JSON; with ``1/3`` those of every third kernel, from the first on.
"""

import functools
import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("cuda_table.json")


class Multiprocessor(NamedTuple):
    """What the blocks on one share, by the CUDA programming guide's table of compute capabilities."""

    capability: tuple[int, int]
    shared_bytes: int
    threads: int
    blocks: int
    registers: int = 65536


ARCHITECTURES = {
    "sm_80": Multiprocessor((8, 0), 164 << 10, 2048, 32),
    "sm_90a": Multiprocessor((9, 0), 228 << 10, 2048, 32),
}
RESERVED_SHARED = 1 << 10
"""Bytes of shared memory that the system takes for each block."""


def kernels():
    """Every kernel that a call may start."""
    from nbattn.cuda import append, attention, decode, hopper, mma, softmax

    modules = (mma, hopper, decode, append, attention, softmax)
    return [kernel for module in modules for kernel in module.kernels()]


def architectures(kernel):
    """Those that a call may start it on."""
    alone = [name for name in ARCHITECTURES if name.endswith("a")] if "-hopper-" in kernel.name else None
    return alone or list(ARCHITECTURES)


def resident_blocks(sm, threads, registers, shared):
    """How many blocks of a kernel are on one multiprocessor at a time."""
    warps = -(-threads // 32)
    # Registers are given to warps in units of 256.
    by_registers = sm.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = sm.shared_bytes // (shared + RESERVED_SHARED)
    return min(by_registers, by_shared, sm.threads // (32 * warps), sm.blocks)


def row(kernel, architecture):
    """Compile one kernel."""
    from nbattn.cuda import compiler

    sm = ARCHITECTURES[architecture]
    assert architecture == compiler.architecture(sm.capability)  # as what calls compile
    code, report = compiler.binary(kernel, sm.capability)
    (registers,) = map(int, re.findall(r"Used (\d+) registers", report))
    # Of the kernel, and of functions of the compiler's that it calls.
    local = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    fixed = sum(map(int, re.findall(r"(\d+) bytes smem", report)))
    shared = fixed + kernel.shared
    blocks = resident_blocks(sm, kernel.threads, registers, shared)
    found = {
        "registers": registers,
        "shared": shared,
        "threads": kernel.threads,
        "blocks": blocks,
        "occupancy": round(blocks * kernel.threads / sm.threads, 3),
        "local": sum(int(n) for each in local for n in each),
    }
    # Functions that the compiler adds: divisions, and shuffles where it does not see that a warp is together.
    if calls := sorted(set(re.findall(rb"\$__internal_\d+_\$(\w+)", code))):
        found["calls"] = [name.decode() for name in calls]
    if warnings := re.findall(r".*(?:C7\d\d\d|[Ww]arning).*", report):
        found["warnings"] = warnings
    return found


@contextmanager
def lowered_once() -> Iterator[None]:
    """Numba's part of a kernel's compilation, most of its time, done for the first architecture alone.

    What it gives is the same for all from 8.0 on; NVVM and the assembler are what tell them apart.
    """
    compiler = importlib.import_module("numba.cuda.compiler")
    lower, last = compiler._compile_pyfunc_with_fixup, [None, None]

    def once(function, *arguments, **options):
        if last[0] is not function:
            last[:] = function, lower(function, *arguments, **options)
        return last[1]

    compiler._compile_pyfunc_with_fixup = once
    try:
        yield
    finally:
        compiler._compile_pyfunc_with_fixup = lower


def rows_of(kernel, chosen):
    """Compile one kernel for those of the architectures that may start it."""
    kernel = replace(kernel, build=functools.cache(kernel.build))
    return {name: row(kernel, name) for name in architectures(kernel) if name in chosen}


def main(arguments):
    from nbattn.cuda import compiler

    chosen = [x for x in arguments if x in ARCHITECTURES] or list(ARCHITECTURES)
    part, parts = next((map(int, x.split("/")) for x in arguments if re.fullmatch(r"\d+/\d+", x)), (1, 1))
    names = [x for x in arguments if x not in ARCHITECTURES and "/" not in x]
    rows = {}
    compiler._toolchain()  # loads numba-cuda as calls do
    with lowered_once():
        for kernel in kernels()[part - 1 :: parts]:
            if not names or kernel.name in names:
                rows[kernel.name] = rows_of(kernel, chosen)
                print(kernel.name, rows[kernel.name], file=sys.stderr, flush=True)
    if arguments:
        print(json.dumps(rows))
        return
    from importlib.metadata import version

    compilers = {name: version(name) for name in ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")}
    lines = [f'  "{name}": {json.dumps(found)}' for name, found in rows.items()]
    TABLE.write_text(
        f'{{\n"compilers": {json.dumps(compilers)},\n"kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1:])
