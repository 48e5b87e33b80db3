"""Additive attention against its formula, written a second time."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from ml_dtypes import bfloat16
from oracle import DTYPES, Result, assert_accurate, assert_same_bits, bounds, compute_dtype_of, normal, see

import nbattn

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
attend = partial(nbattn.additive_attention, w_query=None, w_key=None, return_weights=True, return_lse=True)


def case(rng, dtype=np.float32, batch=2, heads=4, kv_heads=2, queries=33, keys=70, dims=(12, 9), units=21,
         value_dim=17, scale=1.0):  # fmt: skip
    """Query, key and value, and the network's weights; hidden units have a variance near 2 * scale**2."""
    arrays = (
        normal(rng, (batch, heads, queries, dims[0]), dtype),
        normal(rng, (batch, kv_heads, keys, dims[1]), dtype),
        normal(rng, (batch, kv_heads, keys, value_dim), dtype),
    )
    network = {
        "w_query": normal(rng, (units, dims[0])) * np.float32(scale / np.sqrt(dims[0])),
        "w_key": normal(rng, (units, dims[1])) * np.float32(scale / np.sqrt(dims[1])),
        "v": normal(rng, units),
        "bias": normal(rng, units),
    }
    return arrays, {name: x.astype(dtype) for name, x in network.items()}


def formula(query, key, value, *, w_query=None, w_key=None, v, bias=None, compute, **options):
    """softmax(v . tanh(a + b)) @ value in the dtype `compute`, for (B, H, S, D) inputs without NaN."""
    q, k, x, v = (np.asarray(a).astype(compute) for a in (query, key, value, v))
    group = q.shape[1] // k.shape[1]
    if w_query is not None:
        q = q @ np.swapaxes(np.asarray(w_query).astype(compute), -1, -2)
    if w_key is not None:
        k = k @ np.swapaxes(np.asarray(w_key).astype(compute), -1, -2)
    if bias is not None:
        q = q + np.asarray(bias).astype(compute).reshape(-1, 1, v.shape[-1])
    k, x = np.repeat(k, group, axis=1), np.repeat(x, group, axis=1)
    v = np.broadcast_to(v, (q.shape[1], v.shape[-1]))
    scores = np.stack([np.tanh(q[:, h, :, None] + k[:, h, None]) @ v[h] for h in range(q.shape[1])], axis=1)
    seen = see(scores.shape, options.pop("mask", None), **options)
    scores = np.where(seen, scores, compute(-np.inf))
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    largest = np.where(np.isfinite(largest), largest, compute(0))
    exponentials = np.exp(scores - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    weights = exponentials / np.where(total == 0, compute(1), total)
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[..., 0]
    condition = np.broadcast_to(np.abs(v).sum(axis=1)[:, None], lse.shape)
    return Result(weights @ x, weights, lse, seen, weights @ np.abs(x), condition)


def check(backend, arrays, network, **options):
    """Hold output, weights and lse to the rule of `oracle`."""
    dtype = arrays[0].dtype
    compute = compute_dtype_of(dtype)
    wide = [x.astype(np.float64) for x in arrays]
    wide_network = {name: x.astype(np.float64) for name, x in network.items()}
    wider = np.longdouble if compute == np.float64 else np.float64
    plain, exact = (formula(*wide, **wide_network, compute=c, **options) for c in (compute, wider))
    units, few = bounds(exact, dtype, 4)
    wide_units, _ = bounds(exact, np.float64, 4)
    got = attend(*arrays, **network, backend=backend, **options)
    oracle = attend(*wide, **wide_network, backend="reference", **options)
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
    "causal": {"is_causal": True},
    "causal at the end": {"is_causal": True, "query_offset": "end", "key_lengths": [61, 20]},
    "window": {"window_size": (5, 2), "query_offset": np.array([3, -30])},
    "lengths": {"key_lengths": [0, 33]},
    "rows": {"mask": np.arange(33)[:, None] % 3 > 0},
    "keys": {"mask": np.arange(70) % 7 > 2},
    "mask": {"mask": np.random.default_rng(1).random((2, 4, 33, 70)) < 0.3},
}


class TestFormula:
    @pytest.mark.isa
    @pytest.mark.parametrize("scale", [1, 12])
    def test_processor(self, scale, rng):
        check("cpu", *case(rng, scale=scale), **OPTIONS["mask"])

    @dtypes
    @pytest.mark.parametrize("option", OPTIONS)
    def test_options(self, backend, dtype, option, rng):
        check(backend, *case(rng, dtype), **OPTIONS[option])

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize(
        ("queries", "keys", "units", "value_dim"),
        [(1, 1, 1, 1), (1, 130, 8, 16), (2, 65, 7, 3), (5, 5, 9, 33), (16, 64, 16, 1), (17, 31, 15, 64),
         (63, 129, 33, 15), (64, 128, 64, 17), (130, 66, 24, 20)],
    )  # fmt: skip
    def test_sizes(self, backend, dtype, queries, keys, units, value_dim, rng):
        sizes = queries, keys, (units + 1, units), units, value_dim
        check(backend, *case(rng, dtype, 1, 2, 1, *sizes))
        check(backend, *case(rng, dtype, 3, 2, 2, *sizes), is_causal=True, query_offset="end")

    @pytest.mark.parametrize("queries", [3, 33])
    def test_weights_for_each_head(self, backend, queries, rng):
        arrays, _ = case(rng, queries=queries)
        network = {
            "w_query": normal(rng, (4, 21, 12)), "w_key": normal(rng, (2, 21, 9)),
            "v": normal(rng, (4, 21)), "bias": normal(rng, (4, 21)),
        }  # fmt: skip
        check(backend, arrays, network)

    @pytest.mark.parametrize("given", [("v",), ("w_query", "v"), ("w_key", "v", "bias")])
    def test_projected_already(self, backend, given, rng):
        arrays, network = case(rng, dims=(21, 21))
        check(backend, arrays, {name: network[name] for name in given})

    def test_mixed_dtypes_of_weights(self, backend, rng):
        arrays, network = case(rng, bfloat16)
        narrow = attend(*arrays, **network, backend=backend)
        wide = attend(*arrays, **{n: x.astype(np.float64) for n, x in network.items()}, backend=backend)
        for x, y in zip(narrow, wide, strict=True):
            assert_same_bits(x, y)


class TestExtremes:
    """Where exponentials overflow, or where tanh is 1."""

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("scale", [1e-4, 3, 12, 60, 1e4])
    def test_hidden_units(self, backend, dtype, scale, rng):
        check(backend, *case(rng, dtype, scale=scale))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_what_cancels(self, backend, dtype, rng):
        """Units of queries and keys that are far out, whose sums are not."""
        arrays, network = case(rng, dtype, dims=(21, 21))
        q, k, v = arrays
        far = np.linspace(-9, 9, 21) ** 3  # up to 729, whose exponentials no dtype holds
        far = np.round(far).astype(dtype)
        quarters = (np.round(q * 4) / 4 + far).astype(dtype), (np.round(k * 4) / 4 - far).astype(dtype)
        check(backend, (*quarters, v), {"v": network["v"]})

    @pytest.mark.parametrize("v", [0.0, 1e-30, 1e4, "one", "apart"])
    def test_v(self, backend, v, rng):
        arrays, network = case(rng, scale=2)
        factors = {"one": np.arange(21) == 4, "apart": 10.0 ** np.linspace(-35, 0, 21)}.get(v, v)
        network["v"] = (network["v"] * factors).astype(np.float32)
        check(backend, arrays, network)

    def test_infinite_units(self, backend, rng):
        """tanh of inf is 1."""
        arrays, network = case(rng, dims=(21, 21))
        q, k, v = arrays
        few = np.arange(21) < 3
        far, farther = (np.where(few, x, q).astype(np.float32) for x in (99, np.inf))
        expected, got = (attend(x, k, v, v=network["v"], backend=backend) for x in (far, farther))
        np.testing.assert_allclose(got.output, expected.output, rtol=1e-6)


class TestNaN:
    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    def test_behind_masks(self, backend, number, rng):
        arrays, network = case(rng, queries=70)
        mask = rng.random((70, 70)) < 0.5
        mask[:, 5] = False
        call = {**network, "mask": mask, "key_lengths": [64, 70], "window_size": (30, 30), "backend": backend}
        clean = attend(*arrays, **call)
        for x in arrays[1:]:
            x[:, :, 5] = number
            x[0, :, 64:] = number
        for x, y in zip(attend(*arrays, **call), clean, strict=True):
            assert_same_bits(x, y)

    def test_only_where_it_is_seen(self, backend, rng):
        arrays, network = case(rng)
        arrays[2][0, 1, 40, 3] = np.nan
        arrays[1][1, 0, 20, 4] = np.nan
        arrays[0][1, 3, 30, 0] = np.nan
        got = attend(*arrays, **network, is_causal=True, query_offset=10, backend=backend)
        broken = np.zeros(got.output.shape, bool)
        broken[0, 2:, 30:, 3] = True
        broken[1, :2, 10:] = True
        broken[1, 3, 30] = True
        np.testing.assert_array_equal(np.isnan(got.output), broken)
        broken[0] = False  # a value is no part of the sums
        np.testing.assert_array_equal(np.isnan(got.lse), broken.all(-1))

    def test_rows_that_see_nothing(self, backend, rng):
        arrays, network = case(rng)
        got = attend(*arrays, **network, mask=np.arange(33)[:, None] > 4, backend=backend)
        assert not got.output[:, :, :5].any()
        assert not got.weights[:, :, :5].any()
        assert (got.lse[:, :, :5] == -np.inf).all()
        np.testing.assert_allclose(got.weights[:, :, 5:].sum(-1), 1, rtol=1e-5)


class TestMemory:
    def test_layouts(self, backend, rng):
        arrays, network = case(rng)
        expected = attend(*arrays, **network, backend=backend)
        moved = [np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3) for x in arrays]
        network = {name: np.asfortranarray(x) for name, x in network.items()}
        for x in (*moved, *network.values()):
            x.flags.writeable = False
        result = np.full((2, 4, 17, 33), 7, np.float32).swapaxes(2, 3)
        got = attend(*moved, **network, out=result, backend=backend)
        assert got.output is result
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 if backend == "reference" else 0)

    @pytest.mark.parametrize("missing", [1, 2])
    def test_missing_dimensions(self, backend, missing, rng):
        arrays, network = case(rng, batch=1, heads=1, kv_heads=1)
        whole = attend(*arrays, **network, backend=backend)
        drop = (0,) * missing
        part = attend(*(x[drop] for x in arrays), **network, backend=backend)
        for x, y in zip(part, whole, strict=True):
            assert_same_bits(x, y[drop])

    @pytest.mark.parametrize(
        "sizes", [{"queries": 0}, {"keys": 0}, {"batch": 0}, {"heads": 0, "kv_heads": 1}], ids=str
    )
    def test_empty(self, backend, sizes, rng):
        arrays, network = case(rng, **sizes)
        got = attend(*arrays, **network, backend=backend)
        assert got.output.shape == (*arrays[0].shape[:3], 17)
        assert not got.output.any()
        assert (got.lse == -np.inf).all()

    @pytest.mark.parametrize("side", ["start", "end"])
    @pytest.mark.parametrize("queries", [3, 67])
    def test_guard_pages(self, guarded, side, queries, rng):
        arrays, network = case(rng, batch=1, queries=queries)
        mask = rng.random((queries, 70)) < 0.5
        expected = attend(*arrays, **network, mask=mask)
        out = guarded(np.zeros_like(expected.output), side)
        arrays, mask = [guarded(x, side) for x in arrays], guarded(mask, side)
        attend(*arrays, **{name: guarded(x, side) for name, x in network.items()}, mask=mask, out=out)
        assert_same_bits(out, expected.output)

    def test_no_array_of_hidden_units(self, rng):
        arrays, network = case(rng, batch=1, queries=256, keys=256, units=64)
        nbattn.additive_attention(*arrays, **network)
        tracemalloc.start()
        nbattn.additive_attention(*arrays, **network)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * 4 * 256 * 256 * 64 / 50


class TestSameBits:
    def test_alone_and_in_a_batch(self, backend, rng):
        arrays, network = case(rng, batch=3, queries=70)
        arrays[0][1] *= 40
        lengths = np.array([70, 3, 64])
        together = attend(*arrays, **network, key_lengths=lengths, is_causal=True, backend=backend)
        for b in range(3):
            one = slice(b, b + 1)
            alone = attend(
                *(x[one] for x in arrays), **network, key_lengths=lengths[one], is_causal=True,
                backend=backend,
            )  # fmt: skip
            for x, y in zip(alone, together, strict=True):
                assert_same_bits(x, y[one])

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_any_number_of_threads(self, dtype, rng):
        import numba

        arrays, network = case(rng, dtype, queries=130, keys=150, units=40)
        before = numba.get_num_threads()
        results = []
        try:
            for threads in {1, 2, min(4, numba.config.NUMBA_NUM_THREADS)}:
                if threads <= numba.config.NUMBA_NUM_THREADS:
                    numba.set_num_threads(threads)
                    results += [attend(*arrays, **network) for _ in range(3)]
        finally:
            numba.set_num_threads(before)
        for result in results[1:]:
            for x, y in zip(result, results[0], strict=True):
                assert_same_bits(x, y)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {
    "query": zeros(2, 4, 3, 8), "key": zeros(2, 2, 5, 6), "value": zeros(2, 2, 5, 7),
    "w_query": zeros(9, 8), "w_key": zeros(9, 6), "v": zeros(9), "bias": zeros(9),
}  # fmt: skip
BAD = {
    "integers": ({"query": zeros(2, 4, 3, 8, dtype=int)}, TypeError, r"query has dtype int64.*\.astype"),
    "mixed dtypes": ({"key": zeros(2, 2, 5, 6, dtype=np.float64)}, TypeError, "float32, float64 and float32"),
    "dimensions": ({"query": zeros(4, 3, 8)}, ValueError, "3, 4 and 4 dimensions"),
    "head counts": ({"query": zeros(2, 3, 3, 8)}, ValueError, "multiple of the number of key heads"),
    "no numbers": ({"key": zeros(2, 2, 5, 0)}, ValueError, "at least 1, got 8 for query and 0 for key"),
    "key count": ({"value": zeros(2, 2, 4, 7)}, ValueError, "key has 5 positions but value has 4"),
    "w_query": ({"w_query": zeros(9, 7)}, ValueError, r"w_query has shape \(9, 7\); expected \(9, 8\) or"),
    "w_key": ({"w_key": zeros(4, 9, 6)}, ValueError, r"w_key has shape \(4, 9, 6\); .* \(2, 9, 6\)"),
    "w_key dtype": ({"w_key": zeros(9, 6, dtype=int)}, TypeError, "w_key has dtype int64"),
    "not projected": ({"w_query": None}, ValueError, "query has head_dim 8 but v has 9 .* without w_query"),
    "keys not projected": ({"w_key": None}, ValueError, "key has head_dim 6 but v has 9 .* without w_key"),
    "v": ({"v": zeros(3, 9)}, ValueError, r"v has shape \(3, 9\); expected \(9,\) or \(4, 9\)"),
    "v scalar": ({"v": np.float32(1)}, ValueError, r"v has shape \(\); expected \(A,\)"),
    "no units": ({"v": zeros(0)}, ValueError, r"v has shape \(0,\); .* at least one hidden unit"),
    "v missing": ({"v": None}, TypeError, "v has dtype object"),
    "bias": ({"bias": zeros(8)}, ValueError, r"bias has shape \(8,\); expected \(9,\)"),
    "mask": ({"mask": zeros(3, 5)}, TypeError, "mask has dtype float32"),
    "mask shape": ({"mask": np.ones((5, 3), bool)}, ValueError, r"mask has shape \(5, 3\)"),
    "window": ({"window_size": 3}, TypeError, "window_size must be a pair"),
    "lengths": ({"key_lengths": [6, 1]}, ValueError, r"key_lengths\[0\] is 6; expected 0 to 5"),
    "causal": ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
    "out": ({"out": zeros(2, 4, 3, 8)}, ValueError, r"out has shape \(2, 4, 3, 8\); expected \(2, 4, 3, 7\)"),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(backend, name):
    changed, kind, message = BAD[name]
    out = np.full((2, 4, 3, 7), 7, getattr(changed.get("query"), "dtype", np.float32))
    with pytest.raises(kind, match=message):
        nbattn.additive_attention(**{"out": out, "backend": backend, **GOOD, **changed})
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["query", "key", "value", "w_query", "v"])
def test_out_overlaps(backend, name):
    base = np.full(2000, 7, np.float32)
    x = GOOD[name]
    out = base[x.size - 1 :][:168].reshape(2, 4, 3, 7)
    with pytest.raises(ValueError, match="out shares memory with an input"):
        nbattn.additive_attention(**GOOD | {name: base[: x.size].reshape(x.shape)}, out=out, backend=backend)
    assert (base == 7).all()
