"""Attention over pages: every option and storage against the formula, on pages that hold NaN elsewhere."""

import numpy as np
import pytest
from cached import STORAGES, as_multiplied, input_dtype, rounds, stored
from oracle import assert_same_bits, hold, normal

from nbattn import KVCache, paged_attention
from nbattn.cpu import decode

storages = pytest.mark.parametrize("storage", STORAGES)


class Paged:
    """Random keys and values of some lengths, scattered over pages that hold NaN elsewhere."""

    def __init__(self, rng, storage, lengths, *, page_size=16, kv_heads=2, head_dim=32, value_dim=None):
        self.lengths = np.array(lengths, np.int64)
        self.batch, self.longest, self.storage = len(lengths), max(lengths, default=0), storage
        width = -(-self.longest // page_size) + 1
        count = self.batch * width + 3
        self.table = rng.permutation(count)[: self.batch * width].reshape(self.batch, width)
        self.arrays, self.dense = [], []
        for dim in (head_dim, value_dim or head_dim):
            pages, scales, dense = self._random(rng, (count, kv_heads, page_size), dim)
            at = np.arange(max(self.longest, 1))
            rows = dense[self.table[:, at // page_size], :, at % page_size]  # (B, longest, Hkv, D)
            self.dense.append(np.ascontiguousarray(rows.transpose(0, 2, 1, 3))[:, :, : self.longest])
            used = np.zeros((count, page_size), bool)
            for b, length in enumerate(lengths):
                used[self.table[b, at[:length] // page_size], at[:length] % page_size] = True
            poisoned = pages if scales is None else scales
            poisoned.swapaxes(1, 2)[~used] = np.nan
            self.arrays.append((pages.swapaxes(1, 2), None if scales is None else scales.swapaxes(1, 2)))

    def _random(self, rng, shape, dim):
        if self.storage == "int8":
            pages = rng.integers(-127, 128, (*shape, dim)).astype(np.int8)
            scales = (rng.random(shape) * 0.02).astype(np.float32)
            return pages, scales, pages * scales[..., None]
        if self.storage == "int4":
            pages = rng.integers(0, 256, (*shape, dim // 2)).astype(np.uint8)
            scales = normal(rng, (*shape, dim // 32)) * np.float32(0.2)
            groups = pages.reshape(*scales.shape, 16)
            numbers = np.concatenate((groups % 16, groups // 16), axis=-1).astype(np.float32) - 8
            return pages, scales, (numbers * scales[..., None]).reshape(*shape, dim)
        pages = normal(rng, (*shape, dim), input_dtype(self.storage))
        return pages, None, pages.copy()

    def attend(self, query, mask=None, **options):
        (key, key_scales), (value, value_scales) = self.arrays
        options = {"key_scales": key_scales, "value_scales": value_scales, **options}
        return paged_attention(query, key, value, self.table, self.lengths, mask, **options)

    def attend_alone(self, query, b, **options):
        """Of sequence b alone."""
        (key, key_scales), (value, value_scales) = self.arrays
        options = {"key_scales": key_scales, "value_scales": value_scales, "return_lse": True, **options}
        one = slice(b, b + 1)
        return paged_attention(query[one], key, value, self.table[one], self.lengths[one], **options)

    def check(self, backend, query, mask=None, **options):
        result = self.attend(query, mask, return_lse=True, backend=backend, **options)
        assert result.weights is None
        options = {"is_causal": True, "query_offset": "end", **options}
        options["rounds"] = rounds(self.storage, backend)
        query = as_multiplied(query, self.storage, backend)
        hold(result.output, result.lse, query, *self.dense, mask, key_lengths=self.lengths, **options)
        return result


LENGTHS = (70, 1, 0, 33)
OPTIONS = {
    "plain": {},
    "not causal": {"is_causal": False},
    "from the start": {"query_offset": 0},
    "offsets": {"query_offset": [5, 0, 3, 40]},
    "window": {"window_size": (9, None)},
    "window on both sides": {"window_size": (4, 2), "is_causal": False, "query_offset": [30, 0, 0, 10]},
    "sinks": {"sinks": [0.0, -3.0, 5.0, -np.inf], "scale": 0.4},
    "alibi and softcap": {"alibi_slopes": [0.1, 0.2, 0.5, -0.1], "softcap": 3.0},
    "window and alibi": {"window_size": (20, None), "alibi_slopes": [0.5, 0.2, 0.1, 0.0]},
}


def query_for(rng, storage, batch=4, heads=4, queries=1, head_dim=32):
    return normal(rng, (batch, heads, queries, head_dim), input_dtype(storage))


class TestPagedAttention:
    @pytest.mark.isa
    @storages
    @pytest.mark.parametrize("name", OPTIONS)
    def test_options(self, backend, storage, name, rng):
        paged = Paged(rng, storage, LENGTHS)
        for queries in (1, 3):
            paged.check(backend, query_for(rng, storage, queries=queries), **OPTIONS[name])

    @pytest.mark.isa
    @storages
    def test_masks(self, backend, storage, rng):
        paged = Paged(rng, storage, LENGTHS)
        for queries in (1, 5):
            full = (4, 4, queries, 70)
            query, bias = query_for(rng, storage, queries=queries), normal(rng, (4, 1, queries, 70))
            bias[rng.random(bias.shape) < 0.2] = -np.inf
            paged.check(backend, query, rng.random(full) < 0.5)
            paged.check(backend, query, rng.integers(0, 2, (4, 1, 1, 70)), window_size=(30, None))
            paged.check(backend, query, bias=bias.astype(np.float64))
            paged.check(
                backend, query, rng.random((queries, 70)) < 0.5, bias=bias, sinks=np.ones(4, np.float32)
            )

    @storages
    @pytest.mark.parametrize("page_size", [1, 3, 16, 64])
    def test_page_sizes_and_value_dims(self, backend, storage, page_size, rng):
        dims = (64, 96) if storage == "int4" else (40, 23)
        paged = Paged(rng, storage, (50, 7, 64), page_size=page_size, head_dim=dims[0], value_dim=dims[1])
        for queries in (1, 2):
            paged.check(backend, query_for(rng, storage, 3, queries=queries, head_dim=dims[0]))

    @storages
    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (6, 2), (12, 3), (40, 1)])
    def test_groups(self, backend, storage, heads, kv_heads, rng):
        paged = Paged(rng, storage, (40, 9), kv_heads=kv_heads)
        for queries in (1, 3, 9):
            query = query_for(rng, storage, 2, heads, queries)
            paged.check(backend, query, alibi_slopes=rng.random(heads))

    @storages
    def test_many_keys(self, backend, storage, rng):
        paged = Paged(rng, storage, (3000, 511, 512, 513, 1025), page_size=32)
        for queries in (1, 2):
            query = query_for(rng, storage, 5, queries=queries)
            paged.check(backend, query)
            paged.check(backend, query, window_size=(600, None), sinks=np.ones(4))

    @storages
    @pytest.mark.parametrize("queries", [1, 2, 9])
    def test_a_call_that_repeats_another_checks_what_is_new(self, storage, queries, rng, monkeypatch):
        """The same layout, with other pages, tables, lengths and queries, of nine some after the others."""
        monkeypatch.setattr(decode, "MOST_ROWS", 12)
        paged = Paged(rng, storage, LENGTHS)
        for array in (x for pair in paged.arrays for x in pair if x is not None and x.dtype.kind not in "iu"):
            array[np.isnan(array)] = 1
        for _ in range(4):
            query = query_for(rng, storage, queries=queries)
            quick, checked = paged.attend(query), paged.attend(query, return_lse=True).output
            assert_same_bits(quick, checked)
            paged.lengths = rng.permutation(paged.lengths)
            paged.table = rng.permutation(paged.table.ravel()).reshape(paged.table.shape)
            paged.arrays = paged.arrays[::-1]
        bad = [("table", -1), ("table", 10**6), ("lengths", -1), ("lengths", 10**6)]
        for place, wrong in bad:
            name = {"table": "page_table", "lengths": "key_lengths"}[place]
            array = getattr(paged, place)
            setattr(paged, place, array.copy())
            getattr(paged, place)[np.argmax(paged.lengths)] = wrong
            with pytest.raises(ValueError, match=rf"{name}\["):
                paged.attend(query)
            setattr(paged, place, array)
        longest = np.argmax(paged.lengths)
        paged.table[longest, -1] = -1  # which no position needs
        assert_same_bits(paged.attend(query), paged.attend(query, return_lse=True).output)

    @storages
    def test_many_queries(self, backend, storage, rng):
        paged = Paged(rng, storage, (150, 20, 0))
        for queries in (15, 16, 17, 33, 70):
            paged.check(backend, query_for(rng, storage, 3, queries=queries))

    @pytest.mark.isa
    @pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
    @pytest.mark.parametrize("heads", [2, 4, 6, 8, 16, 24])
    def test_numbers_that_are_multiplied_as_they_lie(self, storage, heads, rng):
        for head_dim, value_dim in ((64, 32), (128, 128), (64, 160)):
            paged = Paged(rng, storage, (70, 3, 600), head_dim=head_dim, value_dim=value_dim)
            paged.check("cpu", query_for(rng, storage, 3, heads, head_dim=head_dim))
        paged = Paged(rng, storage, (70, 3, 600), head_dim=64, value_dim=96)
        options = {"softcap": 3.0, "alibi_slopes": np.linspace(-0.1, 0.1, heads), "window_size": (500, None)}
        mask = rng.random((3, heads, 2, 600)) < 0.5
        paged.check("cpu", query_for(rng, storage, 3, heads, 2, head_dim=64), mask, **options)

    @pytest.mark.parametrize("head_dim", [1, 2, 7, 8, 15, 17, 31, 33, 64, 80, 100, 128, 130, 256])
    def test_head_dims(self, backend, head_dim, rng):
        for storage in STORAGES[:5]:
            paged = Paged(rng, storage, (40, 17), head_dim=head_dim)
            paged.check(backend, query_for(rng, storage, 2, head_dim=head_dim))

    def test_half_queries_of_quantised_pages(self, backend, rng):
        for storage in ("int8", "int4"):
            paged = Paged(rng, storage, (40, 9))
            for half in ("float16", "bfloat16"):
                query = query_for(rng, half, 2)
                result = paged.attend(query, return_lse=True, backend=backend)
                assert result.output.dtype == query.dtype
                assert result.lse.dtype == np.float32
                exact = paged.attend(query.astype(np.float32), backend=backend)
                assert_same_bits(result.output, exact.astype(query.dtype))

    @storages
    def test_nothing_to_attend(self, backend, storage, rng):
        for lengths, queries in (((0, 0), 1), ((5, 0), 0), ((), 1)):
            paged = Paged(rng, storage, lengths)
            query = query_for(rng, storage, len(lengths), queries=queries)
            output, _, lse = paged.attend(query, return_lse=True, backend=backend)
            assert output.shape == query.shape
            assert not output[np.array(lengths, int) == 0].any()
            assert (lse[np.array(lengths, int) == 0] == -np.inf).all()

    def test_a_table_without_pages_again(self, rng):
        """Nothing is attended from the third call on either."""
        paged = Paged(rng, "float32", (0, 0))
        paged.table = paged.table[:, :0]
        for _ in range(4):
            assert not paged.attend(query_for(rng, "float32", 2)).any()

    def test_strides(self, backend, rng):
        """Pages as (pages, page_size, heads, D), both in one array, every other page."""
        paged = Paged(rng, "float32", LENGTHS)
        query = query_for(rng, "float32", queries=2)
        expected = paged.check(backend, query)
        (key, _), (value, _) = paged.arrays
        both = np.full((2 * len(key), 16, 2, 2, 40), np.nan, np.float32)
        both[::2, :, 0, :, 3:35], both[::2, :, 1, :, 3:35] = key, value
        both.flags.writeable = False
        for q in (query, np.ascontiguousarray(query.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)):
            got = paged_attention(
                q, both[::2, :, 0, :, 3:35], both[::2, :, 1, :, 3:35], paged.table.astype(np.int32),
                paged.lengths.astype(np.uint8), return_lse=True, backend=backend,
            )  # fmt: skip
            np.testing.assert_allclose(got.output, expected.output, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(got.lse, expected.lse, rtol=1e-5)

    def test_sequences_may_share_pages(self, backend, rng):
        paged = Paged(rng, "float32", (60, 60))
        paged.table[1], paged.dense = paged.table[0], [np.repeat(x[:1], 2, axis=0) for x in paged.dense]
        paged.check(backend, query_for(rng, "float32", 2))

    def test_entries_that_no_position_needs(self, backend, rng):
        paged = Paged(rng, "float32", LENGTHS)
        query = query_for(rng, "float32")
        expected = paged.check(backend, query).output
        for dtype, junk in ((np.int64, -1), (np.int64, np.iinfo(np.int64).max), (np.uint64, 2**64 - 1)):
            table, paged.table = paged.table, paged.table.astype(dtype)
            paged.table[1, 1:], paged.table[2], paged.table[3, 3:] = junk, junk, junk
            assert_same_bits(paged.attend(query, backend=backend), expected)
            paged.table = table

    @storages
    def test_alone_as_in_the_batch(self, backend, storage, rng):
        paged = Paged(rng, storage, (700, 3, 64, 0, 130))
        for queries in (1, 4):
            query = query_for(rng, storage, 5, 8, queries)
            together = paged.attend(query, return_lse=True, backend=backend)
            for b in range(5):
                alone = paged.attend_alone(query, b, backend=backend)
                assert_same_bits(alone.output[0], together.output[b])
                assert_same_bits(alone.lse[0], together.lse[b])

    @storages
    def test_any_number_of_threads(self, storage, rng, monkeypatch):
        from nbattn.cpu import runtime

        paged = Paged(rng, storage, (2500, 3, 640, 0, 130), kv_heads=4)
        for queries in (1, 4):
            query = query_for(rng, storage, 5, 16, queries)
            results = []
            for threads in (1, 2, 5):
                monkeypatch.setattr(runtime, "threads", lambda n=threads: n)
                results.append(paged.attend(query, return_lse=True))
            for other in results[1:]:
                assert_same_bits(other.output, results[0].output)
                assert_same_bits(other.lse, results[0].lse)

    @pytest.mark.parametrize("storage", ["int8", "int4"])
    def test_long_sequences(self, storage, rng, monkeypatch):
        """Where a row sees 16384 quantised keys or 32768, tasks are longer: its own count alone says so."""
        from nbattn.cpu import runtime

        paged = Paged(rng, storage, (33000, 16390, 700), kv_heads=1)
        query = query_for(rng, storage, 3, heads=2)
        for window in (None, (16390, None)):
            together = paged.check("cpu", query, window_size=window)
            monkeypatch.setattr(runtime, "threads", lambda: 3)
            for b in range(3):
                alone = paged.attend_alone(query, b, window_size=window)
                assert_same_bits(alone.output[0], together.output[b])
                assert_same_bits(alone.lse[0], together.lse[b])

    @pytest.mark.parametrize("storage", ["int8", "int4"])
    def test_queries_far_behind_the_keys(self, storage, rng):
        """They see fewer keys than there are, from amid a task on: in shorter tasks, and one more of them."""
        paged = Paged(rng, storage, (16500,), page_size=1000, kv_heads=1)
        for offset in (16700, 17000):
            query = query_for(rng, storage, 1, heads=2)
            paged.check("cpu", query, window_size=(16500, None), query_offset=offset)

    @storages
    def test_next_task_is_shorter(self, storage, rng, monkeypatch):
        """Its rows are in the tables with a task's own: nothing is written over these."""
        from nbattn.cpu import runtime

        monkeypatch.setattr(runtime, "threads", lambda: 1)
        for length in (753, 766, 1024):
            paged = Paged(rng, storage, (length,), page_size=7, kv_heads=12)
            paged.check("cpu", query_for(rng, storage, 1, heads=12))

    def test_out(self, backend, rng):
        paged = Paged(rng, "float32", LENGTHS)
        query = query_for(rng, "float32", queries=2)
        expected = paged.attend(query, backend=backend)
        for out in (np.full(expected.shape, np.nan, np.float32),
                    np.full((*expected.shape[:3], 64), np.nan, np.float32)[..., ::2]):  # fmt: skip
            assert paged.attend(query, out=out, backend=backend) is out
            np.testing.assert_array_equal(out, expected)

    @pytest.mark.parametrize("storage", STORAGES[:4])
    def test_nan_reaches_who_sees_it_and_nobody_else(self, backend, storage, rng):
        for queries in (1, 3):
            query = query_for(rng, storage, 2, queries=queries)
            for which in (0, 1):
                for masked in (False, True):
                    paged = Paged(rng, storage, (70, 40))
                    clean = paged.attend(query, np.arange(70) != 20, backend=backend)
                    for array in (paged.arrays[which][0],):
                        array[paged.table[0, 1], 4, 1, 5] = np.nan  # sequence 0, position 20, key head 1
                    got = paged.attend(query, np.arange(70) != 20 if masked else None, backend=backend)
                    if masked:
                        assert_same_bits(got, clean)
                        continue
                    broken = np.isnan(got.astype(np.float32))
                    expected = np.zeros_like(broken)
                    expected[0, 2:, :, slice(None) if which == 0 else 5] = True
                    np.testing.assert_array_equal(broken, expected)

    def test_nan_scale_is_a_nan_token(self, backend, rng):
        for storage, head_dim, heads in (
            ("int8", 32, 4), ("int8", 64, 4), ("int8", 64, 8), ("int4", 32, 4), ("int4", 32, 16),
        ):  # fmt: skip
            for which in (0, 1):
                paged = Paged(rng, storage, (70, 40), head_dim=head_dim)
                query = query_for(rng, storage, 2, heads, head_dim=head_dim)
                expected = np.zeros((2, heads), bool)
                expected[0, heads // 2 :] = True
                clean = paged.attend(query, np.arange(70) != 20, backend=backend)
                for scale in (np.nan, np.inf, 1e30):
                    paged.arrays[which][1][paged.table[0, 1], 4, 1] = scale
                    broken = ~np.isfinite(paged.attend(query, backend=backend)).all(axis=(2, 3))
                    if np.isnan(scale) or (which and scale == np.inf):
                        np.testing.assert_array_equal(broken, expected)
                    masked = paged.attend(query, np.arange(70) != 20, backend=backend)
                    assert np.isfinite(masked).all()
                    if backend == "cpu" and storage == "int8":
                        assert_same_bits(masked, clean)

    def test_many_small_weights_add_up(self, backend, rng):
        """One key in 64 outweighs the others so much that each is less than what weights of 8 bits can tell
        apart; together they count nevertheless.
        """
        keys, heads = 1024, 4
        key = np.zeros((1, 1, keys, 32), np.float32)
        key[0, 0, ::64] = np.eye(32, dtype=np.float32)[0]
        query = np.zeros((1, heads, 1, 32), np.float32)
        query[..., 0] = np.sqrt(32) * np.log(127 / np.array([0.2, 0.33, 0.45, 0.7]))[:, None]
        value = 1 + 0.1 * normal(rng, (1, 1, keys, 32))
        value[0, 0, ::64] = 0
        value[0, 0, :, 0] = 8  # all scales are alike
        cache = KVCache(1, 1, keys, 32, "int4", backend=backend)
        cache.append(key, value)
        weights = np.exp(query[0, :, 0, 0, None] / np.sqrt(32) * key[0, 0, :, 0].astype(np.float64))
        expected = weights / weights.sum(axis=1, keepdims=True) @ stored(value, "int4")[0, 0]
        np.testing.assert_allclose(cache.attend(query)[0, :, 0], expected, rtol=0.1)

    def test_queries_of_bytes_that_are_nothing_or_not_finite(self, rng):
        paged = Paged(rng, "int8", (70, 40), head_dim=64)
        query = query_for(rng, "int8", 2, head_dim=64)
        query[0, 0], query[0, 1], query[1, 2, 0, 3], query[1, 3] = 0, 1e-40, np.nan, 1e-30 * query[1, 3]
        output = paged.attend(query)
        broken = np.isnan(output).any(axis=(2, 3))
        np.testing.assert_array_equal(broken, [[False] * 4, [False, False, True, False]])
        for b, h in ((0, 0), (0, 1), (1, 3)):  # all keys weigh the same
            mean = paged.dense[1][b, h // 2, : paged.lengths[b]].mean(axis=0)
            np.testing.assert_allclose(output[b, h, 0], mean, atol=1e-4)


def pages_of(dtype=np.float32, heads=2, head_dim=8):
    return np.zeros((6, 4, heads, head_dim), dtype)


GOOD = {
    "query": np.zeros((2, 4, 1, 8), np.float32), "key_pages": pages_of(), "value_pages": pages_of(),
    "page_table": np.array([[0, 1, 2], [3, 4, 5]]), "key_lengths": np.array([12, 5]),
}  # fmt: skip
BYTES = {"key_pages": pages_of(np.int8), "value_pages": pages_of(np.int8)}
SCALES = {"key_scales": np.zeros((6, 4, 2), np.float32), "value_scales": np.zeros((6, 4, 2), np.float32)}
BAD = {
    "page outside": (
        {"page_table": [[0, 1, 6], [3, 4, 5]]},
        ValueError,
        r"page_table\[0, 2\] is 6; expected 0 to 5",
    ),
    "negative page": ({"page_table": [[0, 1, 2], [3, -1, 5]]}, ValueError, r"page_table\[1, 1\] is -1"),
    "huge page": (
        {"page_table": np.array([[2**64 - 1, 1, 2], [3, 4, 5]], np.uint64)},
        ValueError,
        r"page_table\[0, 0\] is",
    ),
    "lengths longer than the table": (
        {"key_lengths": [12, 13]},
        ValueError,
        r"key_lengths\[1\] is 13; expected 0 to 12",
    ),
    "negative length": ({"key_lengths": [12, -1]}, ValueError, r"key_lengths\[1\] is -1"),
    "float lengths": ({"key_lengths": [12.0, 1.0]}, TypeError, "key_lengths must hold integers"),
    "lengths of others": (
        {"key_lengths": [12]},
        ValueError,
        r"key_lengths has shape \(1,\); expected \(2,\)",
    ),
    "float table": ({"page_table": np.zeros((2, 3))}, TypeError, "page_table must hold integers"),
    "flat table": ({"page_table": [0, 1]}, ValueError, r"page_table has shape \(2,\)"),
    "batch": (
        {"query": np.zeros((3, 4, 1, 8), np.float32)},
        ValueError,
        "query has batch size 3; expected 2",
    ),
    "dimensions": (
        {"query": np.zeros((4, 1, 8), np.float32)},
        ValueError,
        r"query has shape \(4, 1, 8\); expected",
    ),
    "head_dim": (
        {"query": np.zeros((2, 4, 1, 7), np.float32)},
        ValueError,
        "query has head_dim 7 but the keys have 8",
    ),
    "heads": (
        {"query": np.zeros((2, 3, 1, 8), np.float32)},
        ValueError,
        "query has 3 heads and the keys have 2",
    ),
    "query dtype": (
        {"query": np.zeros((2, 4, 1, 8))},
        TypeError,
        "query has dtype float64 but the keys have float32",
    ),
    "integer query": ({"query": np.zeros((2, 4, 1, 8), int)}, TypeError, "query has dtype int64"),
    "page dtype": ({"key_pages": pages_of(np.int32)}, TypeError, "key_pages has dtype int32"),
    "page dtypes": (
        {"key_pages": pages_of(np.float64)},
        TypeError,
        "dtypes float64 and float32; both must match",
    ),
    "page shape": (
        {"value_pages": pages_of()[0]},
        ValueError,
        r"value_pages has shape \(4, 2, 8\); expected \(pages",
    ),
    "page shapes": (
        {"value_pages": pages_of(heads=1)},
        ValueError,
        r"key_pages has shape .* all but head_dim must",
    ),
    "empty pages": ({"key_pages": pages_of(head_dim=0)}, ValueError, "key_pages has shape"),
    "scales of floats": (SCALES, ValueError, "key_scales is given, but the pages are float32"),
    "no scales": (BYTES, ValueError, "key_scales is missing; int8 pages need them"),
    "one scale": (BYTES | {"key_scales": SCALES["key_scales"]}, ValueError, "value_scales is missing"),
    "scale dtype": (
        BYTES | SCALES | {"key_scales": np.zeros((6, 4, 2))},
        TypeError,
        "key_scales has dtype float64",
    ),
    "scale shape": (
        BYTES | SCALES | {"key_scales": np.zeros((6, 4, 1), np.float32)},
        ValueError,
        r"key_scales has shape .*\(6, 4, 2\)",
    ),
    "4 bits of 16": (
        SCALES | {"key_pages": pages_of(np.uint8), "value_pages": pages_of(np.uint8)},
        ValueError,
        "multiple of 32, got 16",
    ),
    "double query of bytes": (
        BYTES | SCALES | {"query": np.zeros((2, 4, 1, 8))},
        TypeError,
        "query has dtype float64; keys in int8 take",
    ),
    "mask": ({"mask": np.ones((1, 11), bool)}, ValueError, r"mask has shape \(1, 11\).*\(2, 4, 1, 12\)"),
    "floating mask": ({"mask": np.ones((1, 12))}, TypeError, "mask has dtype float64"),
    "offset": ({"query_offset": "start"}, ValueError, "query_offset must be"),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
    "sinks": ({"sinks": [0.0]}, ValueError, r"sinks has shape \(1,\)"),
    "backend": ({"backend": "numpy"}, ValueError, "backend is 'numpy'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pages(backend, case):
    changed, kind, message = BAD[case]
    out = np.full((2, 4, 1, 8), 7, np.float32)
    with pytest.raises(kind, match=message):
        paged_attention(**{"out": out, "backend": backend, **GOOD, **changed})
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["query", "key_pages", "value_pages", "bias", "sinks"])
@pytest.mark.parametrize("step", [1, 2], ids=["read", "copied"])
def test_out_overlaps(backend, name, step):
    arrays = GOOD | {"bias": np.zeros((2, 4, 1, 12), np.float32), "sinks": np.zeros(4, np.float32)}
    shape = arrays[name].shape
    memory = np.zeros(1024, np.float32)
    array = memory[: step * arrays[name].size].reshape(*shape[:-1], step * shape[-1])[..., ::step]
    with pytest.raises(ValueError, match="out shares memory"):
        paged_attention(**arrays | {name: array}, out=memory[:64].reshape(2, 4, 1, 8), backend=backend)
