"""Luong's attention against its formulas, written a second time."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from ml_dtypes import bfloat16
from oracle import Result, assert_accurate, assert_same_bits, bounds, compute_dtype_of, normal, see

import nbattn

attend = partial(nbattn.luong_attention, return_weights=True, return_lse=True)
SCORES = ("dot", "general", "concat", "location")
LOCAL = ("global", "local-m", "local-p")


def case(rng, score, local, dtype=np.float32, batch=2, heads=4, kv_heads=2, queries=33, keys=70, dims=(12, 9),
         value_dim=17, width=4):  # fmt: skip
    """Query, key and value, and what the score and the window take."""
    if score == "dot":
        dims = (dims[0], dims[0])
    arrays = (
        normal(rng, (batch, heads, queries, dims[0]), dtype),
        normal(rng, (batch, kv_heads, keys, dims[1]), dtype),
        normal(rng, (batch, kv_heads, keys, value_dim), dtype),
    )
    shapes = {"general": dims, "concat": (21, sum(dims)), "location": (keys + 3, dims[0])}
    call = {"score": score}
    if score in shapes:
        call["weight"] = (normal(rng, shapes[score]) / 3).astype(dtype)
    if score == "concat":
        call["v"] = normal(rng, 21, dtype)
    if local != "global":
        call["local"] = width
    if local == "local-p":
        call["w_position"] = (normal(rng, (11, dims[0])) / 3).astype(dtype)
        call["v_position"] = normal(rng, 11, dtype)
    return arrays, call


def formula(query, key, value, *, compute, score, weight=None, v=None, local=None, w_position=None,
            v_position=None, **options):  # fmt: skip
    """Sections 3.1 and 3.2 of the paper in the dtype `compute`, positions counted from 0."""
    q, k, x = (np.asarray(a).astype(compute) for a in (query, key, value))
    weight, v, w_position, v_position = (
        None if a is None else a.astype(compute) for a in (weight, v, w_position, v_position)
    )
    group, keys = q.shape[1] // k.shape[1], k.shape[2]
    k, x = np.repeat(k, group, axis=1), np.repeat(x, group, axis=1)
    sizes = np.abs(q), np.abs(k)
    if score == "dot":
        scores, condition = (a @ b.swapaxes(2, 3) for a, b in ((q, k), sizes))
    elif score == "general":
        scores, condition = (
            a @ w @ b.swapaxes(2, 3) for a, w, b in ((q, weight, k), (sizes[0], np.abs(weight), sizes[1]))
        )
    elif score == "location":
        scores, condition = (a @ w[:keys].T for a, w in ((q, weight), (sizes[0], np.abs(weight))))
    else:
        both = np.empty((*q.shape[:3], keys, q.shape[3] + k.shape[3]), compute)
        both[..., : q.shape[3]], both[..., q.shape[3] :] = q[:, :, :, None], k[:, :, None]
        scores = np.tanh(both @ weight.T) @ v
        condition = np.full(scores.shape, np.abs(v).sum())
    if local is not None and w_position is None:
        options["window_size"] = (local, local)
    seen = see(scores.shape, options.pop("mask", None), **options)
    gaussian = compute(1)
    if w_position is not None:
        lengths = np.broadcast_to(options.get("key_lengths", keys), len(q)).astype(compute)
        with np.errstate(over="ignore"):
            p = lengths[:, None, None] / (1 + np.exp(-np.tanh(q @ w_position.T) @ v_position))
        distance = np.arange(keys) - p[..., None]
        seen &= np.abs(distance) <= local
        sigma = compute(local) / 2
        gaussian = np.exp(-(distance**2) / (2 * sigma**2))
        condition = condition + 4 * keys / local  # what an error of p does to the Gaussian
    scores = np.where(seen, scores, compute(-np.inf))
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    largest = np.where(np.isfinite(largest), largest, compute(0))
    exponentials = np.exp(scores - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    weights = exponentials / np.where(total == 0, compute(1), total) * gaussian
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[..., 0]
    condition = np.where(seen, condition, 0).max(axis=-1, initial=0)
    return Result(weights @ x, weights, lse, seen, weights @ np.abs(x), condition)


def check(backend, arrays, call, **options):
    """Hold output, weights and lse to the rule of `oracle`."""
    dtype = arrays[0].dtype
    compute = compute_dtype_of(dtype)
    wide = [x.astype(np.float64) for x in arrays]
    wide_call = {name: x.astype(np.float64) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    wider = np.longdouble if compute == np.float64 else np.float64
    plain, exact = (formula(*wide, **wide_call, compute=c, **options) for c in (compute, wider))
    units, few = bounds(exact, dtype, 4)
    wide_units, _ = bounds(exact, np.float64, 4)
    got = attend(*arrays, **call, backend=backend, **options)
    oracle = attend(*wide, **wide_call, backend="reference", **options)
    assert got.output.dtype == dtype
    assert got.weights.dtype == got.lse.dtype == compute
    assert not got.weights[~exact.seen].any()
    for name, unit in units.items():
        result, truth, near = (getattr(x, name) for x in (got, exact, plain))
        assert_accurate(result, truth, near.astype(result.dtype), unit, ulp=few[name], what=name)
        near, unit = near if compute == np.float64 else truth, wide_units[name]
        assert_accurate(getattr(oracle, name), truth, near, unit, ulp=2.0**-48, what=f"the oracle's {name}")
    return got


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "query_offset": 20},
    "lengths": {"key_lengths": [0, 33]},
    "mask": {"mask": np.random.default_rng(1).random((33, 70)) < 0.6},
}


class TestFormula:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, bfloat16], ids=lambda d: np.dtype(d).name)
    @pytest.mark.parametrize("local", LOCAL)
    @pytest.mark.parametrize("score", SCORES)
    def test_options(self, backend, score, local, dtype, rng):
        arrays, call = case(rng, score, local, dtype)
        for option in OPTIONS.values():
            check(backend, arrays, call, **option)

    @pytest.mark.isa
    @pytest.mark.parametrize("score", ["dot", "concat"])
    def test_processor(self, score, rng):
        check("cpu", *case(rng, score, "local-p"), **OPTIONS["mask"])

    @pytest.mark.parametrize("local", LOCAL)
    @pytest.mark.parametrize(
        ("queries", "keys", "dim", "value_dim", "width"),
        [(1, 1, 1, 1, 1), (1, 200, 16, 64, 3), (17, 5, 33, 65, 40), (40, 130, 64, 100, 70)],
    )
    def test_sizes(self, backend, local, queries, keys, dim, value_dim, width, rng):
        sizes = {"batch": 1, "queries": queries, "keys": keys, "dims": (dim, dim), "width": width}
        for dtype in (np.float32, np.float64):
            check(backend, *case(rng, "dot", local, dtype, value_dim=value_dim, **sizes))

    def test_concat_is_additive(self, rng):
        arrays, call = case(rng, "concat", "global")
        w = call["weight"]
        expected = nbattn.additive_attention(*arrays, w_query=w[:, :12], w_key=w[:, 12:], v=call["v"])
        assert_same_bits(nbattn.luong_attention(*arrays, **call), expected)

    def test_window_stands_still(self, backend, rng):
        """local-m looks at the query's own position, as `window_size` does."""
        arrays, call = case(rng, "dot", "local-m")
        got = attend(*arrays, **call, query_offset=[3, 40], backend=backend)
        expected = nbattn.scaled_dot_product_attention(
            *arrays, scale=1.0, window_size=(4, 4), query_offset=[3, 40], backend=backend
        )
        assert_same_bits(got.output, expected)


class TestPrediction:
    def test_known_position(self, backend):
        """A query that predicts the middle: with D = 2 and equal scores, weights are 1/5 of a Gaussian."""
        query, key = np.zeros((1, 3)), np.ones((8, 3))
        value = np.eye(8)
        output = nbattn.luong_attention(
            query, key, value, local=2, w_position=np.ones((1, 3)), v_position=np.ones(1), backend=backend
        )
        distance = np.arange(8) - 4.0  # 8 * sigmoid(0)
        expected = np.where(abs(distance) <= 2, np.exp(-(distance**2) / 2) / 5, 0)
        np.testing.assert_allclose(output[0], expected, rtol=1e-14)

    def test_far_out(self, backend, rng):
        """Positions at both ends, where a window has fewer keys."""
        arrays, call = case(rng, "dot", "local-p")
        call["v_position"] = np.full(11, 9, np.float32)
        call["w_position"] = np.broadcast_to(np.float32(3), (11, 12))
        check(backend, arrays, call)

    def test_nan(self, backend, rng):
        arrays, call = case(rng, "dot", "local-p", queries=5)
        clean = attend(*arrays, **call, backend=backend)
        key_seen = (clean.weights[0, :2] > 0).any(axis=(0, 1))
        blind = int(np.flatnonzero(~key_seen)[0])
        for x in arrays[1:]:
            x[0, 0, blind] = np.nan
        mask = np.ones((2, 4, 5, 70), bool)
        mask[1, 3, 2] = False
        arrays[0][1, 3, 1:3] = np.nan
        got = attend(*arrays, **call, mask=mask, backend=backend)
        expected = np.zeros((2, 4, 5), bool)
        expected[1, 3, 1] = True
        np.testing.assert_array_equal(np.isnan(got.output).all(-1), expected)
        np.testing.assert_array_equal(np.isnan(got.output).any(-1), expected)
        np.testing.assert_array_equal(np.isnan(got.lse), expected)
        assert not got.output[1, 3, 2].any()
        assert got.lse[1, 3, 2] == -np.inf
        assert_same_bits(got.output[0], clean.output[0])

    def test_memory_is_that_of_the_windows(self, rng):
        arrays, call = case(rng, "general", "local-p", batch=1, heads=1, kv_heads=1, queries=500, keys=2000)
        nbattn.luong_attention(*arrays, **call)
        tracemalloc.start()
        nbattn.luong_attention(*arrays, **call)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500 * 2000 * 4 / 5

    @pytest.mark.parametrize("score", ["dot", "concat"])
    def test_threads_and_batch(self, score, rng):
        import numba

        arrays, call = case(rng, score, "local-p", batch=3)
        lengths = np.array([70, 5, 64])
        before = numba.get_num_threads()
        try:
            numba.set_num_threads(1)
            alone = [
                attend(*(x[b : b + 1] for x in arrays), **call, key_lengths=lengths[b : b + 1])
                for b in range(3)
            ]
        finally:
            numba.set_num_threads(before)
        together = attend(*arrays, **call, key_lengths=lengths)
        for b in range(3):
            for x, y in zip(alone[b], together, strict=True):
                assert_same_bits(x, y[b : b + 1])

    @pytest.mark.parametrize("side", ["start", "end"])
    def test_guard_pages(self, guarded, side, rng):
        for score in SCORES:
            arrays, call = case(rng, score, "local-p", batch=1, queries=5, width=40)
            mask = rng.random((5, 70)) < 0.8
            expected = nbattn.luong_attention(*arrays, **call, mask=mask)
            call = {name: guarded(x, side) if isinstance(x, np.ndarray) else x for name, x in call.items()}
            out = guarded(np.zeros_like(expected), side)
            moved = [guarded(x, side) for x in arrays]
            nbattn.luong_attention(*moved, **call, mask=guarded(mask, side), out=out)
            assert_same_bits(out, expected)


class TestMemory:
    @pytest.mark.parametrize("local", LOCAL)
    @pytest.mark.parametrize("score", SCORES)
    def test_layouts(self, backend, score, local, rng):
        arrays, call = case(rng, score, local)
        expected = attend(*arrays, **call, backend=backend)
        moved = [np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3) for x in arrays]
        call = {name: np.asfortranarray(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}
        for x in (*moved, *call.values()):
            if isinstance(x, np.ndarray):
                x.flags.writeable = False
        result = np.full((2, 4, 17, 33), 7, np.float32).swapaxes(2, 3)
        got = attend(*moved, **call, out=result, backend=backend)
        assert got.output is result
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 if backend == "reference" else 0)

    @pytest.mark.parametrize("local", LOCAL)
    @pytest.mark.parametrize("missing", [1, 2])
    def test_missing_dimensions(self, backend, missing, local, rng):
        arrays, call = case(rng, "general", local, batch=1, heads=1, kv_heads=1)
        whole = attend(*arrays, **call, backend=backend)
        drop = (0,) * missing
        part = attend(*(x[drop] for x in arrays), **call, backend=backend)
        for x, y in zip(part, whole, strict=True):
            assert_same_bits(x, y[drop])

    @pytest.mark.parametrize("local", LOCAL)
    @pytest.mark.parametrize(
        "sizes", [{"queries": 0}, {"keys": 0}, {"batch": 0}, {"heads": 0, "kv_heads": 1}], ids=str
    )
    def test_empty(self, backend, sizes, local, rng):
        for score in SCORES:
            arrays, call = case(rng, score, local, **sizes)
            got = attend(*arrays, **call, backend=backend)
            assert got.output.shape == (*arrays[0].shape[:3], 17)
            assert not got.output.any()
            assert (got.lse == -np.inf).all()


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {"query": zeros(2, 4, 3, 8), "key": zeros(2, 2, 5, 6), "value": zeros(2, 2, 5, 7),
        "score": "general", "weight": zeros(8, 6)}  # fmt: skip
PREDICTS = {"local": 2, "w_position": zeros(4, 8), "v_position": zeros(4)}
BAD = {
    "score": ({"score": "cosine"}, ValueError, "score is 'cosine'; expected 'dot', 'general'"),
    "score kind": ({"score": None}, ValueError, "score is None"),
    "no weight": ({"weight": None}, ValueError, "score='general' needs weight"),
    "dot with weight": ({"score": "dot"}, ValueError, "score='dot' takes no weight"),
    "dot": ({"score": "dot", "weight": None}, ValueError, "query has head_dim 8 but key has 6; score='dot'"),
    "general": ({"weight": zeros(6, 8)}, ValueError, r"weight has shape \(6, 8\); expected \(8, 6\)"),
    "general with v": ({"v": zeros(3)}, ValueError, "score='general' takes no v"),
    "concat": ({"score": "concat", "v": zeros(3)}, ValueError, r"weight has shape \(8, 6\); .* \(A, 14\)"),
    "concat without v": ({"score": "concat", "weight": zeros(3, 14)}, ValueError, "score='concat' needs v"),
    "concat v": (
        {"score": "concat", "weight": zeros(3, 14), "v": zeros(4)}, ValueError,
        r"v has shape \(4,\); expected \(3,\)",
    ),
    "concat no units": ({"score": "concat", "weight": zeros(0, 14), "v": zeros(0)}, ValueError, r"\(A, 14\)"),
    "location": ({"score": "location"}, ValueError, r"weight has shape \(8, 6\); expected \(S, 8\)"),
    "few rows": ({"score": "location", "weight": zeros(4, 8)}, ValueError, "4 rows but there are 5 keys"),
    "weight dtype": ({"weight": zeros(8, 6, dtype=int)}, TypeError, "weight has dtype int64"),
    "local kind": ({"local": 2.0}, TypeError, "local must be an integer, got float"),
    "local": ({"local": -1}, ValueError, "local must be at least 0, got -1"),
    "no width": (PREDICTS | {"local": 0}, ValueError, "local, with a Gaussian .* at least 1, got 0"),
    "no local": (PREDICTS | {"local": None}, ValueError, "pass local, how far it reaches"),
    "no v_position": (PREDICTS | {"v_position": None}, ValueError, "pass both or neither"),
    "w_position": (PREDICTS | {"w_position": zeros(4, 6)}, ValueError, r"\(4, 6\); expected \(P, 8\)"),
    "v_position": (PREDICTS | {"v_position": zeros(3)}, ValueError, r"v_position .*; expected \(4,\)"),
    "integers": ({"key": zeros(2, 2, 5, 6, dtype=int)}, TypeError, "key has dtype int64"),
    "mask": ({"mask": zeros(3, 5)}, TypeError, "mask has dtype float32"),
    "out": ({"out": zeros(2, 4, 3, 8)}, ValueError, r"out has shape \(2, 4, 3, 8\); expected \(2, 4, 3, 7\)"),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(backend, name):
    changed, kind, message = BAD[name]
    out = np.full((2, 4, 3, 7), 7, np.float32)
    with pytest.raises(kind, match=message):
        nbattn.luong_attention(**{"out": out, "backend": backend, **GOOD, **changed})
    assert (out == 7).all()
