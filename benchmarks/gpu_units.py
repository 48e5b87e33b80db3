"""What the kernel of Hopper GPUs rests on, each alone: tensor maps, descriptors and fragments.

Both come from reading the documentation, so a wrong reading is to show here first, and where it is. Kernels
are built as those of `nbattn.cuda`: the tests run the same checks in an emulator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_cases import judged

ROWS = 64
SHAPES = ((128, 64), (96, 128), (96, 192), (64, 256))
"""Rows of the right matrices, and columns: of every tile of `nbattn.cuda.hopper`."""
TILE_ROWS = 32
TILE_PARAMETERS = (
    ("tile_map", "map"), ("out", "int64"), ("x", "int32"), ("y", "int32"), ("z", "int32"), ("w", "int32"),
)  # fmt: skip
PRODUCT_PARAMETERS = (
    ("query_map", "map"), ("key_map", "map"), ("value_map", "map"), ("weights", "int64"), ("scores", "int64"),
    ("sums", "int64"),
)  # fmt: skip


class Check(NamedTuple):
    """A kernel, what it takes, and what it has to write."""

    name: str
    build: Callable[[Any, Any], Callable[..., None]]  # of the modules `ptx` and `ptx_hopper`
    parameters: tuple[tuple[str, str], ...]
    shared: int
    inputs: dict[str, Any]  # arrays by parameter; of maps those that they describe
    maps: dict[str, tuple[tuple[int, ...], ...]]  # sizes, strides, box
    numbers: dict[str, int]
    results: dict[str, Any]  # arrays to be written over
    expected: dict[str, Any]
    storage: str
    threads: int = 256
    registers: int = 0  # of a thread at the launch, where warpgroups pass them on


def build_tile(isa: Any, hopper: Any) -> Callable[[Any], None]:
    """A tile as it lies in shared memory."""
    int32, int64, same, thread, barrier = isa.int32, isa.int64, isa.same, isa.thread, isa.barrier
    shared_memory, copy_out, unroll = isa.shared_memory, isa.copy_out, isa.unroll
    start_barrier, fence_barriers, wait_phase = hopper.start_barrier, hopper.fence_barriers, hopper.wait_phase
    expect, load_tile, query_map = hopper.expect, hopper.load_tile, hopper.query_map
    size = TILE_ROWS * 128

    def kernel(p):
        memory = shared_memory()
        room, tile_map = int32(memory + size), query_map()  # the first map
        warpgroup = same(int32(thread() >> 7))
        if warpgroup == 0:
            start_barrier(room, 1, thread() == 0)
            fence_barriers()
        barrier()
        if warpgroup == 0:
            if same(int32(thread() >> 5)) == 0:
                expect(room, size, thread() == 0)
                load_tile(memory, tile_map, room, p.x, p.y, p.z, p.w, thread() == 0)
        else:
            wait_phase(room, 0)
            for i in range(2):
                unroll()
                place = int32(16 * (thread() - 128 + 128 * i))
                copy_out(p.out + int64(place), int32(memory + place), True)

    return kernel


def build_products(
    isa: Any, hopper: Any, kind: str, keys: int, width: int, passing: bool
) -> Callable[[Any], None]:
    """queries @ keys.T with both in shared memory, and weights @ values with the left ones in registers.

    With `passing` three warpgroups do it, of which the first writes, with registers of the one that does not.
    """
    cuda, int32, int64, float32 = isa.cuda, isa.int32, isa.int64, isa.float32
    same, thread, barrier, unroll = isa.same, isa.thread, isa.barrier, isa.unroll
    shared_memory, load_half, store_float = isa.shared_memory, isa.load_half, isa.store_float
    start_barrier, fence_barriers, wait_phase = hopper.start_barrier, hopper.fence_barriers, hopper.wait_phase
    expect, load_tile = hopper.expect, hopper.load_tile
    query_map, key_map, value_map = hopper.query_map, hopper.key_map, hopper.value_map
    multiply, multiply_registers = hopper.product(kind, keys), hopper.product_of_registers(kind, width)
    fence_registers, commit_products = hopper.fence_registers, hopper.commit_products
    n_scores, n_sums, n_weights = keys // 2, width // 2, keys // 4
    wait_scores, wait_sums = hopper.wait_products(n_scores, 0), hopper.wait_products(n_sums, 0)
    settled_scores, settled_sums = hopper.settled(n_scores), hopper.settled(n_sums)
    panels, query_panel, panel = width // 64, 128 * ROWS, 128 * keys
    key_at = panels * query_panel
    value_at = key_at + panels * panel
    barrier_at = value_at + panels * panel
    eights = 1 << 62 | (1024 // 16) << 32
    fewer_registers, more_registers = hopper.fewer_registers(32), hopper.more_registers(160)

    def kernel(p):
        s = cuda.local.array(n_scores, float32)
        o = cuda.local.array(n_sums, float32)
        weights = cuda.local.array(n_weights, int32)
        memory = shared_memory()
        room = int32(memory + barrier_at)
        query, key, value = query_map(), key_map(), value_map()
        warpgroup = same(int32(thread() >> 7))
        if warpgroup == 0:
            start_barrier(room, 1, thread() == 0)
            fence_barriers()
        barrier()
        if warpgroup == 0:
            if passing:
                fewer_registers()
            if same(int32(thread() >> 5)) == 0:
                leader = thread() == 0
                expect(room, barrier_at, leader)
                for i in range(panels):
                    unroll()
                    load_tile(int32(memory + i * query_panel), query, room, 64 * i, 0, 0, 0, leader)
                    load_tile(int32(memory + key_at + i * panel), key, room, 64 * i, 0, 0, 0, leader)
                    load_tile(int32(memory + value_at + i * panel), value, room, 64 * i, 0, 0, 0, leader)
        else:
            if passing:
                more_registers()
            lane, first = int32(thread() & 31), warpgroup == 1
            row = int32(((thread() >> 5) & 3) * 16 + (lane >> 2))
            column = int32(2 * (lane & 3))
            for i in range(n_weights):
                unroll()
                at = (row + 8 * (i % 2)) * (2 * keys) + 2 * (column + 8 * (i % 4 // 2) + 16 * (i // 4))
                low, high = load_half(p.weights + at, True), load_half(p.weights + at + 2, True)
                weights[i] = int32(low | high << 16)
            wait_phase(room, 0)
            settled_scores(s)
            fence_registers()
            for k in range(width // 16):
                unroll()
                left = int64(eights | 1 << 16 | int64((memory + (k // 4) * query_panel + k % 4 * 32) >> 4))
                right = int64(
                    eights | 1 << 16 | int64((memory + key_at + (k // 4) * panel + k % 4 * 32) >> 4)
                )
                multiply(s, left, right, k > 0)
            commit_products()
            wait_scores(s)
            for i in range(n_scores):
                unroll()
                at = (row + 8 * (i % 4 // 2)) * (4 * keys) + 4 * (column + i // 4 * 8 + i % 2)
                store_float(p.scores + at, s[i], first)
            for i in range(n_sums):
                unroll()
                o[i] = float32(0)
            settled_sums(o)
            fence_registers()
            for k in range(keys // 16):
                unroll()
                right = int64(eights | (panel // 16) << 16 | int64((memory + value_at + 2048 * k) >> 4))
                multiply_registers(o, weights, 4 * k, right)
            commit_products()
            wait_sums(o)
            for i in range(n_sums):
                unroll()
                at = (row + 8 * (i % 4 // 2)) * (4 * width) + 4 * (column + i // 4 * 8 + i % 2)
                store_float(p.sums + at, o[i], first)

    return kernel


def checks(seed: int) -> list[Check]:
    """Boxes inside an array and across its ends, and products of small integers, which are exact."""
    import numpy as np

    rng = np.random.default_rng(seed)
    found = []
    for x, y in ((0, 0), (64, 24), (0, 40), (128, 0)):
        array = rng.integers(1, 1 << 16, (2, 3, 40, 96)).astype(np.uint16)
        z, w = (int(i) for i in (rng.integers(3), rng.integers(2)))
        tile = np.zeros((TILE_ROWS, 64), np.uint16)
        part = array[w, z, y : min(y + TILE_ROWS, 30), x : min(x + 64, 80)]  # the map ends before the array
        tile[: part.shape[0], : part.shape[1]] = part
        # In each 128 bytes the 16-byte chunk c of row r lies at c ^ r % 8.
        chunks = np.arange(8) ^ np.arange(TILE_ROWS)[:, None] % 8
        swizzled = np.take_along_axis(tile.reshape(TILE_ROWS, 8, 8), chunks[..., None], 1)
        found.append(
            Check(
                f"tile at {x}, {y}, {z}, {w}", build_tile, TILE_PARAMETERS, TILE_ROWS * 128 + 8,
                {"tile_map": array},
                {"tile_map": ((80, 30, 3, 2), array.strides[2::-1], (64, TILE_ROWS, 1, 1))},
                {"x": x, "y": y, "z": z, "w": w},
                {"out": np.full(TILE_ROWS * 64, 0xFFFF, np.uint16)},
                {"out": swizzled.ravel()}, "float16",
            )
        )  # fmt: skip
    kinds = {"float16": "f16", "bfloat16": "bf16"}
    for storage, (keys, width), passing in (
        *((storage, shape, False) for storage in kinds for shape in SHAPES), ("bfloat16", (64, 64), True),
    ):  # fmt: skip
        shapes = {"query_map": (ROWS, width), "key_map": (keys, width), "value_map": (keys, width),
                  "weights": (ROWS, keys)}  # fmt: skip
        numbers = {name: rng.integers(-4, 5, shape).astype(np.float32) for name, shape in shapes.items()}
        query, key, value, weights = numbers.values()
        boxes = {name: (64, shape[0], 1, 1) for name, shape in shapes.items() if name != "weights"}
        found.append(
            Check(
                f"products of {storage} {keys} x {width}" + (" passing registers" if passing else ""),
                partial(build_products, kind=kinds[storage], keys=keys, width=width, passing=passing),
                PRODUCT_PARAMETERS, 2 * width * (ROWS + 2 * keys) + 8,
                {name: _bits(x, storage) for name, x in numbers.items()},
                {name: ((width, box[1], 1, 1), (2 * width,) * 3, box) for name, box in boxes.items()},
                {},
                {"scores": np.full((ROWS, keys), np.nan, np.float32),
                 "sums": np.full((ROWS, width), np.nan, np.float32)},
                {"scores": query @ key.T, "sums": weights @ value}, storage,
                *((512, 128) if passing else ()),
            )
        )  # fmt: skip
    return found


def _bits(x: Any, storage: str) -> Any:
    """Small integers in 16 bits each."""
    import numpy as np

    if storage == "float16":
        return x.astype(np.float16).view(np.uint16)
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def units(seconds: float, seed: int) -> dict[str, Any]:
    """Each check on this GPU, where it is one that has these instructions."""
    from nbattn.cuda import hopper, launch

    place = launch.device(0)
    if place.capability != hopper.CAPABILITY:
        return {"rows": [], "skipped": f"{place} has no wgmma"}
    return {"rows": [judged(check.name, partial(_run, check)) for check in checks(seed)]}


def kernel_of(check: Check) -> Any:
    """The check's kernel as `launch` takes it."""
    from nbattn.cuda import compiler

    def build() -> Any:
        from nbattn.cuda import ptx, ptx_hopper

        return check.build(ptx, ptx_hopper)

    # What is kept on disk knows no change of this file.
    version = zlib.crc32(Path(__file__).read_bytes())
    name = f"unit-{check.name.split(' at ')[0].replace(' ', '-')}-{version:x}"
    return compiler.Kernel(
        name, build, check.parameters, check.threads, check.shared, registers=check.registers
    )


def _run(check: Check) -> dict[str, Any]:
    from nbattn.cuda import arrays, hopper, launch

    with arrays.Copies() as copies:
        values: dict[str, Any] = dict(check.numbers)
        for name, array in check.inputs.items():
            address = copies.send(array).address
            if name in check.maps:
                values[name] = hopper.encode(address, *check.maps[name], check.storage)
            else:
                values[name] = address
        for name, array in check.results.items():
            values[name] = copies.receive(array).address
        launch.run(kernel_of(check), values, 1, copies.device, copies.stream)
    wrong = {name: int((check.results[name] != x).sum()) for name, x in check.expected.items()}
    return {"wrong": wrong, "passed": not any(wrong.values())}
