"""Linear attention is its recurrence: parallel formulas, cuts, decays of all sizes, ONNX's cases."""

import itertools

import numba
import numpy as np
import pytest
from ml_dtypes import bfloat16, finfo
from oracle import assert_same_bits, normal

import nbattn
from nbattn import linear_attention
from nbattn.cpu import emitters

RULES = ("linear", "gated", "gated per feature", "delta", "gated delta", "gated delta per feature")
rules = pytest.mark.parametrize("rule", RULES)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def inputs(rng, rule, batch=2, heads=4, kv_heads=2, tokens=37, features=9, columns=21, dtype=np.float32):
    """Query, key and value, and the options that choose the rule."""
    q = normal(rng, (batch, heads, tokens, features), dtype)
    k = normal(rng, (batch, kv_heads, tokens, features), dtype)
    v = normal(rng, (batch, kv_heads, tokens, columns), dtype)
    k /= np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-3)
    options = {}
    if "gated" in rule:
        shape = k.shape if "feature" in rule else k.shape[:3]
        options["decay"] = -rng.random(shape).astype(dtype) / 2
    if "delta" in rule:
        options["beta"] = rng.random(k.shape[:3]).astype(dtype)
    return (q, k, v), options


def parallel(q, k, v, decay=None, beta=None, scale=None, state=None):
    """All tokens at once, in float64: weights are ratios of decays, the delta rule is a triangular solve."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    n, features = k.shape[2:]
    start = np.zeros((*k.shape[:2], features, v.shape[3])) if state is None else state.astype(np.float64)
    decay = np.zeros(1) if decay is None else np.asarray(decay, np.float64)
    total = np.cumsum(np.broadcast_to(decay if decay.ndim == 4 else decay[..., None], k.shape), axis=2)
    ratio = np.exp(np.minimum(total[:, :, :, None] - total[:, :, None], 0))  # (B, H, reader, writer, F)
    lower = np.tri(n)
    if beta is not None:
        overlap = np.einsum("bhif,bhijf,bhjf->bhij", k, ratio, k) * (lower - np.eye(n))
        recalled = np.einsum("bhif,bhfv->bhiv", k * np.exp(total), start)
        rate = np.asarray(beta, np.float64)[..., None]
        v = np.linalg.solve(np.eye(n) + rate * overlap, rate * (v - recalled))
    q = q.reshape(k.shape[0], k.shape[1], group, n, features) * (features**-0.5 if scale is None else scale)
    weights = np.einsum("bhgif,bhijf,bhjf->bhgij", q, ratio, k) * lower
    output = weights @ v[:, :, None] + (q * np.exp(total)[:, :, None]) @ start[:, :, None]
    end = np.exp(total[:, :, -1])[..., None] * start + np.einsum(
        "bhjf,bhjf,bhjv->bhfv", ratio[:, :, -1], k, v
    )
    return output.reshape(k.shape[0], -1, n, v.shape[3]), end


def close(got, exact, dtype):
    eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
    np.testing.assert_allclose(got, exact, rtol=0, atol=20 * eps * max(np.abs(exact).max(initial=0), 1e-30))


@pytest.mark.isa
@rules
@dtypes
def test_parallel_formula(backend, rule, dtype, rng):
    for heads, kv_heads, tokens, features, columns in (
        (1, 1, 1, 1, 1), (4, 4, 33, 16, 16), (6, 2, 20, 7, 33), (8, 1, 19, 12, 130), (2, 2, 70, 40, 64),
    ):  # fmt: skip
        arrays, options = inputs(rng, rule, 2, heads, kv_heads, tokens, features, columns, dtype)
        state = normal(rng, (2, kv_heads, features, columns), dtype)
        for extra in ({}, {"state": state, "scale": 1.5}):
            exact = parallel(*arrays, **options, **extra)
            got = linear_attention(*arrays, **options, **extra, return_state=True, backend=backend)
            for x, y in zip(got, exact, strict=True):
                assert x.dtype == dtype
                close(x, y, dtype)


@rules
def test_kernels_are_as_exact_as_the_recurrence(rule, rng):
    arrays, options = inputs(rng, rule, tokens=300, features=32, columns=48)
    wide = {name: x.astype(np.float64) for name, x in options.items()}
    exact = linear_attention(*(x.astype(np.float64) for x in arrays), **wide, backend="reference")
    plain = linear_attention(*arrays, **options, backend="reference")
    got = linear_attention(*arrays, **options)
    unit = np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(got - exact).max() <= 2 * np.abs(plain - exact).max() + unit


@rules
def test_full(backend, rule, rng):
    arrays, options = inputs(rng, rule, tokens=50, dtype=np.float64)
    _, end = linear_attention(*arrays, **options, return_state=True, backend=backend)
    q = normal(rng, (2, 4, 333, 9), np.float64)
    got, state = linear_attention(
        q, *arrays[1:], **options, is_causal=False, return_state=True, backend=backend
    )
    close(state, end, np.float64)
    close(got, (q.reshape(2, 2, 2, 333, 9) / 3 @ end[:, :, None]).reshape(got.shape), np.float64)
    alone = linear_attention(q, *arrays[1:], **options, is_causal=False, backend=backend)
    assert_same_bits(alone, got)


@pytest.mark.parametrize("feature_map", ["elu", "relu", nbattn.softmax])
def test_normalized(backend, feature_map, rng):
    """The first linear attention: weights phi(q) @ phi(k), divided by their sum."""
    arrays, _ = inputs(rng, "linear", tokens=40, dtype=np.float64)
    features = {
        "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
        "relu": lambda x: np.maximum(x, 0),
    }.get(feature_map, feature_map)
    q, k = features(arrays[0]), np.repeat(features(arrays[1]), 2, axis=1)
    for is_causal in (True, False):
        weights = q @ k.swapaxes(2, 3) * (np.tri(40) if is_causal else 1)
        total = weights.sum(axis=-1, keepdims=True)
        exact = weights @ np.repeat(arrays[2], 2, axis=1) / np.where(total == 0, 1, total)
        options = {"feature_map": feature_map, "normalize": True, "backend": backend, "is_causal": is_causal}
        close(linear_attention(*arrays, **options), exact, np.float64)
        single = [x.astype(np.float32) for x in arrays]
        np.testing.assert_allclose(linear_attention(*single, **options), exact, atol=1e-4)
    # It continues: the state has the sum of keys in its last column.
    options |= {"is_causal": True, "return_state": True}
    whole, end = linear_attention(*arrays, **options)
    first, state = linear_attention(*(x[:, :, :23] for x in arrays), **options)
    rest, state = linear_attention(*(x[:, :, 23:] for x in arrays), state=state, **options)
    close(np.concatenate((first, rest), axis=2), whole, np.float64)
    close(state, end, np.float64)
    close(state[..., -1], features(arrays[1]).sum(axis=2), np.float64)


def test_nothing_to_divide_by(backend):
    x = -np.ones((3, 4), np.float32)
    got = linear_attention(x, x, x, feature_map="relu", normalize=True, backend=backend)
    np.testing.assert_array_equal(got, np.zeros_like(x))


def test_decay_of_normalized_keys(backend, rng):
    (q, k, v), options = inputs(rng, "gated per feature", dtype=np.float64)
    ones = np.ones_like(v[..., :1])
    got = linear_attention(q, k, v, **options, feature_map="elu", normalize=True, backend=backend)
    parts = linear_attention(
        q, k, np.concatenate((v, ones), axis=-1), **options, feature_map="elu", backend=backend
    )
    close(got, parts[..., :-1] / parts[..., -1:], np.float64)


@pytest.mark.isa
@rules
def test_cut_anywhere(backend, rule, rng):
    arrays, options = inputs(rng, rule, tokens=45)
    whole, end = linear_attention(*arrays, **options, return_state=True, backend=backend)
    for cuts in ([0, 45], [0, 1, 2, 17, 45], [0, 16, 33, 45], range(46)):
        state, parts = None, []
        for i, j in itertools.pairwise(cuts):
            piece = {name: x[:, :, i:j] for name, x in options.items()}
            part, state = linear_attention(
                *(x[:, :, i:j] for x in arrays), **piece, state=state, return_state=True, backend=backend
            )
            parts.append(part)
        if backend == "cpu":  # the recurrence itself: where it is cut changes no bit
            assert_same_bits(np.concatenate(parts, axis=2), whole)
            assert_same_bits(state, end)
        close(np.concatenate(parts, axis=2), whole, np.float32)
        close(state, end, np.float32)


@rules
def test_any_number_of_threads(rule, rng):
    arrays, options = inputs(rng, rule, 1, 2, 1, 300, 32, 70)
    results = []
    before = numba.get_num_threads()
    try:
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            results += [
                linear_attention(*arrays, **options, is_causal=c, return_state=True) for c in (True, False)
            ]
    finally:
        numba.set_num_threads(before)
    for i, result in enumerate(results):
        for got, expected in zip(result, results[i % 2], strict=True):
            assert_same_bits(got, expected)


def test_rest_of_the_batch(rng):
    arrays, options = inputs(rng, "gated delta", 3, 4, 2, 60, 16, 40)
    together = linear_attention(*arrays, **options)
    for b in range(3):
        alone = linear_attention(*(x[b] for x in arrays), **{n: x[b] for n, x in options.items()})
        assert_same_bits(alone, together[b])


@pytest.mark.parametrize("rule", RULES[1:3] + RULES[4:])
@dtypes
def test_decays_of_all_sizes(backend, rule, dtype, rng):
    """From a factor of 0 over denormal ones to growth: never inf or NaN of its own making."""
    arrays, options = inputs(rng, rule, tokens=50, dtype=dtype)
    kinds = np.array([0, -1e-30, -1e-6, -1, -100, -np.inf, np.log(1e-30), 0.1], dtype)
    decay = kinds[rng.integers(0, len(kinds), options["decay"].shape)]
    got = linear_attention(*arrays, **options | {"decay": decay}, backend=backend)
    exact = linear_attention(
        *(x.astype(np.float64) for x in arrays),
        **{n: x.astype(np.float64) for n, x in (options | {"decay": decay}).items()},
        backend="reference",
    )
    assert np.isfinite(exact).all()
    close(got, exact, dtype)
    for factor in (-100, -np.inf, np.log(1e-30)):
        forgets = linear_attention(*arrays, **options | {"decay": factor}, backend=backend)
        fresh = np.einsum("bhsf,bhsf->bhs", arrays[0], np.repeat(arrays[1], 2, axis=1)) / 3
        value = arrays[2] * options.get("beta", np.ones(1, dtype))[..., None]
        close(forgets, fresh[..., None] * np.repeat(value, 2, axis=1), dtype)


@pytest.mark.skipif(not emitters.X86, reason="other processors take no longer over denormals")
def test_denormals(rng):
    """A state that decays and is not added to again is flushed to 0; nobody else's arithmetic is."""
    (q, k, v), _ = inputs(rng, "gated", tokens=2000)
    k[:, :, 5:] = 0
    _, state = linear_attention(q, k, v, decay=-0.1, return_state=True)
    np.testing.assert_array_equal(state, np.zeros_like(state))
    assert np.float32(1e-38) * np.float32(0.5) > 0


@rules
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nothing_reaches_back(backend, rule, poison, rng):
    arrays, options = inputs(rng, rule, tokens=40)
    expected = linear_attention(*arrays, **options, backend=backend)
    names = ["query", "key", "value", *options]
    for t in (0, 1, 13, 16, 39):
        for name in names:
            changed = dict(zip(names, (x.copy() for x in (*arrays, *options.values())), strict=True))
            changed[name][:, :, t] = poison
            got = linear_attention(**changed, backend=backend)
            assert_same_bits(got[:, :, :t], expected[:, :, :t])
            assert not np.isfinite(got[:, :, t]).any()
            if name == "query":
                assert_same_bits(got[:, :, t + 1 :], expected[:, :, t + 1 :])
            with np.errstate(all="ignore"):
                truth = linear_attention(**changed, backend="reference")
            np.testing.assert_array_equal(np.isnan(got), np.isnan(truth))


def test_nan_in_one_column_stays_there(backend, rng):
    (q, k, v), options = inputs(rng, "gated delta", columns=40)
    expected = linear_attention(q, k, v, **options, backend=backend)
    v[:, :, 5, 7] = np.nan
    got = linear_attention(q, k, v, **options, backend=backend)
    others = np.arange(40) != 7
    assert_same_bits(got[..., others], expected[..., others])
    assert np.isnan(got[:, :, 5:, 7]).all()


@pytest.mark.isa
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_outside_the_arrays_is_touched(side, guarded, rng):
    for dtype in (np.float32, np.float64):
        for rule in ("gated per feature", "gated delta"):
            for features, columns in ((1, 1), (7, 19), (16, 33), (33, 65)):
                arrays, options = inputs(rng, rule, 1, 2, 1, 19, features, columns, dtype)
                arrays = [guarded(x, side) for x in arrays]
                options = {name: guarded(x, side) for name, x in options.items()}
                state = guarded(normal(rng, (1, 1, features, columns), dtype), side)
                out = guarded(np.full((1, 2, 19, columns), np.nan, dtype), side)
                expected = parallel(*arrays, **options, state=state)
                linear_attention(*arrays, **options, state=state, return_state=True, out=(out, state))
                close(out, expected[0], dtype)
                close(state, expected[1], dtype)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_halves(backend, dtype, rng):
    arrays, options = inputs(rng, "gated delta")
    arrays, options = [x.astype(dtype) for x in arrays], {n: x.astype(dtype) for n, x in options.items()}
    wide = {name: x.astype(np.float32) for name, x in options.items()}
    exact, end = linear_attention(*(x.astype(np.float32) for x in arrays), **wide, return_state=True)
    out = np.empty(exact.shape, dtype)
    got, state = linear_attention(*arrays, **options, return_state=True, backend=backend)
    assert (got.dtype, state.dtype) == (dtype, np.float32)
    units = np.abs(got.astype(np.float32) - exact) / float(finfo(dtype).eps)
    assert units.max() <= np.abs(exact).max()
    close(state, end, dtype)
    assert linear_attention(*arrays, **options, out=out, backend=backend) is out
    assert_same_bits(out, got)


def test_leading_dimensions_and_layouts(backend, rng):
    arrays, options = inputs(rng, "gated delta per feature")
    whole, end = linear_attention(*arrays, **options, return_state=True, backend=backend)
    one = {name: x[1] for name, x in options.items()}
    got, state = linear_attention(*(x[1] for x in arrays), **one, return_state=True, backend=backend)
    close(got, whole[1], np.float32)
    close(state, end[1], np.float32)
    one = {name: x[1, 0] for name, x in options.items()}
    got, state = linear_attention(
        arrays[0][1, 0], arrays[1][1, 0], arrays[2][1, 0], **one, return_state=True, backend=backend
    )
    close(got, whole[1, 0], np.float32)
    close(state, end[1, 0], np.float32)
    turned = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in arrays]
    turned[2] = np.repeat(turned[2], 2, axis=-1)[..., ::2]
    options["decay"] = options["decay"][..., ::-1].copy()[..., ::-1]
    out = np.zeros((2, 37, 4, 21), np.float32).transpose(0, 2, 1, 3)
    assert linear_attention(*turned, **options, out=out, backend=backend) is out
    close(out, whole, np.float32)


def test_what_broadcasts(backend, rng):
    (q, k, v), _ = inputs(rng, "linear")
    rates = -rng.random((2, 1)).astype(np.float32)
    got = linear_attention(q, k, v, decay=rates, beta=np.float32(0.5), backend=backend)
    spread = {
        "decay": np.broadcast_to(rates[..., None], k.shape),
        "beta": np.full(k.shape[:3], 0.5, np.float32),
    }
    close(got, linear_attention(q, k, v, **spread, backend=backend), np.float32)
    got = linear_attention(q, k, v, decay=-0.5, beta=1, backend=backend)
    close(got, parallel(q, k, v, decay=np.full(k.shape[:3], -0.5), beta=np.ones(k.shape[:3]))[0], np.float32)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty(backend, shape):
    x = np.zeros((*shape, 4), np.float32)
    for is_causal in (True, False):
        got, state = linear_attention(x, x, x, is_causal=is_causal, return_state=True, backend=backend)
        assert got.shape == x.shape
        np.testing.assert_array_equal(state, np.zeros((*shape[:2], 4, 4)))
    state = np.ones((*shape[:2], 4, 4), np.float32)
    _, end = linear_attention(x, x, x, state=state, return_state=True, backend=backend)
    if shape[2] == 0:
        np.testing.assert_array_equal(end, state)


def test_state_in_place(backend, rng):
    arrays, options = inputs(rng, "gated delta")
    state = normal(rng, (2, 2, 9, 21))
    expected, end = linear_attention(
        *arrays, **options, state=state.copy(), return_state=True, backend=backend
    )
    out = np.empty(expected.shape, np.float32)
    kept = state.copy()
    linear_attention(*arrays, **options, state=state, return_state=True, backend=backend)
    assert_same_bits(state, kept)
    got = linear_attention(
        *arrays, **options, state=state, return_state=True, out=(out, state), backend=backend
    )
    assert got[0] is out
    assert got[1] is state
    assert_same_bits(out, expected)
    assert_same_bits(state, end)


X = np.ones((2, 5, 4), np.float32)


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((X, X[:, :3], X[:, :3]), {}, ValueError, "query has 5 positions and key 3; both must match"),
        ((X, X[..., :3], X), {}, ValueError, "query has head_dim 4 but key has 3"),
        ((X, X.astype(int), X), {}, TypeError, "key has dtype int64"),
        ((X, X, X), {"decay": np.ones((2, 5), int)}, TypeError, "decay has dtype int64"),
        ((X, X, X), {"decay": "fast"}, TypeError, "decay has dtype"),
        ((X, X, X), {"decay": X[:, :3, 0]}, ValueError, r"decay has shape \(2, 3\); it must broadcast to"),
        ((X, X, X), {"decay": X[..., :3]}, ValueError, r"decay has shape \(2, 5, 3\); .* = \(2, 5, 4\)"),
        ((X, X, X), {"beta": X}, ValueError, r"beta has shape \(2, 5, 4\); .* = \(2, 5\)"),
        ((X, X, X), {"beta": np.ones(5, bool)}, TypeError, "beta has dtype bool"),
        ((X, X, X), {"state": X}, ValueError, r"state has shape \(2, 5, 4\); expected \(2, 4, 4\)"),
        ((X, X, X), {"state": X[:, :4], "normalize": True}, ValueError, r"expected \(2, 4, 5\)"),
        ((X, X, X), {"feature_map": "tanh"}, ValueError, "feature_map is 'tanh'; expected None, a callable"),
        ((X, X, X), {"feature_map": 3}, TypeError, "feature_map must be a name or callable, got int"),
        ((X, X, X), {"feature_map": lambda x: x[:, 1:]}, ValueError, "feature_map made shape"),
        ((X, X, X), {"feature_map": lambda x: "x"}, TypeError, r"feature_map\(query\) has dtype"),
        ((X, X, X), {"normalize": True, "beta": 1.0}, ValueError, "normalize does not go with beta"),
        ((X, X, X), {"is_causal": 1}, TypeError, "is_causal must be True or False"),
        ((X, X, X), {"return_state": 1}, TypeError, "return_state must be True or False"),
        ((X, X, X), {"scale": np.nan}, ValueError, "scale must be finite"),
        ((X, X, X), {"out": X}, ValueError, "out shares memory with an input"),
        ((X, X, X), {"out": X[:1]}, ValueError, "out has shape"),
        ((X, X, X), {"out": (X, X)}, TypeError, "out is a tuple; pass one array, or also return_state=True"),
        ((X, X, X), {"out": X, "return_state": True}, TypeError, "out must be a tuple of two arrays"),
        ((X, X, X), {"backend": "gpu"}, ValueError, "backend is 'gpu'"),
    ],
)
def test_errors(arrays, options, error, message):
    with pytest.raises(error, match=message):
        linear_attention(*arrays, **options)
