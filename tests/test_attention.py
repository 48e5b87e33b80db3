"""Attention's meaning: every option, alone and together, on every backend."""

import itertools
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from ml_dtypes import bfloat16, finfo
from oracle import DTYPES, SIZES, assert_accurate, check, compute_dtype_of, formula, inputs, normal, see

import nbattn
from nbattn import merge_states, scaled_dot_product_attention, varlen_attention
from nbattn.check import check_mask

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


class TestShapes:
    @pytest.mark.isa
    @dtypes
    def test_ragged_sizes(self, backend, dtype, rng):
        others = [rng.permutation(SIZES) for _ in range(3)]
        for queries, keys, head_dim, value_dim in zip(SIZES, *others, strict=True):
            q, k, v = inputs(rng, 2, 2, 1, queries, keys, head_dim, value_dim, dtype)
            check(backend, q, k, v)
            check(backend, q, k, v, is_causal=True, query_offset="end")

    @dtypes
    def test_long(self, backend, dtype, rng):
        check(backend, *inputs(rng, 1, 2, 1, 260, 517, 64, 40, dtype), is_causal=True, query_offset=257)

    @pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=lambda d: np.dtype(d).name)
    def test_more_keys_than_are_kept_converted(self, backend, dtype, rng):
        check(
            backend,
            *inputs(rng, 1, 2, 2, 70, 2200, 500, dtype=dtype),
            window_size=(900, 1000),
            query_offset="end",
        )

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (4, 1), (6, 2), (12, 3), (40, 1)])
    def test_groups(self, backend, heads, kv_heads, rng):
        for queries in (1, 2, 9, 70):
            q, k, v = inputs(rng, 2, heads, kv_heads, queries, 50, 8)
            check(backend, q, k, v, is_causal=True, query_offset=20, alibi_slopes=rng.random(heads))

    @pytest.mark.gpu
    @pytest.mark.parametrize("missing", [1, 2])
    def test_fewer_dimensions(self, backend, missing, rng):
        q, k, v = inputs(rng, 1, 1, 1, 5, 7, 3)
        drop = (0,) * missing
        full = scaled_dot_product_attention(q, k, v, return_weights=True, return_lse=True, backend=backend)
        small = scaled_dot_product_attention(
            q[drop], k[drop], v[drop], return_weights=True, return_lse=True, backend=backend
        )
        for a, b in zip(small, full, strict=True):
            np.testing.assert_array_equal(a, b[drop], strict=True)

    @pytest.mark.gpu
    def test_three_dimensions_are_heads(self, backend, rng):
        q, k, v = inputs(rng, 1, 6, 2, 5, 7, 3)
        got = scaled_dot_product_attention(q[0], k[0], v[0], backend=backend)
        np.testing.assert_array_equal(got, scaled_dot_product_attention(q, k, v, backend=backend)[0])

    @pytest.mark.gpu
    @dtypes
    @pytest.mark.parametrize(
        ("batch", "heads", "queries", "keys"),
        [(2, 2, 0, 5), (2, 2, 3, 0), (2, 2, 0, 0), (0, 2, 3, 5), (2, 0, 3, 5), (0, 0, 0, 0)],
    )
    def test_empty(self, backend, dtype, batch, heads, queries, keys):
        q, k, v = (np.ones(s, dtype) for s in ((queries, 4), (keys, 4), (keys, 6)))
        q, k, v = (np.broadcast_to(x, (batch, heads, *x.shape)) for x in (q, k, v))
        for options in (
            {},
            {"is_causal": True, "query_offset": "end", "mask": np.ones((queries, keys), bool)},
        ):
            output, weights, lse = scaled_dot_product_attention(
                q, k, v, return_weights=True, return_lse=True, backend=backend, **options
            )
            assert output.shape == (batch, heads, queries, 6)
            assert weights.shape == (batch, heads, queries, keys)
            assert lse.shape == (batch, heads, queries)
            assert output.dtype == dtype
            assert not output.any()
            assert (lse == -np.inf).all()

    @pytest.mark.gpu
    def test_results_asked_for(self, backend, rng):
        q, k, v = inputs(rng, 1, 1, 1, 2, 3, 4)
        call = {"backend": backend}
        assert isinstance(scaled_dot_product_attention(q, k, v, **call), np.ndarray)
        result = scaled_dot_product_attention(q, k, v, return_lse=True, **call)
        assert isinstance(result, nbattn.AttentionOutput)
        assert result.weights is None
        assert scaled_dot_product_attention(q, k, v, return_weights=True, **call).lse is None


class TestScores:
    @pytest.mark.gpu
    @dtypes
    @pytest.mark.parametrize("scale", [None, 0.3, -0.5, 0.0, 2])
    def test_scale(self, backend, dtype, scale, rng):
        check(backend, *inputs(rng, dtype=dtype), scale=scale)

    @pytest.mark.gpu
    @dtypes
    @pytest.mark.parametrize("softcap", [0.5, 2.0, 30, 1e4])
    def test_softcap(self, backend, dtype, softcap, rng):
        check(backend, *inputs(rng, dtype=dtype), softcap=softcap, scale=1.5)

    @pytest.mark.gpu
    def test_softcap_limits(self, backend):
        q, k = np.full((1, 1), 1e6, np.float32), np.array([[1e6], [-1e6], [0]], np.float32)
        result = scaled_dot_product_attention(q, k, k, softcap=2.0, return_weights=True, backend=backend)
        np.testing.assert_allclose(
            result.weights[0], np.exp([2, -2, 0]) / np.exp([2, -2, 0]).sum(), rtol=1e-6
        )

    @pytest.mark.gpu
    def test_softcap_comes_before_bias_and_masks(self, backend):
        x = np.zeros((2, 1), np.float32)
        bias = np.array([[0, 9], [0, -np.inf]], np.float32)
        result = scaled_dot_product_attention(
            x, x, x, bias=bias, softcap=1.0, return_weights=True, backend=backend
        )
        expected = [[1 / (1 + np.exp(9)), 1 / (1 + np.exp(-9))], [1, 0]]
        np.testing.assert_allclose(result.weights, expected, rtol=1e-6)

    @pytest.mark.gpu
    @dtypes
    @pytest.mark.parametrize("bias_dtype", DTYPES, ids=lambda d: np.dtype(d).name)
    def test_bias(self, backend, dtype, bias_dtype, rng):
        q, k, v = inputs(rng, dtype=dtype)
        bias = normal(rng, (2, 4, q.shape[2], k.shape[2]), bias_dtype)
        bias[rng.random(bias.shape) < 0.2] = -np.inf
        bias[:, 1, 4:7] = -np.inf
        check(backend, q, k, v, bias=bias)

    @pytest.mark.gpu
    def test_alibi(self, backend):
        x = np.zeros((1, 2, 4, 1), np.float32)
        slopes = np.array([1.0, 0.5], np.float32)
        result = scaled_dot_product_attention(
            x, x, x, alibi_slopes=slopes, is_causal=True, return_weights=True, backend=backend
        )
        expected = np.exp(np.outer(slopes, [-3, -2, -1, 0]))
        np.testing.assert_allclose(
            result.weights[0, :, 3], expected / expected.sum(1, keepdims=True), rtol=1e-6
        )

    @pytest.mark.gpu
    @dtypes
    def test_alibi_with_offsets(self, backend, dtype, rng):
        slopes = np.array([1.0, 0.25, 0.01, -0.3])
        for offset in (0, 41, -3, [5, -2], "end"):
            check(backend, *inputs(rng, dtype=dtype), alibi_slopes=slopes, query_offset=offset)

    @pytest.mark.gpu
    @dtypes
    def test_sinks(self, backend, dtype, rng):
        check(backend, *inputs(rng, dtype=dtype), sinks=np.array([0.0, -3.0, 5.0, -np.inf]))

    @pytest.mark.gpu
    def test_sink_is_one_more_key_without_value(self, backend, rng):
        q, k, v = inputs(rng, 1, 1, 1, 4, 6, 8)
        result = scaled_dot_product_attention(q, k, v, sinks=[0.0], return_weights=True, backend=backend)
        exponentials = np.exp(q[0, 0] @ k[0, 0].T / np.sqrt(8))
        expected = exponentials / (1 + exponentials.sum(1, keepdims=True))
        np.testing.assert_allclose(result.weights[0, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(result.output[0, 0], expected @ v[0, 0], rtol=1e-4, atol=1e-6)


class TestMasks:
    @pytest.mark.gpu
    @pytest.mark.isa
    @dtypes
    @pytest.mark.parametrize("offset", [0, 5, -4, 37, -60, 10**9, [2, -7], "end"], ids=str)
    def test_causal(self, backend, dtype, offset, rng):
        check(backend, *inputs(rng, dtype=dtype), is_causal=True, query_offset=offset)

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(
        "window",
        [(0, 0), (3, None), (None, 2), (-1, 0), (5, 1), (40, 7), (1000, 1000), (None, None), (2**62, 0)],
    )
    def test_window(self, backend, window, is_causal, rng):
        q, k, v = inputs(rng, 2, 2, 1, 130, 140, 5)
        for offset in (0, 11, [-20, 100]):
            check(backend, q, k, v, window_size=window, is_causal=is_causal, query_offset=offset)

    @pytest.mark.isa
    @dtypes
    @pytest.mark.parametrize("window", [(20, 0), (100, 31), (255, 0)])
    def test_windows_that_begin_within_a_block(self, window, dtype, rng):
        """Queries of one block see other first keys; a NaN among the keys reaches those alone that see it."""
        q, k, v = inputs(rng, 1, 2, 2, 300, 330, 6, dtype=dtype)
        options = {"window_size": window, "query_offset": 29}
        check("cpu", q, k, v, **options)
        spoiled = [x.copy() for x in (k, v)]
        for i, x in enumerate(spoiled):
            x[:, i, 150:153] = np.nan
        got, clean = (
            scaled_dot_product_attention(q, *x, backend="cpu", **options) for x in (spoiled, (k, v))
        )
        position = np.arange(300) + 29
        hit = (position - window[0] < 153) & (position + window[1] >= 150)
        assert np.isnan(got[:, :, hit].astype(np.float32)).all()
        np.testing.assert_array_equal(got[:, :, ~hit], clean[:, :, ~hit])

    @pytest.mark.gpu
    def test_window_counts(self, backend):
        x = np.zeros((40, 1), np.float32)
        weights = scaled_dot_product_attention(
            x, x, x, window_size=(6, 2), return_weights=True, backend=backend
        ).weights
        for i in range(40):
            assert np.flatnonzero(weights[i]).tolist() == list(range(max(0, i - 6), min(40, i + 3)))

    @dtypes
    def test_lengths(self, backend, dtype, rng):
        q, k, v = inputs(rng, 5, 2, 1, 7, 100, 8, dtype=dtype)
        lengths = np.array([100, 0, 1, 64, 97])
        check(backend, q, k, v, key_lengths=lengths)
        check(
            backend, q, k, v, key_lengths=lengths, is_causal=True, query_offset="end", window_size=(30, None)
        )

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
    def test_mask_dtypes(self, backend, dtype, rng):
        q, k, v = inputs(rng)
        keys = k.shape[2]
        mask = rng.integers(0, 2, (2, 4, q.shape[2], keys)).astype(dtype)
        if dtype != np.bool_:
            # Any bit says attend, the highest too.
            mask *= np.array([1, 2, np.iinfo(dtype).max, np.iinfo(dtype).min or 4], dtype)[
                rng.integers(0, 4, keys)
            ]
        check(backend, q, k, v, mask)

    @pytest.mark.isa
    @dtypes
    def test_mask_that_hides_or_shows_whole_runs(self, backend, dtype, rng):
        # Rectangles of every kind against blocks of 64 queries and runs of 64 and 128 keys.
        kinds = np.array([0.0, 0.5, 1.0])[rng.integers(0, 3, (4, 6))]
        mask = rng.random((200, 330)) < np.repeat(np.repeat(kinds, 50, axis=0), 55, axis=1)
        q, k, v = inputs(rng, 1, 2, 1, 200, 330, 8, dtype=dtype)
        check(backend, q, k, v, mask)
        check(backend, q, k, v, mask, window_size=(70, 9), query_offset=20)
        check(backend, q, k, v, mask.T.copy().T, key_lengths=[261])

    def test_broadcast_mask_stays_small(self):
        mask = np.broadcast_to(np.ones((1, 1, 1, 5), np.int64), (2, 3, 1 << 40, 5))
        assert check_mask(mask, mask.shape).strides == (0, 0, 0, 1)

    @pytest.mark.parametrize("axes", range(16))
    def test_broadcast(self, backend, axes, rng):
        shape = (2, 4, 3, 5)
        q, k, v = inputs(rng, 2, 4, 2, 3, 5, 6)
        small = tuple(1 if axes >> i & 1 else n for i, n in enumerate(shape))
        mask = rng.random(small) < 0.6
        bias = normal(rng, small)
        while True:
            check(backend, q, k, v, mask)
            check(backend, q, k, v, bias=bias)
            check(backend, q, k, v, mask, bias=bias, is_causal=True)
            if mask.ndim == 0 or mask.shape[0] != 1:
                break
            mask, bias = mask[0], bias[0]

    def test_masks_combine_by_and(self, backend, rng):
        q, k, v = inputs(rng)
        bias = np.where(rng.random((4, 33, 70)) < 0.5, 0, -np.inf)
        mask = rng.random((2, 1, 33, 70)) < 0.5
        ends = {"key_lengths": [70, 31], "query_offset": [30, 8], "is_causal": True, "window_size": (25, 3)}
        result = check(backend, q, k, v, mask, bias=bias, **ends)
        assert (result.weights == 0).mean() > 0.8
        assert (result.weights > 0).any()


class TestDeadRows:
    WAYS = (
        {"mask": np.zeros((1, 1, 3, 5), bool)},
        {"bias": np.full((3, 5), -np.inf, np.float32)},
        {"is_causal": True, "query_offset": -3},
        {"window_size": (1, 1), "query_offset": 50},
        {"key_lengths": [0]},
        {
            "mask": np.array([1, 1, 0, 0, 0]),
            "window_size": (None, 0),
            "query_offset": 2,
            "bias": np.array([-np.inf, -np.inf, 0, 0, 0]),
        },
    )

    @pytest.mark.gpu
    @pytest.mark.isa
    @dtypes
    @pytest.mark.parametrize("way", range(len(WAYS)))
    def test_nothing_to_attend(self, backend, dtype, way, rng):
        options = self.WAYS[way]
        q, k, v = inputs(rng, 1, 1, 1, 3, 5, 4, dtype=dtype)
        result = check(backend, q, k, v, **options)
        assert not result.output.any()
        assert not result.weights.any()
        assert (result.lse == -np.inf).all()
        result = check(backend, q, k, v, sinks=[0.5], **options)
        assert not result.output.any()
        assert (result.lse == 0.5).all()

    def test_dead_rows_among_live_ones(self, backend, rng):
        q, k, v = inputs(rng, 1, 2, 1, 150, 200, 8)
        mask = rng.random((150, 1)) < 0.5
        result = check(backend, q, k, v, mask)
        assert ((result.lse == -np.inf) == ~mask[:, 0]).all()

    @pytest.mark.gpu
    def test_least_finite_bias_is_no_mask(self, backend, rng):
        q, k, v = inputs(rng, 1, 1, 1, 3, 5, 4)
        bias = np.full(5, np.finfo(np.float32).min)
        result = scaled_dot_product_attention(q, k, v, bias=bias, backend=backend)
        np.testing.assert_allclose(
            result, np.broadcast_to(v.mean(2, keepdims=True), q.shape), rtol=1e-5, atol=1e-6
        )


class TestLeaks:
    DIAGONALS = np.where((np.arange(130) + np.arange(70)[:, None]) % 3 == 0, 0.25, -np.inf)
    WAYS = (
        {"mask": np.arange(130) % 7 < 5},
        {"bias": np.where(np.arange(130) % 5 == 1, -np.inf, 0.25)},
        {"mask": (np.arange(130) + np.arange(70)[:, None]) % 3 == 0},
        {"bias": DIAGONALS},
        {"bias": DIAGONALS.astype(np.float32)},
        {"bias": DIAGONALS.astype(bfloat16)},
        {"is_causal": True, "query_offset": 9},
        {"window_size": (20, 4), "query_offset": 11},
        {"key_lengths": [50, 130]},
    )

    @pytest.mark.isa
    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("way", range(len(WAYS)))
    def test_masked_never_reaches(self, backend, way, poison, rng):
        options = self.WAYS[way]
        for dtype in (np.float32, np.float16):
            clean = inputs(rng, 2, 4, 2, 70, 130, 9, dtype=dtype)
            exact = formula(*clean, compute=np.float64, **options)
            # Row 35 does not see the first batch's bad keys, and sees the second's.
            bad = np.zeros((2, 2, 130), bool)
            for b, kv_head in np.ndindex(2, 2):
                candidates = np.flatnonzero(exact.seen[b, 2 * kv_head, 35] == b)
                bad[b, kv_head, rng.choice(candidates, 2)] = True
            for where in ((1,), (2,), (1, 2)):
                arrays = list(clean)
                for which in where:
                    arrays[which] = np.where(bad[..., None], dtype(poison), clean[which])
                spared = ~(exact.seen & np.repeat(bad, 2, axis=1)[:, :, None]).any(-1)
                assert spared[0, :, 35].all()
                assert not spared[1, :, 35].any()
                got = scaled_dot_product_attention(*arrays, **options, backend=backend, return_lse=True)
                plain = formula(*clean, compute=np.float32, **options)
                ulp = 4 * 2.0**-23 if dtype == np.float32 else 2.0**-10
                assert_accurate(
                    got.output[spared], exact.output[spared], plain.output[spared],
                    exact.magnitude[spared] + 1e-7, ulp=ulp, what="spared rows",
                )  # fmt: skip
                # An infinite key may as well get the score -inf and weigh nothing.
                if where != (1,):
                    assert not np.isfinite(got.output[~spared]).any()
                if np.isnan(poison):
                    assert np.isnan(got.output[~spared]).all()
                    check(backend, *arrays, **options)

    @dtypes
    def test_one_column_of_a_value(self, backend, dtype, rng):
        q, k, v = inputs(rng, dtype=dtype)
        v[0, 1, 40, 3] = np.nan
        result = check(backend, q, k, v, is_causal=True, query_offset=20)
        assert np.isnan(result.output).sum() == 2 * 13

    @pytest.mark.gpu
    @dtypes
    def test_query_touches_only_its_row(self, backend, dtype, rng):
        q, k, v = inputs(rng, dtype=dtype)
        for poison in (np.nan, np.inf):
            broken = q.copy()
            broken[1, 2, 7, 0] = poison
            got = scaled_dot_product_attention(broken, k, v, backend=backend)
            assert not np.isfinite(got[1, 2, 7].astype(np.float32)).any()
            got[1, 2, 7] = 0
            expected = scaled_dot_product_attention(q, k, v, backend=backend)
            expected[1, 2, 7] = 0
            assert np.isfinite(got.astype(np.float32)).all()
            np.testing.assert_allclose(
                got.astype(np.float64), expected.astype(np.float64), atol=8 * float(finfo(dtype).eps)
            )

    @pytest.mark.gpu
    @dtypes
    def test_nan_in_options_reaches(self, backend, dtype, rng):
        q, k, v = inputs(rng, 1, 2, 1, 4, 6, 3, dtype=dtype)
        bias = np.zeros((4, 6))
        bias[2, 5] = np.nan
        got = np.isnan(scaled_dot_product_attention(q, k, v, bias=bias, backend=backend).astype(np.float32))
        assert got[:, :, 2].all()
        assert not got[:, :, [0, 1, 3]].any()
        sinks = np.array([np.nan, 1.0])
        got = np.isnan(scaled_dot_product_attention(q, k, v, sinks=sinks, backend=backend).astype(np.float32))
        assert got[:, 0].all()
        assert not got[:, 1].any()

    @pytest.mark.gpu
    def test_bias_below_the_compute_dtype_masks(self, backend, rng):
        q, k, v = inputs(rng, 1, 2, 1, 40, 60, 3)
        bias = np.where(np.arange(60) < 30, 0, np.finfo(np.float64).min)
        k[:, :, 40] = v[:, :, 41] = np.nan
        got = scaled_dot_product_attention(q, k, v, bias=bias, backend=backend)
        expected = scaled_dot_product_attention(q, k[:, :, :30], v[:, :, :30], backend=backend)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.gpu
    def test_nan_bias_behind_a_mask(self, backend, rng):
        q, k, v = inputs(rng, 1, 2, 1, 40, 60, 3)
        bias = np.where(np.arange(60) < 30, 0, np.nan)
        expected = scaled_dot_product_attention(q, k[:, :, :30], v[:, :, :30], backend=backend)
        for options in ({"mask": np.arange(60) < 30}, {"key_lengths": [30]}):
            got = scaled_dot_product_attention(q, k, v, bias=bias, backend=backend, **options)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


class TestExtremes:
    @pytest.mark.gpu
    @pytest.mark.isa
    @dtypes
    @pytest.mark.parametrize("scale", [1e4, 1e10, 1e20, 1e30, -1e30])
    def test_huge_scores(self, backend, dtype, scale, rng):
        q = np.array([[1], [-1], [2]], dtype)
        k = rng.permutation(100).astype(dtype)[:, None] - dtype(49)
        v = normal(rng, (100, 7), dtype)
        result = scaled_dot_product_attention(
            q, k, v, scale=scale, return_weights=True, return_lse=True, backend=backend
        )
        best = np.argmax(np.sign(scale) * q.astype(np.float64) @ k.astype(np.float64).T, axis=1)
        np.testing.assert_array_equal(result.output, v[best])
        np.testing.assert_array_equal(result.weights, np.eye(100)[best])
        expected = scale * q[:, 0].astype(np.float64) * k[best, 0].astype(np.float64)
        np.testing.assert_allclose(result.lse, expected, rtol=1e-6)

    @pytest.mark.gpu
    def test_products_beyond_float16(self, backend, rng):
        q, k, v = inputs(rng, dtype=np.float16)
        check(backend, q * np.float16(200), k * np.float16(200), v, scale=1e-3)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_denormals(self, backend, dtype, rng):
        tiny = float(np.finfo(dtype).smallest_subnormal)
        q, k, v = (x * dtype(1000 * tiny) for x in inputs(rng, dtype=dtype))
        got = scaled_dot_product_attention(q, k, v, backend=backend)
        expected = np.repeat(v.astype(np.longdouble).mean(2, keepdims=True), 2, axis=1)
        assert expected.any()
        assert np.abs(got - expected).max() <= 70 * tiny

    @pytest.mark.gpu
    @dtypes
    def test_key_of_minus_infinity_weighs_nothing(self, backend, dtype):
        q, v = np.ones((2, 1), dtype), np.array([[1], [2], [3]], dtype)
        k = np.array([[0], [-np.inf], [0]], dtype)
        result = scaled_dot_product_attention(q, k, v, return_weights=True, backend=backend)
        np.testing.assert_array_equal(result.output, np.full((2, 1), 2, dtype))
        np.testing.assert_array_equal(result.weights, [[0.5, 0, 0.5]] * 2)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_values_near_the_limit(self, backend, dtype, rng):
        v = np.full((50, 3), np.finfo(dtype).max / 64, dtype)
        got = scaled_dot_product_attention(
            normal(rng, (9, 4), dtype), normal(rng, (50, 4), dtype), v, backend=backend
        )
        np.testing.assert_allclose(got, v[:9], rtol=1e-5)


class Call(NamedTuple):
    arrays: tuple
    options: dict

    def __repr__(self):
        def show(x):
            return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) and x.size > 6 else repr(x)

        arguments = ", ".join(f"{name}={show(x)}" for name, x in self.options.items())
        return f"({', '.join(map(show, self.arrays))}, {arguments})"


@st.composite
def calls(draw, sizes=tuple(SIZES), most=4):
    """Sizes and options drawn by hypothesis, numbers by a seed."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, most))
    size, choose = st.sampled_from(sizes), lambda *x: draw(st.sampled_from(x))
    queries, keys = choose(1, *sizes), draw(size)
    shape = (batch, kv_heads * group, queries, keys)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = inputs(rng, batch, shape[1], kv_heads, queries, keys, draw(size), draw(size), choose(*DTYPES))

    side = st.one_of(st.none(), st.integers(-1, keys + 3))
    offset = st.integers(-queries - 3, keys + 3)
    strategies = {
        "scale": st.sampled_from([0.1, 1.0, -0.7, 3.0]),
        "softcap": st.sampled_from([1.0, 20.0]),
        "is_causal": st.just(True),
        "window_size": st.tuples(side, side),
        "query_offset": st.one_of(st.just("end"), offset, st.lists(offset, min_size=batch, max_size=batch)),
        "key_lengths": st.lists(st.integers(0, keys), min_size=batch, max_size=batch),
        "alibi_slopes": st.builds(rng.random, st.just(shape[1])),
        "sinks": st.builds(rng.standard_normal, st.just(shape[1])),
    }
    options = {name: draw(strategy) for name, strategy in strategies.items() if draw(st.booleans())}
    small = tuple(choose(1, n) for n in shape)
    if draw(st.booleans()):
        dtype = choose(np.bool_, np.int8, np.int32, np.int64)
        options["mask"] = (rng.random(small) < choose(0.1, 0.7)).astype(dtype)
    if draw(st.booleans()):
        bias = np.where(rng.random(small[1:]) < choose(0, 0.5), -np.inf, rng.standard_normal(small[1:]))
        options["bias"] = bias.astype(choose(*DTYPES))
    if draw(st.booleans()):
        for array in arrays[choose(0, 1, 2) :]:
            array[rng.random(array.shape[:3]) < 0.03] = np.nan
    return Call(arrays, options)


@pytest.mark.isa
@given(call=calls())
def test_everything_together(backend, call):
    # Where there are few numbers, the plain formula may be right by luck.
    check(backend, *call.arrays, ulp=8, **call.options)


@pytest.mark.gpu("only")
@settings(max_examples=40)
@given(call=calls((1, 2, 3, 5, 9, 14, 21), most=2))
def test_everything_small_together(backend, call):
    check(backend, *call.arrays, ulp=8, **call.options)


@pytest.mark.gpu
@dtypes
def test_weights_lse_and_output_agree(backend, dtype, rng):
    q, k, v = inputs(rng, dtype=dtype)
    compute = compute_dtype_of(dtype)
    mask = rng.random((q.shape[2], k.shape[2])) < 0.5
    output, weights, lse = scaled_dot_product_attention(
        q, k, v, mask, return_weights=True, return_lse=True, backend=backend
    )
    eps = float(finfo(compute).eps)
    np.testing.assert_allclose(weights.sum(-1), np.ones(lse.shape), rtol=8 * eps)
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    scores = q.astype(compute) @ k.astype(compute).transpose(0, 1, 3, 2) / np.sqrt(compute(q.shape[3]))
    np.testing.assert_allclose(weights, np.where(mask, np.exp(scores - lse[..., None]), 0), rtol=64 * eps)
    np.testing.assert_allclose(
        output.astype(compute), weights @ v.astype(compute), rtol=0, atol=4 * float(finfo(dtype).eps)
    )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=lambda d: np.dtype(d).name)
class TestHalfPrecision:
    """Every number is read exactly and rounded to the nearest, ties to even.

    bfloat16's denormals may be taken as 0: the processors' instructions for it do.
    """

    @staticmethod
    def assert_equal(got, expected):
        got, expected = got.astype(np.float32), expected.astype(np.float32)
        got = np.where((got == 0) & (np.abs(expected) < np.finfo(np.float32).smallest_normal), expected, got)
        np.testing.assert_array_equal(got, expected)

    def test_every_number(self, backend, dtype):
        v = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(256, 1, 256)
        x = np.zeros((256, 1, 1), dtype)
        got = scaled_dot_product_attention(x, x, v, backend=backend)
        self.assert_equal(got, v)

    def test_rounding(self, backend, dtype, rng):
        a = rng.integers(0, 2**16, (300, 256)).astype(np.uint16)
        neighbours = (a ^ rng.integers(0, 2**7, a.shape).astype(np.uint16)).view(dtype)
        v = np.stack([a.view(dtype), neighbours], axis=1)
        v = np.where(np.abs(v.astype(np.float32)) < 1e38, v, dtype(1))
        got = scaled_dot_product_attention(
            np.zeros((300, 1, 1), dtype), np.zeros((300, 2, 1), dtype), v, backend=backend
        )
        wide = v.astype(np.float32)
        self.assert_equal(got, ((wide[:, :1] + wide[:, 1:]) / 2).astype(dtype))


class TestBfloat16Products:
    @pytest.mark.isa
    def test_error_is_that_of_bfloat16_operands(self, backend, rng):
        for options in (
            {},
            {"is_causal": True, "softcap": 5.0},
            {"window_size": (40, 0), "sinks": [0.0] * 4},
        ):
            q, k, v = inputs(rng, 2, 4, 2, 100, 130, 33)
            narrow = [x.astype(bfloat16).astype(np.float64) for x in (q, k, v)]
            got = scaled_dot_product_attention(
                q,
                k,
                v,
                compute_dtype="bfloat16",
                return_lse=True,
                return_weights=True,
                backend=backend,
                **options,
            )
            exact = formula(*narrow, compute=np.float64, **options)
            plain = formula(*narrow, compute=np.float32, **options)
            largest = exact.weights.max(-1, keepdims=True, initial=0)
            rounded = (plain.weights / largest).astype(bfloat16).astype(np.float64) * largest
            values = np.repeat(narrow[2], 2, axis=1)
            assert_accurate(
                got.output, exact.output, rounded @ values, exact.magnitude, ulp=2.0**-10, what="output"
            )
            # The scores have float32 sums, so lse and weights lose nothing but the rounding of q and k.
            assert_accurate(got.lse, exact.lse, plain.lse, np.ones(1), ulp=2.0**-20, what="lse")
            assert_accurate(
                got.weights, exact.weights, plain.weights, np.ones(1), ulp=2.0**-20, what="weights"
            )

    @pytest.mark.gpu
    def test_is_not_float32(self, backend, rng):
        q, k, v = inputs(rng)
        usual = scaled_dot_product_attention(q, k, v, backend=backend)
        rough = scaled_dot_product_attention(q, k, v, compute_dtype="bfloat16", backend=backend)
        assert 1e-4 < np.abs(usual - rough).max() < 2e-2

    def test_leaks_nothing(self, backend, rng):
        q, k, v = inputs(rng)
        expected = scaled_dot_product_attention(
            q, k[:, :, :40], v[:, :, :40], compute_dtype="bfloat16", backend=backend
        )
        k[:, :, 40:] = v[:, :, 40:] = np.nan
        got = scaled_dot_product_attention(
            q, k, v, np.arange(70) < 40, compute_dtype="bfloat16", backend=backend
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-2)
        for bits in (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):
            v[:, :, 3] = np.array(bits, np.uint32).view(np.float32)
            got = scaled_dot_product_attention(
                q, k, v, compute_dtype="bfloat16", key_lengths=[40, 40], backend=backend
            )
            assert np.isnan(got).all()
        k[:, :, 3] = np.nan
        got = scaled_dot_product_attention(
            q, k, v, np.arange(70) < 40, compute_dtype="bfloat16", backend=backend
        )
        assert np.isnan(got).all()


class TestMergeStates:
    @dtypes
    def test_parts_merge_to_the_whole(self, backend, dtype, rng):
        q, k, v = inputs(rng, dtype=dtype)
        mask = rng.random((33, 70)) < 0.5
        whole = check(backend, q, k, v, mask)
        for cuts in ([0, 70], [0, 0, 31, 70], [0, 1, 2, 50, 70]):
            parts = [
                scaled_dot_product_attention(
                    q, k[:, :, a:b], v[:, :, a:b], mask[:, a:b], return_lse=True, backend=backend
                )
                for a, b in itertools.pairwise(cuts)
            ]
            output, lse = merge_states(np.stack([p.output for p in parts]), np.stack([p.lse for p in parts]))
            assert output.dtype == dtype
            assert lse.dtype == compute_dtype_of(dtype)
            eps = float(finfo(dtype).eps)
            np.testing.assert_allclose(
                output.astype(np.float64), whole.output.astype(np.float64), rtol=0, atol=4 * eps
            )
            np.testing.assert_allclose(lse, whole.lse, rtol=16 * float(finfo(lse.dtype).eps))

    def test_empty_states(self):
        outputs = np.array([[[np.nan], [np.nan], [5.0]], [[2.0], [np.inf], [np.nan]]], np.float32)
        lses = np.array([[-np.inf, -np.inf, 1.0], [0.5, -np.inf, -np.inf]], np.float32)
        output, lse = merge_states(outputs, lses)
        np.testing.assert_array_equal(output, np.array([[2.0], [0.0], [5.0]], np.float32), strict=True)
        np.testing.assert_array_equal(lse, np.array([0.5, -np.inf, 1.0], np.float32), strict=True)

    def test_no_states(self):
        output, lse = merge_states(np.ones((0, 3, 2)), np.ones((0, 3)))
        np.testing.assert_array_equal(output, np.zeros((3, 2)))
        np.testing.assert_array_equal(lse, np.full(3, -np.inf))

    def test_nan_reaches(self):
        output, lse = merge_states(np.array([[np.nan, 1.0], [1.0, 1.0]]), np.zeros(2))
        np.testing.assert_array_equal(output, [np.nan, 1.0])
        output, lse = merge_states(np.ones((2, 1)), np.array([0.0, np.nan]))
        assert np.isnan(output).all()
        assert np.isnan(lse)

    def test_far_apart(self):
        output, lse = merge_states(np.array([[1.0], [2.0]]), np.array([-1e4, 1e4]))
        assert (output.item(), lse.item()) == (2.0, 1e4)

    def test_precision_follows_either_input(self):
        output, lse = merge_states(np.ones((2, 3, 4), np.float32), np.zeros((2, 3)))
        assert (output.dtype, lse.dtype) == (np.float32, np.float64)
        np.testing.assert_allclose(lse, np.log(2), rtol=1e-15)


class TestVarlen:
    QUERIES = (0, 3, 0, 70, 1, 17, 0)
    KEYS = (5, 0, 0, 130, 64, 20, 0)

    def packed(self, rng, dtype=np.float32, heads=4, kv_heads=2):
        q = normal(rng, (sum(self.QUERIES), heads, 16), dtype)
        k = normal(rng, (sum(self.KEYS), kv_heads, 16), dtype)
        v = normal(rng, (sum(self.KEYS), kv_heads, 9), dtype)
        return q, k, v, np.cumsum((0, *self.QUERIES)), np.cumsum((0, *self.KEYS))

    @pytest.mark.isa
    @dtypes
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"is_causal": True},
            {"is_causal": True, "query_offset": "end", "window_size": (9, None)},
            {"key_lengths": [1, 0, 0, 99, 64, 3, 0], "sinks": [0.0, 1.0, 2.0, 3.0], "query_offset": "end"},
            {
                "query_offset": [0, 0, 0, 5, 60, -3, 1],
                "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
                "is_causal": True,
            },
            {"mask": "random", "bias": "random", "softcap": 3.0, "scale": 0.4},
        ],
        ids=str,
    )
    def test_equals_a_call_for_each_sequence(self, backend, dtype, options, rng):
        q, k, v, q_starts, k_starts = self.packed(rng, dtype)
        full = (7, 4, max(self.QUERIES), max(self.KEYS))
        options = dict(options)
        if "mask" in options:
            options |= {"mask": rng.random(full) < 0.7, "bias": normal(rng, (7, 1, *full[2:]))}
        output, weights, lse = varlen_attention(
            q, k, v, q_starts, k_starts, return_weights=True, return_lse=True, backend=backend, **options
        )
        assert output.shape == (sum(self.QUERIES), 4, 9)
        assert weights.shape == full
        assert lse.shape == (sum(self.QUERIES), 4)
        for b, (n, m) in enumerate(zip(self.QUERIES, self.KEYS, strict=True)):
            rows, cols = slice(*q_starts[b : b + 2]), slice(*k_starts[b : b + 2])
            one = dict(options)
            for name in ("key_lengths", "query_offset"):
                if isinstance(one.get(name), list):
                    one[name] = one[name][b : b + 1]
            for name in ("mask", "bias"):
                if name in one:
                    one[name] = one[name][b : b + 1, :, :n, :m]
            alone = scaled_dot_product_attention(
                *(x.transpose(1, 0, 2)[None] for x in (q[rows], k[cols], v[cols])),
                return_weights=True, return_lse=True, backend=backend, **one,
            )  # fmt: skip
            tolerance = 4 * float(finfo(dtype).eps)
            np.testing.assert_allclose(
                output[rows].astype(np.float64),
                alone.output[0].swapaxes(0, 1).astype(np.float64),
                atol=tolerance,
            )
            np.testing.assert_allclose(weights[b, :, :n, :m], alone.weights[0], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(lse[rows], alone.lse[0].T, rtol=1e-5, atol=1e-6)
            assert not weights[b, :, n:].any()
            assert not weights[b, :, :, m:].any()

    @pytest.mark.gpu
    def test_no_sequences(self, backend):
        q, k = np.ones((0, 2, 4), np.float32), np.ones((0, 1, 4), np.float32)
        result = varlen_attention(q, k, k, [0], [0], return_weights=True, return_lse=True, backend=backend)
        assert result.output.shape == (0, 2, 4)
        assert result.weights.shape == (0, 2, 0, 0)
        assert result.lse.shape == (0, 2)

    def test_neighbours_never_leak(self, backend, rng):
        q, k, v, q_starts, k_starts = self.packed(rng)
        k[k_starts[3] : k_starts[4]] = np.nan
        v[k_starts[5] : k_starts[6]] = np.inf
        got = varlen_attention(q, k, v, q_starts, k_starts, backend=backend)
        finite = np.isfinite(got).all(axis=(1, 2))
        expected = np.repeat([True, True, True, False, True, False, True], self.QUERIES)
        np.testing.assert_array_equal(finite, expected)

    def test_out(self, backend, rng):
        q, k, v, q_starts, k_starts = self.packed(rng)
        expected = varlen_attention(q, k, v, q_starts, k_starts, backend=backend)
        out = np.full(expected.shape, np.nan, np.float32)
        assert varlen_attention(q, k, v, q_starts, k_starts, out=out, backend=backend) is out
        np.testing.assert_array_equal(out, expected)


def test_see_is_what_it_says():
    """The oracle's own masks, spelled out once."""
    seen = see((1, 1, 3, 4), is_causal=True, window_size=(1, None), query_offset=1, key_lengths=[3])
    np.testing.assert_array_equal(seen[0, 0], [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]])
