"""How arrays may lie in memory, what is written, and that results do not depend on what runs beside them."""

import importlib.util
import itertools
import mmap
import sys
import tracemalloc

import numpy as np
import pytest
from ml_dtypes import bfloat16
from oracle import DTYPES, SIZES, assert_same_bits, inputs, normal

import nbattn
import nbattn.reference.attention
from nbattn import scaled_dot_product_attention, varlen_attention

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def rebuilt(x, shape_of_base, view):
    """A copy of `x` that is `view` of a larger array; everything else in that array is NaN or True."""
    base = np.full(shape_of_base, True if x.dtype.kind in "bi" else np.nan, x.dtype)
    target = view(base)
    target[...] = x
    return target


def unaligned(x):
    result = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    result[...] = x
    return result


def odd_strides(x):
    """Rows that are no whole number of elements apart."""
    record = np.dtype([("row", x.dtype, x.shape[-1:]), ("pad", np.uint8, 1)])
    result = np.empty(x.shape[:-1], record)
    result["row"] = x
    return result["row"]


def read_only(x):
    result = x.copy()
    result.flags.writeable = False
    return result


LAYOUTS = {
    "batch, sequence, heads": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "sequence, batch, heads": lambda x: np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
    "reversed batch, heads, sequence": lambda x: x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "every other row": lambda x: rebuilt(
        x, (*x.shape[:2], 2 * x.shape[2], x.shape[3]), lambda base: base[:, :, 1::2]
    ),
    "part of a wider row": lambda x: rebuilt(x, (*x.shape[:3], x.shape[3] + 9), lambda base: base[..., 5:-4]),
    "every other number": lambda x: rebuilt(x, (*x.shape[:3], 2 * x.shape[3]), lambda base: base[..., ::2]),
    "reversed numbers": lambda x: x[..., ::-1].copy()[..., ::-1],
    "numbers first": lambda x: np.asfortranarray(x),
    "read-only": read_only,
    "unaligned": unaligned,
    "odd strides": odd_strides,
}


class TestLayouts:
    @dtypes
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_inputs(self, backend, dtype, layout, rng):
        arrays = inputs(rng, value_dim=9, dtype=dtype)
        if layout in ("unaligned", "odd strides") and np.dtype(dtype) == bfloat16:
            pytest.skip("ml_dtypes cannot make such an array")
        expected = scaled_dot_product_attention(*arrays, is_causal=True, query_offset="end", backend=backend)
        moved = [LAYOUTS[layout](x) for x in arrays]
        got = scaled_dot_product_attention(*moved, is_causal=True, query_offset="end", backend=backend)
        np.testing.assert_array_equal(got, expected, strict=True)
        for x, y in zip(moved, arrays, strict=True):
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_mask_and_bias(self, backend, layout, rng):
        q, k, v = inputs(rng)
        mask, bias = rng.random((2, 4, 33, 70)) < 0.5, normal(rng, (2, 4, 33, 70))
        mask = mask.astype(np.int32)
        expected = scaled_dot_product_attention(q, k, v, mask, bias=bias, backend=backend)
        move = LAYOUTS[layout]
        got = scaled_dot_product_attention(q, k, v, move(mask), bias=move(bias), backend=backend)
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 1, 2), (3,), (0, 1, 2, 3)])
    def test_broadcast_inputs(self, backend, axes, rng):
        arrays = inputs(rng, 2, 4, 4)
        flat = [
            np.broadcast_to(x[tuple(slice(1) if a in axes else slice(None) for a in range(4))], x.shape)
            for x in arrays
        ]
        expected = scaled_dot_product_attention(*(x.copy() for x in flat), backend=backend)
        # BLAS may sum in another order where rows lie elsewhere.
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if backend == "reference" else {"rtol": 0, "atol": 0}
        got = scaled_dot_product_attention(*flat, backend=backend)
        np.testing.assert_allclose(got, expected, **tolerance)

    def test_byte_swapped(self, backend, rng):
        arrays = inputs(rng)
        mask, bias = rng.integers(0, 2, (33, 70)), normal(rng, (33, 70))
        expected = scaled_dot_product_attention(*arrays, mask, bias=bias, backend=backend)
        q, k, v, mask, bias = (x.astype(x.dtype.newbyteorder()) for x in (*arrays, mask, bias))
        np.testing.assert_array_equal(
            scaled_dot_product_attention(q, k, v, mask, bias=bias, backend=backend), expected
        )

    @pytest.mark.parametrize(
        "layout",
        [
            "batch, sequence, heads",
            "reversed batch, heads, sequence",
            "every other row",
            "part of a wider row",
        ],
    )
    def test_views_are_read_where_they_lie(self, monkeypatch, layout, rng):
        problems = []
        monkeypatch.setattr(
            nbattn.reference.attention, "forward", lambda problem, *_: problems.append(problem)
        )
        arrays = [LAYOUTS[layout](x) for x in inputs(rng)]
        mask, bias = np.ones((33, 70), bool), np.ones((2, 1, 33, 70), np.float32)
        scaled_dot_product_attention(*arrays, mask, bias=bias, backend="reference")
        (p,) = problems
        for x, kernel_sees in zip(
            (*arrays, mask, bias), (p.query, p.key, p.value, p.mask, p.bias), strict=True
        ):
            assert np.shares_memory(x, kernel_sees)

    def test_packed(self, backend, rng):
        starts = [0, 10, 10, 33]
        x = normal(rng, (3, 33, 4, 17))
        expected = varlen_attention(*x.copy(), starts, starts, backend=backend)
        moved = rebuilt(x, (33, 4, 3, 20), lambda base: base.transpose(2, 0, 1, 3)[..., :17])
        np.testing.assert_array_equal(varlen_attention(*moved, starts, starts, backend=backend), expected)


class TestOut:
    @dtypes
    def test_is_written_and_returned(self, backend, dtype, rng):
        q, k, v = inputs(rng, value_dim=9, dtype=dtype)
        expected = scaled_dot_product_attention(q, k, v, backend=backend)
        for layout, make in LAYOUTS.items():
            if layout == "read-only" or (
                layout in ("unaligned", "odd strides") and np.dtype(dtype) == bfloat16
            ):
                continue
            out = make(np.full(expected.shape, np.nan, dtype))
            result = scaled_dot_product_attention(q, k, v, out=out, return_lse=True, backend=backend)
            assert result.output is out, layout
            np.testing.assert_array_equal(out, expected, err_msg=layout)

    def test_nothing_beside_it_is_written(self, backend, rng):
        q, k, v = inputs(rng, value_dim=9)
        base = np.full((2, 33, 5, 30), 7, np.float32)
        out = base.transpose(0, 2, 1, 3)[:, 1:, ::-1, 10:19]
        scaled_dot_product_attention(q, k, v, out=out, backend=backend)
        np.testing.assert_array_equal(out, scaled_dot_product_attention(q, k, v, backend=backend))
        out[...] = 7
        assert (base == 7).all()

    def test_beside_the_input_in_one_array(self, backend, rng):
        q, k, v = inputs(rng)
        base = np.empty((2, 4, 33, 34), np.float32)
        base[..., ::2] = q
        out = base[..., 1::2]
        scaled_dot_product_attention(base[..., ::2], k, v, out=out, backend=backend)
        np.testing.assert_array_equal(out, scaled_dot_product_attention(q, k, v, backend=backend))

    def test_fewer_dimensions(self, backend, rng):
        q, k, v = (x[0, 0] for x in inputs(rng))
        out = np.empty((33, 17), np.float32)
        assert scaled_dot_product_attention(q, k, v, out=out, backend=backend) is out
        np.testing.assert_array_equal(out, scaled_dot_product_attention(q, k, v, backend=backend))


@pytest.mark.isa
@dtypes
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_outside_the_arrays_is_touched(backend, dtype, side, guarded, rng):
    for queries, keys in zip(SIZES, rng.permutation(SIZES), strict=True):
        head_dim, value_dim = rng.choice(SIZES, 2)
        for heads, kv_heads in ((1, 1), (4, 2)):
            arrays = inputs(rng, 1, heads, kv_heads, queries, keys, head_dim, value_dim, dtype)
            mask = rng.random((queries, keys)) < 0.7
            bias = normal(rng, (heads, queries, keys), dtype)
            numbers = normal(rng, (2, heads))
            q, k, v, mask, bias, slopes, sinks = (guarded(x, side) for x in (*arrays, mask, bias, *numbers))
            out = guarded(np.full((1, heads, queries, value_dim), np.nan, dtype), side)
            lengths, offset = guarded(np.array([keys]), side), guarded(np.array([1]), side)
            common = {"out": out, "backend": backend}
            for options in ({}, {"return_lse": True, "return_weights": True}):
                scaled_dot_product_attention(q, k, v, **common, **options)
                scaled_dot_product_attention(
                    q, k, v, mask, bias=bias, alibi_slopes=slopes, sinks=sinks, key_lengths=lengths,
                    query_offset=offset, is_causal=True, **common, **options,
                )  # fmt: skip
            assert np.isfinite(out.astype(np.float32)).all()
            v[0, 0, keys // 2] = np.nan
            scaled_dot_product_attention(q, k, v, mask, **common)
            starts = (
                guarded(np.array([0, queries // 2, queries]), side),
                guarded(np.array([0, keys // 3, keys]), side),
            )
            packed = (guarded(x[0].swapaxes(0, 1), side) for x in (q, k, v))
            varlen_attention(*packed, *starts, sinks=sinks, backend=backend)


def test_memory_is_linear(rng):
    """A 4096 x 4096 score matrix would be 64 MB."""
    q, k, v = inputs(rng, 1, 1, 1, 4096, 4096, 64)
    out = np.empty_like(q)
    call = {"is_causal": True, "return_lse": True, "backend": "cpu"}
    scaled_dot_product_attention(q[:, :, :2], k, v, **call)
    tracemalloc.start()
    try:
        scaled_dot_product_attention(q, k, v, np.ones(4096, bool), bias=np.zeros((4096, 1)), out=out, **call)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 2**33, reason="needs Linux and 64 bits")
def test_beyond_32_bits(backend, rng):
    """Arrays whose halves lie 2**32 elements apart, in memory of which few pages are touched."""
    size = 2**33 + 2**24
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    base = np.frombuffer(memory, np.uint8)
    place = itertools.count(0, 2**16)

    def far(x, axis):
        strides = list(x.strides)
        strides[axis] = 2**32 * x.itemsize
        start = base[next(place) :].view(x.dtype)[:1]
        result = np.lib.stride_tricks.as_strided(start, x.shape, strides, writeable=True)
        result[...] = x
        return result

    arrays = inputs(rng, 2, 2, 2, 2, 2, 3, dtype=np.float16)
    mask, bias = rng.random((2, 2, 2, 2)) < 0.7, normal(rng, (2, 2, 2, 2), np.float16)
    call = {"return_lse": True, "backend": backend}
    expected = scaled_dot_product_attention(*arrays, mask, bias=bias, **call)
    for axis in range(3):
        moved, out = [far(x, axis) for x in arrays], far(np.zeros((2, 2, 2, 3), np.float16), axis)
        got = scaled_dot_product_attention(*moved, far(mask, axis), bias=far(bias, axis), out=out, **call)
        np.testing.assert_array_equal(got.output, expected.output)
        np.testing.assert_array_equal(got.lse, expected.lse)


class TestInputsAreNeverWritten:
    @dtypes
    def test_attention(self, backend, dtype, rng):
        mask, bias = rng.random((33, 70)) < 0.5, normal(rng, (33, 70), dtype)
        numbers = [rng.random(4), rng.random(4), np.array([3, -4]), np.array([60, 70])]
        arrays = [*inputs(rng, dtype=dtype), mask, bias, *numbers]
        arrays[2][0, 0, 9] = np.nan
        before = [x.copy() for x in arrays]
        for x in arrays:
            x.flags.writeable = False
        q, k, v, mask, bias, slopes, sinks, offset, lengths = arrays
        scaled_dot_product_attention(
            q, k, v, mask, bias=bias, alibi_slopes=slopes, sinks=sinks, query_offset=offset, is_causal=True,
            key_lengths=lengths, softcap=3.0, return_weights=True, return_lse=True, backend=backend,
        )  # fmt: skip
        for x, y in zip(arrays, before, strict=True):
            assert_same_bits(x, y)


class TestSameBits:
    """The result depends on nothing but the arguments."""

    OPTIONS = (
        {},
        {"is_causal": True, "query_offset": "end"},
        {"window_size": (40, 3), "sinks": np.array([0.0, 1.0, -1.0, 2.0])},
    )

    @dtypes
    @pytest.mark.parametrize("option", range(len(OPTIONS)))
    @pytest.mark.parametrize("queries", [1, 5, 300])
    def test_alone_and_in_a_batch(self, backend, dtype, option, queries, rng):
        q, k, v = inputs(rng, 5, 4, 2, queries, 310, 20, dtype=dtype)
        v[3, 0, 7] = np.nan
        lengths = np.array([310, 40, 1, 309, 96])
        call = {"return_lse": True, "return_weights": True, "backend": backend, **self.OPTIONS[option]}
        together = scaled_dot_product_attention(q, k, v, key_lengths=lengths, **call)
        for b in range(5):
            one = slice(b, b + 1)
            alone = scaled_dot_product_attention(q[one], k[one], v[one], key_lengths=lengths[one], **call)
            for x, y in zip(alone, together, strict=True):
                assert_same_bits(x, y[one])

    @pytest.mark.parametrize("option", range(len(OPTIONS)))
    def test_alone_and_packed(self, backend, option, rng):
        q_lengths, k_lengths = [1, 5, 300, 2, 70], [130, 9, 310, 1, 80]
        q_starts, k_starts = np.cumsum([0, *q_lengths]), np.cumsum([0, *k_lengths])
        q = normal(rng, (q_starts[-1], 4, 20))
        k, v = normal(rng, (2, k_starts[-1], 2, 20))
        call = {"return_lse": True, "backend": backend, **self.OPTIONS[option]}
        together = varlen_attention(q, k, v, q_starts, k_starts, **call)
        for b, (n, m) in enumerate(zip(q_lengths, k_lengths, strict=True)):
            rows, cols = slice(*q_starts[b : b + 2]), slice(*k_starts[b : b + 2])
            alone = varlen_attention(q[rows], k[cols], v[cols], [0, n], [0, m], **call)
            assert_same_bits(alone.output, together.output[rows])
            assert_same_bits(alone.lse, together.lse[rows])
            padded = scaled_dot_product_attention(
                *(x.swapaxes(0, 1) for x in (q[rows], k[cols], v[cols])), **call
            )
            assert_same_bits(padded.output.swapaxes(0, 1), alone.output)

    @dtypes
    def test_any_number_of_threads(self, dtype, rng):
        import numba

        cases = [inputs(rng, 3, 4, 2, n, 400, 64, dtype=dtype) for n in (1, 7, 400)]
        results = []
        before = numba.get_num_threads()
        try:
            for threads in (1, 2, min(4, numba.config.NUMBA_NUM_THREADS)):
                if threads > numba.config.NUMBA_NUM_THREADS:
                    continue
                numba.set_num_threads(threads)
                for _ in range(3):
                    results.append(
                        [
                            scaled_dot_product_attention(*x, is_causal=True, return_lse=True, backend="cpu")
                            for x in cases
                        ]
                    )
        finally:
            numba.set_num_threads(before)
        for result in results[1:]:
            for x, y in zip(result, results[0], strict=True):
                assert_same_bits(x.output, y.output)
                assert_same_bits(x.lse, y.lse)


class ArrayOnly:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class DLPackOnly:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class TestOtherArrays:
    @pytest.mark.parametrize(
        "wrap", [ArrayOnly, DLPackOnly, lambda x: x.tolist()], ids=["array", "dlpack", "list"]
    )
    def test_protocols(self, backend, wrap, rng):
        arrays = inputs(rng, dtype=np.float64)
        mask = rng.integers(0, 2, (33, 70))
        expected = scaled_dot_product_attention(*arrays, mask, sinks=np.ones(4), backend=backend)
        got = scaled_dot_product_attention(
            *map(wrap, (*arrays, mask)), sinks=wrap(np.ones(4)), backend=backend
        )
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, expected)

    def test_subclasses(self, backend, rng):
        q, k, v = (x[0, 0] for x in inputs(rng))
        expected = scaled_dot_product_attention(q, k, v, backend=backend)
        with pytest.warns(PendingDeprecationWarning):
            got = scaled_dot_product_attention(*map(np.matrix, (q, k, v)), backend=backend)
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, expected)

    @pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
    def test_torch(self, backend, rng, monkeypatch):
        import torch

        arrays = inputs(rng)
        tensors = [torch.from_numpy(x) for x in arrays]
        got = scaled_dot_product_attention(*tensors, torch.ones(33, 70, dtype=torch.bool), backend=backend)
        np.testing.assert_array_equal(got, scaled_dot_product_attention(*arrays, backend=backend))
        problems = []
        monkeypatch.setattr(
            nbattn.reference.attention, "forward", lambda problem, *_: problems.append(problem)
        )
        scaled_dot_product_attention(*tensors, backend="reference")
        assert np.shares_memory(problems[0].key, arrays[1])
