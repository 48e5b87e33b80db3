"""The Hopper kernel's own source in an emulator of warpgroups, and the emulator against the PTX ISA."""

import ast
import ctypes
import inspect
import struct
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import prompts
import pytest
import warp
import warpgroup
from ml_dtypes import bfloat16
from oracle import inputs, normal
from prompts import NOTHING, poisoned
from test_cuda_mma import DeviceArray, aligned, on_gpu

import nbattn
from benchmarks import gpu_units
from nbattn.cuda import attention, compiler, hopper, hopper_kernel, launch, mma
from nbattn.cuda.hopper_tiles import PARAMETERS, Tile
from nbattn.resolve import resolve_batch

pytestmark = pytest.mark.cuda_emu

halves = pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=lambda d: np.dtype(d).name)
SMALL = Tile(64, 64, 32, groups=2, stages=2, turns=True)
"""Small enough that small inputs span several blocks of queries and steps of keys, and tests take little."""
ONE = SMALL._replace(groups=1)
Record = namedtuple("Record", [name for name, _ in PARAMETERS])


def emulate(problem, out, lse=None, tile=None, role=warpgroup.Role, seed=0):
    """Run the kernel for a problem of NumPy arrays, as `hopper.prepared` would; the machine that did."""
    p = problem
    tile = tile or hopper.tile_of(p)
    m = warpgroup.Gpu(tile.threads, tile.shared_bytes, seed)
    m.role_class = role
    there = replace(p, **{name: on_gpu(m, getattr(p, name)) for name in ("query", "key", "value", "sinks")})
    vectors = {name: m.place(x) for name, x in mma.vectors(p).items()}
    results = on_gpu(m, out, output=True), on_gpu(m, lse, output=True)
    values, blocks = hopper.values(there, *results, tile, vectors, warpgroup.tensor_map)
    number = {"float32": np.float32, "int32": int, "int64": int, "map": lambda x: x}
    record = Record(*(number[kind](values.get(name, 0)) for name, kind in PARAMETERS))
    full = hopper.is_full(p)
    m.run(lambda isa: hopper_kernel.build(isa, isa, p.storage, tile, full), record, range(blocks))
    m.fetch()
    return m


def attend(query, key, value, *, tile=ONE, role=warpgroup.Role, seed=0, **options):
    """Output, lse, and the machine that made them."""
    p = resolve_batch(query, key, value, NOTHING._replace(**options)).problem
    out = poisoned((*query.shape[:3], value.shape[3]), query.dtype)
    lse = poisoned(query.shape[:3], np.float32)
    return out, lse, emulate(p, out, lse, tile, role, seed)


def hold(query, key, value, *, tile=ONE, **options):
    out, lse, machine = attend(query, key, value, tile=tile, **options)
    oracle.hold(out, lse, query, key, value, **options)
    assert not any(count for name, count in machine.conflicts.items() if name != "load"), machine.conflicts
    return out


def play(*programs, shared_bytes=1 << 14, seed=0):
    """Run a function for each warpgroup but the first, whose warp 0 runs the first function."""

    def build(isa):
        def kernel(p):
            isa.first = isa.ids[0] == 0
            number = 0 if isa.first else isa.ids[0] // 128
            if isa.first or number:
                programs[number](isa)

        return kernel

    gpu = warpgroup.Gpu(128 * max(2, len(programs)), shared_bytes, seed)
    programs += (lambda isa: None,) * (2 - len(programs))
    gpu.run(build, None, [0])


def place_panels(matrix, shared, at):
    """Put rows of 64-column panels into shared memory, by the PTX ISA's figures of the 128-byte swizzle."""
    rows, columns = matrix.shape
    for r in range(rows):
        for c in range(columns):
            inside = r * 128 + ((c % 64 // 8) ^ (r % 8)) * 16 + c % 8 * 2
            shared.view(np.uint16)[(at + c // 64 * rows * 128 + inside) // 2] = matrix[r, c].view(np.uint16)


class TestInstructions:
    """Descriptors and tensor maps first: all else rests on them."""

    @halves
    def test_product(self, dtype, rng):
        """64 x 64 @ (64 x 32).T in four steps, of which each is 32 bytes further in the rows."""
        kind = "f16" if dtype == np.float16 else "bf16"
        a, b, start = normal(rng, (64, 64), dtype), normal(rng, (32, 64), dtype), normal(rng, (64, 32))
        found = np.zeros((64, 32), np.float32)

        def compute(isa):
            place_panels(a, isa.shared, 1024)
            place_panels(b, isa.shared, 1024 + 8192)
            isa.all.writer[:], isa.all.write_thread[:] = isa.own[0], isa.ids[0]
            c = isa.cuda.local.array(16, isa.float32)
            rows, columns = self.places(32)
            for i in range(16):
                c[i] = start[rows[i], columns[i]]
            isa.fence_registers()
            multiply = isa.product(kind, 32)
            for k in range(4):
                left, right = (1 << 62 | 64 << 32 | (at + 32 * k) >> 4 for at in (1024, 9216))
                multiply(c, left, right, True)
            isa.commit_products()
            with pytest.raises(AssertionError, match="nothing wrote"):
                c[0]
            isa.wait_products(16, 0)(c)
            for i in range(16):
                found[rows[i], columns[i]] = c[i]

        play(lambda isa: None, compute)
        exact = start + a.astype(float) @ b.astype(float).T
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)

    @halves
    def test_product_of_registers(self, dtype, rng):
        """64 x 32 in registers @ 32 x 128 in two panels."""
        kind = "f16" if dtype == np.float16 else "bf16"
        a, b = normal(rng, (64, 32), dtype), normal(rng, (32, 128), dtype)
        found = np.zeros((64, 128), np.float32)

        def compute(isa):
            place_panels(b, isa.shared, 2048)
            isa.all.writer[:], isa.all.write_thread[:] = isa.own[0], isa.ids[0]
            c, words = isa.cuda.local.array(64, isa.float32), isa.cuda.local.array(8, isa.int32)
            rows, columns = self.places(128)
            for i in range(64):
                c[i] = 0.0
            t = np.arange(128)
            for i in range(8):  # of a 64 x 16 matrix: (g, 2 q), (g + 8, 2 q), (g, 2 q + 8), (g + 8, 2 q + 8)
                row = t // 32 * 16 + t % 32 // 4 + 8 * (i % 2)
                column = t % 4 * 2 + 8 * (i % 4 // 2) + 16 * (i // 4)
                words[i] = np.stack([a[row, column], a[row, column + 1]], -1).view(np.uint32)[:, 0]
            isa.fence_registers()
            multiply = isa.product_of_registers(kind, 128)
            for k in range(2):  # the next panel is 4096 bytes on, the next 8 rows 1024, the next 16 2048
                multiply(c, words, 4 * k, 1 << 62 | 64 << 32 | 256 << 16 | (2048 + 2048 * k) >> 4)
            isa.commit_products()
            isa.wait_products(64, 0)(c)
            for i in range(64):
                found[rows[i], columns[i]] = c[i]

        play(lambda isa: None, compute)
        np.testing.assert_allclose(found, a.astype(float) @ b.astype(float), rtol=1e-5, atol=1e-5)

    @staticmethod
    def places(width):
        """Rows and columns of a warpgroup's sums: of a thread's i-th those of all threads."""
        t = np.arange(128)
        i = np.arange(width // 2)[:, None]
        return t // 32 * 16 + t % 32 // 4 + 8 * (i % 4 // 2), i // 4 * 8 + t % 4 * 2 + i % 2

    @pytest.mark.parametrize(("x", "y"), [(0, 0), (64, 24), (0, 40), (128, 0), (0, -8)])
    def test_tile(self, x, y, rng):
        """Rows of 128 bytes in the swizzle; zeros beyond the array's ends, whatever lies there."""
        array = rng.integers(1, 1 << 16, (2, 3, 30, 80)).astype(np.uint16)
        around = np.full((2, 3, 40, 96), 0xFFFF, np.uint16)
        around[:, :, :30, :80] = array
        there = around[:, :, :30, :80]
        gpu = warpgroup.Gpu(256, 1 << 13)
        address = gpu.place(there)
        m = warpgroup.tensor_map(
            address, *hopper.map_of(SimpleNamespace(shape=there.shape, strides=there.strides), 16), "float16"
        )
        expected = np.zeros((16, 64), np.uint16)
        for r in range(16):
            for c in range(64):
                if 0 <= y + r < 30 and x + c < 80:
                    expected[r, c] = array[1, 2, y + r, x + c]
        shared = np.zeros(1 << 13, np.uint8)
        place_panels(expected, shared, 4096)

        def build(isa):
            def kernel(p):
                if isa.ids[0] != 0:
                    return
                isa.start_barrier(0, 1, isa.ids == 0)
                isa.fence_barriers()
                isa.warp_barrier()
                isa.expect(0, 2048, isa.ids == 5)
                isa.load_tile(4096, m, 0, x, y, 2, 1, isa.ids == 5)
                with pytest.raises(warp.Race):
                    isa.load_shared(4096 + 4 * isa.ids)
                isa.wait_phase(0, 0)
                isa.load_shared(4096 + 4 * isa.ids)
                np.testing.assert_array_equal(isa.shared[4096:6144], shared[4096:6144])

            return kernel

        gpu.run(build, None, [0])

    def test_map_of_axes_of_one(self):
        """Their strides may be anything; a map's are multiples of 16 above 0."""
        x = np.zeros((1, 1, 1, 17), np.float16)
        strange = SimpleNamespace(shape=x.shape, strides=(0, 3, 6, 2))
        sizes, strides, box = hopper.map_of(strange, 8)
        assert (sizes, strides, box) == ((17, 1, 1, 1), (48, 48, 48), (64, 8, 1, 1))


class TestChecks:
    """What the emulator must not let pass."""

    def two(self, first, second, **options):
        """Two programs, and an mbarrier at 0 that waits for one arrival."""

        def begin(isa):
            isa.start_barrier(0, 1, isa.ids == 0)
            isa.fence_barriers()
            isa.meet(1, 160)
            first(isa)

        def other(isa):
            isa.meet(1, 160)
            second(isa)

        play(begin, other, **options)

    def test_an_mbarrier_orders(self):
        write = lambda isa: isa.store_shared(64 + 4 * isa.ids, 0, True)  # noqa: E731
        read = lambda isa: isa.load_shared(np.where(isa.ids < 160, 4 * (isa.ids - 128) + 64, 64))  # noqa: E731
        arrive = lambda isa: isa.arrive(0, isa.ids == 0)  # noqa: E731
        for seed in range(4):
            self.two(
                lambda isa: (write(isa), arrive(isa)),
                lambda isa: (isa.wait_phase(0, 0), read(isa)), seed=seed,
            )  # fmt: skip
            with pytest.raises((warp.Race, AssertionError)):
                self.two(lambda isa: (arrive(isa), write(isa)), lambda isa: (isa.wait_phase(0, 0), read(isa)))
            with pytest.raises(warp.Race):  # read before it is overwritten
                self.two(
                    lambda isa: (write(isa), arrive(isa), write(isa)),
                    lambda isa: (isa.wait_phase(0, 0), read(isa), isa.meet(2, 128)), seed=seed,
                )  # fmt: skip

    def test_deadlocks(self):
        with pytest.raises(warpgroup.Deadlock, match="mbarrier 0, parity 0"):
            self.two(lambda isa: None, lambda isa: isa.wait_phase(0, 0))
        with pytest.raises(warpgroup.Deadlock, match="barrier 3"):
            self.two(lambda isa: None, lambda isa: isa.meet(3, 160))

    def test_a_fresh_mbarrier_has_ended_the_phase_before(self):
        self.two(lambda isa: isa.wait_phase(0, 1), lambda isa: isa.wait_phase(0, 1))

    def test_a_missed_phase(self):
        with pytest.raises(AssertionError, match="missed"):
            self.two(
                lambda isa: (isa.arrive(0, isa.ids == 0), isa.arrive(0, isa.ids == 0), isa.meet(2, 160)),
                lambda isa: (isa.meet(2, 160), isa.wait_phase(0, 1)),
            )

    MISSING = (
        "fence_registers", "fence_barriers", "wait_phase", "arrive", "expect", "barrier", "warp_barrier",
        "announce", "load_tile", "commit_products", "wait_products",
    )  # fmt: skip

    @pytest.mark.parametrize("missing", MISSING)
    def test_a_kernel_that_lacks_it_fails(self, missing, rng):
        class Broken(warpgroup.Role):
            pass

        nothing = lambda *_: None  # noqa: E731
        setattr(Broken, missing, (lambda *_: nothing) if missing == "wait_products" else nothing)
        q, k, v = inputs(rng, 1, 1, 1, 70, 70, 64, dtype=np.float16)
        with pytest.raises(AssertionError):
            attend(q, k, v, role=Broken, tile=SMALL)

    @pytest.mark.parametrize("missing", ["fence_shared", "meet"])
    def test_mending_that_lacks_it_fails(self, missing, rng):
        class Broken(warpgroup.Role):
            pass

        setattr(Broken, missing, lambda *_: None)
        q, k, v = inputs(rng, 1, 1, 1, 70, 40, 64, dtype=np.float16)
        v[0, 0, 39, 3] = np.nan
        tile = SMALL._replace(turns=False)
        attend(q, k, v, is_causal=True, tile=tile)
        with pytest.raises(AssertionError):
            attend(q, k, v, is_causal=True, tile=tile, role=Broken)


def test_names_are_those_of_ptx_hopper():
    """Read from the source, as its import needs numba-cuda."""
    tree = ast.parse((Path(nbattn.__file__).parent / "cuda" / "ptx_hopper.py").read_text())
    names = {
        n.name: len(n.args.args) for n in tree.body if isinstance(n, ast.FunctionDef) if n.name[0] != "_"
    }
    for name, count in names.items():
        assert len(inspect.signature(getattr(warpgroup.Role, name)).parameters) == count + 1, name
    ours = {name for name in vars(warpgroup.Role) if name[0] != "_"} - set(vars(warp.Machine))
    assert ours == {*names, "query_map", "key_map", "value_map"}


class TestAttention:
    @halves
    @pytest.mark.parametrize("tile", [SMALL, ONE._replace(stages=1), SMALL._replace(turns=False)])
    def test_ragged_sizes(self, dtype, tile, rng):
        for queries, keys in ((1, 1), (129, 31), (64, 97)):
            q, k, v = inputs(rng, 1, 1, 1, queries, keys, 64, dtype=dtype)
            hold(q, k, v, tile=tile)
            hold(q, k, v, tile=tile, is_causal=True, query_offset="end")

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("number", range(len(hopper.TILES)))
    def test_every_tile(self, number, full, rng):
        """As chosen by the problem; half of the cases in each dtype."""
        tile = (hopper.FULL_TILES if full else hopper.TILES)[number]
        dtype = (np.float16, bfloat16)[(number + full) % 2]
        q, k, v = inputs(rng, 1, 1, 1, 70, 140, tile.width, tile.value_width, dtype)
        options = {"softcap": 3.0} if full else {}
        assert hopper.tile_of(resolve_batch(q, k, v, NOTHING._replace(**options)).problem) == tile
        hold(q, k, v, tile=None, is_causal=True, query_offset=60, **options)

    @halves
    @pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 24), (17, 3), (40, 64), (64, 7)])
    def test_head_dims(self, dtype, head_dim, value_dim, rng):
        q, k, v = (aligned(x) for x in inputs(rng, 1, 1, 1, 40, 50, head_dim, value_dim, dtype))
        hold(q, k, v)

    def test_panels(self, rng):
        """More of one than of the other, and the last not used in full."""
        for head_dim, value_dim in ((80, 40), (40, 104)):
            q, k, v = inputs(rng, 1, 1, 1, 70, 80, head_dim, value_dim, np.float16)
            tile = ONE._replace(width=-(-head_dim // 16) * 16, value_width=-(-value_dim // 16) * 16)
            hold(q, k, v, tile=tile, is_causal=True, query_offset=10)

    def test_batches_and_groups(self, rng):
        q, k, v = inputs(rng, 2, 4, 2, 70, 40, 64, dtype=np.float16)
        hold(q, k, v, is_causal=True, query_offset=[5, -3])

    def test_longest_blocks_come_first(self, rng, monkeypatch):
        """In sections, of which the last may be smaller: every block is somebody's."""
        q, k, v = inputs(rng, 3, 2, 2, 70, 40, 64, dtype=np.float16)
        order = []

        class Noting(warpgroup.Role):
            def load_tile(self, shared, tensor_map, barrier, x, y, z, w, wanted):
                if tensor_map == self.parameters.query_map:
                    order.append((y, z, w))
                super().load_tile(shared, tensor_map, barrier, x, y, z, w, wanted)

        monkeypatch.setattr(hopper, "SECTION_BYTES", 4 * 2 * 128 * 40)
        out, lse, _ = attend(q, k, v, role=Noting)
        oracle.hold(out, lse, q, k, v)
        units = [(h, b) for b in range(3) for h in range(2)]
        expected = [(row, *unit) for part in (units[:4], units[4:]) for row in (64, 0) for unit in part]
        assert order == expected

    def test_strides(self, rng):
        q, k, v = inputs(rng, 2, 2, 2, 40, 50, 64, dtype=bfloat16)
        out, lse, _ = attend(q, k, v)
        by_head = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
        mixed = np.stack([k, v], axis=3)  # keys and values interleaved
        for arrays in (by_head, (q, mixed[..., 0, :], mixed[..., 1, :])):
            again, lse_again, _ = attend(*arrays)
            oracle.assert_same_bits(again, out)
            oracle.assert_same_bits(lse_again, lse)
        hold(q, k[:, :, ::2], v[:, :, ::2])

    @pytest.mark.parametrize("layout", ["by head", "odd"])
    def test_out(self, layout, rng):
        q, k, v = inputs(rng, 1, 2, 1, 40, 50, 64, 24, np.float16)
        p = resolve_batch(q, k, v, NOTHING).problem
        out = {
            "by head": lambda: poisoned((1, 40, 2, 24), np.float16).transpose(0, 2, 1, 3),
            "odd": lambda: poisoned((1, 2, 40, 27), np.float16)[..., 2:26],
        }[layout]()
        emulate(p, out, tile=ONE)
        oracle.hold(out, None, q, k, v)
        if layout == "odd":
            assert np.isnan(out.base[..., :2]).all()
            assert np.isnan(out.base[..., 26:]).all()

    @pytest.mark.parametrize(("queries", "keys"), [(0, 5), (70, 0)])
    def test_empty(self, queries, keys):
        q, k, v = (np.ones((2, 1, n, 64), np.float16) for n in (queries, keys, keys))
        out, lse, _ = attend(q, k, v)
        assert not out.any()
        assert (lse == -np.inf).all()

    @pytest.mark.parametrize("scale", [-0.5, 0.0, 2, 1e-35, 1e20])
    def test_scale(self, scale, rng):
        q, k, v = inputs(rng, 1, 1, 1, 40, 50, 64, dtype=np.float16)
        if scale < 1e3:
            hold(q, k, v, scale=scale)
        else:
            q[:], k[:] = 0, 0
            q[..., 0], k[..., 0] = 1, rng.permutation(50) - 24
            lse = prompts.best_key_alone(attend, q, k, v, int(k[0, 0, :, 0].argmax()), scale=scale)
            np.testing.assert_allclose(lse, scale * 25, rtol=1e-6)

    def test_scores_whose_rounding_is_felt(self, rng):
        prompts.scores_whose_rounding_is_felt(attend, 64, rng)

    @pytest.mark.parametrize("softcap", [0.5, 30, 1e4])
    def test_softcap(self, softcap, rng):
        hold(*inputs(rng, 1, 1, 1, 40, 50, 64, dtype=np.float16), softcap=softcap, scale=1.5)

    @halves
    def test_sinks(self, dtype, rng):
        q, k, v = inputs(rng, 1, 2, 1, 40, 70, 64, dtype=dtype)
        hold(q, k, v, sinks=np.array([-3.0, 9.0]))
        hold(q, k, v, sinks=np.array([0.0, -np.inf]), is_causal=True, query_offset=-9)

    @pytest.mark.parametrize("offset", [0, 37, -60, 10**9, -(10**12), [2, -7]], ids=str)
    def test_causal(self, offset, rng):
        hold(*inputs(rng, 2, 1, 1, 40, 70, 64, dtype=np.float16), is_causal=True, query_offset=offset)

    @pytest.mark.parametrize("window", [(0, 0), (3, None), (None, 2), (40, 7), (2**62, 0)])
    def test_window(self, window, rng):
        hold(*inputs(rng, 2, 1, 1, 70, 80, 64, dtype=np.float16), window_size=window, query_offset=[-20, 60])

    def test_windows_that_begin_a_key_after_a_step(self, rng):
        """One key of the step is hidden, from the last query alone."""
        hold(*inputs(rng, 1, 1, 1, 64, 80, 64, dtype=np.float16), window_size=(30, None))

    @halves
    def test_lengths(self, dtype, rng):
        q, k, v = inputs(rng, 5, 1, 1, 33, 100, 64, dtype=dtype)
        lengths = np.array([100, 0, 1, 64, 97])
        k[1], v[1:3, :, 5] = np.nan, np.nan
        hold(q, k, v, key_lengths=lengths)
        hold(q, k, v, key_lengths=lengths, is_causal=True, query_offset="end", window_size=(30, None))

    @halves
    def test_everything_at_once(self, dtype, rng):
        q, k, v = inputs(rng, 2, 2, 1, 70, 100, 64, dtype=dtype)
        v[0, 0, 40, 3], k[1, 0, 7, 30] = np.nan, np.nan
        hold(
            q, k, v, softcap=3.0, window_size=(60, 0), sinks=np.array([12.0, -np.inf]), query_offset=20,
            key_lengths=[90, 55], scale=0.4,
        )  # fmt: skip

    def test_packed(self, rng):
        prompts.packed(emulate, ONE, 1, 64, rng)


class TestLeaks:
    WAYS = (
        {"is_causal": True, "query_offset": 9},
        {"window_size": (20, 4), "query_offset": 11},
        {"key_lengths": [50, 70]},
    )

    @pytest.mark.parametrize("way", range(len(WAYS)))
    @pytest.mark.parametrize(
        ("poison", "dtype"), [(np.nan, bfloat16), (-np.inf, np.float16)], ids=["nan", "inf"]
    )
    def test_masked_never_reaches(self, way, poison, dtype, rng):
        clean = inputs(rng, 2, 1, 1, 40, 70, 64, dtype=dtype)
        prompts.masked_never_reaches(attend, clean, self.WAYS[way], poison, ((1,), (1, 2)), rng)

    @pytest.mark.parametrize(
        "tile", [SMALL, Tile(64, 64, 64, 3, 2, True), ONE._replace(width=96, value_width=128)], ids=str
    )
    def test_an_infinite_value_stays_what_it_is(self, tile, rng):
        """Of groups that share the mending, where threads and chunks do not divide, and of two panels."""
        q, k, v = inputs(rng, 1, 1, 1, 40, 70, tile.width, tile.value_width, np.float16)
        v[0, 0, 3, 5], v[0, 0, 50, 9], v[0, 0, 51, 9], v[0, 0, 45, -1] = np.inf, -np.inf, np.inf, np.inf
        v[0, 0, 63, 2] = np.inf  # in the last chunk of the step, and seen by none
        out, _, _ = attend(q, k, v, is_causal=True, query_offset=12, tile=tile)
        wide = out[0, 0].astype(np.float32)
        assert (wide[:, 5] == np.inf).all()
        assert np.isfinite(wide[:38, 9]).all()
        assert np.isfinite(wide[:, 2]).all()
        assert wide[38, 9] == -np.inf
        assert np.isnan(wide[39, 9])
        assert np.isfinite(wide[:33, -1]).all()
        assert (wide[33:, -1] == np.inf).all()

    def test_query_touches_only_its_row(self, rng):
        prompts.a_query_touches_only_its_row(attend, *inputs(rng, 1, 1, 1, 40, 70, 64, dtype=np.float16))


class TestBits:
    def test_do_not_depend_on_who_goes_first(self, rng):
        q, k, v = inputs(rng, 1, 1, 1, 130, 200, 64, dtype=np.float16)
        expected, lse, _ = attend(q, k, v, is_causal=True, query_offset=60, tile=SMALL)
        for seed in range(1, 4):
            got, got_lse, _ = attend(q, k, v, is_causal=True, query_offset=60, tile=SMALL, seed=seed)
            oracle.assert_same_bits(got, expected)
            oracle.assert_same_bits(got_lse, lse)

    def test_do_not_depend_on_the_rest_of_the_batch(self, rng):
        prompts.bits_are_those_of_one_alone(attend, *inputs(rng, 3, 1, 1, 40, 70, 64, dtype=bfloat16))


class TestChoice:
    class Gpu:
        capability = (9, 0)

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(launch, "device", lambda ordinal: self.Gpu)
        for module in (hopper, mma):
            monkeypatch.setattr(module, "prepared", lambda *x, name=module.__name__: name.split(".")[-1])

    def chosen(self, q, k, v, *, mask=None, out=None, **options):
        p = resolve_batch(q, k, v, NOTHING._replace(mask=mask, **options)).problem
        names = ("query", "key", "value", "mask", "bias", "alibi_slopes")
        there = {
            name: None if x is None else DeviceArray(x.ctypes.data, x.shape, x.strides, x.dtype)
            for name, x in ((name, getattr(p, name)) for name in names)
        }
        return attention._prepared(replace(p, **there), p.query if out is None else out, None, None, None)

    def inputs(self, rng, head_dim=64, dtype=np.float16, heads=2):
        return tuple(aligned(x) for x in inputs(rng, 2, heads, heads, 5, 7, head_dim, dtype=dtype))

    @halves
    @pytest.mark.parametrize("head_dim", [1, 17, 64, 80, 128, 192, 256])
    def test_halves(self, dtype, head_dim, rng):
        options = {"is_causal": True, "softcap": 1.0, "sinks": np.zeros(2), "key_lengths": [3, 4]}
        assert self.chosen(*self.inputs(rng, head_dim, dtype), window_size=(2, 1), **options) == "hopper"

    @pytest.mark.parametrize(
        ("name", "option"),
        [
            ("alibi_slopes", np.ones(2)), ("bias", np.zeros((5, 7), np.float16)),
            ("mask", np.ones((5, 7), bool)),
        ],
    )  # fmt: skip
    def test_options_of_the_other_kernel(self, name, option, rng):
        assert self.chosen(*self.inputs(rng), **{name: option}) == "mma"

    def test_arrays_of_the_other_kernel(self, rng):
        q, k, v = self.inputs(rng)
        assert self.chosen(q, np.broadcast_to(k[:, :1], k.shape), v) == "mma"
        assert self.chosen(q, k, np.broadcast_to(v[:1], v.shape)) == "mma"
        assert self.chosen(q, k[:, :, ::-1], v[:, :, ::-1]) == "mma"

    def test_neither(self, rng, monkeypatch):
        q, k, v = self.inputs(rng)
        asked = []
        monkeypatch.setattr(attention, "parameters", lambda *x: asked.append(x) or {})
        monkeypatch.setattr(attention, "_on_host", lambda *x: {})
        monkeypatch.setattr(attention, "_blocks", lambda *x: 0)
        unaligned = np.zeros((2, 2, 7, 72), np.float16)
        for arrays, options in (
            ((q, unaligned[..., 4:68], v), {}),
            ((q, k, np.zeros((2, 2, 7, 65), np.float16)[..., :64]), {}),
            (self.inputs(rng, 257), {}),
            ((q, k, v), {"mask": nbattn.BlockMask.from_dense(np.ones((5, 7), bool))}),
        ):
            assert self.chosen(*arrays, **options)[2] == 0
        assert len(asked) == 4

    @pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
    def test_functions_of_the_user_s(self, name, rng):
        function = {"score_mod": lambda s, b, h, i, j: s, "mask_mod": lambda b, h, i, j: i >= j}[name]
        problem = resolve_batch(*self.inputs(rng), NOTHING._replace(**{name: function})).problem
        assert not hopper.covers(problem)

    def test_devices_of_the_other_kernel(self, rng, monkeypatch):
        for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
            monkeypatch.setattr(self.Gpu, "capability", capability)
            assert self.chosen(*self.inputs(rng)) == "mma"

    def test_one_row_needs_no_stride(self, rng):
        q, k, v = inputs(rng, 1, 1, 1, 1, 1, 9, dtype=np.float16)
        assert self.chosen(*(aligned(x) for x in (q, k, v))) == "hopper"


def test_tiles_fit_a_multiprocessor():
    for tile in hopper.TILES + hopper.FULL_TILES:
        assert tile.shared_bytes <= 227 << 10
        fewer, more = tile.registers
        assert more % 8 == fewer % 8 == 0
        assert tile.keys * tile.value_panels * 8 >= 128 * tile.groups  # each has a chunk to mend
        # As many as the launch has must go around: what some give back others take, or wait for, for ever.
        assert tile.launch_registers * tile.threads <= 65536
        assert fewer + tile.groups * more <= (tile.groups + 1) * tile.launch_registers
        assert tile.rows <= 256 >= tile.keys  # of a tensor map's box


class TestMaps:
    @pytest.fixture
    def asked(self, monkeypatch):
        """A driver whose maps are told apart by what was asked for."""
        asked = []

        def ask(function, start, kind, rank, address, sizes, strides, box, steps, *rest):
            assert function == "cuTensorMapEncodeTiled"
            assert start % 64 == 0
            assert (rank, list(steps), len(strides)) == (4, [1] * 4, 3)
            asked.append((kind, address, tuple(sizes), tuple(strides), tuple(box), rest))
            text = repr(asked[-1]).encode().rjust(128)[-128:]
            ctypes.memmove(start, text, 128)

        monkeypatch.setattr(launch, "ask", ask)
        return asked

    @halves
    def test_what_the_driver_is_asked(self, dtype, asked):
        x = np.zeros((2, 3, 30, 80), dtype)
        words = hopper.encode(4096, *hopper.map_of(x, 128), np.dtype(dtype).name)
        assert len(words) == 16
        # CU_TENSOR_MAP_DATA_TYPE_FLOAT16 or _BFLOAT16, no interleave, 128-byte swizzle, zeros beyond ends.
        kind = 6 if dtype == np.float16 else 9
        strides = (160, 160 * 30, 160 * 90)
        assert asked == [(kind, 4096, (80, 30, 3, 2), strides, (64, 128, 1, 1), (0, 3, 3, 0))]

    def test_maps_are_kept_for_a_while(self, asked):
        made = hopper.Map("float16", *hopper.map_of(np.zeros((1, 1, 8, 64), np.float16), 8))
        first = made.at(1 << 20)
        assert made.at(1 << 20) is first
        assert len(asked) == 1
        for i in range(1, 2 * hopper.LATEST):
            assert made.at((1 << 20) + 4096 * i) != first
        assert len(made.made) <= hopper.LATEST
        assert made.at(1 << 20) == first

    def test_a_repeated_call_has_the_maps_of_its_arrays(self, asked, monkeypatch):
        started = []
        place = SimpleNamespace(function=lambda kernel: 7)
        monkeypatch.setattr(launch.Call, "start", lambda self, *x: started.append(x))

        def prepared(base):
            arrays = [DeviceArray(base + i * 4096, (1, 2, 70, 64), (17920, 8960, 128, 2), np.float16)
                      for i in range(4)]  # fmt: skip
            x = np.zeros((1, 2, 70, 64), np.float16)
            p = resolve_batch(x, x, x, NOTHING._replace(is_causal=True)).problem
            p = replace(p, query=arrays[0], key=arrays[1], value=arrays[2])
            return p, hopper.prepared(p, arrays[3], None, None)

        p, made = prepared(1 << 20)
        call = hopper.Call(p, made, place)
        call(5, *((1 << 30) + i * 4096 for i in range(4)))
        kernel, values, _ = prepared(1 << 30)[1]
        ((parameters, stream),) = started
        assert stream == 5
        assert parameters == kernel.packed(values)
        assert parameters != made[0].packed(made[1])
        assert call.parameters == made[0].packed(made[1])

    def test_the_driver_takes_each_parameter_by_itself(self, monkeypatch):
        """A map is aligned to 64 bytes among a GPU's constants, where all bytes at once would lie beside."""
        kernel = hopper.kernel("float16", hopper.TILES[0], False)
        values = {name: 3 + i for i, (name, kind) in enumerate(PARAMETERS) if kind != "map"}
        values |= {
            f"{name}_map": range(9 * i, 9 * i + 16) for i, name in enumerate(("query", "key", "value"))
        }
        found = []

        def ask(function, *arguments):
            assert function == "cuLaunchKernel"
            *sizes, places, extra = arguments
            assert sizes == [7, 5, 1, 1, kernel.threads, 1, 1, kernel.shared, 9]
            assert extra is None
            for place, (_, kind) in zip(places, PARAMETERS, strict=True):
                form = compiler._format(kind)
                found.append(struct.unpack(form, ctypes.string_at(place, struct.calcsize(form))))

        monkeypatch.setattr(launch, "ask", ask)
        launch.launch(kernel, 7, kernel.packed(values), 5, 9)
        for (name, _), numbers in zip(PARAMETERS, found, strict=True):
            assert numbers == (tuple(values[name]) if name.endswith("_map") else (values[name],)), name

    def test_no_parameter_is_several(self):
        for kernel in hopper.kernels():
            assert kernel.has_maps
            assert not any("x" in kind for _, kind in kernel.parameters)
        assert not mma.kernels()[0].has_maps


UNITS = gpu_units.checks(5)


class TestUnits:
    """The checks that a GPU does first, in the emulator."""

    def run(self, check):
        gpu = warpgroup.Gpu(check.threads, check.shared)
        values = dict(check.numbers)
        for name, array in check.inputs.items():
            values[name] = address = gpu.place(array)
            if name in check.maps:
                values[name] = warpgroup.tensor_map(address, *check.maps[name], check.storage)
        results = {name: x.copy() for name, x in check.results.items()}
        values |= {name: gpu.place(x, output=True) for name, x in results.items()}
        # Whatever a kernel calls its maps.
        maps = [values[name] for name, kind in check.parameters if kind == "map"]
        names = ("query_map", "key_map", "value_map")
        parameters = SimpleNamespace(**values)
        vars(parameters).update(zip(names, maps, strict=False))
        gpu.run(lambda isa: check.build(isa, isa), parameters, [0])
        gpu.fetch()
        return results

    @pytest.mark.parametrize("number", range(len(UNITS)))
    def test_check(self, number):
        check = UNITS[number]
        for name, x in self.run(check).items():
            np.testing.assert_array_equal(x, check.expected[name], err_msg=name)

    def test_without_the_swizzle_they_fail(self, monkeypatch):
        swizzled = warpgroup.swizzled
        monkeypatch.setattr(warpgroup, "swizzled", lambda address: address)
        tile = self.run(UNITS[0])
        assert (tile["out"] != UNITS[0].expected["out"]).any()
        lies = warpgroup.descriptor_places
        monkeypatch.setattr(warpgroup, "descriptor_places", lambda *x: swizzled(lies(*x) * 2) // 2)
        products = self.run(UNITS[-1])
        for name, x in products.items():
            assert (x != UNITS[-1].expected[name]).any(), name
