"""Many float32 queries, which AMX multiplies as sums of three bfloat16: nothing may show of that."""

import numba
import numpy as np
import pytest
from oracle import assert_same_bits, check, formula, hold, inputs, normal

from nbattn import scaled_dot_product_attention, varlen_attention

ROWS = 70
GROUP = 4
"""Heads that share keys: 280 rows, from 256 on they are multiplied so."""


def many(rng, keys=200, head_dim=24, value_dim=20, batch=1, kv_heads=1, queries=ROWS):
    return inputs(rng, batch, kv_heads * GROUP, kv_heads, queries, keys, head_dim, value_dim)


def test_all_24_bits_of_a_value(rng):
    """A weight of 1 gives the value itself."""
    keys = 160
    v = normal(rng, (1, 1, keys, 33)) * np.float32(2) ** rng.integers(-45, 40, (1, 1, keys, 33)).astype(
        np.float32
    )
    chosen = rng.integers(0, keys, 300)
    k = np.eye(keys, dtype=np.float32)[None, None] * 100
    got = scaled_dot_product_attention(k[:, :, chosen], k, v, scale=1.0)
    np.testing.assert_array_equal(got, v[:, :, chosen])


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_no_worse_than_the_formula(scale, rng):
    q, k, v = inputs(rng, 1, 2, 2, 300, 700, 64)
    exact, plain = (formula(q, k, v, compute=t, scale=scale) for t in (np.float64, np.float32))
    got = scaled_dot_product_attention(q, k, v, scale=scale, return_lse=True)
    for name in ("output", "lse"):
        truth = getattr(exact, name)
        assert np.abs(getattr(got, name) - truth).max() <= np.abs(getattr(plain, name) - truth).max()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-15, 1e15, 1e17, 1e30])
def test_values_of_any_size(size, rng):
    q, k, v = many(rng)
    for rows in (slice(None), slice(3, 5), slice(130, None)):
        mixed = v.copy()
        mixed[:, :, rows] *= np.float32(size)
        check("cpu", q, k, mixed)
    v[..., ::2] = 0
    check("cpu", q, k, v * np.float32(size), is_causal=True, query_offset=100)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-32, 1e-20, 1e-17])
def test_scores_of_sizes_that_cancel(size, rng):
    """Small queries and large keys, some or all of them, and the other way round."""
    q, k, v = many(rng)
    size, other = np.float32(size), np.float32(min(1 / size, 1e37))
    scale = 1 / (float(size) * float(other))
    for rows in (slice(None), slice(7, 8), slice(65, 69)):
        large_k, large_q = k.copy(), q.copy()
        large_k[:, :, rows] *= other
        large_q[:, :, rows] *= other
        check("cpu", q * size, large_k, v, scale=scale, ulp=8)
        check("cpu", large_q, k * size, v, scale=scale, ulp=8)


def test_largest_numbers(rng):
    """Those above 3.39e38 round to an infinite bfloat16."""
    q, k, v = many(rng)
    top = np.finfo(np.float32).max
    for small, large, i in ((k, q, 5), (q, k, 7)):
        clean = large[0, 0, i].copy()
        large[0, 0, i] = np.sign(clean) * top
        small *= np.float32(1e-38)
        check("cpu", q, k, v)
        large[0, 0, i] = clean
        small *= np.float32(1e38)
    v[0, 0, 7] = top / 1024
    check("cpu", q, k, v)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(which, bad, rng):
    arrays = many(rng)
    arrays[which][0, 0, 66, 2] = bad
    seen = np.ones((ROWS, 200), bool)
    seen[30:50, 60:70] = False
    if np.isnan(bad):
        check("cpu", *arrays, seen)
    got = scaled_dot_product_attention(*arrays, seen)
    clean = [np.where(np.isfinite(x), x, 0) for x in arrays]
    expected = scaled_dot_product_attention(*clean, seen)
    spared = {0: np.s_[:, :, :66], 1: np.s_[:, :, 30:50], 2: np.s_[:, :, 30:50]}[which]
    np.testing.assert_allclose(got[spared], expected[spared], atol=1e-6)
    if which == 2:
        assert not np.isfinite(got[:, :, :30, 2]).any()
        np.testing.assert_allclose(got[..., 3:], expected[..., 3:], atol=1e-6)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (8, 8), (31, 17), (33, 15), (64, 64), (80, 96)])
def test_every_option_at_ragged_sizes(head_dim, value_dim, rng):
    q, k, v = many(rng, keys=157, head_dim=head_dim, value_dim=value_dim)
    bias = normal(rng, (ROWS, 157))
    check("cpu", q, k, v, rng.random((ROWS, 157)) < 0.7, bias=bias, window_size=(90, 60), query_offset=40,
          softcap=3.0, alibi_slopes=rng.random(GROUP), sinks=normal(rng, GROUP))  # fmt: skip


def test_more_keys_than_are_kept(rng):
    for window in (None, (700, 100)):
        q, k, v = inputs(rng, 1, 1, 1, 260, 3000, 600)
        got = scaled_dot_product_attention(
            q, k, v, window_size=window, query_offset=2500, return_lse=True, is_causal=window is None
        )
        hold(
            got.output, got.lse, q, k, v, window_size=window, query_offset=2500, is_causal=window is None
        )  # fmt: skip


class TestSameBits:
    """What lies beside a head changes nothing in it."""

    @pytest.mark.parametrize("threads", [1, 2])
    def test_threads_and_heads(self, threads, rng):
        q, k, v = many(rng, batch=2, kv_heads=2)
        alone = scaled_dot_product_attention(q[:1, :GROUP], k[:1, :1], v[:1, :1])
        k[1, 1, 3], v[1, 0, 9], q[0, GROUP, 2] = 1e30, 1e-30, np.nan
        before = numba.get_num_threads()
        try:
            numba.set_num_threads(min(threads, before))
            assert_same_bits(scaled_dot_product_attention(q, k, v)[:1, :GROUP], alone)
        finally:
            numba.set_num_threads(before)

    @pytest.mark.parametrize("bad", [1e30, np.inf, np.nan])
    def test_rows_of_one_block(self, bad, rng):
        """Short heads share blocks where no sequence beside them is long."""
        q, k, v = inputs(rng, 1, 16, 1, 20, 150, 32)
        expected = scaled_dot_product_attention(q, k, v)
        broken = q.copy()
        broken[0, 3, 7, 0] = bad
        got = scaled_dot_product_attention(broken, k, v)
        got[0, 3, 7] = expected[0, 3, 7]
        assert_same_bits(got, expected)
        more, keys = normal(rng, (300, 16, 32)), normal(rng, (90, 1, 32))
        packed = varlen_attention(
            np.concatenate([more, broken[0].swapaxes(0, 1)]),
            *(np.concatenate([keys, x[0].swapaxes(0, 1)]) for x in (k, v)), [0, 300, 320], [0, 90, 240],
        )  # fmt: skip
        packed = packed[300:].swapaxes(0, 1)[None].copy()
        packed[0, 3, 7] = expected[0, 3, 7]
        assert_same_bits(packed, expected)
