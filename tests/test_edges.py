"""Corners that once went wrong: extreme scales, NaN beside packed sequences, many sequences."""

import numpy as np
import pytest

from nbattn import scaled_dot_product_attention as sdpa
from nbattn import varlen_attention


@pytest.mark.parametrize("scale", [1e-50, 1e-46, 1e-38, 1e30, -1e-40, 0.0])
def test_extreme_scales_stay_finite_behind_a_mask(backend, rng, scale):
    q, k, v = (rng.standard_normal((1, 2, 20, 8)).astype(np.float32) for _ in range(3))
    got = sdpa(q, k, v, is_causal=True, scale=scale, backend=backend)
    exact = sdpa(*(x.astype(np.float64) for x in (q, k, v)), is_causal=True, scale=scale, backend="reference")
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_numbers_beyond_the_compute_dtype(rng, option):
    x = rng.standard_normal((1, 2, 4, 8)).astype(np.float32)
    for number in (1e39, 10**400):
        with pytest.raises(ValueError, match=option):
            sdpa(x, x, x, **{option: number})
    with pytest.raises(TypeError, match=option):
        sdpa(x, x, x, **{option: True})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nan_in_one_head_leaves_the_others_bits(backend, rng, dtype):
    q, k, v = (rng.standard_normal((80, h, 8)).astype(dtype) for h in (4, 1, 1))
    q[0, 0] = np.nan
    alone = varlen_attention(q[:3], k[:3], v[:3], [0, 3], [0, 3], backend=backend)
    beside = varlen_attention(q, k, v, [0, 3, 80], [0, 3, 80], backend=backend)
    np.testing.assert_array_equal(alone, beside[:3])
    assert np.isnan(alone[0, 0]).all()
    assert np.isfinite(np.delete(alone.reshape(12, 8), 0, axis=0)).all()


def test_one_nan_value_changes_no_other_bit(backend, rng):
    q, k, v = (rng.standard_normal((1, 1, 300, 9)).astype(np.float32) for _ in range(3))
    clean = sdpa(q, k, v, is_causal=True, backend=backend)
    v[0, 0, 150, 4] = np.nan
    got = sdpa(q, k, v, is_causal=True, backend=backend)
    np.testing.assert_array_equal(got[:, :, :150], clean[:, :, :150])
    assert np.isnan(got[0, 0, 150:, 4]).all()
    np.testing.assert_array_equal(np.delete(got, 4, axis=3), np.delete(clean, 4, axis=3))


def test_thousands_of_sequences_some_empty(backend, rng):
    lengths = rng.integers(0, 3, 2000)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    x = rng.standard_normal((starts[-1], 1, 4)).astype(np.float32)
    got = varlen_attention(x, x, x, starts, starts, backend=backend)
    ones = np.flatnonzero(lengths == 1)
    np.testing.assert_allclose(got[starts[ones]], x[starts[ones]], rtol=1e-6)


def test_a_set_is_no_window(rng):
    x = rng.standard_normal((1, 1, 4, 8)).astype(np.float32)
    with pytest.raises(TypeError, match="window_size"):
        sdpa(x, x, x, window_size={1, 2})
