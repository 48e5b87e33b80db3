"""The power of two that all softmaxes of attention are made of, on vectors and single numbers."""

import numba
import numpy as np
import pytest

from nbattn.cpu import emitters, runtime, simd


def powers(x, factor, short=False, vectors=True):
    """2**(x * factor), of x's dtype, by the kernels' own arithmetic."""
    dtype, size = x.dtype.type, x.itemsize
    load, store, get, put = simd.loads(x.dtype.name)
    lanes, splat = simd.lanes(dtype), simd.splat
    exp2 = simd.exp2_product_short if short else simd.exp2_product
    floor = dtype(emitters.exp2_floor(dtype) / factor)

    @numba.njit
    def run(source, target, count, c, floor):
        for i in range(0, count, lanes) if vectors else range(count):
            a, t = source + i * size, target + i * size
            if vectors:
                store(t, exp2(load(a), splat(c), splat(floor)))
            else:
                put(t, exp2(get(a), c, floor))

    result = np.full_like(x, 7)
    run(x.ctypes.data, result.ctypes.data, x.size, dtype(factor), floor)
    return result, floor


@pytest.mark.isa
@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "numbers"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_within_a_unit_over_the_whole_range(rng, dtype, vectors):
    factor, lowest = 0.18, emitters.exp2_floor(dtype)
    x = (rng.uniform(lowest + 2, 8, 20_000) / dtype(factor)).astype(dtype)
    got, _ = powers(x, factor, vectors=vectors)
    exact = np.exp2(x.astype(np.longdouble) * np.longdouble(dtype(factor)))
    units = np.abs(got - exact) / np.spacing(exact.astype(dtype))
    # Without the instruction of a multiply-add the product is rounded.
    rounded = 0 if {"fma", "neon"} & runtime.cpu_features() else np.abs(x * factor)
    assert (units < 1.2 + rounded).all()


@pytest.mark.isa
@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "numbers"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ends(dtype, vectors):
    factor = 0.18
    floor = dtype(emitters.exp2_floor(dtype) / factor)
    below = np.finfo(dtype).min, 2 * floor, np.nextafter(floor, 2 * floor), floor
    x = np.resize(np.array([0, -0.0, -np.inf, np.nan, *below], dtype), 64)
    got, same = powers(x, factor, vectors=vectors)
    assert same == floor
    np.testing.assert_array_equal(got[:8], np.array([1, 1, 0, np.nan, 0, 0, 0, 0], dtype))
    np.testing.assert_array_equal(got, np.resize(got[:8], 64))


def test_short_for_bfloat16(rng):
    x = rng.uniform(-120, 8, 20_000).astype(np.float32)
    got, _ = powers(x, 1.0, short=True)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(got - exact) / exact).max() < 6e-7
    assert powers(np.zeros(64, np.float32), 1.0, short=True)[0].tolist() == [1.0] * 64
