"""What bad input gets: an error of the right kind that names the argument, before anything is written."""

import re

import numpy as np
import pytest
from ml_dtypes import bfloat16
from scipy.sparse import csr_array

import nbattn
from nbattn import merge_states, scaled_dot_product_attention, varlen_attention


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {"query": zeros(2, 4, 3, 8), "key": zeros(2, 2, 5, 8), "value": zeros(2, 2, 5, 6)}
OUT = (2, 4, 3, 6)

BAD = {
    # shapes
    "head_dim": ({"key": zeros(2, 2, 5, 7)}, ValueError, "query has head_dim 8 but key has 7; both"),
    "key count": ({"value": zeros(2, 2, 4, 6)}, ValueError, "key has 5 positions but value has 4"),
    "kv heads": ({"value": zeros(2, 4, 5, 6)}, ValueError, "key has 2 heads but value has 4"),
    "batch": ({"query": zeros(3, 4, 3, 8)}, ValueError, "batch sizes 3, 2 and 2"),
    "head counts": ({"query": zeros(2, 3, 3, 8)}, ValueError, "query has 3 heads and key has 2.*multiple"),
    "fewer heads": ({"query": zeros(2, 1, 3, 8)}, ValueError, "query has 1 heads and key has 2.*multiple"),
    "no heads": ({"key": zeros(2, 0, 5, 8), "value": zeros(2, 0, 5, 6)}, ValueError, "4 heads and key has 0"),
    "mixed ndim": ({"query": zeros(4, 3, 8)}, ValueError, "3, 4 and 4 dimensions.*same number"),
    "5 dimensions": (
        {name: x[None] for name, x in GOOD.items()}, ValueError, "5, 5 and 5 dimensions; expected .* 2 to 4",
    ),
    "1 dimension": (dict.fromkeys(GOOD, zeros(8)), ValueError, "1, 1 and 1 dimensions"),
    "no numbers": (
        {"query": zeros(2, 4, 3, 0), "key": zeros(2, 2, 5, 0)}, ValueError, "head_dim must be at least 1",
    ),
    "no value numbers": ({"value": zeros(2, 2, 5, 0)}, ValueError, "at least 1, got 8 .* 0 for value"),
    # dtypes
    "mixed dtypes": ({"key": zeros(2, 2, 5, 8, dtype=np.float64)}, TypeError, "float32, float64 and float32"),
    "half and bfloat16": (
        {"query": zeros(2, 4, 3, 8, dtype=np.float16), "key": zeros(2, 2, 5, 8, dtype=bfloat16)}, TypeError,
        "float16, bfloat16 and float32",
    ),
    "integers": ({"query": zeros(2, 4, 3, 8, dtype=np.int32)}, TypeError, r"query has dtype int32.*\.astype"),
    "bools": ({"value": zeros(2, 2, 5, 6, dtype=bool)}, TypeError, r"value has dtype bool.*value\.astype"),
    "complex": ({"key": zeros(2, 2, 5, 8, dtype=np.complex64)}, TypeError, "key has dtype complex64"),
    "long double": ({"key": zeros(2, 2, 5, 8, dtype=np.longdouble)}, TypeError, "key has dtype"),
    "text": ({"query": "abc"}, TypeError, "query has dtype"),
    "None": ({"query": None}, TypeError, "query has dtype object"),
    "ragged": ({"query": [[1.0], [1.0, 2.0]]}, TypeError, "query cannot be read as an array"),
    # mask and bias
    "function as mask": (
        {"mask": lambda b, h, i, j: i >= j}, TypeError,
        r"mask is a function; pass it as mask_mod, or BlockMask.from_mask_mod of it",
    ),
    "sparse mask": (
        {"mask": csr_array(zeros(3, 5))}, TypeError, r"mask is a csr_array; pass BlockMask.from_sparse of it",
    ),
    "float mask": ({"mask": zeros(3, 5)}, TypeError, "mask has dtype float32.*as bias"),
    "bfloat16 mask": ({"mask": zeros(3, 5, dtype=bfloat16)}, TypeError, "mask has dtype bfloat16.*as bias"),
    "complex mask": ({"mask": zeros(3, 5, dtype=complex)}, TypeError, "mask has dtype complex128.*use bool"),
    "mask shape": (
        {"mask": zeros(3, 4, dtype=bool)}, ValueError,
        r"mask has shape \(3, 4\).*\(batch, heads, queries, keys\) = \(2, 4, 3, 5\)",
    ),
    "mask from the left": ({"mask": zeros(2, 4, dtype=bool)}, ValueError, r"mask has shape \(2, 4\)"),
    "mask of kv heads": ({"mask": zeros(2, 3, 5, dtype=bool)}, ValueError, r"mask has shape \(2, 3, 5\)"),
    "mask with 5 dimensions": ({"mask": zeros(1, 1, 1, 1, 1, dtype=bool)}, ValueError, "mask has shape"),
    "empty mask": ({"mask": zeros(0, dtype=bool)}, ValueError, r"mask has shape \(0,\)"),
    "bool bias": ({"bias": zeros(3, 5, dtype=bool)}, TypeError, "bias has dtype bool.*as mask"),
    "int bias": ({"bias": zeros(3, 5, dtype=int)}, TypeError, "bias has dtype int64.*as mask"),
    "bias shape": ({"bias": zeros(5, 3)}, ValueError, r"bias has shape \(5, 3\)"),
    # positions
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal must be True or False, got int"),
    "window of one": ({"window_size": 3}, TypeError, "window_size must be a pair"),
    "window of three": ({"window_size": (1, 2, 3)}, ValueError, "window_size must be a pair"),
    "float window": ({"window_size": (1.5, 0)}, TypeError, "window_size must be an integer, got float"),
    "negative window": ({"window_size": (-2, 0)}, ValueError, "window_size must hold non-negative.*-2"),
    "bool window": ({"window_size": (True, 0)}, TypeError, "window_size must be an integer, got bool"),
    "offset": ({"query_offset": 1.0}, TypeError, "query_offset must be an integer, got float"),
    "offset None": ({"query_offset": None}, TypeError, "query_offset must be an integer, got NoneType"),
    "offset word": ({"query_offset": "start"}, ValueError, "query_offset.*'end', got 'start'"),
    "offset shape": ({"query_offset": [1, 2, 3]}, ValueError, r"query_offset has shape \(3,\)"),
    "offset dtype": ({"query_offset": [1.0, 2.0]}, TypeError, "query_offset must hold integers"),
    "offset size": ({"query_offset": 2**62}, ValueError, r"query_offset must be smaller than 2\*\*40"),
    "offset beyond": (
        {"query_offset": np.array([0, 2**64 - 1], np.uint64)},
        ValueError,
        r"must be smaller than 2\*\*40",
    ),
    "offset sizes": ({"query_offset": [0, -(2**63)]}, ValueError, r"must be smaller than 2\*\*40"),
    "lengths too long": ({"key_lengths": [5, 6]}, ValueError, r"key_lengths\[1\] is 6; expected 0 to 5"),
    "lengths negative": ({"key_lengths": [-1, 5]}, ValueError, r"key_lengths\[0\] is -1; expected 0 to 5"),
    "lengths shape": ({"key_lengths": [5]}, ValueError, r"key_lengths has shape \(1,\); expected \(2,\)"),
    "lengths scalar": ({"key_lengths": 5}, ValueError, r"key_lengths has shape \(\)"),
    "lengths dtype": ({"key_lengths": [5.0, 5.0]}, TypeError, "key_lengths must hold integers"),
    # numbers
    "scale": ({"scale": np.nan}, ValueError, "scale must be finite, got nan"),
    "scale kind": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "scale array": ({"scale": np.ones(3)}, TypeError, "scale must be a number, got ndarray"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be positive.*-1.0"),
    "softcap kind": ({"softcap": 1j}, TypeError, "softcap must be a number, got complex"),
    "softcap inf": ({"softcap": np.inf}, ValueError, "softcap must be finite"),
    "slopes shape": ({"alibi_slopes": zeros(2)}, ValueError, r"alibi_slopes has shape \(2,\); expected"),
    "slopes dtype": ({"alibi_slopes": zeros(4, dtype=int)}, TypeError, "alibi_slopes has dtype int64"),
    "sinks shape": ({"sinks": zeros(4, 1)}, ValueError, r"sinks has shape \(4, 1\); expected \(4,\)"),
    "sinks dtype": ({"sinks": [0, 0, 0, 0]}, TypeError, "sinks has dtype int64"),
    "compute_dtype": ({"compute_dtype": "float16"}, ValueError, "compute_dtype is 'float16' with float32"),
    "compute_dtype with float64": (
        {name: x.astype(np.float64) for name, x in GOOD.items()} | {"compute_dtype": "bfloat16"}, ValueError,
        "compute_dtype is 'bfloat16' with float64 inputs",
    ),
    "return_lse": ({"return_lse": "yes"}, TypeError, "return_lse must be True or False, got str"),
    "return_weights": ({"return_weights": None}, TypeError, "return_weights must be True or False"),
    # where
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu'; expected None, 'cpu'"),
    "backend kind": ({"backend": 1}, ValueError, "backend is 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(backend, case):
    changed, kind, message = BAD[case]
    dtype = getattr(changed.get("query"), "dtype", np.float32)
    out = np.full(OUT, 7, dtype)
    with pytest.raises(kind, match=message) as caught:
        scaled_dot_product_attention(**{"out": out, "backend": backend, **GOOD, **changed})
    assert type(caught.value) is kind
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"is_causal": True}, {"is_causal": 1}),
        ({"is_causal": False}, {"is_causal": 0}),
        ({"query_offset": 1}, {"query_offset": 1.0}),
        ({"query_offset": 1}, {"query_offset": True}),
        ({"window_size": (1, 0)}, {"window_size": (1.0, 0)}),
        ({"window_size": (1, 0)}, {"window_size": (True, 0)}),
        ({}, {"window_size": ()}),
    ],
    ids=str,
)
def test_errors_do_not_depend_on_earlier_calls(good, bad):
    """Equal to what was fine before is not enough."""
    for _ in range(4):
        scaled_dot_product_attention(**GOOD, **good)
    with pytest.raises((TypeError, ValueError)):
        scaled_dot_product_attention(**GOOD, **bad)


BAD_OUT = {
    "list": ([[0.0]], TypeError, "out must be a numpy array, got list"),
    "shape": (zeros(2, 4, 3, 8), ValueError, re.escape("out has shape (2, 4, 3, 8); expected (2, 4, 3, 6)")),
    "dimensions": (zeros(4, 3, 6), ValueError, re.escape("out has shape (4, 3, 6); expected (2, 4, 3, 6)")),
    "dtype": (zeros(*OUT, dtype=np.float64), ValueError, "out has dtype float64; expected float32"),
    "byte order": (zeros(*OUT, dtype=np.dtype("f4").newbyteorder()), ValueError, "out has dtype .f4"),
    "read-only": (np.broadcast_to(np.float32(0), OUT), ValueError, "out is read-only"),
    "one place for all": (
        np.lib.stride_tricks.as_strided(zeros(6), OUT, (0, 0, 0, 4)), ValueError, "broadcast axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OUT)
def test_bad_out(backend, case):
    out, kind, message = BAD_OUT[case]
    with pytest.raises(kind, match=message):
        scaled_dot_product_attention(**GOOD, out=out, backend=backend)


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "bias", "sinks"])
def test_out_overlaps(backend, name):
    size = {"query": 192, "key": 160, "value": 120, "mask": 15, "bias": 15, "sinks": 4}[name]
    base = np.full(400, 7, np.float32)
    numbers = base[:size] if name != "mask" else base.view(np.uint32)[:size]
    arrays = {**GOOD, "mask": np.ones((3, 5), bool), "bias": zeros(3, 5), "sinks": zeros(4)}
    arrays[name] = numbers.reshape(arrays[name].shape)
    for start in (0, size - 1):
        out = base[start : start + 144].reshape(OUT)
        with pytest.raises(ValueError, match="out shares memory with an input"):
            scaled_dot_product_attention(**arrays, out=out, backend=backend)
        assert (base == 7).all()
    scaled_dot_product_attention(**arrays, out=base[size : size + 144].reshape(OUT), backend=backend)


def test_out_overlaps_an_input_that_was_copied(backend):
    base = np.full((2, 4, 3, 16), 7, np.float32)
    query = base[..., ::2]
    with pytest.raises(ValueError, match="out shares memory"):
        scaled_dot_product_attention(**GOOD | {"query": query}, out=base[..., 4:10], backend=backend)


PACKED = {"query": zeros(6, 4, 8), "key": zeros(9, 2, 8), "value": zeros(9, 2, 6)}
STARTS = {"cu_seqlens_q": [0, 2, 6], "cu_seqlens_k": [0, 9, 9]}
BAD_PACKED = {
    "4 dimensions": (
        {"query": zeros(1, 6, 4, 8)},
        ValueError,
        r"query has shape \(1, 6, 4, 8\); expected 3 dim",
    ),
    "2 dimensions": ({"value": zeros(9, 6)}, ValueError, r"value has shape \(9, 6\); expected 3 dim"),
    "head_dim": ({"key": zeros(9, 2, 7)}, ValueError, "query has head_dim 8 but key has 7"),
    "key count": ({"value": zeros(8, 2, 6)}, ValueError, "key has 9 positions but value has 8"),
    "head counts": ({"query": zeros(6, 3, 8)}, ValueError, "multiple of the number of key heads"),
    "integers": ({"query": zeros(6, 4, 8, dtype=int)}, TypeError, "query has dtype int64"),
    "starts at": ({"cu_seqlens_q": [1, 2, 6]}, ValueError, "cu_seqlens_q starts at 1; expected 0"),
    "negative": ({"cu_seqlens_k": [-1, 2, 9]}, ValueError, "cu_seqlens_k starts at -1; expected 0"),
    "decreasing": (
        {"cu_seqlens_k": [0, 10, 9]},
        ValueError,
        "cu_seqlens_k decreases from 10 to 9 at entry 2",
    ),
    "decreasing by too much to count": (
        {"cu_seqlens_q": [0, 2, 2, 6], "cu_seqlens_k": [0, 2**62, -(2**62) - 1, 9]},
        ValueError,
        "cu_seqlens_k decreases from",
    ),
    "ends at": ({"cu_seqlens_q": [0, 2, 5]}, ValueError, "cu_seqlens_q ends at 5 but query has 6 rows"),
    "ends beyond": ({"cu_seqlens_k": [0, 2, 10]}, ValueError, "cu_seqlens_k ends at 10 but key has 9 rows"),
    "float starts": ({"cu_seqlens_q": [0.0, 2.0, 6.0]}, TypeError, "cu_seqlens_q must hold integers"),
    "2-D starts": ({"cu_seqlens_q": [[0, 2, 6]]}, ValueError, r"cu_seqlens_q has shape \(1, 3\)"),
    "no starts": ({"cu_seqlens_q": np.zeros(0, int)}, ValueError, r"cu_seqlens_q has shape \(0,\)"),
    "other count": ({"cu_seqlens_k": [0, 9]}, ValueError, "cu_seqlens_q has 3 entries and cu_seqlens_k 2"),
    "lengths": ({"key_lengths": [9, 1]}, ValueError, r"key_lengths\[1\] is 1; expected 0 to 0"),
    "mask shape": ({"mask": np.ones((6, 9), bool)}, ValueError, r"mask has shape \(6, 9\).*\(2, 4, 4, 9\)"),
    "out": ({"out": zeros(6, 4, 8)}, ValueError, r"out has shape \(6, 4, 8\); expected \(6, 4, 6\)"),
    "backend": ({"backend": "numpy"}, ValueError, "backend is 'numpy'"),
}


@pytest.mark.parametrize("case", BAD_PACKED)
def test_bad_packed(backend, case):
    changed, kind, message = BAD_PACKED[case]
    out = np.full((6, 4, 6), 7, np.float32)
    with pytest.raises(kind, match=message):
        varlen_attention(**{"out": out, "backend": backend, **PACKED, **STARTS, **changed})
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("outputs", "lses", "kind", "message"),
    [
        (zeros(2, 3, 4), zeros(2, 4), ValueError, r"outputs has shape \(2, 3, 4\) and lses \(2, 4\)"),
        (zeros(3), zeros(), ValueError, "outputs has shape"),
        (np.float32(1), np.float32(1), ValueError, "outputs has shape"),
        (zeros(2, 3, 4, dtype=int), zeros(2, 3), TypeError, "outputs has dtype int64"),
        (zeros(2, 3, 4), zeros(2, 3, dtype=bool), TypeError, "lses has dtype bool"),
    ],
)
def test_bad_states(outputs, lses, kind, message):
    with pytest.raises(kind, match=message):
        merge_states(outputs, lses)


SOFTMAX = ("softmax", "log_softmax", "logsumexp")
BAD_SOFTMAX = {
    "complex": ({"x": [1j]}, TypeError, "x has dtype complex128"),
    "text": ({"x": "abc"}, TypeError, "x has dtype"),
    "axis": ({"axis": 2}, ValueError, "axis is 2, but x has 2 dimensions"),
    "negative axis": ({"axis": (0, -3)}, ValueError, "axis is -3, but x has 2 dimensions"),
    "axis twice": ({"axis": (1, -1)}, ValueError, "axis names a dimension twice"),
    "float axis": ({"axis": 1.0}, TypeError, "axis must be an integer, got float"),
    "scalar": ({"x": 1.0}, ValueError, "axis is -1, but x has 0 dimensions"),
    "float where": ({"where": zeros(2, 3)}, TypeError, "where has dtype float32; expected bool or integer"),
    "where shape": (
        {"where": [True, False]},
        ValueError,
        r"where has shape \(2,\), which does not broadcast",
    ),
    "larger where": ({"where": np.ones((4, 2, 3), bool)}, ValueError, r"where has shape \(4, 2, 3\), which"),
    "scale": ({"scale": np.inf}, ValueError, "scale must be finite"),
    "scale kind": ({"scale": None}, TypeError, "scale must be a number"),
    "out shape": ({"out": zeros(7)}, ValueError, r"out has shape \(7,\)"),
    "out dtype": ({"out": zeros(2, 3, dtype=np.float64)}, ValueError, "out has"),
    "backend": ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
}


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("case", BAD_SOFTMAX)
def test_bad_softmax(backend, name, case):
    changed, kind, message = BAD_SOFTMAX[case]
    out = np.full((2, 3) if name != "logsumexp" else 2, 7, np.float32)
    with pytest.raises(kind, match=message):
        getattr(nbattn, name)(**{"x": zeros(2, 3), "out": out, "backend": backend, **changed})
    assert (out == 7).all()


def test_softmax_out_overlaps(backend):
    x = zeros(2, 3)
    for name in SOFTMAX[:2]:
        with pytest.raises(ValueError, match="out shares memory"):
            getattr(nbattn, name)(x, out=x, backend=backend)
    with pytest.raises(ValueError, match="out shares memory"):
        nbattn.logsumexp(x, out=x[:, 0], backend=backend)
    with pytest.raises(TypeError, match="keepdims must be True or False"):
        nbattn.logsumexp(x, keepdims=1, backend=backend)
