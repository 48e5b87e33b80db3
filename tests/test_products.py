"""Many rows times a matrix: `Linear` beyond `FEW` rows, against float64 and against itself."""

import math

import ml_dtypes
import numba
import numpy as np
import pytest

from nbattn.cpu import products
from nbattn.layers import FeedForward, Linear
from nbattn.layers.linear import ACTIVATIONS, FEW
from nbattn.reference import rowwise
from nbattn.reference.matvec import narrowed

# d_out and d_in: whole tiles or not, of 8, 16 and 64 columns; less than one; more than one depth.
SHAPES = [(64, 64), (32, 16), (70, 40), (100, 33), (129, 130), (33, 2 * products.DEPTH + 5)]


def made(rng, dtype, shape, groups=1):
    """(weight, scales, the matrix that they mean) of a dtype."""
    matrix = rng.standard_normal(shape, np.float32)
    weight, scales = narrowed(matrix, dtype, groups)
    wide = weight.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else weight
    wide = wide.astype(np.float64)
    return weight, scales, wide if scales is None else wide * np.repeat(scales, shape[1] // groups, axis=1)


def bound(matrix, x, rest):
    """Of the error of float32: a few ulp of the sum of magnitudes, for sums in any order."""
    size = np.abs(x).astype(np.float64) @ np.abs(matrix).T + np.abs(rest)
    return (4 + math.sqrt(matrix.shape[1])) * 2.0**-24 * size + 1e-30


def many(layer, rows):
    """The layer, once it is sure that so many rows go through the kernel."""
    assert layer._product(np.empty((rows, layer.d_in), np.float32)) is layer._many
    assert isinstance(layer._many, products.Plan)
    return layer


@pytest.mark.isa
@pytest.mark.parametrize("dtype", FEW)
def test_products(rng, dtype):
    for shape in SHAPES:
        weight, scales, matrix = made(rng, dtype, shape)
        bias = rng.standard_normal(shape[0], np.float32)
        layer = Linear(weight, bias, scales=scales)
        # Whatever is left behind tiles of 6 rows, and several tiles.
        for rows in (*range(FEW[dtype] + 1, FEW[dtype] + 7), 100):
            x = rng.standard_normal((rows, shape[1]), np.float32)
            exact = x.astype(np.float64) @ matrix.T + bias
            error = np.abs(many(layer, rows)(x) - exact)
            assert (error <= bound(matrix, x, bias)).all(), (shape, rows)
            assert error.max() > 0


@pytest.mark.isa
def test_groups(rng):
    for groups in (2, 3, 6):
        weight, scales, matrix = made(rng, "int8", (70, 192), groups)
        x = rng.standard_normal((30, 192), np.float32)
        y = many(Linear(weight, scales=scales), 30)(x)
        assert (np.abs(y - x.astype(np.float64) @ matrix.T) <= bound(matrix, x, 0)).all()


@pytest.mark.isa
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activation_and_what_is_added(rng, activation):
    """Of results in whole tiles and in the last one, which is not whole."""
    weight, _, matrix = made(rng, "float32", (2 * products.COLUMNS + 7, 40))
    bias = rng.standard_normal(len(weight), np.float32)
    layer = many(Linear(weight / 4, bias), 20)
    x, plus = (
        rng.standard_normal((2, 10, 40), np.float32),
        rng.standard_normal((2, 10, len(weight)), np.float32),
    )
    exact = x.astype(np.float64) @ matrix.T / 4 + bias
    if activation:
        exact = rowwise.activation(activation, exact)
    limit = bound(matrix / 4, x.reshape(20, 40), bias).reshape(exact.shape)
    for given in (None, plus, np.asfortranarray(plus)):
        y = layer(x, activation=activation, plus=given)
        total = exact if given is None else exact + given
        assert y.dtype == np.float32
        # A slope is 1.13 at most.
        assert (np.abs(y - total) <= 1.2 * limit + 2.0**-22 * np.abs(total) + 1e-6).all()
    few = layer(x[:, :2], activation=activation, plus=plus[:, :2])
    np.testing.assert_allclose(few, layer(x, activation=activation, plus=plus)[:, :2], rtol=1e-4, atol=1e-5)
    reference = Linear(weight / 4, bias, backend="reference")(x, activation=activation, plus=plus)
    np.testing.assert_allclose(reference, layer(x, activation=activation, plus=plus), rtol=1e-4, atol=1e-5)


def test_what_is_added_may_be_float64(rng):
    layer = Linear(np.ones((64, 64), np.float32))
    y = layer(np.ones((20, 64), np.float32), plus=np.full((20, 64), 1e-12))
    assert y.dtype == np.float64
    assert (y == 64 + 1e-12).all()


@pytest.mark.parametrize("dtype", FEW)
def test_the_same_bits(rng, dtype):
    """Whatever the number of threads, and whatever other rows there are."""
    weight, scales, _ = made(rng, dtype, (200, products.DEPTH + 64))
    layer = many(Linear(weight, rng.standard_normal(200, np.float32), scales=scales), FEW[dtype] + 1)
    x, plus = (rng.standard_normal((700, n), np.float32) for n in (layer.d_in, 200))
    threads = numba.get_num_threads()
    y = layer(x, activation="gelu", plus=plus)
    try:
        numba.set_num_threads(1)
        np.testing.assert_array_equal(layer(x, activation="gelu", plus=plus), y)
    finally:
        numba.set_num_threads(threads)
    few = FEW[dtype]
    for part in (np.s_[: few + 1], np.s_[100 : few + 105], np.s_[3:600], np.s_[::-1]):
        np.testing.assert_array_equal(layer(x[part], activation="gelu", plus=plus[part]), y[part])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_stay_alone(rng, value):
    """What is not finite in a row of x, or of the weight, reaches no other."""
    layer = Linear(rng.standard_normal((100, 40), np.float32), np.ones(100))
    x = rng.standard_normal((50, 40), np.float32)
    y = layer(x)
    x[17, 39] = x[49, 0] = value
    got = layer(x)
    assert not np.isfinite(got[[17, 49]]).any()
    np.testing.assert_array_equal(np.delete(got, [17, 49], 0), np.delete(y, [17, 49], 0))
    weight = layer.weight.copy()
    weight[99, 5] = weight[3, 39] = value
    got = Linear(weight, np.ones(100))(x[:17])
    assert not np.isfinite(got[:, [3, 99]]).any()
    np.testing.assert_array_equal(np.delete(got, [3, 99], 1), np.delete(y[:17], [3, 99], 1))


@pytest.mark.parametrize("dtype", FEW)
def test_nothing_beyond_the_arrays_is_read(rng, guarded, dtype):
    for shape in ((70, 35), (products.COLUMNS, 64)):
        weight, scales, matrix = made(rng, dtype, shape)
        for side in ("start", "end"):
            own = guarded(weight, side), guarded(np.ones(shape[0], np.float32), side)
            factors = None if scales is None else guarded(scales, side)
            rows = FEW[dtype] + 5
            x, plus = (guarded(rng.standard_normal((rows, n), np.float32), side) for n in shape[::-1])
            layer = many(Linear(*own, scales=factors), rows)
            assert np.shares_memory(layer.weight, own[0])
            np.testing.assert_allclose(layer(x, plus=plus), x @ matrix.T + 1 + plus, rtol=1e-4, atol=1e-4)


def test_nothing_beyond_the_results_is_written(rng, guarded):
    weight = rng.standard_normal((70, 64), np.float32)
    plan = products.Plan(weight, "float32", np.zeros(70, np.float32))
    x = rng.standard_normal((13, 64), np.float32)
    for side in ("start", "end"):
        y = guarded(np.zeros((13, 70), np.float32), side)
        plan(x, y)
        np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_strides(rng):
    weight = rng.standard_normal((140, 64), np.float32)
    x = rng.standard_normal((64, 20), np.float32).T
    for w in (np.asfortranarray(weight), weight[::2], weight[::-1], np.broadcast_to(weight[0], (70, 64))):
        np.testing.assert_array_equal(many(Linear(w), 20)(x), Linear(w.copy(order="C"))(x.copy()))


def test_small_matrices_and_float64(rng):
    for shape in ((1, 64), (64, 3)):
        layer = Linear(rng.standard_normal(shape, np.float32))
        x = rng.standard_normal((40, shape[1]), np.float32)
        np.testing.assert_allclose(layer(x, activation="relu"), np.maximum(x @ layer.weight.T, 0), atol=1e-4)
    layer, x = Linear(rng.standard_normal((64, 64))), rng.standard_normal((40, 64))
    y = layer(x, activation="silu", plus=x)
    np.testing.assert_allclose(y, rowwise.activation("silu", x @ layer.weight.T) + x, rtol=1e-12, atol=1e-12)


def test_complaints():
    layer = Linear(np.ones((64, 32), np.float32))
    x = np.ones((20, 32), np.float32)
    with pytest.raises(ValueError, match="activation is 'elu'; expected one of gelu, gelu_tanh, relu, silu"):
        layer(x, activation="elu")
    with pytest.raises(ValueError, match=r"plus has shape \(64,\); expected \(20, 64\), as the product"):
        layer(x, plus=np.ones(64, np.float32))
    with pytest.raises(TypeError, match="plus"):
        layer(x, plus=np.ones((20, 64), int))


def test_feed_forward_adds(rng):
    up, down = (Linear(rng.standard_normal(shape, np.float32) / 8) for shape in ((80, 64), (64, 80)))
    x, plus = rng.standard_normal((2, 30, 64), np.float32)
    layer = FeedForward(up, down)
    np.testing.assert_allclose(layer(x, plus=plus), layer(x) + plus, rtol=1e-5, atol=1e-5)
