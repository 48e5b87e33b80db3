"""The tensor-core kernels' own source in an emulator of GPU threads, and the emulator against the PTX ISA."""

import ast
import inspect
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import prompts
import pytest
import warp
from ml_dtypes import bfloat16
from oracle import inputs, normal
from prompts import NOTHING, poisoned

import nbattn
from nbattn.cuda import launch, mma, mma_kernel
from nbattn.cuda.mma_tiles import PARAMETERS, Tile
from nbattn.resolve import resolve_batch

pytestmark = pytest.mark.cuda_emu

HALVES = [np.float16, bfloat16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: np.dtype(d).name)
dtypes = pytest.mark.parametrize("dtype", [*HALVES, np.float32], ids=lambda d: np.dtype(d).name)
SMALL = Tile(32, 32, rows=32, keys=32, warps=2, keep=False)
"""Small enough that small inputs span several blocks of queries and steps of keys, and tests take little."""
Record = namedtuple("Record", [name for name, _ in PARAMETERS])


class DeviceArray(NamedTuple):
    """What the kernel's parameters are filled from."""

    address: int
    shape: tuple
    strides: tuple
    dtype: np.dtype
    device: int = 0


def on_gpu(machine, array, *, output=False):
    """The array in the machine's memory; None for None."""
    if array is None:
        return None
    return DeviceArray(machine.place(array, output=output), array.shape, array.strides, array.dtype)


def emulate(problem, out, lse=None, tile=None, machine=warp.Machine):
    """Run the kernel for a problem of NumPy arrays, as `mma.prepared` would; the machine that did."""
    p = problem
    tile = tile or mma.tile_of(p)
    m = machine(tile.threads, tile.shared_bytes)
    names = ("query", "key", "value", "mask", "bias", "alibi_slopes", "sinks")
    there = replace(p, **{name: on_gpu(m, getattr(p, name)) for name in names})
    vectors = {name: m.place(x) for name, x in mma.vectors(p).items()}
    results = on_gpu(m, out, output=True), on_gpu(m, lse, output=True)
    values, blocks = mma.values(there, *results, tile, vectors)
    number = {"float32": np.float32, "int32": int, "int64": int}
    record = Record(*(number[kind](values.get(name, 0)) for name, kind in PARAMETERS))
    m.run(mma_kernel.build(m, p.storage, tile, mma.is_full(p)), record, range(blocks))
    m.fetch()
    return m


def attend(query, key, value, mask=None, *, tile=SMALL, machine=warp.Machine, **options):
    """Output, lse, and the machine that made them."""
    p = resolve_batch(query, key, value, NOTHING._replace(mask=mask, **options)).problem
    unit = query.itemsize
    tile = tile and tile._replace(unit=unit, keep=tile.keep and unit == 2)
    out, lse = (
        poisoned((*query.shape[:3], value.shape[3]), query.dtype),
        poisoned(query.shape[:3], np.float32),
    )
    return out, lse, emulate(p, out, lse, tile, machine)


def hold(query, key, value, mask=None, *, tile=SMALL, **options):
    out, lse, machine = attend(query, key, value, mask, tile=tile, **options)
    oracle.hold(out, lse, query, key, value, mask, **options)
    # Only what looks for values that are not finite may wait for banks.
    finite = np.isfinite(value.astype(np.float32)).all() and np.isfinite(out.astype(np.float32)).all()
    counted = {name: n for name, n in machine.conflicts.items() if n and (finite or name != "load")}
    assert not counted, counted
    return out


def aligned(array):
    """A copy whose rows start at multiples of 16 bytes."""
    unit = 16 // array.itemsize
    width = -(-array.shape[-1] // unit) * unit
    room = np.zeros((*array.shape[:-1], width), array.dtype)
    shift = -room.ctypes.data % 16
    assert shift == 0
    room[..., : array.shape[-1]] = array
    return room[..., : array.shape[-1]]


class TestInstructions:
    """The emulator's fragments, by the formulas of the PTX ISA, element by element."""

    def machine(self):
        machine = warp.Machine(64, 2048)
        machine._start(0)
        return machine

    @staticmethod
    def fragment(machine, matrices, words, halves, row, column):
        """A fragment of one matrix for each warp: register i of a lane holds element (row(i), column(i))."""
        registers = warp.Registers(words + 1, np.int64, machine.threads)
        for thread in range(machine.threads):
            matrix, group, member = matrices[thread // 32], thread % 32 >> 2, thread % 4
            numbers = [matrix[row(i, group, member), column(i, group, member)] for i in range(words * halves)]
            registers.data[1:, thread] = np.array(numbers, matrices.dtype).view(np.uint32)
        registers.known[:] = True
        return registers

    @pytest.mark.parametrize("kind", ["f16", "bf16"])
    def test_m16n8k16(self, kind, rng):
        m, dtype = self.machine(), {"f16": np.float16, "bf16": bfloat16}[kind]
        a, b = (normal(rng, (2, *shape), dtype) for shape in ((16, 16), (16, 8)))
        x = self.fragment(
            m, a, 4, 2,
            lambda i, group, _: group if 0 <= i < 2 or 4 <= i < 6 else group + 8,
            lambda i, _, member: member * 2 + (i & 1) + (8 if i >= 4 else 0),
        )  # fmt: skip
        y = self.fragment(
            m, b, 2, 2,
            lambda i, _, member: member * 2 + (i & 1) + (8 if i >= 2 else 0),
            lambda i, group, _: group,
        )  # fmt: skip
        self.multiply(m, getattr(m, f"multiply_{kind}"), a, x, b, y, rng)

    def test_m16n8k8(self, rng):
        m = self.machine()
        a, b = (normal(rng, (2, *shape), bfloat16).astype(np.float32) for shape in ((16, 8), (8, 8)))
        x = self.fragment(
            m, a, 4, 1,
            lambda i, group, _: group if i in (0, 2) else group + 8,
            lambda i, _, member: member if i in (0, 1) else member + 4,
        )  # fmt: skip
        y = self.fragment(
            m, b, 2, 1,
            lambda i, _, member: member if i == 0 else member + 4,
            lambda i, group, _: group,
        )  # fmt: skip
        self.multiply(m, m.multiply_tf32, a, x, b, y, rng)

    @staticmethod
    def multiply(m, instruction, a, x, b, y, rng):
        c = normal(rng, (2, 16, 8))
        z = warp.Registers(6, np.float32, m.threads)
        for thread in range(m.threads):
            group, member = thread % 32 >> 2, thread % 4
            for i in range(4):
                z.data[2 + i, thread] = c[thread // 32, group + 8 * (i >= 2), member * 2 + (i & 1)]
        z.known[:] = True
        instruction(z, 2, x, 1, y, 1)
        expected = c + a.astype(float) @ b.astype(float)
        for thread in range(m.threads):
            group, member = thread % 32 >> 2, thread % 4
            for i in range(4):
                element = expected[thread // 32, group + 8 * (i >= 2), member * 2 + (i & 1)]
                assert z.data[2 + i, thread] == warp.toward_zero(element)

    def test_tf32_drops_bits(self):
        m = self.machine()
        one = np.float32(1 + 2**-11).view(np.uint32)
        a, b, c = (warp.Registers(4, t, 64) for t in (np.int64, np.int64, np.float32))
        for registers, x in ((a, one), (b, one), (c, 0)):
            for i in range(4):
                registers[i] = x
        m.multiply_tf32(c, 0, a, 0, b, 0)
        assert (c[0] == 8).all()

    @pytest.mark.parametrize("turned", [False, True])
    def test_ldmatrix(self, turned, rng):
        m = self.machine()
        matrices = rng.permutation(512).astype(np.uint16).reshape(2, 4, 8, 8)
        # Rows lie apart and in an order of their own.
        slots = rng.permutation(64)
        for number, slot in enumerate(slots):
            m.shared[16 * slot : 16 * slot + 16] = matrices.reshape(64, 8)[number].view(np.uint8)
        m.written_by[:], m.written_at[:] = m.ids[0], 0
        m.barrier()
        x = warp.Registers(5, np.int64, 64)
        (m.load_matrices_turned if turned else m.load_matrices)(x, 1, 16 * slots)
        for thread in range(64):
            lane = thread % 32
            for k in range(4):
                matrix = matrices[thread // 32, k].T if turned else matrices[thread // 32, k]
                low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
                assert x.data[1 + k, thread] == warp.wrap(int(low) | int(high) << 16)

    def test_exchange(self):
        m = self.machine()
        for distance in (1, 2, 16):
            np.testing.assert_array_equal(m.exchange(m.ids, distance), m.ids ^ distance)

    @halves
    def test_pack(self, dtype, rng):
        m, kind = self.machine(), {np.float16: "f16"}.get(dtype, "bf16")
        x, y = normal(rng, 64), normal(rng, 64)
        word = getattr(m, f"pack_{kind}")(x, y)
        np.testing.assert_array_equal(getattr(m, f"low_{kind}")(word), x.astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(getattr(m, f"high_{kind}")(word), y.astype(dtype).astype(np.float32))
        assert (word & 0xFFFF == x.astype(dtype).view(np.uint16)).all()

    def test_copies_land_when_waited_for(self, rng):
        m = self.machine()
        source = rng.integers(0, 256, (64, 16), np.uint8)
        size = m.ids % 17
        m.copy_async(16 * m.ids, m.place(source) + 16 * m.ids, size)
        m.wait_copies()  # not of a group yet
        assert m.pending.any()
        m.commit_copies()
        m.wait_copies()
        assert not m.pending.any()
        m.barrier()
        got = m.shared[: 64 * 16].reshape(64, 16)
        np.testing.assert_array_equal(got, np.where(np.arange(16) < size[:, None], source, 0))


class TestChecks:
    """What the emulator must not let pass."""

    def machine(self):
        machine = warp.Machine(64, 1024)
        machine._start(0)
        return machine

    def test_read_before_the_barrier(self):
        for between, fails in (
            (lambda m: None, True),
            (lambda m: m.warp_barrier(), True),
            (lambda m: m.barrier(), False),
        ):
            m = self.machine()
            m.store_shared(4 * m.ids, 0, True)
            between(m)
            if fails:
                with pytest.raises(warp.Race, match="read that another thread wrote"):
                    m.load_shared(4 * (63 - m.ids))
            else:
                m.load_shared(4 * (63 - m.ids))

    def test_warp_barrier_is_enough_within_a_warp(self):
        m = self.machine()
        m.store_shared(4 * m.ids, 0, True)
        with pytest.raises(warp.Race):
            m.load_shared(4 * (m.ids ^ 1))
        m.warp_barrier()
        m.load_shared(4 * (m.ids ^ 1))

    def test_write_after_another_thread_read(self):
        for between, other, fails in (
            (lambda m: None, 1, True), (lambda m: None, 0, False), (lambda m: m.warp_barrier(), 1, False),
            (lambda m: m.warp_barrier(), 32, True), (lambda m: m.barrier(), 32, False),
        ):  # fmt: skip
            m = self.machine()
            m.store_shared(4 * m.ids, 0, True)
            m.barrier()
            m.load_shared(4 * (m.ids ^ other))
            between(m)
            if fails:
                with pytest.raises(warp.Race, match="written that another thread read"):
                    m.store_shared(4 * m.ids, 1, True)
            else:
                m.store_shared(4 * m.ids, 1, True)

    def test_copies(self):
        m = self.machine()
        source = m.place(np.zeros(1024, np.uint8)) + 16 * m.ids
        m.copy_async(16 * m.ids, source, 16)
        m.commit_copies()
        with pytest.raises(warp.Race, match="may not have reached"):
            m.load_shared(16 * m.ids)
        with pytest.raises(warp.Race, match="may yet reach"):
            m.store_shared(16 * m.ids, 0, True)
        m.wait_copies()
        m.load_shared(16 * m.ids)
        with pytest.raises(warp.Race):
            m.load_shared(16 * (63 - m.ids))

    def test_memory_has_bounds(self):
        m = self.machine()
        x, y = m.place(np.zeros(64, np.float32)), m.place(np.zeros(64, np.float32), output=True)
        m.load_float(x + 4 * m.ids, True)
        with pytest.raises(AssertionError, match="no array"):
            m.load_float(x + 4 * m.ids + 4, True)
        m.load_float(x + 4 * m.ids + 4, m.ids < 63)
        with pytest.raises(AssertionError, match="aligned"):
            m.load_float(x + 4 * m.ids + 2, m.ids < 63)
        with pytest.raises(AssertionError, match="aligned"):
            m.copy_async(16 * m.ids, x + 4 * m.ids, 4)
        m.store_float(y + 4 * m.ids, 1, m.ids < 63)
        with pytest.raises(AssertionError, match="4 bytes of 256 were not written"):
            m.fetch()
        with pytest.raises(AssertionError, match="or again"):
            m.store_float(y + 4 * m.ids, 1, True)

    def test_registers_are_written_first(self):
        x = warp.Registers(4, np.float32, 64)
        x[1] = 1
        with pytest.raises(AssertionError, match="nothing wrote"):
            x[0]
        with pytest.raises(AssertionError, match="ends there"):
            x[4]

    def test_conflicts_are_counted(self):
        m = self.machine()
        m.store_shared(4 * m.ids, 0, True)
        assert m.conflicts["store"] == 0
        m = self.machine()
        m.store_shared(4 * (m.ids % 32 * 8 + m.ids // 32), 0, True)  # 8 rows of 4 banks
        assert m.conflicts["store"] == 2 * 7

    @pytest.mark.parametrize("missing", ["barrier", "wait_copies", "warp_barrier"])
    def test_a_kernel_that_lacks_it_fails(self, missing, rng):
        class Broken(warp.Machine):
            pass

        setattr(Broken, missing, lambda self: None)
        q, k, v = inputs(rng, 1, 1, 1, 40, 70, 32, dtype=np.float16)
        attend(q, k, v)
        with pytest.raises(AssertionError):
            attend(q, k, v, machine=Broken)


def test_names_are_those_of_ptx():
    """Read from the source, as its import needs numba-cuda."""
    tree = ast.parse((Path(nbattn.__file__).parent / "cuda" / "ptx.py").read_text())
    names = {n.name: len(n.args.args) for n in tree.body if isinstance(n, ast.FunctionDef)}
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assigned |= {x.name for n in tree.body if isinstance(n, ast.ImportFrom) and n.level for x in n.names}
    machine = {name: f for name, f in inspect.getmembers(warp.Machine(32, 0)) if name[0] != "_"}
    used = {name for name, function in machine.items() if callable(function)} - {
        "place",
        "workspace",
        "run",
        "fetch",
    }
    assert used <= {*names, *assigned}
    for name in used & {*names}:
        assert len(inspect.signature(machine[name]).parameters) == names[name], name


class TestAttention:
    @dtypes
    @pytest.mark.parametrize("tile", [SMALL, SMALL._replace(rows=64, keep=True), SMALL._replace(keys=64)])
    def test_ragged_sizes(self, dtype, tile, rng):
        for queries, keys in ((1, 1), (33, 31), (64, 65), (31, 100), (97, 32)):
            q, k, v = inputs(rng, 1, 2, 1, queries, keys, 32, dtype=dtype)
            hold(q, k, v, tile=tile)
            hold(q, k, v, tile=tile, is_causal=True, query_offset="end")

    @pytest.mark.parametrize(
        ("dtype", "full", "tile"),
        [
            (dtype, full, tile)
            for d, dtype in enumerate([*HALVES, np.float32])
            for full in (False, True)
            for n, tile in enumerate(mma.tiles_of(np.dtype(dtype).name, full))
            if dtype == np.float32 or (n + d) % 2 == full
        ],
        ids=str,
    )
    def test_every_tile(self, dtype, full, tile, rng):
        """As chosen by the problem; half of the cases in each dtype of 16 bits."""
        q, k, v = inputs(rng, 1, 1, 1, 140, 70, *tile[:2], dtype)
        options = {"softcap": 3.0} if full else {}
        assert mma.tile_of(resolve_batch(q, k, v, NOTHING._replace(**options)).problem) == tile
        hold(q, k, v, tile=None, is_causal=True, query_offset=-10, **options)

    def test_sums_of_float32_do_not_drift(self, rng):
        """Tensor cores cut sums off: thousands of keys would make them smaller and smaller."""
        q, k, v = (np.abs(x) for x in inputs(rng, 1, 1, 1, 16, 1500, 32))
        hold(q, k, v)
        hold(*(np.abs(x) for x in inputs(rng, 1, 1, 1, 64, 64, 128)), tile=None)

    def test_float32_that_is_almost_too_large(self, rng):
        q, k, v = inputs(rng, 1, 1, 1, 16, 40, 32)
        v[0, 0, 3], k[0, 0, 5] = 3.4e38, 1.7e38
        hold(q * np.float32(1e-30), k * np.float32(1e-8), v)

    @dtypes
    @pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (8, 24), (17, 3), (30, 32), (31, 7)])
    def test_head_dims(self, dtype, head_dim, value_dim, rng):
        q, k, v = (aligned(x) for x in inputs(rng, 1, 2, 1, 40, 50, head_dim, value_dim, dtype))
        hold(q, k, v)

    def test_batches_and_groups(self, rng):
        q, k, v = inputs(rng, 2, 6, 2, 33, 40, 32, dtype=np.float16)
        hold(q, k, v, is_causal=True, query_offset=[5, -3])

    @halves
    def test_strides(self, dtype, rng):
        q, k, v = inputs(rng, 2, 2, 2, 40, 50, 32, dtype=dtype)
        out, lse, _ = attend(q, k, v)
        by_head = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
        mixed = np.stack([k, v], axis=3)  # keys and values interleaved
        for arrays in (by_head, (q, mixed[..., 0, :], mixed[..., 1, :])):
            again, lse_again, _ = attend(*arrays)
            oracle.assert_same_bits(again, out)
            oracle.assert_same_bits(lse_again, lse)
        once = np.broadcast_to(k[:1, :1], k.shape)
        hold(q, once, v)
        hold(q, k[:, :, ::2], v[:, :, ::2])

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize("layout", ["aligned", "by head", "odd"])
    def test_out(self, layout, dtype, rng):
        q, k, v = inputs(rng, 1, 2, 1, 40, 50, 32, 24, dtype)
        p = resolve_batch(q, k, v, NOTHING).problem
        shape = (1, 2, 40, 24)
        out = {
            "aligned": lambda: poisoned(shape, dtype),
            "by head": lambda: poisoned((1, 40, 2, 24), dtype).transpose(0, 2, 1, 3),
            "odd": lambda: poisoned((1, 2, 40, 27), dtype)[..., 2:26],
        }[layout]()
        around = out.base.copy() if out.base is not None else None
        emulate(p, out, tile=SMALL._replace(unit=out.itemsize))
        oracle.hold(out, None, q, k, v)
        if layout == "odd":
            np.testing.assert_array_equal(out.base[..., :2], around[..., :2])
            np.testing.assert_array_equal(out.base[..., 26:], around[..., 26:])

    @dtypes
    @pytest.mark.parametrize(("queries", "keys"), [(0, 5), (40, 0)])
    def test_empty(self, dtype, queries, keys, rng):
        q, k, v = (np.ones((2, 2, n, 32), dtype) for n in (queries, keys, keys))
        out, lse, _ = attend(q, k, v)
        assert not out.any()
        assert (lse == -np.inf).all()

    @dtypes
    @pytest.mark.parametrize("scale", [0.3, -0.5, 0.0, 2, 1e-35, 1e4, 1e20])
    def test_scale(self, dtype, scale, rng):
        q, k, v = inputs(rng, 1, 2, 1, 40, 50, 32, dtype=dtype)
        if scale < 1e3:
            hold(q, k, v, scale=scale)
        else:
            q[:], k[:] = 0, 0
            q[..., 0], k[..., 0] = 1, rng.permutation(50) - 24
            lse = prompts.best_key_alone(attend, q, k, v, int(k[0, 0, :, 0].argmax()), scale=scale)
            np.testing.assert_allclose(lse, scale * 25, rtol=1e-6)

    def test_products_beyond_float16(self, rng):
        q, k, v = inputs(rng, 1, 2, 1, 40, 50, 32, dtype=np.float16)
        hold(q * np.float16(200), k * np.float16(200), v, scale=1e-3)

    def test_scores_whose_rounding_is_felt(self, rng):
        prompts.scores_whose_rounding_is_felt(attend, 32, rng)

    @halves
    @pytest.mark.parametrize("softcap", [0.5, 30, 1e4])
    def test_softcap(self, dtype, softcap, rng):
        hold(*inputs(rng, 1, 2, 1, 40, 50, 32, dtype=dtype), softcap=softcap, scale=1.5)

    @dtypes
    @pytest.mark.parametrize("same", [True, False])
    def test_bias(self, dtype, same, rng):
        q, k, v = inputs(rng, 2, 2, 1, 40, 70, 32, dtype=dtype)
        bias = normal(rng, (2, 2, 40, 70), dtype if same else np.float32)
        bias[rng.random(bias.shape) < 0.2] = -np.inf
        bias[:, 1, 4:7] = -np.inf
        hold(q, k, v, bias=bias)
        hold(q, k, v, bias=bias[:1, :, :1, :].copy())
        hold(q, k, v, bias=bias[:, :1, :, :1].copy())

    @dtypes
    def test_mask(self, dtype, rng):
        q, k, v = inputs(rng, 2, 2, 1, 40, 70, 32, dtype=dtype)
        mask = rng.random((2, 2, 40, 70)) < 0.5
        mask[1, 1, 3] = False
        hold(q, k, v, mask)
        hold(q, k, v, mask[1:, :, :, :1])
        hold(q, k, v, mask[0, :, :1])
        hold(q, k, v, rng.integers(0, 2, (40, 70)).astype(np.uint8) * 128)

    @halves
    def test_alibi(self, dtype, rng):
        q, k, v = inputs(rng, 2, 2, 1, 40, 70, 32, dtype=dtype)
        for offset in (0, [41, -3], "end"):
            hold(q, k, v, alibi_slopes=np.array([1.0, -0.3]), query_offset=offset)

    @dtypes
    def test_sinks(self, dtype, rng):
        q, k, v = inputs(rng, 2, 2, 1, 40, 70, 32, dtype=dtype)
        hold(q, k, v, sinks=np.array([-3.0, 9.0]))
        hold(q, k, v, sinks=np.array([0.0, -np.inf]), is_causal=True, query_offset=-9)

    @halves
    @pytest.mark.parametrize("offset", [0, 37, -60, 10**9, -(10**12), [2, -7], "end"], ids=str)
    def test_causal(self, dtype, offset, rng):
        hold(*inputs(rng, 2, 2, 1, 40, 70, 32, dtype=dtype), is_causal=True, query_offset=offset)

    @pytest.mark.parametrize("window", [(0, 0), (3, None), (None, 2), (40, 7), (2**62, 0)])
    def test_window(self, window, rng):
        q, k, v = inputs(rng, 2, 2, 1, 70, 80, 32, dtype=np.float16)
        for offset in (0, [-20, 60]):
            hold(q, k, v, window_size=window, query_offset=offset)

    @dtypes
    def test_lengths(self, dtype, rng):
        q, k, v = inputs(rng, 5, 2, 1, 33, 100, 32, dtype=dtype)
        lengths = np.array([100, 0, 1, 64, 97])
        k[1], v[1:3, :, 5] = np.nan, np.nan
        hold(q, k, v, key_lengths=lengths)
        hold(q, k, v, key_lengths=lengths, is_causal=True, query_offset="end", window_size=(30, None))

    @dtypes
    def test_everything_at_once(self, dtype, rng):
        q, k, v = inputs(rng, 2, 2, 1, 70, 100, 32, dtype=dtype)
        bias = normal(rng, (2, 1, 70, 100))
        bias[rng.random(bias.shape) < 0.2] = -np.inf
        v[0, 0, 40, 3], k[1, 0, 7, 30] = np.nan, np.nan
        hold(
            q, k, v, rng.random((2, 70, 100)) < 0.6, bias=bias, softcap=3.0, window_size=(60, 0),
            alibi_slopes=np.array([1.0, -0.3]), sinks=np.array([12.0, -np.inf]),
            query_offset=20, key_lengths=[90, 55], scale=0.4,
        )  # fmt: skip

    def test_packed(self, rng):
        prompts.packed(emulate, SMALL, 2, 32, rng)


class TestLeaks:
    DIAGONALS = (np.arange(70) + np.arange(40)[:, None]) % 3 == 0
    WAYS = (
        {"mask": DIAGONALS},
        {"bias": np.where(DIAGONALS, np.float32(0.25), np.float32(-np.inf))},
        {"is_causal": True, "query_offset": 9},
        {"window_size": (20, 4), "query_offset": 11},
        {"key_lengths": [50, 70]},
    )

    @pytest.mark.parametrize(
        ("way", "poison", "dtype"),
        [
            *((way, np.nan, dtype) for way in range(5) for dtype in HALVES),
            *((way, -np.inf, np.float16) for way in range(5)),
            (1, np.nan, np.float32), (4, -np.inf, np.float32),
        ],
        ids=str,
    )  # fmt: skip
    def test_masked_never_reaches(self, way, poison, dtype, rng):
        clean = inputs(rng, 2, 2, 1, 40, 70, 32, dtype=dtype)
        places = ((1,), (2,), (1, 2))
        prompts.masked_never_reaches(attend, clean, self.WAYS[way], poison, places, rng)

    @dtypes
    def test_an_infinite_value_stays_what_it_is(self, dtype, rng):
        q, k, v = inputs(rng, 1, 1, 1, 40, 70, 32, dtype=dtype)
        v[0, 0, 3, 5], v[0, 0, 50, 9], v[0, 0, 51, 9] = np.inf, -np.inf, np.inf
        out, _, _ = attend(q, k, v, is_causal=True, query_offset=12)
        wide = out[0, 0].astype(np.float32)
        assert (wide[:, 5] == np.inf).all()
        assert np.isfinite(wide[:38, 9]).all()
        assert wide[38, 9] == -np.inf
        assert np.isnan(wide[39, 9])

    @dtypes
    def test_query_touches_only_its_row(self, dtype, rng):
        prompts.a_query_touches_only_its_row(attend, *inputs(rng, 1, 1, 1, 40, 70, 32, dtype=dtype))

    def test_nan_in_options_reaches(self, rng):
        q, k, v = inputs(rng, 1, 2, 1, 4, 6, 32, dtype=np.float16)
        bias = np.zeros((4, 6), np.float32)
        bias[2, 5] = np.nan
        got = np.isnan(attend(q, k, v, bias=bias)[0])
        assert got[:, :, 2].all()
        assert not got[:, :, [0, 1, 3]].any()
        got = np.isnan(attend(q, k, v, sinks=np.array([np.nan, 1.0]))[0])
        assert got[:, 0].all()
        assert not got[:, 1].any()
        shown = np.arange(6) < 5
        assert not np.isnan(attend(q, k, v, shown, bias=np.where(shown, 0, np.float32(np.nan)))[0]).any()


class TestBits:
    def test_do_not_depend_on_the_rest_of_the_batch(self, rng):
        prompts.bits_are_those_of_one_alone(attend, *inputs(rng, 3, 2, 1, 40, 70, 32, dtype=bfloat16))


class TestCovers:
    class Gpu:
        capability = (8, 0)

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(launch, "device", lambda ordinal: self.Gpu)

    def problem(self, q, k, v, **options):
        p = resolve_batch(q, k, v, NOTHING._replace(**options)).problem
        names = ("query", "key", "value", "mask", "bias")
        there = {
            name: None if x is None else DeviceArray(x.ctypes.data, x.shape, x.strides, x.dtype)
            for name, x in ((name, getattr(p, name)) for name in names)
        }
        return replace(p, **there)

    def inputs(self, rng, head_dim=32, dtype=np.float16):
        return tuple(aligned(x) for x in inputs(rng, 1, 2, 1, 5, 7, head_dim, dtype=dtype))

    @halves
    @pytest.mark.parametrize("head_dim", [1, 17, 64, 100, 256])
    def test_halves(self, dtype, head_dim, rng):
        q, k, v = self.inputs(rng, head_dim, dtype)
        assert mma.covers(
            self.problem(q, k, v, is_causal=True, softcap=1.0, bias=np.zeros((5, 7), np.float32))
        )

    def test_not(self, rng, monkeypatch):
        q, k, v = self.inputs(rng)
        assert mma.covers(self.problem(q, k, v))
        assert not mma.covers(self.problem(*self.inputs(rng, 257)))
        wide = self.inputs(rng, 128, np.float32)
        assert mma.covers(self.problem(*wide))
        assert not mma.covers(self.problem(*wide, compute_dtype="bfloat16"))
        assert not mma.covers(self.problem(*self.inputs(rng, 129, np.float32)))
        assert not mma.covers(self.problem(*self.inputs(rng, dtype=np.float64)))
        assert not mma.covers(self.problem(q, k, v, bias=np.zeros((5, 7))))
        assert not mma.covers(self.problem(q, k, v, score_mod=lambda s, b, h, i, j: s))
        unaligned = np.zeros((1, 1, 7, 36), np.float16)[..., :32]
        assert not mma.covers(self.problem(q, unaligned, v))
        assert not mma.covers(self.problem(q, k, np.zeros((1, 1, 7, 40), np.float16)[..., 2:34]))
        monkeypatch.setattr(self.Gpu, "capability", (7, 5))
        assert not mma.covers(self.problem(q, k, v))

    def test_one_key_needs_no_alignment(self, rng):
        q, k, v = inputs(rng, 1, 1, 1, 1, 1, 9, dtype=np.float16)
        assert mma.covers(self.problem(*(aligned(x) for x in (q, k, v))))

    def test_tiles_fit_the_smallest_gpu(self):
        for tile in (t for s in mma.STORAGES for full in (False, True) for t in mma.tiles_of(s, full)):
            assert tile.shared_bytes <= 99 << 10
            assert tile.keys % (tile.threads // 8) == 0
            assert tile.rows % (tile.threads // 8) == 0
            assert tile.rows % (16 * tile.warps) == 0
