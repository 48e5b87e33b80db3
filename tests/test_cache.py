"""KVCache: random walks beside plain arrays that grow, turning positions, rings, and what bad calls leave."""

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref
from functools import partial, partialmethod

import numpy as np
import pytest
from cached import DTYPES, STORAGES, Line, input_dtype, poison, snapshot, stored
from ml_dtypes import bfloat16
from oracle import assert_same_bits, hold, normal

from nbattn import KVCache, reader, scaled_dot_product_attention
from nbattn.cpu import arrays

storages = pytest.mark.parametrize("storage", STORAGES)
native = pytest.mark.skipif(not arrays.KNOWN, reason="keeps its arrays in another way")
LLAMA = {"base": 100.0}
GPTJ = {"base": 1e4, "interleaved": True, "width": 6}


class Walk:
    """A cache and its model under random calls; memory that holds no position is NaN all the time."""

    def __init__(self, seed, storage, backend, *, window=None, rotary=None, alike=0.0):
        self.rng = rng = np.random.default_rng(seed)
        self.alike = alike  # how many of the calls are as a decoder's steps: those that are made natively
        self.storage, self.window, self.backend = storage, window, backend
        self.batch, self.capacity = int(rng.integers(1, 4)), 23 if window else 40
        self.kv_heads, self.group = int(rng.integers(1, 3)), int(rng.choice([1, 2, 5]))
        key_dims = [32] if storage == "int4" else [8, 34] if rotary else [7, 8, 33]
        self.dims = int(rng.choice(key_dims)), int(rng.choice([32, 64] if storage == "int4" else [8, 20]))
        options = {f"rotary_{'dim' if name == 'width' else name}": x for name, x in (rotary or {}).items()}
        self.cache = KVCache(
            self.batch, self.kv_heads, self.capacity, self.dims[0], storage, value_dim=self.dims[1],
            window=window, backend=backend, **options,
        )  # fmt: skip
        self.ulp = 4 if rotary is None else 40
        self.lines = [Line(self.kv_heads, *self.dims, storage, rotary) for _ in range(self.batch)]
        self.highest = np.zeros(self.batch, int)  # since the last reset: what a ring has overwritten
        self.poison()

    def poison(self):
        used = np.zeros((self.batch, self.capacity), bool)
        for b, line in enumerate(self.lines):
            first = max(0, self.highest[b] - self.capacity) if self.window else 0
            used[b, np.arange(first, len(line)) % self.capacity] = True
        poison(self.cache._store.pages, used)

    def new(self, heads, tokens, dim):
        return normal(self.rng, (self.batch, heads, tokens, dim), input_dtype(self.storage))

    def append(self):
        most = 50 if self.rng.random() < 0.05 else 5
        tokens = int(self.rng.integers(0, most))
        counts = self.rng.integers(0, tokens + 1, self.batch) if self.rng.random() < 0.4 else None
        if self.rng.random() < self.alike:
            tokens, counts = 1, None
        key, value = (self.new(self.kv_heads, tokens, dim) for dim in self.dims)
        each = np.full(self.batch, tokens) if counts is None else counts
        lengths = np.array([len(line) for line in self.lines])
        if not self.window and (lengths + each > self.capacity).any():
            before = snapshot(self.cache._store.pages)
            with pytest.raises(ValueError, match="do not fit"):
                self.cache.append(key, value, counts)
            assert snapshot(self.cache._store.pages) == before
            return
        self.cache.append(key, value, counts)
        for b, line in enumerate(self.lines):
            line.append(key[b, :, : each[b]], value[b, :, : each[b]])
        self.highest = np.maximum(self.highest, [len(line) for line in self.lines])

    def truncate(self):
        new = [len(line) - int(self.rng.integers(0, min(4, len(line)) + 1)) for line in self.lines]
        if self.window:
            first = np.maximum(0, self.highest - self.capacity)
            lost = [
                0 < n < len(line) and max(0, n - self.window + 1) < f
                for n, line, f in zip(new, self.lines, first, strict=True)
            ]
            if any(lost):
                with pytest.raises(ValueError, match="but the ring holds positions from"):
                    self.cache.truncate(new)
                return
            self.highest[np.array(new) == 0] = 0
        self.cache.truncate(np.array(new))
        for line, n in zip(self.lines, new, strict=True):
            line.truncate(n)

    def reset(self):
        if self.rng.random() < 0.3:
            self.cache.reset()
            which = range(self.batch)
        else:
            which = [int(self.rng.integers(self.batch))]
            self.cache.reset(which[0])
        for b in which:
            self.lines[b].truncate(0)
            self.highest[b] = 0

    def attend(self):
        rng, heads = self.rng, self.kv_heads * self.group
        if rng.random() < self.alike:
            query = self.new(heads, 1, self.dims[0])
            output = self.cache.attend(query)
            options = {"window_size": (self.window - 1, None)} if self.window else {}
            for b, line in enumerate(self.lines):
                line.hold(output[b], None, query[b], ulp=self.ulp, backend=self.backend, **options)
            return
        queries = int(rng.choice([1, 1, 1, 2, 3, 6]))
        counts = rng.integers(0, queries + 1, self.batch) if rng.random() < 0.3 else None
        each = np.full(self.batch, queries) if counts is None else counts
        query = self.new(heads, queries, self.dims[0])
        options = {}
        if rng.random() < 0.2:
            options["window_size"] = (int(rng.integers(0, 9)), None)
        if rng.random() < 0.2:
            options["sinks"] = normal(rng, heads)
        if rng.random() < 0.2:
            options["alibi_slopes"] = rng.random(heads)
        if rng.random() < 0.1:
            options["softcap"] = 2.0
        lengths = np.array([len(line) for line in self.lines])
        mask = rng.random((self.batch, 1, queries, lengths.max())) < 0.8 if rng.random() < 0.2 else None
        if rng.random() < 0.2:
            options["scale"] = float(rng.normal())
        if rng.random() < 0.2:
            options["is_causal"] = False
        bias = None
        if rng.random() < 0.2:
            bias = normal(rng, (self.batch, int(rng.choice([1, heads])), queries, lengths.max()))
        left = options.get("window_size", (10**9,))[0]
        if self.window:
            left = min(left, self.window - 1)
            first = np.maximum(0, self.highest - self.capacity)
            if (np.maximum(0, lengths - each - left) < first).any():
                with pytest.raises(ValueError, match="but the ring holds them from"):
                    self.cache.attend(query, mask, bias=bias, lengths=counts, **options)
                return
        given = {"mask": mask, "bias": bias, "lengths": counts, **options}
        result = self.cache.attend(query, return_lse=True, **given)
        out = np.empty_like(result.output) if rng.random() < 0.5 else None
        again = self.cache.attend(query, out=out, **given)
        assert out is None or again is out
        assert_same_bits(again, result.output)
        if left < 10**9:
            options["window_size"] = (left, None)
        for b, (line, n) in enumerate(zip(self.lines, each, strict=True)):
            assert not result.output[b, :, n:].any()
            assert (result.lse[b, :, n:] == -np.inf).all()
            seen, added = (None if x is None else x[b : b + 1, :, :n, : len(line)] for x in (mask, bias))
            output, lse = result.output[b, :, :n], result.lse[b, :, :n]
            query_ = query[b, :, :n]
            line.hold(output, lse, query_, seen, bias=added, ulp=self.ulp, backend=self.backend, **options)

    def go(self, steps):
        for _ in range(steps):
            getattr(self, self.rng.choice(["append"] * 9 + ["attend"] * 8 + ["truncate"] * 2 + ["reset"]))()
            self.poison()
            np.testing.assert_array_equal(self.cache.lengths, [len(line) for line in self.lines])


WALKS = [
    *({"storage": storage} for storage in STORAGES),
    *({"storage": storage, "window": 12} for storage in STORAGES),
    {"storage": "float32", "window": 23},
    *({"storage": storage, "rotary": LLAMA} for storage in ("float32", "float64")),
    {"storage": "float32", "rotary": GPTJ, "window": 12},
    *({"storage": storage, "alike": 0.8} for storage in ("bfloat16", "int8")),
    {"storage": "float32", "rotary": LLAMA, "alike": 0.8},
    {"storage": "float32", "window": 12, "alike": 0.8},
]


@pytest.mark.parametrize("options", WALKS, ids=repr)
def test_walk(backend, options):
    for seed in range(3):
        Walk(seed, backend=backend, **options).go(60)


@pytest.mark.slow
@pytest.mark.parametrize("options", WALKS, ids=repr)
def test_long_walk(backend, options):
    for seed in range(100, 103):
        Walk(seed, backend=backend, **options).go(1000)


def filled(storage, lengths, backend, *, kv_heads=2, head_dim=32, tokens=None, **options):
    """A cache with random tokens, and them."""
    rng = np.random.default_rng(1)
    shape = (len(lengths), kv_heads, tokens or max(lengths), head_dim)
    cache = KVCache(len(lengths), kv_heads, shape[2] + 5, head_dim, storage, backend=backend, **options)
    key, value = (normal(rng, shape, input_dtype(storage)) for _ in range(2))
    cache.append(key, value, lengths)
    return cache, key, value


class TestAttend:
    @storages
    def test_is_the_plain_door(self, backend, storage, rng):
        """Within 2 % for 8 bits and 25 % for 4 of these normal numbers, else to the last bits."""
        cache, key, value = filled(storage, [40, 9, 0], backend)
        query = normal(rng, (3, 6, 2, 32), input_dtype(storage))
        got = cache.attend(query).astype(np.float64)
        plain = scaled_dot_product_attention(
            *(x.astype(np.float64) for x in (query, key, value)), is_causal=True, query_offset="end",
            key_lengths=[40, 9, 0], backend="reference",
        )  # fmt: skip
        error = np.linalg.norm(got - plain) / np.linalg.norm(plain)
        assert error < {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2,
                        "int8": 0.02, "int4": 0.25}[storage]  # fmt: skip

    def test_a_prompt_then_tokens(self, backend, rng):
        """Every step's attention is a row of the whole sequence's."""
        q, k, v = (normal(rng, (2, h, 30, 16)) for h in (4, 2, 2))
        cache = KVCache(2, 2, 30, 16, backend=backend)
        outputs = []
        for start, end in [(0, 17), *((i, i + 1) for i in range(17, 25)), (25, 30)]:
            new = slice(start, end)
            assert cache.append(k[:, :, new], v[:, :, new]) is None
            outputs.append(cache.attend(q[:, :, new]))
        hold(np.concatenate(outputs, axis=2), None, q, k, v, is_causal=True)

    def test_layouts(self, backend, rng):
        """(batch, positions, heads, head_dim) arrays, strided, read-only, or not contiguous in any axis."""
        q, k, v = (normal(rng, (2, 7, h, 16)) for h in (4, 2, 2))
        plain, other = (KVCache(2, 2, 30, 16, backend=backend) for _ in range(2))
        for _ in range(4):  # the later ones take a shorter way
            plain.append(*(np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (k, v)))
            wide = np.repeat(k, 2, axis=3)
            wide.flags.writeable = False
            other.append(wide[..., ::2].transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
            expected = plain.attend(np.ascontiguousarray(q.transpose(0, 2, 1, 3)))
            assert_same_bits(other.attend(q.transpose(0, 2, 1, 3)), expected)
            q = q + 1

    @storages
    def test_alone_as_in_the_batch(self, backend, storage, rng):
        cache, key, value = filled(storage, [40, 9, 700], backend)
        query = normal(rng, (3, 8, 2, 32), input_dtype(storage))
        together = cache.attend(query, return_lse=True)
        for b, length in enumerate([40, 9, 700]):
            alone = KVCache(1, 2, 700, 32, storage, backend=backend)
            alone.append(key[b : b + 1, :, :length], value[b : b + 1, :, :length])
            result = alone.attend(query[b : b + 1], return_lse=True)
            assert_same_bits(result.output[0], together.output[b])
            assert_same_bits(result.lse[0], together.lse[b])

    def test_same_options_again(self, backend, rng):
        """Calls that repeat an earlier one's layout are shorter: to the same bits, and the same errors."""
        cache, *_ = filled("float32", [20, 9], backend)
        sinks = normal(rng, 4)
        choices = [{}, {"is_causal": False}, {"window_size": (3, None)}, {"scale": 0.3}, {"softcap": 2.0},
                   {"sinks": sinks}, {"sinks": sinks + 1}, {"alibi_slopes": sinks}]  # fmt: skip
        for step in range(5):
            token = normal(rng, (2, 2, 1, 32))
            cache.append(token, token)
            for options in choices:
                query = normal(rng, (2, 4, 2, 32))
                mask = np.ones((1, 21 + step), bool)  # which no shorter way is made for
                expected = cache.attend(query, mask, return_lse=True, **options)
                assert_same_bits(cache.attend(query, **options), expected.output)
                result = cache.attend(query, return_lse=True, **options)
                assert_same_bits(result.output, expected.output)
                assert_same_bits(result.lse, expected.lse)
            for bad in (
                {"is_causal": 1},
                {"scale": True},
                {"window_size": (3.0, None)},
                {"window_size": 3},
                {"window_size": ()},
                {"window_size": (np.float64(3), None)},
                {"sinks": [1, 2, 3, 4]},
            ):
                with pytest.raises(TypeError):
                    cache.attend(query, **bad)

    @pytest.mark.parametrize(
        "options",
        [
            {"window_size": (3, None)},
            {"window_size": [3, 0]},
            {"window_size": (np.int64(3), -1)},
            {"scale": 1 / np.sqrt(16)},
            {"scale": np.float32(0.1)},
            {"is_causal": np.True_},
            {"return_lse": np.True_},
            {"softcap": np.int32(2)},
            {"backend": "cpu"},
            {"window_size": (2, None), "scale": np.float64(2), "softcap": 3},
        ],
        ids=repr,
    )
    def test_ordinary_calls_are_remembered(self, options, rng):
        cache, *_ = filled("float32", [20, 9], None)
        for _ in range(4):
            query = normal(rng, (2, 4, 1, 32))
            expected = cache.attend(query, np.ones((1, 20), bool), **options)  # no shorter way
            np.testing.assert_array_equal(cache.attend(query, **options)[0], expected[0])
        assert len(cache._places.readers) == 1
        assert all(cache._places.readers.values())

    @pytest.mark.parametrize("storage", ["float32", "int8"])
    def test_lengths_of_repeated_calls(self, storage, rng):
        """They are checked each time, place the queries, and end the rows; calls without them stay apart."""
        cache, *_ = filled(storage, [20, 9], None, tokens=40, rotary_base=100.0)
        for step in range(5):
            counts = rng.integers(0, 4, 2)
            token, query = normal(rng, (2, 2, 3, 32)), normal(rng, (2, 4, 3, 32))
            cache.append(token, token, counts)
            mask = np.ones((1, cache.lengths.max()), bool)  # which no shorter way is made for
            for lengths in (counts, None):
                expected = cache.attend(query, mask, lengths=lengths, return_lse=True)
                out = np.full(query.shape, np.nan, np.float32)
                result = cache.attend(query, lengths=lengths, return_lse=True, out=out)
                assert result.output is out
                assert_same_bits(out, expected.output)
                assert_same_bits(result.lse, expected.lse)
                assert_same_bits(cache.attend(query, lengths=lengths), expected.output)
            for b, count in enumerate(counts):
                assert (cache.attend(query, lengths=counts)[b, :, count:] == 0).all()
            with pytest.raises(ValueError, match=r"lengths\[1\] is 4; expected 0 to 3"):
                cache.attend(query, lengths=[1, 4])
            assert all(cache._places.readers.values()) == (step > 0)

    @native
    @storages
    def test_native_calls(self, storage, rng, monkeypatch):
        """One native call makes the latest again: while the cache grows and shrinks, over chunks of keys, and
        never where the query lies otherwise or the options are others."""
        made, again = [], reader.Reader.again
        monkeypatch.setattr(reader.Reader, "again", lambda *a: made.append(again(*a)) or made[-1])
        options = {"rotary_base": 100.0, "rotary_dim": 16} if storage in ("float16", "int8") else {}
        cache = KVCache(2, 2, 1200, 32, storage, **options)
        dtype, sizes = input_dtype(storage), [1, 62, 1, 1, 300, 200, 1, -150, 400, 1, 1, -80, 300, -600, 90]
        window, everything = [40, None], None
        for step, size in enumerate(sizes):
            new = normal(rng, (2, 2, abs(size), 32), dtype)
            if size < 0:
                cache.truncate(cache.lengths + size)
            else:
                cache.append(new, new)
            query = normal(rng, (2, 8, 1, 32), dtype)
            wide = np.repeat(query, 2, axis=2)[:, :, ::2]
            everything = np.ones((1, cache.lengths[0]), bool)  # which no shorter way is made for
            made.clear()
            for q, options in (
                (query, {}), (query, {"scale": 0.5}), (query, {"is_causal": False}), (query, {"softcap": 2}),
                (wide, {}), (wide, {"window_size": window}), (query, {"window_size": (9, 0)}), (query, {}),
            ):  # fmt: skip
                expected = cache.attend(q, everything, **options)
                for _ in range(2):
                    assert_same_bits(cache.attend(q, **options), expected)
            assert sum(x is not None for x in made) >= (6 if step > 0 else 0)
            for bad in (query[:1], query.astype(np.float64 if dtype != np.float64 else np.float32), query[0]):
                with pytest.raises((TypeError, ValueError), match="query has"):
                    cache.attend(bad)
            with pytest.raises(TypeError, match="is_causal must be"):
                cache.attend(query, is_causal=1)
        for window[0] in (40, 41, 7):  # the same object
            for _ in range(3):
                expected = cache.attend(query, everything, window_size=window)
                assert_same_bits(cache.attend(query, window_size=window), expected)

    @native
    @pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
    def test_native_appends(self, storage, rng):
        """They stop at the capacity, and are not made of arrays that lie otherwise."""
        cache, line = KVCache(1, 2, 12, 32, storage, rotary_base=100.0), Line(2, 32, 32, storage, LLAMA)
        dtype = input_dtype(storage)
        for step in range(12):
            key, value = normal(rng, (2, 1, 2, 1, 32), dtype)
            before = snapshot(cache._store.pages)
            for bad in (
                (key[:, :1], value),
                (key, value.astype(np.float64)),
                (key[0], value[0]),
                (key, None),
            ):
                with pytest.raises((TypeError, ValueError)):
                    cache.append(*bad)
            assert snapshot(cache._store.pages) == before
            if step == 7:
                key, value = (np.repeat(x, 2, axis=3)[..., ::2] for x in (key, value))
            cache.append(key, value)
            assert (cache._places.rewrite is not None) == (step > 0)
            line.append(key[0], value[0])
            query = normal(rng, (1, 4, 1, 32), dtype)
            line.hold(cache.attend(query)[0], None, query[0], ulp=40, backend="cpu")
        before = snapshot(cache._store.pages)
        with pytest.raises(ValueError, match="sequence 0 holds 12 of 12 positions; 1 more do not fit"):
            cache.append(key, value)
        assert snapshot(cache._store.pages) == before
        assert cache.lengths == 12
        cache.truncate(11)
        cache.append(key, value)

    def test_numbers_that_look_alike_stay_apart(self, rng):
        cache, *_ = filled("float32", [20, 9], None)
        query = normal(rng, (2, 4, 1, 32))
        for _ in range(4):
            for options in ({"scale": 1}, {"window_size": (1, 1)}, {"is_causal": np.False_}):
                cache.attend(query, **options)
            for bad in (
                {"scale": True}, {"scale": np.True_}, {"window_size": (np.True_, 1)},
                {"is_causal": np.int64(0)},                {"window_size": (1.0, 1)},
            ):  # fmt: skip
                with pytest.raises(TypeError):
                    cache.attend(query, **bad)

    def test_many_queries_again_while_the_cache_grows(self, backend, rng):
        """More of them than the decode kernel takes, where nothing is to be gathered."""
        cache = KVCache(1, 1, 200, 16, backend=backend)
        for _ in range(4):
            new, query = normal(rng, (1, 1, 50, 16)), normal(rng, (1, 2, 50, 16))
            cache.append(new, new)
            with_mask = cache.attend(query, np.ones((1, cache.lengths[0]), bool))  # no shorter way
            np.testing.assert_allclose(cache.attend(query), with_mask, rtol=1e-5, atol=1e-6)

    def test_sinks_that_change_in_place(self, backend, rng):
        cache, *_ = filled("float32", [20, 9], backend)
        query, sinks = normal(rng, (2, 4, 1, 32)), np.zeros(4, np.float32)
        for _ in range(4):
            np.testing.assert_array_equal(
                cache.attend(query, sinks=sinks),
                cache.attend(query, np.ones((1, 20), bool), sinks=sinks.copy()),
            )
            sinks += 1

    def test_out(self, backend, rng):
        cache, *_ = filled("float32", [20, 9], backend)
        query = normal(rng, (2, 4, 1, 32))
        for _ in range(3):
            out = np.full((2, 4, 1, 32), np.nan, np.float32)
            assert cache.attend(query, out=out) is out
            np.testing.assert_array_equal(out, cache.attend(query))

    def test_out_of_repeated_calls(self, rng):
        """Checked each time, and written whatever its layout; nothing is written where it is refused."""
        for storage, dtype in (("float32", np.float32), ("int8", np.float16)):
            cache, *_ = filled(storage, [20, 9], None)
            query, sinks = normal(rng, (2, 4, 1, 32), dtype), normal(rng, 4)
            for _ in range(4):
                out = np.zeros((2, 1, 4, 64), dtype)[..., ::2].swapaxes(1, 2)
                result = cache.attend(query, sinks=sinks, out=out)
                assert result is out
                assert_same_bits(out, cache.attend(query, np.ones((1, 20), bool), sinks=sinks))
                before = query.copy(), snapshot(cache._store.pages)
                for bad in (query, query[:1], out.astype(np.float64), sinks, [1]):
                    with pytest.raises((TypeError, ValueError), match="out "):
                        cache.attend(query, sinks=sinks, out=bad)
                assert_same_bits(query, before[0])
                assert snapshot(cache._store.pages) == before[1]
            assert len(cache._places.readers) == 1
        memory = cache._store.pages.key_scales.swapaxes(1, 2).view(np.float16)
        inside = np.lib.stride_tricks.as_strided(memory, query.shape, (8, 8, 8, 2))
        for _ in range(4):
            cache.attend(query)
        with pytest.raises(ValueError, match="out shares memory"):
            cache.attend(query, out=inside)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_copies_are_caches_of_their_own(self, backend, copied, rng):
        for storage in ("float32", "int8"):
            cache, *_ = filled(storage, [20, 9], backend, window=12)
            token, query = normal(rng, (2, 2, 1, 32)), normal(rng, (2, 4, 1, 32))
            for _ in range(4):
                cache.append(token, token), cache.attend(query)
            other = copied(cache)
            expected = cache.attend(query)
            np.testing.assert_array_equal(other.attend(query), expected)
            for _ in range(4):
                other.append(token + 1, token), other.attend(query)
            np.testing.assert_array_equal(cache.attend(query), expected)
            for _ in range(4):
                cache.append(token + 1, token)
            np.testing.assert_array_equal(cache.attend(query), other.attend(query))

    def test_results_do_not_share_memory(self, backend, rng):
        cache, *_ = filled("float32", [20, 9], backend)
        query = normal(rng, (2, 4, 1, 32))
        results = [cache.attend(query) for _ in range(4)]
        assert not np.shares_memory(results[2], results[3])

    def test_half_queries_of_quantised_caches(self, backend, rng):
        for storage in ("int8", "int4"):
            _, key, value = filled(storage, [20, 9], backend)
            for dtype in (np.float16, bfloat16):
                halves = KVCache(2, 2, 20, 32, storage, backend=backend)
                halves.append(key.astype(dtype), value.astype(dtype), [20, 9])
                whole = KVCache(2, 2, 20, 32, storage, backend=backend)
                whole.append(*(x.astype(dtype).astype(np.float32) for x in (key, value)), [20, 9])
                query = normal(rng, (2, 4, 1, 32), dtype)
                for _ in range(4):
                    got = halves.attend(query)
                    assert_same_bits(got, whole.attend(query.astype(np.float32)).astype(dtype))

    def test_who_has_another_backend(self, rng):
        cache, *_ = filled("float32", [20, 9], "reference")
        query = normal(rng, (2, 4, 1, 32))
        np.testing.assert_array_equal(cache.attend(query), cache.attend(query, backend="reference"))
        np.testing.assert_allclose(
            cache.attend(query, backend="cpu"), cache.attend(query), rtol=1e-5, atol=1e-6
        )

    def test_eight_threads_at_once(self, rng):
        cache, *_ = filled("float32", [700, 9], None)
        queries = [normal(rng, (2, 4, 1, 32)) for _ in range(8)]
        expected = [cache.attend(query) for query in queries]
        wrong = []

        def work(i):
            for _ in range(200):
                if not np.array_equal(cache.attend(queries[i]), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not wrong

    @pytest.mark.parametrize("queries", [3, 20], ids=["few", "tiled"])
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_threads_with_other_lengths(self, backend, queries, rng, monkeypatch):
        """A thread comes in with other `lengths` when another's call has been checked."""
        cache, *_ = filled("float32", [700, 9], backend)
        query = normal(rng, (2, 8, queries, 32))
        for lengths in ([1, 3], [1, 3], [3, 0]):
            expected = cache.attend(query, lengths=lengths)
        reader = next(iter(cache._places.readers.values())).__self__
        forward = reader.forward

        def late(*args, **options):
            monkeypatch.setattr(reader, "forward", forward)
            cache.attend(query, lengths=[1, 3])
            forward(*args, **options)

        monkeypatch.setattr(reader, "forward", late)
        assert_same_bits(cache.attend(query, lengths=[3, 0]), expected)
        assert reader.forward is forward

    @pytest.mark.parametrize("storage", ["float32", "int8"])
    def test_memory_goes_with_the_cache(self, storage, rng):
        """It does not wait for the garbage collector, however often the cache was read."""
        cache, *_ = filled(storage, [20, 9], None, rotary_base=100.0)
        query = normal(rng, (2, 4, 1, 32))
        for _ in range(4):
            cache.attend(query), cache.attend(query, lengths=[1, 0])
        held = [weakref.ref(x) for x in (cache._store.pages.key, cache._store.pages.value)]
        gc.disable()
        try:
            del cache
            assert [x() for x in held] == [None, None]
        finally:
            gc.enable()


class TestStorage:
    @pytest.mark.parametrize(("storage", "bound"), [("int8", 1 / 254), ("int4", 1 / 8)])
    def test_stated_error(self, backend, storage, bound, rng):
        """A value that is attended alone comes back as it is stored."""
        cache = KVCache(1, 1, 64, 32, storage, backend=backend)
        value = normal(rng, (1, 1, 64, 32)) * np.exp(3 * normal(rng, (1, 1, 64, 1)))
        cache.append(value, value)
        got = np.stack([
            cache.attend(np.zeros((1, 1, 1, 32), np.float32), np.arange(64) == j)[0, 0, 0] for j in range(64)
        ])  # fmt: skip
        np.testing.assert_allclose(got, stored(value, storage)[0, 0], rtol=1e-6)
        error = np.abs(got - value[0, 0]) / np.abs(value[0, 0]).max(axis=-1, keepdims=True)
        assert error.max() <= bound * (1 + 1e-5)
        if storage == "int4":
            assert np.mean(error < 1 / 16) > 0.98

    def test_dtypes_by_name_and_by_type(self):
        for name, dtype in DTYPES.items():
            for given in (name, dtype, np.dtype(dtype)):
                assert KVCache(1, 1, 4, 8, given)._store.pages.key.dtype == dtype
        for given, name in (("f4", "float32"), ("<f2", "float16"), ("d", "float64"), (float, "float64")):
            assert KVCache(1, 1, 4, 8, given).dtype == name
        assert KVCache(1, 1, 4, 8, np.int8)._store.pages.storage == "int8"

    def test_memory_is_its_arrays(self, rng):
        """Full at 32k positions, a cache of 64 MB takes no more for itself than a few kilobytes."""
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            cache = KVCache(1, 2, 32768, 64, "float32")
            memory = sum(x.nbytes for x in cache._store.pages[:2])
            assert memory == 2 * 2 * 32768 * 64 * 4
            new = normal(rng, (1, 2, 1, 64))
            chunk = np.broadcast_to(new, (1, 2, 8191, 64))
            query = normal(rng, (1, 8, 1, 64))
            for _ in range(4):
                cache.append(chunk, chunk)
                for _ in range(3):
                    cache.attend(query)
                cache.append(new, new)
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0] - before
            cache.attend(query)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert (cache.lengths == 32768).all()
        finally:
            tracemalloc.stop()
        assert held - memory < 1 << 20
        assert peak - held < 1 << 19

    def test_what_it_says_of_itself(self):
        cache = KVCache(3, 2, 10, 32, "int4", window=6)
        assert repr(cache) == "KVCache(batch=3, capacity=10, window=6, int4)"
        assert repr(KVCache(3, 2, 10, 8)) == "KVCache(batch=3, capacity=10, float32)"
        assert (cache.batch, cache.capacity, cache.window, cache.dtype) == (3, 10, 6, "int4")
        assert cache.nbytes == 3 * 2 * 10 * 2 * (16 + 4)
        with pytest.raises(AttributeError):
            cache.capacity = 20


class TestRotary:
    @pytest.mark.parametrize("rotary", [LLAMA, GPTJ, {"base": 5e5, "width": 4}])
    @storages
    def test_stored_keys(self, backend, storage, rotary, rng):
        """What lies in the cache is the key, turned by its position and rounded once."""
        options = {f"rotary_{'dim' if name == 'width' else name}": x for name, x in rotary.items()}
        head_dim = 32 if storage == "int4" else 12
        cache = KVCache(1, 2, 300, head_dim, storage, backend=backend, **options)
        line = Line(2, head_dim, head_dim, storage, rotary)
        for tokens in (1, 250, 2):
            key, value = (normal(rng, (1, 2, tokens, head_dim), input_dtype(storage)) for _ in range(2))
            cache.append(key, value)
            line.append(key[0], value[0])
        if storage in DTYPES:
            got = cache._store.pages.key[0].swapaxes(0, 1)[:, :253]
            eps = {"float64": 2.0**-50, "float32": 2.0**-21, "float16": 2.0**-9, "bfloat16": 2.0**-6}[storage]
            np.testing.assert_allclose(
                got.astype(np.float64), line.key.astype(np.float64), atol=eps, rtol=eps
            )
        query = normal(rng, (1, 4, 2, head_dim), input_dtype(storage))
        got = cache.attend(query)[0]
        if storage in ("float32", "float64"):
            line.hold(got, None, query[0], ulp=40)
        else:
            plain = Line(2, head_dim, head_dim, "float64", rotary)
            plain.key, plain.value = line.key.astype(np.float64), line.value.astype(np.float64)
            assert np.isfinite(got).all()

    def test_far_positions(self, backend, rng):
        """A ring's stream may be long: what counts is the distance, not the position."""
        near, far = (
            KVCache(1, 1, 8, 16, "float64", window=8, rotary_base=1e4, backend=backend) for _ in range(2)
        )
        tokens = normal(rng, (1, 1, 20, 16), np.float64)
        far._places.lengths[:] = 10**7
        far._places.starts[:] = 10**7
        for i in range(20):
            token, query = tokens[:, :, i : i + 1], tokens[:, :, 19 - i : 20 - i]
            for cache in (near, far):
                cache.append(token, token)
            if i >= 7:
                np.testing.assert_allclose(far.attend(query), near.attend(query), atol=1e-7)
        assert (far.lengths == 10**7 + 20).all()


class TestRing:
    def test_memory_does_not_grow(self, backend, rng):
        cache = KVCache(2, 1, 10, 8, window=10, backend=backend)
        line = Line(1, 8, 8, "float32")
        for _ in range(100):
            token = normal(rng, (2, 1, 1, 8))
            cache.append(token, token)
            line.append(token[0], token[0])
            query = normal(rng, (2, 2, 1, 8))
            line.hold(cache.attend(query)[0], None, query[0], window_size=(9, None))
        assert cache._store.pages.key.shape[1] == 10
        assert (cache.lengths == 100).all()

    def test_a_long_stream_is_no_more_work(self, rng, monkeypatch):
        """What a repeated call tells the kernel of its keys is what the ring holds, not the stream."""
        from nbattn.cpu import decode

        seen = []
        for name in ("forward", "again"):
            method = getattr(decode.Plan, name)
            spy = partial(lambda method, *a, **o: seen.append(a[-1]) or method(*a, **o), method)
            monkeypatch.setattr(decode.Plan, name, partialmethod(spy))
        cache = KVCache(1, 1, 60, 8, window=10)
        for _ in range(40):
            new = normal(rng, (1, 1, 50, 8))
            cache.append(new, new)
            cache.attend(new[:, :, :1], is_causal=False, return_lse=True)
            cache.attend(new[:, :, :1], is_causal=False)
        keys = [x for x in seen if isinstance(x, int)]
        assert len(keys) == 38 + (1 if arrays.KNOWN else 38 + 1)
        assert set(keys) == {60, 64}

    def test_alibi_of_a_long_stream(self, backend, rng):
        """Distances are exact where positions are no float32 numbers any more."""
        cache = KVCache(1, 1, 16, 1, window=8, backend=backend)
        many = np.broadcast_to(np.float32(0), (1, 1, 2**25, 1))
        cache.append(many, many)
        line = Line(1, 1, 1, "float32")
        for _ in range(9):
            key, value, query = normal(rng, (3, 1, 1, 1, 1))
            cache.append(key, value)
            line.append(key[0], value[0])
        slopes = np.ones(1, np.float32)
        got = cache.attend(query, alibi_slopes=slopes, return_lse=True)
        line.hold(got.output[0], got.lse[0], query[0], window_size=(7, None), alibi_slopes=slopes)

    def test_window_counts_the_query_s_own_position(self, backend):
        cache = KVCache(1, 1, 4, 1, window=3, backend=backend)
        x = np.arange(6, dtype=np.float32).reshape(1, 1, 6, 1)
        cache.append(x, x)
        assert cache.attend(np.zeros((1, 1, 1, 1), np.float32)).item() == 4  # of 3, 4 and 5
        np.testing.assert_array_equal(cache.attend(np.zeros((1, 1, 2, 1), np.float32)).ravel(), [3, 4])
        with pytest.raises(ValueError, match=r"sees from position 1 on, but the ring holds them from 2 on"):
            cache.attend(np.zeros((1, 1, 3, 1), np.float32))

    @pytest.mark.parametrize("queries", [1, 3])
    def test_calls_that_repeat_are_held_to_the_ring_too(self, backend, queries, rng):
        """Three queries see more than the ring has from its first lap on; one does once it went back."""
        cache = KVCache(1, 1, 8, 4, window=7, backend=backend)
        x, query = normal(rng, (1, 1, 1, 4)), normal(rng, (1, 1, queries, 4))
        for _ in range(8):
            cache.append(x, x)
            cache.attend(query)
        for _ in range(2):
            cache.append(x, x)
        if queries == 1:
            cache.attend(query)
            cache.truncate(9)
            cache.attend(query)
            cache.append(np.repeat(x, 6, axis=2), np.repeat(x, 6, axis=2))  # holds 7 to 14
            cache.truncate(13)  # where the next position sees 7, and the last one 6
        with pytest.raises(ValueError, match="but the ring holds them from"):
            cache.attend(query)

    @native
    def test_what_native_appends_overwrite(self, rng):
        """Several tokens at once, and after it went back."""
        cache, line = KVCache(2, 1, 10, 4, window=6), Line(1, 4, 4, "float32")

        def append():
            new = normal(rng, (1, 1, 2, 4)).repeat(2, axis=0)
            cache.append(new, new)
            line.append(new[0], new[0])

        def check(held):
            """Of how many queries it holds all that they see."""
            query = normal(rng, (2, 2, held, 4))
            line.hold(cache.attend(query)[1], None, query[1], window_size=(5, None))
            with pytest.raises(ValueError, match="but the ring holds them from"):
                cache.attend(normal(rng, (2, 2, held + 1, 4)))

        for _ in range(15):
            append()
        assert cache._places.rewrite is not None
        check(5)
        cache.truncate(25), line.truncate(25)
        append()  # 27, of which 20 to 24 are older
        check(2)
        append(), append(), append()
        check(5)

    def test_truncate_back_to_what_it_holds(self, backend, rng):
        cache = KVCache(1, 1, 10, 4, window=6, backend=backend)
        x = normal(rng, (1, 1, 30, 4))
        cache.append(x, x)  # holds 20 to 29
        before = snapshot(cache._store.pages)
        with pytest.raises(ValueError, match=r"lengths\[0\] is 24; but the ring holds positions from 20 on"):
            cache.truncate(24)  # the next position, 24, sees 19
        assert cache.lengths == 30
        assert snapshot(cache._store.pages) == before
        cache.truncate(25)
        cache.append(x[:, :, :1], x[:, :, :1])
        query = normal(rng, (1, 1, 1, 4))
        line = Line(1, 4, 4, "float32")
        line.append(x[0, :, :25], x[0, :, :25]), line.append(x[0, :, :1], x[0, :, :1])
        line.hold(cache.attend(query)[0], None, query[0], window_size=(5, None))
        cache.truncate(0)
        cache.append(x[:, :, :3], x[:, :, :3])
        cache.truncate(1)
        assert cache.lengths == 1


def rows(batch=2, heads=2, tokens=1, dim=8, dtype=np.float32):
    return np.ones((batch, heads, tokens, dim), dtype)


BAD_NEW = {
    "other batch": (
        (rows(3), rows(3)),
        {},
        ValueError,
        r"key has shape \(3, 2, 1, 8\); expected \(2, 2, new",
    ),
    "other heads": ((rows(heads=1), rows()), {}, ValueError, r"key has shape \(2, 1, 1, 8\)"),
    "other head_dim": (
        (rows(), rows(dim=7)),
        {},
        ValueError,
        r"value has shape \(2, 2, 1, 7\); expected .* 8\)",
    ),
    "dimensions": ((rows()[0], rows()), {}, ValueError, r"key has shape \(2, 1, 8\)"),
    "token counts": ((rows(tokens=2), rows()), {}, ValueError, "key has 2 positions but value has 1"),
    "dtype": ((rows(dtype=np.float64), rows()), {}, TypeError, "key has dtype float64 but the cache float32"),
    "integers": ((rows(dtype=int), rows()), {}, TypeError, "key has dtype int64"),
    "too many": (
        (rows(tokens=9), rows(tokens=9)),
        {},
        ValueError,
        "sequence 0 holds 3 of 10 positions; 9 more",
    ),
    "one too many": (
        (rows(tokens=8), rows(tokens=8)),
        {"lengths": [1, 8]},
        ValueError,
        "sequence 1 holds 3 of 10 positions; 8",
    ),
    "lengths": ((rows(), rows()), {"lengths": [1, 2]}, ValueError, r"lengths\[1\] is 2; expected 0 to 1"),
    "negative lengths": ((rows(), rows()), {"lengths": [-1, 1]}, ValueError, r"lengths\[0\] is -1"),
    "lengths of others": ((rows(), rows()), {"lengths": [1]}, ValueError, r"lengths has shape \(1,\)"),
    "float lengths": ((rows(), rows()), {"lengths": [1.0, 1.0]}, TypeError, "lengths must hold integers"),
}


@pytest.mark.parametrize("case", BAD_NEW)
def test_bad_append(backend, case):
    arrays, options, kind, message = BAD_NEW[case]
    cache = KVCache(2, 2, 10, 8, backend=backend)
    for _ in range(3):
        cache.append(rows(), rows())
    before = snapshot(cache._store.pages)
    with pytest.raises(kind, match=message):
        cache.append(*arrays, **options)
    assert snapshot(cache._store.pages) == before
    np.testing.assert_array_equal(cache.lengths, [3, 3])


BAD_CALLS = {
    "other batch": (lambda c: c.attend(rows(3)), ValueError, "query has batch size 3; expected 2"),
    "head_dim": (lambda c: c.attend(rows(dim=7)), ValueError, "query has head_dim 7 but the keys have 8"),
    "heads": (lambda c: c.attend(rows(heads=3)), ValueError, "query has 3 heads and the keys have 2"),
    "dtype": (
        lambda c: c.attend(rows(dtype=np.float16)),
        TypeError,
        "query has dtype float16 but the keys have",
    ),
    "mask": (
        lambda c: c.attend(rows(), np.ones((1, 9), bool)),
        ValueError,
        r"mask has shape .*\(2, 2, 1, 3\)",
    ),
    "counts": (lambda c: c.attend(rows(), lengths=[2, 0]), ValueError, r"lengths\[0\] is 2; expected 0 to 1"),
    "out": (lambda c: c.attend(rows(), out=rows(3)), ValueError, r"out has shape \(3, 2, 1, 8\)"),
    "out in the cache": (
        lambda c: c.attend(rows(), out=c._store.pages.key[:, :1].swapaxes(1, 2)),
        ValueError,
        "out shares memory",
    ),
    "backend": (lambda c: c.attend(rows(), backend="tpu"), ValueError, "backend is 'tpu'"),
    "longer": (lambda c: c.truncate(4), ValueError, r"lengths\[0\] is 4; expected 0 to 3"),
    "one longer": (lambda c: c.truncate([3, 4]), ValueError, r"lengths\[1\] is 4; expected 0 to 3"),
    "negative": (lambda c: c.truncate(-1), ValueError, r"lengths\[0\] is -1"),
    "float length": (lambda c: c.truncate(1.0), TypeError, "lengths must be an integer"),
    "bool length": (lambda c: c.truncate(True), TypeError, "lengths must be an integer"),
    "lengths of others": (lambda c: c.truncate([1]), ValueError, r"lengths has shape \(1,\)"),
    "no such sequence": (lambda c: c.reset(2), ValueError, "sequence is 2; expected 0 to 1"),
    "last sequence": (lambda c: c.reset(-1), ValueError, "sequence is -1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(backend, case):
    call, kind, message = BAD_CALLS[case]
    cache = KVCache(2, 2, 10, 8, backend=backend)
    for _ in range(3):
        cache.append(rows(), rows())
        cache.attend(rows())
    before = snapshot(cache._store.pages)
    with pytest.raises(kind, match=message):
        call(cache)
    assert snapshot(cache._store.pages) == before
    np.testing.assert_array_equal(cache.lengths, [3, 3])


SIZES = {"batch": 2, "kv_heads": 2, "capacity": 10, "head_dim": 32}
BAD_CACHES = {
    "batch": ({"batch": -1}, ValueError, "batch is -1; expected at least 0"),
    "capacity": ({"capacity": 0}, ValueError, "capacity is 0; expected at least 1"),
    "head_dim": ({"head_dim": 0}, ValueError, "head_dim is 0"),
    "value_dim": ({"value_dim": 0}, ValueError, "value_dim is 0"),
    "heads": ({"kv_heads": 1.0}, TypeError, "kv_heads must be an integer, got float"),
    "dtype": ({"dtype": "int16"}, ValueError, "dtype is int16; expected float32, float64"),
    "dtype type": ({"dtype": np.int32}, ValueError, "dtype is int32"),
    "no dtype": ({"dtype": None}, ValueError, "dtype is None; expected float32"),
    "unknown dtype": ({"dtype": "half precision"}, ValueError, "dtype is half precision; expected float32"),
    "4 bits": (
        {"dtype": "int4", "head_dim": 40},
        ValueError,
        "head_dim is 40; an int4 cache needs a multiple of 32",
    ),
    "4 bits of values": ({"dtype": "int4", "value_dim": 8}, ValueError, "value_dim is 8; an int4"),
    "window": ({"window": 11}, ValueError, "window is 11 but capacity 10"),
    "no window": ({"window": 0}, ValueError, "window is 0; expected at least 1"),
    "base": ({"rotary_base": 0}, ValueError, "rotary_base must be positive, got 0"),
    "base type": ({"rotary_base": "1e4"}, TypeError, "rotary_base must be a number"),
    "odd": ({"rotary_base": 1e4, "rotary_dim": 3}, ValueError, "rotary_dim is 3; expected an even number"),
    "wide": (
        {"rotary_base": 1e4, "rotary_dim": 34},
        ValueError,
        "rotary_dim is 34; .* from 2 to head_dim 32",
    ),
    "odd head_dim": ({"rotary_base": 1e4, "head_dim": 9}, ValueError, "rotary_dim is 9"),
    "no base": ({"rotary_dim": 4}, ValueError, "need a rotary_base"),
    "flag": (
        {"rotary_base": 1e4, "rotary_interleaved": 1},
        TypeError,
        "rotary_interleaved must be True or False",
    ),
    "backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches(case):
    changed, kind, message = BAD_CACHES[case]
    with pytest.raises(kind, match=message):
        KVCache(**{"backend": "reference", **SIZES, **changed})


def test_no_sequences(backend):
    cache = KVCache(0, 2, 10, 8, backend=backend)
    cache.append(rows(0), rows(0))
    assert cache.attend(rows(0)).shape == (0, 2, 1, 8)
    assert cache.attend(rows(0), bias=np.zeros((0, 2, 1, 0), np.float32)).shape == (0, 2, 1, 8)
    cache.truncate(0), cache.reset()
    assert cache.lengths.shape == (0,)
