"""Which kernel takes a call without a cache, and that nobody can tell from the results."""

import numpy as np
import pytest
from ml_dtypes import bfloat16
from oracle import DTYPES, assert_same_bits, check, inputs, normal

from nbattn import PagedKVCache, scaled_dot_product_attention, varlen_attention
from nbattn.cpu import attention, decode

SHAPES = [(1, 1), (1, 16), (1, 33), (4, 1), (4, 8), (4, 9), (8, 1), (8, 4), (8, 5)]


@pytest.fixture
def taken(monkeypatch):
    """Names of the kernels that calls run on, as they come."""
    names = []
    for module in (attention, decode):
        real = module.kernel
        monkeypatch.setattr(module, "kernel", lambda name, real=real: names.append(name) or real(name))
    return names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "queries"), SHAPES)
def test_both_sides_of_the_crossover(dtype, group, queries, rng):
    x = inputs(rng, 1, 2 * group, 2, queries, 600, 32, dtype=dtype)
    check("cpu", *x, is_causal=True, query_offset="end", window_size=(530, None), ulp=6)
    check("cpu", *x, key_lengths=[577], sinks=np.ones(2 * group), ulp=6)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("last", [1, 17, 129, 250])
def test_chunks_of_every_length_follow_each_other(dtype, group, last, rng):
    """A thread finds the next chunk's keys before it reads a chunk: neither may come into the other's way."""
    check("cpu", *inputs(rng, 6, 4 * group, 4, 1, decode.CHUNK + last, 32, dtype=dtype), ulp=6)


def test_few_queries_are_read_off_and_many_tiled(taken, rng):
    for queries, kernel in ((1, "decode-float32"), (5, "decode-float32"), (64, "attention-float32")):
        x = inputs(rng, 1, 4, 1, queries, 300, 32)
        scaled_dot_product_attention(*x)
        varlen_attention(*(a[0].swapaxes(0, 1) for a in x), [0, queries], [0, 300])
        assert set(taken) == {kernel}
        taken.clear()
    scaled_dot_product_attention(*inputs(rng, 1, 4, 1, 1, 300, 32), return_weights=True)
    scaled_dot_product_attention(*inputs(rng, 1, 4, 1, 1, 300, 32), compute_dtype="bfloat16")
    assert set(taken) == {"attention-float32", "attention-float32-bfloat16"}


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_a_packed_sequence_goes_its_own_way(dtype, taken, rng):
    """Decoding steps beside parts of prompts: each has the bits that it has alone."""
    counts, lengths = [1, 70, 0, 1, 4, 90, 1, 0], [300, 90, 5, 0, 530, 120, 1, 0]
    starts, key_starts = (np.concatenate(([0], np.cumsum(n))) for n in (counts, lengths))
    query = normal(rng, (starts[-1], 4, 32), dtype)
    key, value = (normal(rng, (key_starts[-1], 2, 32), dtype) for _ in range(2))
    options = {"is_causal": True, "query_offset": "end", "return_lse": True}
    options["alibi_slopes"] = np.linspace(0.1, 0.4, 4)
    together = varlen_attention(query, key, value, starts, key_starts, **options)
    name = np.dtype(dtype).name
    assert set(taken) == {f"decode-{name}", f"attention-{name}"}
    for b in range(len(counts)):
        rows, keys = slice(*starts[b : b + 2]), slice(*key_starts[b : b + 2])
        alone = varlen_attention(
            query[rows], key[keys], value[keys], [0, counts[b]], [0, lengths[b]], **options
        )
        assert_same_bits(alone.output, together.output[rows])
        assert_same_bits(alone.lse, together.lse[rows])
        dense = scaled_dot_product_attention(
            *(x.swapaxes(0, 1)[None] for x in (query[rows], key[keys], value[keys])), **options
        )
        assert_same_bits(dense.output[0].swapaxes(0, 1).copy(), alone.output)


def test_few_queries_with_masks_of_every_kind(rng):
    x = inputs(rng, 2, 4, 2, 2, 600, 40, 24)
    bias = normal(rng, (1, 4, 2, 600))
    bias[..., 7:90] = -np.inf
    for dtype in (bool, np.int16, np.int32, np.int64):
        check("cpu", *x, rng.integers(0, 2, (2, 1, 2, 600)).astype(dtype))
    for dtype in DTYPES:
        check("cpu", *x, bias=bias.astype(dtype), softcap=5.0, alibi_slopes=np.ones(4))


def test_a_late_helper_leaves_memory_alone(rng, monkeypatch):
    """Helpers that find no task left must not write where another call works by then."""
    from nbattn.cpu import runtime

    few, many = inputs(rng, 1, 8, 2, 2, 4000, 32), inputs(rng, 1, 4, 4, 300, 300, 32)
    expected = scaled_dot_product_attention(*many)
    monkeypatch.setattr(runtime, "threads", lambda: 4)
    for _ in range(30):
        scaled_dot_product_attention(*few)
        assert_same_bits(scaled_dot_product_attention(*many), expected)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 1e-2), ("int8", 1e-2), ("int4", 4e-2)]
)
def test_prompts_over_pages_are_read_off_in_parts(dtype, bound, taken, rng, monkeypatch):
    """More rows than one call of the kernel takes, over keys that are no array."""
    monkeypatch.setattr(decode, "MOST_ROWS", 100)
    cache = PagedKVCache(40, 16, 2, 32, dtype)
    sequences = [cache.add(), cache.add()]
    given = np.float32 if dtype in ("int8", "int4") else dtype
    query = normal(rng, (2, 8, 60, 32), given)
    for count in (60, 60, 51):
        cache.append(sequences, *(normal(rng, (2, 2, count, 32), given) for _ in range(2)))
        options = {"window_size": (130, None), "sinks": np.linspace(-1, 1, 8), "return_lse": True}
        some = query[:, :, -count:]
        results = cache.attend(sequences, some, **options)
        expected = cache.attend(sequences, some, backend="reference", **options)
        for x, y in ((results.output, expected.output), (results.lse, expected.lse)):
            np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=bound, atol=bound)
    assert set(taken) == {f"decode-{dtype}"}
    alike = cache.attend(sequences, query), cache.attend(sequences, query, out=np.empty_like(query))
    assert_same_bits(*alike)
    last = cache.attend(sequences, query[:, :, 30:])
    np.testing.assert_allclose(last.astype(float), alike[0][:, :, 30:].astype(float), rtol=bound, atol=bound)
