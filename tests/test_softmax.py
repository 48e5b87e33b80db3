"""softmax, log_softmax and logsumexp mean what scipy's mean, with masks."""

import importlib
import itertools

import hypothesis.strategies as st
import numba
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from ml_dtypes import finfo
from oracle import DTYPES, HALF, SIZES, assert_accurate, compute_dtype_of, normal

import nbattn
from nbattn.cpu import softmax as cpu_softmax

softmax_door = importlib.import_module("nbattn.softmax")  # not the function of this name
NAMES = ("softmax", "log_softmax", "logsumexp")
names = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
EMPTY = {"softmax": 0.0, "log_softmax": -np.inf, "logsumexp": -np.inf}


def formula(name, x, axis, where, scale, compute):
    """What scipy would say if the entries outside `where` were not there; finite entries only."""
    with np.errstate(all="ignore"):
        scores = np.where(where, np.asarray(x).astype(compute) * compute(scale), -np.inf)
        largest = scores.max(axis=axis, keepdims=True, initial=-np.inf)
        shifted = scores - np.where(largest == -np.inf, 0, largest)
        total = np.exp(shifted).sum(axis=axis, keepdims=True)
        if name == "softmax":
            return np.where(where, np.exp(shifted) / np.where(total == 0, 1, total), 0).astype(compute)
        if name == "log_softmax":
            return np.where(where, shifted - np.log(total), -np.inf).astype(compute)
        return np.squeeze(largest + np.log(total), axis=axis).astype(compute)


def check(backend, name, x, axis=-1, where=None, scale=1.0):
    dtype, compute = x.dtype, compute_dtype_of(x.dtype)
    kept = np.ones(x.shape, bool) if where is None else np.broadcast_to(np.asarray(where) != 0, x.shape)
    plain = formula(name, x, axis, kept, scale, compute).astype(dtype)
    exact = formula(name, x, axis, kept, scale, np.longdouble if dtype == np.float64 else np.float64)
    got = getattr(nbattn, name)(x, axis, where=where, scale=scale, backend=backend)
    assert got.dtype == dtype
    eps, stored_eps = float(finfo(compute).eps), float(finfo(dtype).eps)
    size = np.abs(np.where(kept, x.astype(np.float64) * scale, 0)).max(initial=1) * eps / stored_eps
    if name == "softmax":
        size = size * exact.max(axis=axis, keepdims=True, initial=0)
    unit = np.abs(np.where(np.isfinite(exact), exact, 0)) + size
    unit += max(float(finfo(dtype).smallest_subnormal), float(finfo(compute).smallest_normal) / eps)
    ulp = stored_eps / 2 if dtype in HALF else 4 * eps
    assert_accurate(np.asarray(got), np.asarray(exact), np.asarray(plain), unit, ulp=ulp, what=name)
    return got


@pytest.mark.gpu("slow")
@pytest.mark.isa
@names
@dtypes
def test_ragged_sizes(backend, name, dtype, rng):
    for n in SIZES:
        check(backend, name, normal(rng, (5, n), dtype))
        check(backend, name, normal(rng, (3, n, 6), dtype), axis=1, scale=3.0)
        check(backend, name, normal(rng, (37, n), dtype), scale=-0.5)
    for n in (255, 256, 257, 5000):
        check(backend, name, normal(rng, (17, n), dtype))
        check(backend, name, normal(rng, (n, 17), dtype), axis=0)


@pytest.mark.gpu
@names
@pytest.mark.parametrize(
    "axis", [0, 1, 2, 3, -1, -4, (0, 1), (1, 2), (3, 2), (0, 3), (1, 3, 0), (-1, 0, 1, 2), (), None]
)
def test_axes(backend, name, axis, rng):
    x = normal(rng, (3, 4, 5, 6), np.float64)
    where = rng.random((4, 1, 6)) < 0.6
    got = getattr(nbattn, name)(x, axis, backend=backend)
    expected = getattr(scipy.special, name)(x, axis=axis)
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)
    assert np.shape(got) == np.shape(expected)
    check(backend, name, x, axis, where)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, -1, (0, 2), (), None])
def test_keepdims(backend, axis, rng):
    x = normal(rng, (3, 4, 5))
    got = nbattn.logsumexp(x, axis, keepdims=True, backend=backend)
    expected = scipy.special.logsumexp(x, axis=axis, keepdims=True)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.gpu("slow")
@names
@dtypes
def test_where(backend, name, dtype, rng):
    x = normal(rng, (6, 40, 7), dtype)
    for shape in ((6, 40, 7), (40, 1), (6, 1, 1), (7,), ()):
        where = rng.random(shape) < 0.5
        for axis in (-1, 1, (0, 2)):
            check(backend, name, x, axis, where)
            check(backend, name, x, axis, where.astype(np.int64) * 256, scale=-2.0)


@pytest.mark.gpu
@names
@dtypes
def test_empty_rows(backend, name, dtype, rng):
    where = np.array([[True] * 9, [False] * 9])
    got = getattr(nbattn, name)(normal(rng, (2, 9), dtype), where=where, backend=backend)
    assert np.isfinite(got[0].astype(np.float64)).all()
    assert (got[1] == dtype(EMPTY[name])).all()


@pytest.mark.gpu
@names
@pytest.mark.parametrize(
    ("shape", "axis"), [((0,), -1), ((3, 0), -1), ((0, 3), -1), ((0, 3), 0), ((2, 0, 4), (0, 2))]
)
def test_empty_arrays(backend, name, shape, axis):
    got = getattr(nbattn, name)(np.zeros(shape, np.float32), axis, backend=backend)
    assert got.shape == (np.zeros(shape).sum(axis=axis).shape if name == "logsumexp" else shape)
    assert got.dtype == np.float32
    assert (got == -np.inf).all()


@pytest.mark.gpu
@names
@dtypes
def test_nothing_leaks_from_outside(backend, name, dtype, rng):
    x = normal(rng, (4, 50), dtype)
    where = rng.random((4, 50)) < 0.5
    expected = getattr(nbattn, name)(x, where=where, backend=backend)
    for poison in (np.nan, np.inf, -np.inf):
        x[~where] = poison
        got = getattr(nbattn, name)(x, where=where, backend=backend)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.gpu
@names
def test_nan_and_inf_are_scipys(backend, name):
    """Every pattern of three special numbers, in a row of five."""
    special = [0.5, 800.0, np.inf, -np.inf, np.nan]
    with np.errstate(all="ignore"):
        for row in itertools.product(special, repeat=3):
            x = np.array([[1.0, *row, 2.0], [*row, -np.inf, -np.inf]])
            expected = getattr(scipy.special, name)(x, axis=-1)
            np.testing.assert_allclose(
                getattr(nbattn, name)(x, backend=backend), expected, rtol=1e-14, err_msg=str(row)
            )
            columns = getattr(nbattn, name)(x.T.copy(), 0, backend=backend)
            np.testing.assert_allclose(columns.T, expected, rtol=1e-14)


@pytest.mark.gpu
@names
@dtypes
def test_far_apart(backend, name, dtype):
    x = np.array([[1e4, 0.0, -1e4], [-6e4, -6e4, -6e4]], dtype)
    expected = {
        "softmax": [[1, 0, 0], [1 / 3] * 3],
        "log_softmax": [[0, -float(x[0, 0]), 2 * float(x[0, 2])], [-np.log(3)] * 3],
        "logsumexp": [float(x[0, 0]), float(x[1, 0]) + np.log(3)],
    }[name]
    got = getattr(nbattn, name)(x, backend=backend)
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=float(finfo(dtype).eps))


@pytest.mark.gpu
def test_log_softmax_keeps_digits(backend):
    got = nbattn.log_softmax(np.array([0.0, -700.0, -1000.0]), backend=backend)
    np.testing.assert_array_equal(got, [0.0, -700.0, -1000.0])


@pytest.mark.gpu
@names
def test_scale(backend, name, rng):
    x = normal(rng, (3, 20), np.float64)
    for scale in (0.25, -3, 0, np.float32(2)):
        expected = getattr(scipy.special, name)(x * float(scale), axis=-1)
        np.testing.assert_allclose(
            getattr(nbattn, name)(x, scale=scale, backend=backend), expected, rtol=1e-12
        )


@pytest.mark.gpu
@names
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_integers_are_read_as_float64(backend, name, dtype, rng):
    x = rng.integers(0, 2, (3, 9)).astype(dtype)
    got = getattr(nbattn, name)(x, backend=backend)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, getattr(scipy.special, name)(x.astype(np.float64), axis=-1), rtol=1e-14)


@pytest.mark.gpu
@names
def test_scalars_and_lists(backend, name):
    function = getattr(nbattn, name)
    assert (
        function(3.0, None, backend=backend) == {"softmax": 1.0, "log_softmax": 0.0, "logsumexp": 3.0}[name]
    )
    assert np.shape(function([1.0, 2.0], backend=backend)) == (() if name == "logsumexp" else (2,))
    assert isinstance(nbattn.logsumexp([1.0, 2.0], backend=backend), np.float64)


@pytest.mark.gpu("slow")
@names
@dtypes
def test_layouts_and_out(backend, name, dtype, rng):
    function = getattr(nbattn, name)
    x = normal(rng, (4, 6, 50), dtype)
    where = rng.random((4, 6, 50)) < 0.7
    views = [
        np.asfortranarray,
        lambda a: a[::-1, :, ::-1].copy()[::-1, :, ::-1],
        lambda a: a.transpose(1, 0, 2).copy().transpose(1, 0, 2),
        lambda a: np.repeat(a, 2, axis=2)[..., ::2],
    ]
    for axis in (-1, 1, (0, 2)):
        expected = function(x, axis, where=where, backend=backend)
        for view in views:
            # The order of a sum may follow the layout of x, as it does in NumPy.
            got = function(view(x), axis, where=view(where), backend=backend)
            np.testing.assert_allclose(
                got.astype(np.float64), expected.astype(np.float64), rtol=4 * float(finfo(dtype).eps)
            )
            out = np.full(expected.shape, np.nan, dtype)
            out = view(out) if out.ndim == 3 else out[::-1].copy()[::-1]
            assert function(x, axis, where=where, out=out, backend=backend) is out
            np.testing.assert_array_equal(out, expected)


@pytest.mark.gpu
@names
def test_unaligned_and_byte_swapped(backend, name, rng):
    x = normal(rng, (4, 9))
    expected = getattr(nbattn, name)(x, backend=backend)
    swapped = getattr(nbattn, name)(x.astype(x.dtype.newbyteorder()), backend=backend)
    np.testing.assert_array_equal(swapped, expected, strict=True)
    unaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    unaligned[...] = x
    np.testing.assert_array_equal(getattr(nbattn, name)(unaligned, backend=backend), expected)
    out = np.empty(expected.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(expected.shape)
    getattr(nbattn, name)(x, out=out, backend=backend)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.isa
@names
@dtypes
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_outside_the_arrays_is_touched(backend, name, dtype, side, guarded, rng):
    for n in SIZES:
        for shape, axis in (((2, n), -1), ((n, 3), 0), ((2, n, 17), 1), ((33, n), 1)):
            x = guarded(normal(rng, shape, dtype), side)
            where = guarded(rng.random(shape) < 0.7, side)
            expected = getattr(nbattn, name)(x, axis, backend=backend)
            out = guarded(np.full(expected.shape, np.nan, dtype), side)
            getattr(nbattn, name)(x, axis, out=out, backend=backend)
            np.testing.assert_array_equal(out, expected)
            getattr(nbattn, name)(x, axis, where=where, out=out, backend=backend)


@pytest.mark.gpu
@names
def test_order_in_memory_is_kept(backend, name, rng):
    x = np.asfortranarray(normal(rng, (30, 40)))
    got = getattr(nbattn, name)(x, backend=backend)
    assert name == "logsumexp" or got.flags.f_contiguous


@pytest.fixture
def cut_small(monkeypatch):
    """The CPU kernels with work cut so small that small arrays meet every path, also past the caches."""
    small = {"CHUNK": 64, "CHUNK_ROWS": 5, "SEGMENT": 320, "PANEL": 1 << 12, "PANEL_LINES": 3, "TASK": 300}
    for constant, value in (small | {"SERIAL": 0, "STREAM": 0}).items():
        monkeypatch.setattr(cpu_softmax, constant, value)
    softmax_door._repeats.clear()


@pytest.mark.isa
@names
@dtypes
def test_work_cut_small(cut_small, name, dtype, rng):
    cases = [((3, 700), -1), ((700, 3), 0), ((700, 100), 0), ((2, 500, 33), 1), ((50, 40), 1), ((2, 2500), 1)]
    for shape, axis in cases:
        x = normal(rng, shape, dtype)
        check("cpu", name, x, axis, scale=-1.5)
        where = rng.random(shape) < 0.01
        check("cpu", name, np.where(where, x, dtype(np.nan)), axis, where)


@names
def test_nan_and_inf_in_long_rows(cut_small, name):
    with np.errstate(all="ignore"):
        for special in itertools.product([0.5, 800.0, np.inf, -np.inf, np.nan], repeat=3):
            x = np.full((2, 700), [[1.0], [-np.inf]])
            x[:, [3, 100, 699]] = special
            expected = getattr(scipy.special, name)(x, axis=-1)
            np.testing.assert_allclose(getattr(nbattn, name)(x), expected, rtol=1e-13, err_msg=str(special))
            columns = getattr(nbattn, name)(np.repeat(x.T, 9, axis=1), 0)
            np.testing.assert_allclose(columns.T[::9], expected, rtol=1e-13, err_msg=str(special))


@pytest.mark.isa
@dtypes
@pytest.mark.parametrize("side", ["start", "end"])
def test_past_the_caches_at_any_address(monkeypatch, dtype, side, guarded, rng):
    for shape, axis in (((3, 2049), 1), ((2, 2111), 1), ((9, 192), 0), ((2, 5, 200), 1)):
        x = guarded(normal(rng, shape, dtype), side)
        size = x.size
        for first in range(0, 33, 3):
            room = guarded(np.full(size + first, np.nan, dtype), side)
            out = room[first:].reshape(shape)
            monkeypatch.undo()
            expected = nbattn.softmax(x, axis)
            monkeypatch.setattr(cpu_softmax, "STREAM", 0)
            nbattn.softmax(x, axis, out=out)
            np.testing.assert_array_equal(out, expected)
            assert np.isnan(room[:first].astype(np.float32)).all()


@pytest.mark.isa
@dtypes
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows_written_while_the_next_is_read(monkeypatch, name, dtype, rng):
    """In several chunks, tasks and threads, the same bits as rows that are written at once."""
    x = normal(rng, (23, 2111), dtype)
    x[5], x[6, 3], x[9, 7], x[22, 2110] = -np.inf, np.nan, np.inf, np.nan
    monkeypatch.setattr(cpu_softmax, "CHUNK", 256)
    expected = getattr(nbattn, name)(x)
    for constant, value in {"STREAM": 0, "SERIAL": 0, "LATE_TASK": 4 * 2111}.items():
        monkeypatch.setattr(cpu_softmax, constant, value)
    for room in (np.full((25, 2111), 7, dtype), np.full((25, 2143), 7, dtype)):
        out = room[1:24, :2111]
        getattr(nbattn, name)(x, out=out)
        np.testing.assert_array_equal(out.astype(np.float64), expected.astype(np.float64))
        out[...] = 7
        assert (room == 7).all()


@names
def test_any_number_of_threads(cut_small, name, rng):
    arrays = [(normal(rng, (40, 700)), 1), (normal(rng, (700, 130)), 0), (normal(rng, (300, 40)), 1)]
    before = numba.get_num_threads()
    try:
        results = []
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            results += [[getattr(nbattn, name)(x, axis) for x, axis in arrays]]
    finally:
        numba.set_num_threads(before)
    for others in results[1:]:
        for got, expected in zip(others, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.gpu
@names
def test_rows_do_not_depend_on_each_other(backend, name, rng):
    for n in (5, 20, 130, 300):
        x = normal(rng, (40, n))
        together = getattr(nbattn, name)(x, backend=backend)
        for i in range(40):
            np.testing.assert_array_equal(getattr(nbattn, name)(x[i], backend=backend), together[i])


@pytest.mark.isa
@names
@given(data=st.data())
def test_everything_together(backend, name, data):
    everything(backend, name, data)


@pytest.mark.gpu("only")
@names
@settings(max_examples=15)
@given(data=st.data())
def test_some_of_everything(backend, name, data):
    everything(backend, name, data)


def everything(backend, name, data):
    shape = tuple(
        data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 16, 33]), min_size=1, max_size=3), label="shape")
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    x = (rng.standard_normal(shape) * data.draw(st.sampled_from([1, 30]), label="spread")).astype(dtype)
    axis = data.draw(st.sampled_from([None, *range(-len(shape), len(shape))]), label="axis")
    where = None
    if data.draw(st.booleans(), label="where"):
        where = rng.random(shape) < data.draw(st.sampled_from([0.1, 0.8]), label="share")
        x[~where] = np.nan
    check(backend, name, x, axis, where, scale=0.7)
