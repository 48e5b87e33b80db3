"""Cascade attention is attention over the prefix and the rest in one piece."""

import numpy as np
import pytest
from cached import Line, input_dtype
from oracle import DTYPES, hold, inputs, normal

from nbattn import KVCache, PagedKVCache, cascade_attention

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
OPTIONS = {
    "plain": {},
    "not causal": {"is_causal": False},
    "lengths": {"key_lengths": [20, 0, 7]},
    "offsets": {"query_offset": [0, 5, 17]},
    "before the suffix": {"query_offset": -9},
    "far before and apart": {"query_offset": [-40, -1, -14]},
    "window into the prefix": {"window_size": (25, None), "key_lengths": [20, 3, 3]},
    "window within the suffix": {"window_size": (4, None)},
    "window without causal": {"window_size": (9, 3), "is_causal": False, "query_offset": [0, -20, 3]},
    "alibi": {"alibi_slopes": [0.3, 0.1, 0.0, -0.1], "key_lengths": [20, 3, 3]},
    "sinks and softcap": {"sinks": [0.0, 4.0, -np.inf, 1.0], "softcap": 2.0, "scale": 0.7},
}


def check(got, q, prefix, rest, mask=None, bias=None, *, key_lengths=None, query_offset="end", **options):
    """Hold to one attention over everything."""
    batch, size = len(q), prefix[0].shape[1]
    keys, values = (
        np.concatenate((np.broadcast_to(x, (batch, *x.shape)), y), axis=2)
        for x, y in zip(prefix, rest, strict=True)
    )
    if mask is not None:
        seen = np.ones((*mask.shape[:-1], size), bool)
        mask = np.concatenate((seen, mask), axis=-1)
    if bias is not None:
        bias = np.concatenate((np.zeros((*bias.shape[:-1], size)), bias), axis=-1)
    lengths = np.full(batch, rest[0].shape[2]) if key_lengths is None else np.array(key_lengths)
    offset = query_offset
    if not isinstance(query_offset, str):
        offset = size + np.broadcast_to(query_offset, batch)
    options = {
        "is_causal": True,
        "key_lengths": size + lengths,
        "query_offset": offset,
        "bias": bias,
        **options,
    }
    # Two parts that are rounded before they are merged.
    hold(got.output, got.lse, q, keys, values, mask, ulp=8, **options)


def parts(rng, dtype=np.float32, queries=3, prefix=30, keys=20, batch=3):
    q, k, v = inputs(rng, batch, 4, 2, queries, keys, 16, 9, dtype)
    return q, (normal(rng, (2, prefix, 16), dtype), normal(rng, (2, prefix, 9), dtype)), (k, v)


class TestArrays:
    @dtypes
    @pytest.mark.parametrize("name", OPTIONS)
    def test_options(self, backend, dtype, name, rng):
        for queries in (1, 3):
            q, prefix, rest = parts(rng, dtype, queries)
            got = cascade_attention(q, *prefix, *rest, return_lse=True, backend=backend, **OPTIONS[name])
            check(got, q, prefix, rest, **OPTIONS[name])

    def test_masks_are_for_the_rest(self, backend, rng):
        q, prefix, rest = parts(rng)
        mask, bias = rng.random((3, 1, 3, 20)) < 0.3, normal(rng, (4, 1, 20))
        got = cascade_attention(q, *prefix, *rest, mask, bias=bias, return_lse=True, backend=backend)
        check(got, q, prefix, rest, mask, bias)

    @pytest.mark.parametrize(
        "sizes", [(0, 20, 3, 3), (30, 0, 3, 3), (0, 0, 1, 2), (30, 20, 0, 3), (30, 20, 3, 0)]
    )
    def test_empty_parts(self, backend, sizes, rng):
        prefix, keys, queries, batch = sizes
        q, first, rest = parts(rng, np.float32, queries, prefix, keys, batch)
        got = cascade_attention(q, *first, *rest, return_lse=True, backend=backend)
        assert got.output.shape == (batch, 4, queries, 9)
        check(got, q, first, rest)

    def test_many_sequences(self, backend, rng):
        q, prefix, rest = parts(rng, batch=70, prefix=300, queries=1)
        lengths = rng.integers(0, 21, 70)
        got = cascade_attention(q, *prefix, *rest, key_lengths=lengths, return_lse=True, backend=backend)
        check(got, q, prefix, rest, key_lengths=lengths)

    def test_out_and_strides(self, backend, rng):
        q, prefix, rest = parts(rng)
        expected = cascade_attention(q, *prefix, *rest, backend=backend)
        turned = [np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2) for x in (q, *prefix, *rest)]
        out = np.full((3, 3, 4, 9), np.nan, np.float32).swapaxes(1, 2)
        assert cascade_attention(*turned, out=out, backend=backend) is out
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

    def test_nan_stays_where_it_is_seen(self, backend, rng):
        q, prefix, (k, v) = parts(rng)
        k[:, :, 7:], v[:, :, 7:] = np.nan, np.nan
        got = cascade_attention(q, *prefix, k, v, key_lengths=[7, 7, 20], backend=backend)
        np.testing.assert_array_equal(np.isfinite(got).all(axis=(1, 2, 3)), [True, True, False])


class TestCaches:
    @pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
    def test_contiguous(self, backend, storage, rng):
        dtype = input_dtype(storage)
        q, prefix, rest = parts(rng, dtype, queries=2)
        cache = KVCache(3, 2, 20, 16, storage, value_dim=9, backend=backend)
        lines = [Line(2, 16, 9, storage) for _ in range(3)]
        lengths = [20, 0, 7]
        cache.append(*rest, lengths)
        for b, n in enumerate(lengths):
            lines[b].append(*(x[b, :, :n] for x in rest))
        held = [np.zeros_like(x) for x in rest]
        for b, line in enumerate(lines):
            held[0][b, :, : len(line)], held[1][b, :, : len(line)] = line.key, line.value
        for options in ({}, {"window_size": (12, None)}, {"sinks": np.ones(4, np.float32)}):
            got = cascade_attention(q, *prefix, cache, return_lse=True, **options)
            check(got, q, prefix, held, key_lengths=lengths, **options)

    def test_paged(self, backend, rng):
        q, prefix, rest = parts(rng)
        cache = PagedKVCache(30, 4, 2, 16, value_dim=9, backend=backend)
        handles = [cache.add() for _ in range(3)]
        cache.append(handles, *rest, [20, 0, 7])
        got = cascade_attention(q[[2, 0]], *prefix, cache, [handles[2], handles[0]], return_lse=True)
        check(got, q[[2, 0]], prefix, [x[[2, 0]] for x in rest], key_lengths=[7, 20])

    def test_ring(self, backend, rng):
        q, prefix, rest = parts(rng, queries=1)
        cache = KVCache(3, 2, 20, 16, value_dim=9, window=12, backend=backend)
        cache.append(*rest, [20, 5, 7])
        got = cascade_attention(q, *prefix, cache, return_lse=True)
        check(got, q, prefix, rest, key_lengths=[20, 5, 7], window_size=(11, None))

    def test_rotary(self, backend, rng):
        """A prefix that is turned by its positions, and a cache that counts on from 0."""
        q, prefix, rest = parts(rng, queries=2)
        whole, part = (
            KVCache(3, 2, 60, 16, value_dim=9, rotary_base=100.0, backend=backend) for _ in range(2)
        )
        whole.append(*(np.broadcast_to(x, (3, *x.shape)) for x in prefix))
        turned = whole._store.pages.key[0, :30].swapaxes(0, 1).copy()
        whole.append(*rest), part.append(*rest)
        got = cascade_attention(q, turned, prefix[1], part)
        np.testing.assert_allclose(got, whole.attend(q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_walk(backend, seed):
    """Sequences that grow and shrink behind one prefix."""
    rng = np.random.default_rng(seed)
    prefix = normal(rng, (2, 40, 16)), normal(rng, (2, 40, 9))
    cache = KVCache(3, 2, 30, 16, value_dim=9, backend=backend)
    lines = [Line(2, 16, 9, "float32") for _ in range(3)]
    for line in lines:
        line.append(*prefix)
    for _ in range(40):
        if rng.random() < 0.7 and (cache.lengths < 26).all():
            counts = rng.integers(0, 5, 3)
            new = normal(rng, (3, 2, 4, 16)), normal(rng, (3, 2, 4, 9))
            cache.append(*new, counts)
            for b, n in enumerate(counts):
                lines[b].append(*(x[b, :, :n] for x in new))
        else:
            lengths = np.maximum(cache.lengths - rng.integers(0, 9, 3), 0)
            cache.truncate(lengths)
            for b, n in enumerate(lengths):
                lines[b].truncate(40 + n)
        q = normal(rng, (3, 4, int(rng.integers(1, 4)), 16))
        options = {"window_size": (int(rng.integers(1, 50)), None)} if rng.random() < 0.3 else {}
        got = cascade_attention(q, *prefix, cache, return_lse=True, **options)
        for b in range(3):
            lines[b].hold(got.output[b], got.lse[b], q[b], ulp=8, **options)


SIZES = {
    "query": (2, 4, 3, 8),
    "prefix_key": (2, 5, 8),
    "prefix_value": (2, 5, 6),
    "key": (2, 2, 7, 8),
    "value": (2, 2, 7, 6),
}
GOOD = {name: np.zeros(shape, np.float32) for name, shape in SIZES.items()}
BAD = {
    "prefix with a batch": (
        {"prefix_key": GOOD["key"]},
        ValueError,
        r"prefix_key has shape \(2, 2, 7, 8\); expected",
    ),
    "prefix head_dim": (
        {"prefix_key": np.zeros((2, 5, 7), np.float32)},
        ValueError,
        r"expected \(heads, P, 8\)",
    ),
    "prefix heads": ({"prefix_key": np.zeros((3, 5, 8), np.float32)}, ValueError, "heads that divide 4"),
    "other key heads": (
        {"prefix_key": np.zeros((4, 5, 8), np.float32), "prefix_value": np.zeros((4, 5, 6), np.float32)},
        ValueError,
        "prefix_key has 4 heads but key has 2; both must match",
    ),
    "other key heads than a cache": (
        {"key": KVCache(2, 1, 7, 8, value_dim=6, backend="reference"), "value": None},
        ValueError,
        "prefix_key has 2 heads but key has 1",
    ),
    "prefix lengths": (
        {"prefix_value": np.zeros((2, 4, 6), np.float32)},
        ValueError,
        r"prefix_value has shape .* \(2, 5,",
    ),
    "value dims": (
        {"value": np.zeros((2, 2, 7, 5), np.float32)},
        ValueError,
        "prefix_value has head_dim 6 but value has 5",
    ),
    "dtypes": ({"prefix_key": np.zeros((2, 5, 8))}, TypeError, "all three must share one"),
    "suffix dtypes": ({"key": np.zeros((2, 2, 7, 8))}, TypeError, "all three must share one"),
    "dimensions": ({"query": np.zeros((4, 3, 8), np.float32)}, ValueError, r"query has shape \(4, 3, 8\)"),
    "lengths": ({"key_lengths": [8, 0]}, ValueError, r"key_lengths\[0\] is 8"),
    "mask": ({"mask": np.ones((3, 12), bool)}, ValueError, "mask has shape"),
    "flag": ({"return_lse": 1}, TypeError, "return_lse must be"),
    "cache and value": (
        {"key": KVCache(2, 2, 7, 8, value_dim=6, backend="reference")},
        ValueError,
        "value must be None",
    ),
    "pages and no sequences": (
        {"key": PagedKVCache(2, 7, 2, 8, value_dim=6, backend="reference"), "value": None},
        ValueError,
        "value is missing; it must be the sequences",
    ),
    "cache and lengths": (
        {"key": KVCache(2, 2, 7, 8, value_dim=6, backend="reference"), "value": None, "key_lengths": [1, 1]},
        ValueError,
        "query_offset and key_lengths are for arrays",
    ),
    "cache of others": (
        {"key": KVCache(3, 2, 7, 8, value_dim=6, backend="reference"), "value": None},
        ValueError,
        "batch size 2; expected 3",
    ),
    "backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case):
    changed, kind, message = BAD[case]
    out = np.full((2, 4, 3, 6), 7, np.float32)
    with pytest.raises(kind, match=message):
        cascade_attention(**{"out": out, "backend": "reference", **GOOD, **changed})
    assert (out == 7).all()


@pytest.mark.parametrize("name", GOOD)
def test_out_overlaps(name):
    memory = np.zeros(400, np.float32)
    array = memory[: GOOD[name].size].reshape(GOOD[name].shape)
    with pytest.raises(ValueError, match="out shares memory"):
        cascade_attention(**GOOD | {name: array}, out=memory[:144].reshape(2, 4, 3, 6), backend="reference")


def test_out_in_the_cache():
    cache = KVCache(2, 2, 7, 8, value_dim=6, backend="reference")
    cache.append(GOOD["key"], GOOD["value"])
    out = np.lib.stride_tricks.as_strided(cache._store.pages.value, (2, 4, 3, 6), (288, 72, 24, 4))
    call = {name: GOOD[name] for name in ("query", "prefix_key", "prefix_value")}
    with pytest.raises(ValueError, match="out shares memory"):
        cascade_attention(**call, key=cache, out=out)
