"""The decode kernels' own source in the emulator of GPU threads: chunks, pages, rows, and who merges."""

from collections import namedtuple
from dataclasses import replace

import numpy as np
import oracle
import pytest
import warp
from ml_dtypes import bfloat16
from oracle import inputs, normal
from prompts import NOTHING, poisoned
from test_cuda_mma import aligned, on_gpu

from nbattn.cuda import decode, decode_kernel
from nbattn.cuda.decode_tiles import PARAMETERS, Tile
from nbattn.device import DeviceArray
from nbattn.resolve import resolve_batch

pytestmark = pytest.mark.cuda_emu

halves = pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=["float16", "bfloat16"])
SMALL, SMALL_BYTES, SMALL_FLOATS = Tile(32, 3), Tile(32, 4, 1), Tile(32, 4, 4)
SMALL_NIBBLES = Tile(64, 4, 0.5, 2)
SHARED_BYTES, SHARED_FLOATS = Tile(64, 4, 1, 2), Tile(64, 3, 4, 3)
"""With the queries in shared memory, as wide tiles have them."""
Record = namedtuple("Record", [name for name, _ in PARAMETERS])
NUMBERS = {"float32": np.float32, "int32": int, "int64": int}


def emulate(problem, out, lse=None, tile=None, launches=1, lengths=None):
    """Run the kernel for a problem of NumPy arrays, as `decode.prepared` would, its blocks in any order."""
    p, tile = problem, tile or decode.tile_of(problem)
    m = warp.Machine(tile.threads, tile.shared_bytes)
    names = ("query", "key_pages", "value_pages", "key_scales", "value_scales", "alibi_slopes", "sinks")
    there = replace(p, **{name: on_gpu(m, getattr(p, name)) for name in names})
    if lengths is not None:
        at = m.place(lengths)
        there = p = replace(there, key_lengths=DeviceArray(at, lengths.shape, (8,), lengths.dtype, 0))
    addresses = {name: m.place(x) for name, x in decode.vectors(p).items()}
    results = on_gpu(m, out, output=True), on_gpu(m, lse, output=True)
    start = decode.start(None, there, *results, tile, addresses)
    counters = m.workspace(np.zeros(start.units, np.int32))
    sums = m.workspace(np.full((start.sums + start.states) // 4, np.nan, np.float32))
    values = start.values | start.shared(counters, sums)
    record = Record(*(NUMBERS[kind](values.get(name, 0)) for name, kind in PARAMETERS))
    blocks = np.arange(start.blocks)
    for number in range(launches):
        np.random.default_rng(number).shuffle(blocks)
        for array, at in m.outputs:  # may be written once in each launch
            m.writable[at : at + array.nbytes] = True
        m.run(decode_kernel.build(m, p.storage, tile), record, blocks.tolist())
    m.fetch()
    at = counters - warp.HEAP
    assert not m.heap[at : at + 4 * start.units].any()
    return start


def attend(query, key, value, *, tile=SMALL, launches=1, **options):
    """Output, lse, and the launch that made them."""
    p = decode.as_cache(resolve_batch(query, key, value, NOTHING._replace(**options)).problem)
    out = poisoned((*query.shape[:3], value.shape[3]), query.dtype)
    lse = poisoned(query.shape[:3], np.float32)
    return out, lse, emulate(p, out, lse, tile, launches)


def hold(query, key, value, *, tile=SMALL, **options):
    out, lse, start = attend(query, key, value, tile=tile, **options)
    oracle.hold(out, lse, query, key, value, **options)
    return out, lse, start


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(decode, "SHORTEST", 64)
    monkeypatch.setattr(decode, "PAGED_CHUNK", 64)


class TestChunks:
    @halves
    def test_sizes(self, dtype, rng):
        for keys, chunks in ((1, 1), (16, 1), (63, 1), (65, 2), (330, 6)):
            q, k, v = inputs(rng, 1, 2, 1, 1, keys, 32, dtype=dtype)
            assert hold(q, k, v)[2].blocks == chunks

    @pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 1), (8, 2), (17, 1), (5, 7)])
    def test_rows(self, group, queries, rng):
        dtype = [np.float16, bfloat16][group % 2]
        q, k, v = inputs(rng, 1, 2 * group, 2, queries, 100, 32, dtype=dtype)
        hold(q, k, v, is_causal=True, query_offset="end")

    @pytest.mark.parametrize("number", range(len(decode.TILES)))
    def test_every_tile(self, number, rng):
        tile = decode.TILES[number]
        q, k, v = inputs(rng, 1, 4, 1, 2, 140, tile.width - 8, tile.width, bfloat16)
        hold(q, k, v, tile=None, is_causal=True, query_offset="end")
        assert tile.shared_bytes <= 99 << 10

    @pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (8, 24), (17, 3), (31, 32)])
    def test_head_dims(self, head_dim, value_dim, rng):
        q, k, v = (aligned(x) for x in inputs(rng, 1, 2, 1, 1, 40, head_dim, value_dim, np.float16))
        hold(q, k, v)

    def test_strides(self, rng):
        q, k, v = inputs(rng, 1, 2, 2, 2, 80, 32, dtype=np.float16)
        out, lse, _ = attend(q, k, v)
        by_head = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
        again, lse_again, _ = attend(*by_head)
        oracle.assert_same_bits(again, out)
        oracle.assert_same_bits(lse_again, lse)
        hold(q, np.broadcast_to(k[:, :1], k.shape), v[:, :, ::-1])

    def test_alone_as_in_the_batch(self, rng):
        q, k, v = inputs(rng, 3, 2, 1, 2, 200, 32, dtype=bfloat16)
        options = {"is_causal": True, "query_offset": "end"}
        lengths = [130, 200, 0]
        out, lse, _ = hold(q, k, v, key_lengths=lengths, **options)
        for b, length in enumerate(lengths):
            one = slice(b, b + 1)
            alone, lse_alone, _ = attend(q[one], k[one], v[one], key_lengths=[length], **options)
            oracle.assert_same_bits(alone, out[one])
            oracle.assert_same_bits(lse_alone, lse[one])

    def test_a_launch_can_be_made_again(self, rng):
        """As a graph does it."""
        q, k, v = inputs(rng, 2, 2, 1, 1, 200, 32, dtype=np.float16)
        hold(q, k, v, launches=3)

    @pytest.mark.parametrize("missing", [(0, 1), (2,)])
    def test_a_fence_that_is_missing_is_noticed(self, missing, rng, monkeypatch):
        """Those before a block counts itself in, and the one after."""
        fences, fence = [], warp.Machine.fence

        def some(self):
            fences.append(self.number)
            if fences.count(self.number) - 1 not in missing:
                fence(self)

        monkeypatch.setattr(warp.Machine, "fence", some)
        q, k, v = inputs(rng, 1, 1, 1, 1, 200, 32, dtype=np.float16)
        message = "counts itself in before" if 0 in missing else "is read before a fence"
        with pytest.raises(AssertionError, match=message):
            attend(q, k, v)


class TestOptions:
    OPTIONS = (
        {"scale": -0.3}, {"scale": 0.0}, {"softcap": 2.0}, {"window_size": (40, None)},
        {"window_size": (100, 3)}, {"window_size": (0, 0)}, {"key_lengths": [64, 3]},
        {"key_lengths": [0, 129]}, {"query_offset": [-1, 7], "is_causal": True},
        {"query_offset": 10**6, "is_causal": True}, {"query_offset": -(10**6), "window_size": (5, 5)},
    )  # fmt: skip

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_alone(self, options, rng):
        q, k, v = inputs(rng, 2, 2, 1, 3, 140, 32, dtype=bfloat16)
        if "query_offset" not in options:
            options = options | {"query_offset": "end"}
        hold(q, k, v, **options)

    def test_per_head(self, rng):
        q, k, v = inputs(rng, 2, 6, 2, 2, 80, 32, dtype=np.float16)
        end = {"is_causal": True, "query_offset": "end"}
        hold(q, k, v, alibi_slopes=rng.random(6), **end)
        hold(q, k, v, sinks=normal(rng, 6), **end)
        hold(
            q, k, v, sinks=normal(rng, 6), key_lengths=[0, 5], softcap=3.0, alibi_slopes=rng.random(6), **end
        )
        hold(q, k, v, sinks=np.full(6, -np.inf), key_lengths=[0, 5], **end)

    def test_large_scores(self, rng):
        q, k, v = inputs(rng, 1, 2, 1, 1, 140, 32, dtype=bfloat16)
        q[:], k[:] = 0, 0
        q[..., 0], k[..., 0] = 1, rng.permutation(140)
        best = int(k[0, 0, :, 0].argmax())
        out, _, _ = attend(q, k, v, scale=1e20)
        np.testing.assert_array_equal(out, np.broadcast_to(v[:, :, best, None], out.shape))


class TestNumbersThatAreNone:
    @pytest.mark.parametrize(("dtype", "bad"), [(bfloat16, np.nan), (np.float16, np.inf)])
    def test_unseen(self, dtype, bad, rng):
        """Beyond lengths, before windows, and where some rows see and others do not."""
        q, k, v = inputs(rng, 2, 2, 1, 3, 150, 32, dtype=dtype)
        options = {
            "is_causal": True,
            "query_offset": [100, 133],
            "window_size": (60, 0),
            "key_lengths": [103, 140],
        }
        expected, lse, _ = hold(q, k, v, **options)
        for b, (first, last) in enumerate(((40, 103), (73, 136))):
            k[b, :, :first], k[b, :, last:], v[b, :, :first], v[b, :, last:] = bad, bad, bad, bad
        out, lse_again, _ = attend(q, k, v, **options)
        oracle.assert_same_bits(out, expected)
        oracle.assert_same_bits(lse_again, lse)

    @halves
    def test_seen_by_some(self, dtype, rng):
        q, k, v = inputs(rng, 2, 4, 2, 3, 150, 32, dtype=dtype)
        options = {"is_causal": True, "query_offset": "end", "window_size": (60, 0)}
        v[0, 0, 149, 3] = v[0, 1, 148, 5] = np.nan
        v[1, 0, 149, 31] = v[1, 1, 148, 30] = v[1, 0, 87, 2] = np.nan
        k[1, 1, 149, 7] = np.nan
        hold(q, k, v, **options)
        v[np.isnan(v)] = np.inf
        k[1, 1, 149, 7] = 0
        out, _, _ = attend(q, k, v, **options)
        seen = oracle.see((2, 4, 3, 150), **options).astype(float) @ np.isinf(np.repeat(v, 2, axis=1))
        np.testing.assert_array_equal(np.isinf(out), seen > 0)
        assert np.isfinite(out[seen == 0]).all()

    def test_seen(self, rng):
        q, k, v = inputs(rng, 2, 4, 2, 1, 150, 32, dtype=np.float16)
        k[0, 0, 70, 0] = v[1, 1, 30, 4] = q[1, 0, 0, 0] = np.nan
        hold(q, k, v)


class Paged:
    """Keys and values of sequences, in pages that lie anywhere among others."""

    def __init__(self, rng, lengths, page_size, dtype, kv_heads=2, heads=4, queries=1, dims=(32, 24)):
        wide = -(-max(lengths) // page_size) + 1
        count = len(lengths) * wide + 3
        order = rng.permutation(count)
        self.table = np.full((len(lengths), wide), 1 << 20)
        self.pages = [poisoned((count, kv_heads, page_size, dim), dtype).swapaxes(1, 2) for dim in dims]
        self.rows = [normal(rng, (len(lengths), kv_heads, max(lengths), dim), dtype) for dim in dims]
        for b, length in enumerate(lengths):
            for i in range(-(-length // page_size)):
                self.table[b, i] = page = order[b * wide + i]
                for pages, rows in zip(self.pages, self.rows, strict=True):
                    part = rows[b, :, i * page_size : min((i + 1) * page_size, length)].swapaxes(0, 1)
                    pages[page, : len(part)] = part
        self.query = normal(rng, (len(lengths), heads, queries, dims[0]), dtype)
        self.lengths = np.array(lengths)

    def problem(self, **options):
        p = decode.as_cache(
            resolve_batch(
                self.query, *self.rows,
                NOTHING._replace(is_causal=True, query_offset="end", key_lengths=self.lengths, **options),
            ).problem
        )  # fmt: skip
        return replace(p, key_pages=self.pages[0], value_pages=self.pages[1], page_table=self.table)


class TestFloats:
    """float32, whose numbers are multiplied in three parts."""

    def test_sizes(self, rng):
        for group, queries, keys in ((1, 1, 1), (3, 2, 150), (17, 1, 70)):
            q, k, v = inputs(rng, 2, group, 1, queries, keys, 32, 24)
            hold(
                q, k, v, tile=SMALL_FLOATS, is_causal=True, query_offset="end", key_lengths=[keys, keys // 2]
            )

    def test_options(self, rng):
        q, k, v = inputs(rng, 1, 4, 2, 2, 140, 29, 31)
        q, k, v = (aligned(x) for x in (q, k, v))
        more = {"sinks": normal(rng, 4), "alibi_slopes": rng.random(4), "softcap": 4.0, "scale": -0.4}
        for tile in (SMALL_FLOATS, SHARED_FLOATS):
            hold(q, k, v, tile=tile, window_size=(90, None), query_offset="end", **more)

    @pytest.mark.parametrize("number", range(len(decode.FLOAT_TILES)))
    def test_every_tile(self, number, rng):
        tile = decode.FLOAT_TILES[number]
        q, k, v = inputs(rng, 1, 2, 1, 1, 70, tile.width - 4, tile.width)
        hold(q, k, v, tile=None)
        assert tile.shared_bytes <= 99 << 10
        assert tile.warp_bytes >= 16 * tile.sum_pitch

    def test_numbers_of_every_size(self, rng):
        """The parts of the largest and of denormal numbers are none that overflow or vanish."""
        q, k, v = inputs(rng, 1, 2, 1, 1, 40, 32)
        v *= np.exp2(rng.integers(-140, 120, v.shape)).astype(np.float32)
        v[0, 0, :, :2] = np.finfo(np.float32).max / 64 * np.sign(v[0, 0, :, :2])
        hold(q * 0, k, v, tile=SMALL_FLOATS)

    def test_seen_by_some(self, rng):
        q, k, v = inputs(rng, 1, 4, 2, 3, 150, 32)
        options = {"is_causal": True, "query_offset": "end", "window_size": (60, 0), "tile": SMALL_FLOATS}
        v[0, 0, 149, 3] = v[0, 1, 148, 5] = v[0, 1, 87, 30] = k[0, 1, 149, 7] = np.nan
        hold(q, k, v, **options)
        v[np.isnan(v)], k[np.isnan(k)] = np.inf, 0
        out, _, _ = attend(q, k, v, **options)
        del options["tile"]
        seen = oracle.see((1, 4, 3, 150), **options).astype(float) @ np.isinf(np.repeat(v, 2, axis=1))
        np.testing.assert_array_equal(np.isinf(out), seen > 0)
        assert np.isfinite(out[seen == 0]).all()


class TestPages:
    @pytest.mark.parametrize("page_size", [1, 5, 16, 64])
    def test_sizes(self, page_size, rng):
        dtype = [np.float16, bfloat16][page_size % 2]
        paged = Paged(rng, [130, 0, 17], page_size, dtype, 1, 2, 2)
        p = paged.problem()
        out, lse = poisoned((3, 2, 2, 24), dtype), poisoned((3, 2, 2), np.float32)
        emulate(p, out, lse, SMALL)
        options = {"is_causal": True, "query_offset": "end", "key_lengths": [130, 0, 17]}
        oracle.hold(out, lse, paged.query, *paged.rows, **options)
        contiguous, lse_contiguous, _ = attend(paged.query, *paged.rows, **options)
        oracle.assert_same_bits(out, contiguous)
        oracle.assert_same_bits(lse, lse_contiguous)

    def test_ring(self, rng):
        """Position p of a stream lies in row p % 50; what is older than the ring is gone."""
        dtype = bfloat16
        q, k, v = inputs(rng, 2, 2, 1, 2, 200, 32, dtype=dtype)
        lengths, starts = np.array([200, 30]), np.array([150, 0])
        rows = [poisoned((2, 50, 1, 32), dtype) for _ in range(2)]
        for x, ring in zip((k, v), rows, strict=True):
            for b in range(2):
                for j in range(starts[b], lengths[b]):
                    ring[b, j % 50] = x[b, :, j]
        options = {"is_causal": True, "query_offset": "end", "key_lengths": lengths, "window_size": (40, 0)}
        p = decode.as_cache(resolve_batch(q, k, v, NOTHING._replace(**options)).problem)
        p = replace(p, key_pages=rows[0], value_pages=rows[1], ring=50, key_starts=starts, max_keys=50)
        out, lse = poisoned((2, 2, 2, 32), dtype), poisoned((2, 2, 2), np.float32)
        emulate(p, out, lse, SMALL)
        oracle.hold(out, lse, q, k, v, **options)


def test_lengths_that_the_gpu_knows(rng):
    """As in a graph: queries stand at the end of what the memory says then."""
    q, k, v = inputs(rng, 3, 2, 1, 2, 150, 32, dtype=bfloat16)
    lengths = np.array([150, 1, 70])
    options = {"is_causal": True, "query_offset": "end", "key_lengths": lengths}
    p = decode.as_cache(resolve_batch(q, k, v, NOTHING._replace(**options)).problem)
    out, lse = poisoned(q.shape, bfloat16), poisoned((3, 2, 2), np.float32)
    emulate(p, out, lse, SMALL, lengths=lengths)
    oracle.hold(out, lse, q, k, v, **options)


def test_lengths_of_nobody(rng):
    """A launch of a graph that is not told a sequence, as -1 says, is not to be mistaken for one."""
    paged = Paged(rng, [130, 9, 17], 16, np.float16, 1, 2, 2)
    out, lse = poisoned((3, 2, 2, 24), np.float16), poisoned((3, 2, 2), np.float32)
    emulate(paged.problem(), out, lse, SMALL, lengths=np.array([130, -1, 17]))
    options = {"is_causal": True, "query_offset": "end", "key_lengths": [130, 9, 17]}
    contiguous, lse_contiguous, _ = attend(paged.query, *paged.rows, **options)
    for got, expected in ((out, contiguous), (lse, lse_contiguous)):
        oracle.assert_same_bits(got[::2], expected[::2])
        assert np.isnan(got[1].astype(float)).all()


class Quantised:
    """Keys and values with a scale for each token and head, or for each 32 numbers."""

    storage, tile, dims = "int8", SMALL_BYTES, (32, 24)

    def problem(self, rng, lengths, dtype=np.float32, heads=4, queries=2, dims=None, page_size=0):
        """A problem, and its keys and values in float32."""
        batch, most, dims = len(lengths), max(lengths), dims or self.dims
        query = normal(rng, (batch, heads, queries, dims[0]), dtype)
        pages, scales, dense = [], [], []
        size = page_size or most
        wide = -(-most // size)
        table = rng.permutation(batch * wide).reshape(batch, wide) if page_size else np.arange(batch)[:, None]
        position = np.arange(most)
        at = table[:, position // size], position % size
        for dim in dims:
            stored, numbers, scale = self.rows(rng, (batch * wide, 2, size), dim)
            pages.append(stored.swapaxes(1, 2))
            scales.append(scale.swapaxes(1, 2))
            dense.append(numbers.swapaxes(1, 2)[at].transpose(0, 2, 1, 3))
        for b, length in enumerate(lengths):
            for scale in scales:
                scale[at[0][b, length:], at[1][length:]] = np.nan
        options = {"is_causal": True, "query_offset": "end", "key_lengths": np.array(lengths)}
        p = decode.as_cache(
            resolve_batch(query.astype(np.float32), *dense, NOTHING._replace(**options)).problem
        )
        p = replace(
            p, query=query, key_pages=pages[0], value_pages=pages[1], key_scales=scales[0],
            value_scales=scales[1], storage=self.storage, page_table=table,
        )  # fmt: skip
        return p, dense, options

    def run(self, p, tile=None):
        values = p.value_pages.shape[3] * (2 if self.storage == "int4" else 1)
        out = poisoned((*p.query.shape[:3], values), p.query.dtype)
        lse = poisoned(p.query.shape[:3], np.float32)
        emulate(p, out, lse, tile or self.tile)
        return out, lse

    def hold_options(self, dtype, page_size, tile, rng):
        p, dense, options = self.problem(rng, [130, 0, 33], dtype, page_size=page_size)
        more = {"sinks": normal(rng, 4), "alibi_slopes": rng.random(4), "softcap": 4.0, "scale": 0.4}
        oracle.hold(*self.run(p, tile), p.query, *dense, rounds="fine", **options)
        p = replace(p, **(more | {name: np.float32(more[name]) for name in ("sinks", "alibi_slopes")}))
        oracle.hold(*self.run(p, tile), p.query, *dense, rounds="fine", **options, **more)

    def hold_tile(self, tile, rng):
        p, dense, options = self.problem(rng, [100], dims=(tile.width, tile.width - 32), queries=1)
        assert decode.tile_of(p) == tile
        assert tile.shared_bytes <= 99 << 10
        assert tile.warp_bytes >= 16 * tile.sum_pitch
        oracle.hold(*self.run(p, tile), p.query, *dense, rounds="fine", **options)

    def test_scales_that_are_no_numbers(self, rng):
        p, *_ = self.problem(rng, [100, 70])
        expected, _ = self.run(p)
        p.value_scales[0, 99, 0] = p.key_scales[1, 69, 1] = np.nan
        out, _ = self.run(p)
        broken = np.isnan(out).any(-1)
        assert broken[0, :2, 1].all()
        assert broken[1, 2:, 1].all()
        assert broken.sum() == 4
        oracle.assert_same_bits(out[~broken], expected[~broken])


class TestBytes(Quantised):
    @staticmethod
    def rows(rng, shape, dim):
        room = -(-dim // 16) * 16
        numbers = rng.integers(-127, 128, (*shape, room)).astype(np.int8)[..., :dim]
        scale = (rng.random(shape) * 0.02).astype(np.float32)
        return numbers, numbers * scale[..., None], scale

    @pytest.mark.parametrize(
        ("dtype", "page_size", "tile"),
        [(np.float32, 0, SHARED_BYTES), (np.float32, 5, None), (np.float16, 5, None), (bfloat16, 0, None)],
    )
    def test_options(self, dtype, page_size, tile, rng):
        self.hold_options(dtype, page_size, tile, rng)

    @pytest.mark.parametrize("tile", decode.BYTE_TILES)
    def test_every_tile(self, tile, rng):
        self.hold_tile(tile, rng)


class TestNibbles(Quantised):
    storage, tile, dims = "int4", SMALL_NIBBLES, (64, 32)

    @staticmethod
    def rows(rng, shape, dim):
        """Byte i of 16 has number i in its low bits, and i + 16 in its high ones, 8 more than they are."""
        numbers = rng.integers(-8, 8, (*shape, dim // 32, 2, 16))
        scale = (rng.standard_normal((*shape, dim // 32)) * 0.3).astype(np.float32)
        stored = (numbers[..., 0, :] + 8 + (numbers[..., 1, :] + 8) * 16).astype(np.uint8)
        dense = (numbers * scale[..., None, None]).astype(np.float32)
        return stored.reshape(*shape, dim // 2), dense.reshape(*shape, dim), scale

    @pytest.mark.parametrize(("dtype", "page_size"), [(np.float32, 5), (bfloat16, 0)])
    def test_options(self, dtype, page_size, rng):
        self.hold_options(dtype, page_size, None, rng)

    @pytest.mark.parametrize("tile", decode.NIBBLE_TILES)
    def test_every_tile(self, tile, rng):
        self.hold_tile(tile, rng)
