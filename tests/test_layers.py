"""The layers against formulas in float64 and, where they are installed, PyTorch and ONNX."""

import importlib.util
import math

import ml_dtypes
import numpy as np
import pytest

from nbattn import KVCache
from nbattn.layers import (
    GRU,
    BahdanauAttention,
    Embedding,
    FeedForward,
    GRUCell,
    LayerNorm,
    Linear,
    LuongAttention,
    MultiHeadAttention,
    RMSNorm,
    Rotary,
    SwiGLU,
    gelu,
    gelu_tanh,
    relu,
    silu,
)
from nbattn.layers.linear import FEW
from nbattn.reference.matvec import narrowed, widened

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
# Rows that are whole vectors or not, of 4, 8 and 16 lanes; numbers of them that are whole tiles or not.
SHAPES = [(8, 16), (9, 17), (37, 100), (64, 96), (130, 33), (3, 5), (1, 64), (40, 3)]


def made(rng, dtype, shape, groups=1):
    """(weight, scales, the matrix that they mean) of a dtype."""
    matrix = rng.standard_normal(shape).astype(np.float32)
    if dtype in ("float32", "float64"):
        return matrix.astype(dtype), None, matrix
    weight, scales = narrowed(matrix, dtype, groups)
    wide = weight.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else weight
    wide = wide.astype(np.float64)
    return weight, scales, wide if scales is None else wide * np.repeat(scales, shape[1] // groups, axis=1)


def bound(matrix, x, bias):
    """Of the error of float32: a few ulp of the sum of magnitudes, for sums in any order."""
    size = np.abs(x).astype(np.float64) @ np.abs(matrix).T.astype(np.float64) + np.abs(bias)
    return (4 + math.sqrt(matrix.shape[1])) * 2.0**-24 * size + 1e-30


class TestLinear:
    @pytest.mark.parametrize("dtype", FEW)
    @pytest.mark.isa
    def test_products(self, rng, backend, dtype):
        for shape in SHAPES:
            weight, scales, matrix = made(rng, dtype, shape)
            bias = rng.standard_normal(shape[0]).astype(np.float32)
            layer = Linear(weight, bias, scales=scales, backend=backend)
            for rows in (1, 2, 3, 4, 7):
                x = rng.standard_normal((rows, shape[1]), np.float32)
                exact = x.astype(np.float64) @ matrix.T + bias
                assert (np.abs(layer(x) - exact) <= bound(matrix, x, bias)).all(), (shape, rows)
                assert (np.abs(layer(x).astype(float) - exact).max() > 0) or shape[1] < 6

    @pytest.mark.parametrize("dtype", FEW)
    def test_many_rows(self, rng, dtype):
        weight, scales, matrix = made(rng, dtype, (70, 40))
        x = rng.standard_normal((2, FEW[dtype], 40), np.float32)
        y = Linear(weight, scales=scales)(x)
        assert y.shape == (2, FEW[dtype], 70)
        assert (np.abs(y - x.astype(np.float64) @ matrix.T) <= bound(matrix, x, 0)).all()

    @pytest.mark.isa
    @pytest.mark.parametrize("groups", [2, 3, 6])
    def test_groups(self, rng, backend, groups):
        weight, scales, matrix = made(rng, "int8", (21, 192), groups)
        for rows in (1, 2, 3):
            x = rng.standard_normal((rows, 192), np.float32)
            y = Linear(weight, scales=scales, backend=backend)(x)
            assert (np.abs(y - x.astype(np.float64) @ matrix.T) <= bound(matrix, x, 0)).all()

    @pytest.mark.parametrize("dtype", FEW)
    def test_threads_give_the_same_bits(self, rng, dtype):
        import numba

        weight, scales, _ = made(rng, dtype, (9001, 130 if dtype == "float32" else 290))
        layer = Linear(weight, scales=scales)
        x = rng.standard_normal((5, weight.shape[1]), np.float32)
        threads = numba.get_num_threads()
        y = layer(x)
        try:
            numba.set_num_threads(1)
            np.testing.assert_array_equal(layer(x), y)
        finally:
            numba.set_num_threads(threads)
        np.testing.assert_array_equal(layer(x[:3]), y[:3])
        assert layer._few.tasks > 1

    @pytest.mark.parametrize("dtype", FEW)
    def test_nothing_beyond_the_arrays_is_read(self, rng, guarded, dtype):
        for shape in ((11, 35), (64, 64)):
            weight, scales, matrix = made(rng, dtype, shape)
            for side in ("start", "end"):
                own = guarded(weight, side), guarded(np.ones(shape[0], np.float32), side)
                factors = None if scales is None else guarded(scales, side)
                for rows in (1, 3):
                    x = guarded(rng.standard_normal((rows, shape[1]), np.float32), side)
                    layer = Linear(*own, scales=factors)
                    assert np.shares_memory(layer.weight, own[0])
                    np.testing.assert_allclose(layer(x), x @ matrix.T + 1, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("where", [0, 17, 34])
    def test_infinite_weights_and_nan(self, where):
        weight = np.ones((9, 35), np.float32)
        weight[4, where] = np.inf
        weight[6, where] = np.nan
        y = Linear(weight)(np.full((1, 35), 2, np.float32))[0]
        assert y[4] == np.inf
        assert np.isnan(y[6])
        assert (np.delete(y, [4, 6]) == 70).all()

    def test_float64(self, rng):
        weight, x = rng.standard_normal((9, 20)), rng.standard_normal((3, 20))
        for w, v in ((weight, x), (weight.astype(np.float32), x), (weight, x.astype(np.float32))):
            y = Linear(w)(v)
            assert y.dtype == np.float64
            np.testing.assert_allclose(y, v.astype(float) @ w.T.astype(float), rtol=1e-13, atol=1e-13)

    def test_strides(self, rng):
        weight = rng.standard_normal((40, 64), np.float32)
        x = rng.standard_normal((64, 2), np.float32).T
        for w in (np.asfortranarray(weight), np.repeat(weight, 2, axis=1)[:, ::2]):
            np.testing.assert_array_equal(Linear(w)(x), Linear(weight)(x))
        for w in (weight[::2], weight[::-1]):
            np.testing.assert_array_equal(Linear(w)(x), Linear(w.copy())(x))
        np.testing.assert_array_equal(Linear(weight[:1].repeat(9, 0))(x)[:, 8], Linear(weight[:9])(x)[:, 0])
        broadcast = np.broadcast_to(weight[0], (9, 64))
        np.testing.assert_array_equal(Linear(broadcast)(x), Linear(broadcast.copy())(x))

    def test_shapes(self, rng):
        layer = Linear(rng.standard_normal((40, 64), np.float32))
        x = rng.standard_normal((2, 3, 64), np.float32)
        np.testing.assert_array_equal(layer(x)[1, 2], layer(x[1, 2]))
        assert layer(x[:, :0]).shape == (2, 0, 40)
        assert Linear(np.ones((0, 64), np.float32))(x).shape == (2, 3, 0)
        assert (Linear(np.ones((9, 0), np.float32), np.ones(9))(x[..., :0]) == 1).all()
        assert layer(x.astype(np.float16)).dtype == np.float32

    def test_astype(self, rng):
        weight = rng.standard_normal((64, 96), np.float32)
        layer = Linear(weight, np.ones(64))
        x = rng.standard_normal((2, 96), np.float32)
        for dtype, group, most in (("float16", None, 1e-3), ("bfloat16", None, 5e-3), ("int8", None, 1e-2),
                                   ("int8", 32, 1e-2)):  # fmt: skip
            narrow = layer.astype(dtype, group=group)
            assert narrow.dtype == dtype
            error = np.linalg.norm(narrow(x) - layer(x)) / np.linalg.norm(layer(x))
            assert 0 < error < most, dtype
            back = narrow.astype("float32")
            np.testing.assert_array_equal(back.weight, widened(narrow.weight, dtype, narrow.scales))
        assert (
            layer.astype("bfloat16").weight.tolist()
            == weight.astype(ml_dtypes.bfloat16).view(np.uint16).tolist()
        )
        assert Linear(weight.astype(ml_dtypes.bfloat16)).dtype == "bfloat16"

    def test_bfloat16_of_special_numbers(self):
        special = np.array(
            [[np.inf, -np.inf, np.nan, -0.0, 3.4e38, 1e-45, 1.00390625, 1.01171875]], np.float32
        )
        with np.errstate(all="ignore"):
            expected = special.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(widened(narrowed(special, "bfloat16")[0], "bfloat16"), expected)

    def test_int8_of_zeros(self):
        layer = Linear(np.zeros((9, 32), np.float32)).astype("int8")
        assert (layer(np.ones(32, np.float32)) == 0).all()

    @pytest.mark.parametrize(
        ("arguments", "error", "complaint"),
        [
            ({"weight": np.ones((2, 2), int)}, TypeError, "weight has dtype int64; expected one of float32"),
            ({"weight": np.ones((2, 2), ">f4")}, TypeError, "weight has dtype >f4"),
            ({"weight": np.ones(2)}, ValueError, r"weight has shape \(2,\); expected 2 dimensions"),
            ({"weight": np.ones((2, 3)), "bias": np.ones(3)}, ValueError, r"bias has shape \(3,\); expected"),
            ({"weight": np.ones((2, 3)), "bias": np.ones(2, int)}, TypeError, "bias"),
            ({"weight": np.ones((2, 3), np.int8)}, ValueError, "weight is int8 and scales missing"),
            ({"weight": np.ones((2, 3)), "scales": np.ones(2)}, ValueError, "and scales given; int8 alone"),
            ({"weight": np.ones((2, 64), np.int8), "scales": np.ones(3)}, ValueError, "scales has shape"),
            (
                {"weight": np.ones((2, 64), np.int8), "scales": np.ones((2, 4))},
                ValueError,
                "a group has 16 numbers; expected a multiple of 32 that divides d_in, 64",
            ),
            ({"weight": np.ones((2, 3)), "backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ],
    )  # fmt: skip
    def test_wrong_weights(self, arguments, error, complaint):
        with pytest.raises(error, match=complaint):
            Linear(**arguments)

    def test_wrong_calls(self):
        layer = Linear(np.ones((2, 3)))
        with pytest.raises(ValueError, match=r"x has shape \(4,\); expected \(..., 3\)"):
            layer(np.ones(4))
        with pytest.raises(TypeError, match="x has dtype int64"):
            layer(np.ones(3, int))
        with pytest.raises(ValueError, match="dtype is 'int4'"):
            layer.astype("int4")
        with pytest.raises(ValueError, match="a group has 2 numbers"):
            layer.astype("int8", group=2)


class TestEmbedding:
    @pytest.mark.parametrize("dtype", [*FEW, "float64"])
    def test_rows(self, rng, dtype):
        weight, scales, matrix = made(rng, dtype, (7, 64))
        ids = np.array([[3, 0], [6, 6]], np.uint8)
        y = Embedding(weight, scales=scales)(ids)
        assert y.dtype == (np.float64 if dtype == "float64" else np.float32)
        np.testing.assert_allclose(y, matrix[ids], rtol=1e-6)

    @pytest.mark.parametrize("ids", [[-1], [7], [[0, 8]]])
    def test_out_of_range(self, ids):
        with pytest.raises(ValueError, match=r"ids holds .* expected 0 to 6"):
            Embedding(np.ones((7, 2)))(ids)

    def test_other_ids(self):
        with pytest.raises(TypeError, match="expected integers"):
            Embedding(np.ones((7, 2)))([0.5])
        assert Embedding(np.ones((7, 2)))([]).shape == (0, 2)


class TestNorms:
    def test_layer_norm(self, rng):
        x, weight, bias = rng.standard_normal((2, 3, 5)) + 3, rng.standard_normal(5), rng.standard_normal(5)
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * weight
        np.testing.assert_allclose(LayerNorm(weight, eps=1e-3)(x), expected, rtol=1e-12)
        np.testing.assert_allclose(LayerNorm(weight, bias, 1e-3)(x), expected + bias, rtol=1e-12)

    def test_layer_norm_far_from_zero(self, rng):
        x = rng.standard_normal((4, 64)).astype(np.float32) + 1000
        y = LayerNorm(np.ones(64, np.float32), eps=0.0)(x)
        exact = LayerNorm(np.ones(64), eps=0.0)(x.astype(np.float64))
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, exact, atol=1e-3)

    def test_rms_norm(self, rng):
        x = rng.standard_normal((2, 5))
        expected = 3 * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(RMSNorm(np.full(5, 3.0), 1e-6)(x), expected, rtol=1e-14)

    @pytest.mark.isa
    def test_rows_of_float32(self, rng, backend):
        for d in (16, 17, 31, 64, 384, 577):
            x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5, d), d, d))
            x[0, 0], x[1, 2, d // 2], x[2, 1] = 0, np.nan, 1e4 + x[2, 1]
            wide = x.astype(np.float64)
            with np.errstate(invalid="ignore"):
                centred = wide - wide.mean(-1, keepdims=True)
                layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight
                root = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
            for got, exact in (
                (LayerNorm(weight, bias, backend=backend)(x), layer + bias),
                (LayerNorm(weight, backend=backend)(x), layer),
                (RMSNorm(weight, 1e-6, backend=backend)(x), root),
            ):
                assert got.dtype == np.float32
                assert np.isnan(got[1, 2]).all()
                # Beside 1e4, the mean has only so many digits behind the point.
                np.testing.assert_allclose(got[2, 1], exact[2, 1], atol=3e-3)
                got, exact = (np.delete(a.reshape(15, d), (7, 11), 0) for a in (got, exact))
                np.testing.assert_allclose(got, exact, rtol=2e-6, atol=2e-6)

    def test_any_threads_and_strides(self, rng):
        import numba

        x = rng.standard_normal((300, 2, 96), np.float32)
        layer = LayerNorm(np.ones(96, np.float32), np.ones(96, np.float32))
        whole = layer(x)
        curved = gelu(x)
        threads = numba.get_num_threads()
        try:
            numba.set_num_threads(1)
            np.testing.assert_array_equal(layer(x[:, 1]), whole[:, 1])
            np.testing.assert_array_equal(gelu(x[::2]), curved[::2])
        finally:
            numba.set_num_threads(threads)
        np.testing.assert_array_equal(layer(x[7, 0]), whole[7, 0])
        assert layer(x[:0]).shape == (0, 2, 96)
        assert gelu(x[:0]).shape == (0, 2, 96)


class TestFeedForward:
    @pytest.mark.isa
    def test_activations_of_float32(self, backend):
        from scipy.special import ndtr

        x = np.r_[np.linspace(-14, 14, 20011), 0, -0.0, 1e30, -1e30, 1e-30].astype(np.float32)
        wide = x.astype(np.float64)
        with np.errstate(over="ignore"):
            tanh = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
            exact = {
                gelu: wide * ndtr(wide),
                gelu_tanh: wide * (0.5 + 0.5 * tanh),
                silu: wide / (1 + np.exp(-wide)),
                relu: np.maximum(wide, 0),
            }
            for f, y in exact.items():
                got = f(x, backend=backend)
                assert got.dtype == np.float32
                near = np.abs(x) < 1e3
                np.testing.assert_allclose(got[near], y[near], rtol=4e-7, atol=6e-7)
                assert (got[~near] == y[~near].astype(np.float32)).all()
        for f in exact:
            got = f(np.full(40, np.nan, np.float32), backend=backend)
            assert np.isnan(got).all()
            with np.errstate(invalid="ignore"):
                assert (f(np.full(40, np.inf, np.float32), backend=backend) == np.inf).all()

    def test_tail(self):
        """The kernel's GELU keeps digits where 1 + erf has none left."""
        from scipy.special import ndtr

        x = np.linspace(-5, -1, 1001).astype(np.float32)
        np.testing.assert_allclose(gelu(x), x * ndtr(x.astype(np.float64)), rtol=4e-6)

    @pytest.mark.parametrize("rows", [2, 40])
    def test_gated(self, rng, backend, rows):
        gate, up = (Linear(rng.standard_normal((33, 20), np.float32), backend=backend) for _ in range(2))
        down = Linear(rng.standard_normal((20, 33), np.float32), backend=backend)
        x = rng.standard_normal((rows, 20), np.float32)
        exact = [layer.weight.astype(np.float64) for layer in (gate, up, down)]
        a, c = (x @ w.T for w in exact[:2])
        expected = (a / (1 + np.exp(-a)) * c) @ exact[2].T
        np.testing.assert_allclose(SwiGLU(gate, up, down)(x), expected, rtol=1e-4, atol=1e-3)

    def test_activations(self):
        from scipy.special import ndtr

        x = np.linspace(-6, 6, 101)
        np.testing.assert_allclose(gelu(x), x * ndtr(x), atol=1e-14)
        np.testing.assert_allclose(gelu_tanh(x), gelu(x), atol=5e-4)
        assert np.abs(gelu_tanh(x) - gelu(x)).max() > 1e-4
        np.testing.assert_allclose(silu(x), x / (1 + np.exp(-x)), atol=1e-14)
        for f in (gelu, gelu_tanh, silu):
            assert f(np.ones(2, np.float32)).dtype == np.float32

    def test_feed_forward(self, rng):
        up, down = (
            Linear(rng.standard_normal((7, 3)), rng.standard_normal(7)),
            Linear(rng.standard_normal((3, 7))),
        )
        x = rng.standard_normal((2, 3))
        np.testing.assert_allclose(FeedForward(up, down)(x), down(gelu(up(x))))
        np.testing.assert_allclose(FeedForward(up, down, "relu")(x), down(np.maximum(up(x), 0)))

    def test_swiglu_does_not_overflow(self):
        one = Linear(np.ones((1, 1), np.float32))
        y = SwiGLU(one, one, one)(np.array([[-200.0], [0.0], [2.0], [200.0]], np.float32))
        np.testing.assert_allclose(y[:, 0], [0, 0, 4 / (1 + np.exp(-2)), 40000], rtol=1e-6)

    def test_what_does_not_fit(self):
        one, two = Linear(np.ones((1, 1))), Linear(np.ones((2, 1)))
        for make in (
            lambda: FeedForward(two, one),
            lambda: SwiGLU(one, two, one),
            lambda: SwiGLU(two, one, one),
        ):
            with pytest.raises(ValueError, match="one layer gives 2 numbers but the next takes 1"):
                make()
        for layer in (FeedForward, SwiGLU):
            with pytest.raises(ValueError, match="activation is 'gulu'; expected one of gelu"):
                layer(*[one] * (2 if layer is FeedForward else 3), "gulu")


class TestRotary:
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_scores_depend_on_distance(self, rng, interleaved):
        rotary = Rotary(6, 100.0, interleaved=interleaved)
        q, k = rng.standard_normal((2, 1, 8))
        scores = [float((rotary(q, i + 4) @ rotary(k, i).T)[0, 0]) for i in (0, 3, 50)]
        np.testing.assert_allclose(scores, scores[0], rtol=1e-12)
        assert abs(scores[0] - float((rotary(q, 5) @ rotary(k, 0).T)[0, 0])) > 1e-3
        np.testing.assert_array_equal(rotary(q, 9)[..., 6:], q[..., 6:])

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_formula(self, rng, interleaved):
        x = rng.standard_normal((2, 3, 5, 8), np.float32)
        angle = np.arange(5)[:, None] * 100.0 ** (-np.arange(4) / 4)
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) if interleaved else (x[..., :4] + 1j * x[..., 4:])
        turned = pairs * np.exp(1j * angle)
        expected = np.stack([turned.real, turned.imag], axis=-1 if interleaved else -2).reshape(x.shape)
        y = Rotary(8, 100.0, interleaved=interleaved)(x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, atol=1e-6)

    def test_is_what_a_cache_does(self, rng):
        x = rng.standard_normal((2, 1, 5, 8), np.float32)
        rotary = Rotary(8, 100.0)
        caches = [KVCache(2, 1, 5, 8, rotary_base=base, backend="reference") for base in (100.0, None)]
        caches[0].append(x, x)
        caches[1].append(rotary(x), x)
        np.testing.assert_allclose(caches[0].attend(x), caches[1].attend(rotary(x)), atol=1e-6)

    def test_positions(self, rng):
        x = rng.standard_normal((2, 3, 5, 8))
        rotary = Rotary(8)
        np.testing.assert_array_equal(rotary(x, 7), rotary(x, np.arange(7, 12)))
        each = np.stack([np.arange(5), np.arange(5) + 7])[:, None]
        np.testing.assert_array_equal(rotary(x, each)[1], rotary(x[1], 7))
        with pytest.raises(ValueError, match=r"positions has shape \(4,\); it must broadcast to \(2, 3, 5\)"):
            rotary(x, np.arange(4))
        with pytest.raises(TypeError, match="expected integers"):
            rotary(x, 0.5)
        with pytest.raises(ValueError, match="at least 8 numbers"):
            rotary(x[..., :7])
        for wrong in ({"dim": 3}, {"dim": 0}, {"dim": 2, "base": 0}):
            with pytest.raises(ValueError, match="expected an even number"):
                Rotary(**wrong)


def attention_state(rng, d, separate=None, biases=True, rows=False):
    """The state dict of a torch.nn.MultiheadAttention, as arrays."""
    state = {"out_proj.weight": rng.standard_normal((d, d))}
    if separate:
        widths = zip("qkv", (d, *separate), strict=True)
        state |= {f"{letter}_proj_weight": rng.standard_normal((d, width)) for letter, width in widths}
    else:
        state["in_proj_weight"] = rng.standard_normal((3 * d, d))
    if biases:
        state |= {"in_proj_bias": rng.standard_normal(3 * d), "out_proj.bias": rng.standard_normal(d)}
    if rows:
        state |= {name: rng.standard_normal((1, 1, d)) for name in ("bias_k", "bias_v")}
    return {name: (x / math.sqrt(x.shape[-1])).astype(np.float32) for name, x in state.items()}


class TestMultiHeadAttention:
    D, HEADS = 24, 3

    def formula(self, state, x, context, heads, kv_heads, seen):
        """In float64, one head at a time; `seen` (Sq, Sk)."""
        q, k, v = np.split(state["in_proj_weight"].astype(float), np.cumsum([24, 24 * kv_heads // heads])[:2])
        outputs, weights = [], []
        size = len(q) // heads
        for h in range(heads):
            own, shared = slice(h * size, (h + 1) * size), h * kv_heads // heads
            shared = slice(shared * size, (shared + 1) * size)
            scores = (x @ q[own].T) @ (context @ k[shared].T).T / math.sqrt(size)
            e = np.where(seen, np.exp(scores), 0)
            weights.append(e / e.sum(-1, keepdims=True))
            outputs.append(weights[-1] @ (context @ v[shared].T))
        return np.concatenate(outputs, -1) @ state["out_proj.weight"].T.astype(float), np.stack(weights)

    @pytest.mark.parametrize("kv_heads", [1, 3])
    def test_formula(self, rng, backend, kv_heads):
        state = attention_state(rng, 24, biases=False)
        width = 8 * kv_heads
        parts = [state["in_proj_weight"][:n] for n in (24, width, width)]
        state["in_proj_weight"] = np.concatenate(parts)
        linears = [Linear(w, backend=backend) for w in (*parts, state["out_proj.weight"])]
        layer = MultiHeadAttention(*linears, 3, kv_heads, backend=backend)
        x, context = rng.standard_normal((5, 24), np.float32), rng.standard_normal((7, 24), np.float32)
        causal = np.tril(np.ones((5, 5), bool))
        for options, keys, seen in (
            ({}, x, True),
            ({"is_causal": True}, x, causal),
            ({"mask": causal}, x, causal),
            ({"context": context, "key_lengths": None}, context, True),
            ({"memory": layer.project(context)}, context, True),
        ):
            y, weights = self.formula(state, x, keys, 3, kv_heads, seen)
            result = layer(x, return_weights=True, **options)
            np.testing.assert_allclose(result.output, y, atol=3e-6)
            np.testing.assert_allclose(result.weights, weights, atol=1e-6)
            np.testing.assert_allclose(layer(x, **options), y, atol=3e-6)
        batch = np.stack([x, x[::-1]])
        np.testing.assert_allclose(layer(batch)[1], layer(x[::-1]), atol=1e-6)
        lengths = layer(x[None], context[None], key_lengths=[4])
        np.testing.assert_allclose(lengths[0], layer(x, context[:4]), atol=1e-6)

    def test_cache(self, rng):
        layer = MultiHeadAttention.from_torch(attention_state(rng, 24), 3, backend="reference")
        x = rng.standard_normal((2, 9, 24), np.float32)
        cache = KVCache(2, 3, 9, 8, backend="reference")
        parts = [layer(part, cache=cache) for part in np.split(x, [5, 6, 8], axis=1)]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), layer(x, is_causal=True), atol=1e-6)

    @needs_torch
    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize("zero", [False, True])
    @pytest.mark.parametrize("separate", [None, (20, 12)])
    def test_is_pytorchs(self, rng, separate, rows, zero):
        import torch

        kdim, vdim = separate or (24, 24)
        theirs = torch.nn.MultiheadAttention(
            24, 3, add_bias_kv=rows, add_zero_attn=zero, kdim=kdim, vdim=vdim, batch_first=True
        )
        state = attention_state(rng, 24, separate, rows=rows)
        theirs.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
        prefixed = {f"layer.{name}": x for name, x in state.items()} | {"other.weight": np.ones(1)}
        ours = MultiHeadAttention.from_torch(
            prefixed, 3, prefix="layer.", add_zero_attn=zero, backend="reference"
        )
        assert kdim == vdim or separate
        x = rng.standard_normal((2, 5, 24), np.float32)
        key = rng.standard_normal((2, 7, kdim), np.float32)
        value = key if kdim == vdim else rng.standard_normal((2, 7, vdim), np.float32)
        seen = np.tril(np.ones((5, 7), bool), 2)
        memory = ours.project(key, value)
        for mask in (None, seen):
            with torch.no_grad():
                expected = theirs(
                    *map(torch.from_numpy, (x, key, value)), average_attn_weights=False,
                    attn_mask=None if mask is None else torch.from_numpy(~mask),
                )  # fmt: skip
            result = ours(x, memory=memory, mask=mask, return_weights=True)
            for got, want in zip(result[:2], expected, strict=True):
                np.testing.assert_allclose(got, want.numpy(), atol=2e-6)
        causal = ours(x, memory=memory, is_causal=True)
        np.testing.assert_allclose(causal, ours(x, memory=memory, mask=np.tril(seen)[:, :7]), atol=2e-6)
        lengths = ours(x, memory=memory, key_lengths=[7, 2])
        first = ours(x, memory=memory, mask=np.arange(7) < np.array([7, 2])[:, None, None, None])
        np.testing.assert_allclose(lengths, first, atol=2e-6)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda s: s.pop("in_proj_weight"), "state lacks q_proj_weight"),
            (lambda s: s.pop("out_proj.weight"), "state lacks out_proj.weight"),
            (lambda s: s.update(gate=np.ones(3)), "state holds gate, which fits no"),
            (lambda s: s.update(bias_k=np.ones((1, 1, 24))), "one of bias_k and bias_v"),
            (lambda s: s.update(in_proj_bias=np.ones(71)), r"in_proj has shape \(71,\)"),
            (lambda s: s.update(in_proj_bias=np.ones(69)), r"bias has shape \(23,\)"),
        ],
    )
    def test_wrong_states(self, rng, change, complaint):
        state = attention_state(rng, 24)
        change(state)
        with pytest.raises(ValueError, match=complaint):
            MultiHeadAttention.from_torch(state, 3)

    def test_what_does_not_fit(self, rng):
        wide, narrow = Linear(np.ones((24, 24))), Linear(np.ones((16, 24)))
        for arguments, complaint in (
            ((wide, wide, wide, wide, 5), "query gives 24 numbers; expected a multiple of its 5 heads"),
            ((wide, narrow, narrow, wide, 3, 2), "heads must divide"),
            ((wide, narrow, narrow, wide, 4, 2), "be of one size"),
            ((wide, wide, wide, narrow.__class__(np.ones((24, 23))), 3), "output takes 23 numbers"),
        ):
            with pytest.raises(ValueError, match=complaint):
                MultiHeadAttention(*arguments)
        with pytest.raises(ValueError, match=r"extra has shapes \(3, 1, 8\) and \(3, 2, 8\)"):
            MultiHeadAttention(wide, wide, wide, wide, 3, extra=(np.ones((3, 1, 8)), np.ones((3, 2, 8))))
        layer, x = MultiHeadAttention(wide, wide, wide, wide, 3), np.ones((1, 2, 24))
        with pytest.raises(ValueError, match="exclude each other"):
            layer(x, x, cache=KVCache(1, 3, 2, 8))
        with pytest.raises(ValueError, match=r"value \(1, 3, 24\); all but the last size must match"):
            layer.project(x, np.ones((1, 3, 24)))
        with pytest.raises(ValueError, match="no return_weights"):
            layer(x, cache=KVCache(1, 3, 2, 8), return_weights=True)


class TestAligned:
    """Bahdanau's and Luong's attention."""

    @pytest.fixture
    def arrays(self, rng):
        return rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 5, 4))

    def softmax(self, scores, seen=True):
        e = np.where(seen, np.exp(scores), 0)
        return e / e.sum(-1, keepdims=True)

    def test_bahdanau(self, rng, arrays):
        x, context = arrays
        w_query, w_key, v, bias = (rng.standard_normal(s) for s in ((7, 6), (7, 4), 7, 7))
        layer = BahdanauAttention(w_query, w_key, v, bias, backend="reference")
        scores = np.tanh((x @ w_query.T + bias)[:, :, None] + (context @ w_key.T)[:, None]) @ v
        seen = rng.random((2, 3, 5)) < 0.7
        seen[..., 0] = True
        short = np.arange(5) < np.array([5, 2])[:, None, None]
        cases = [
            ({}, True),
            ({"mask": seen}, seen),
            ({"mask": seen[0]}, seen[0]),
            ({"key_lengths": [5, 2]}, short),
        ]
        for options, kept in cases:
            weights = self.softmax(scores, kept)
            for given in ({"context": context}, {"memory": layer.project(context)}):
                result = layer(x, return_weights=True, **given, **options)
                np.testing.assert_allclose(result.weights, weights, atol=1e-12)
                np.testing.assert_allclose(result.output, weights @ context, atol=1e-12)
                np.testing.assert_array_equal(layer(x, **given, **options), result.output)
        np.testing.assert_allclose(layer(x[1], context[1]), layer(x, context)[1], atol=1e-12)
        for given in ({}, {"context": context, "memory": layer.project(context)}):
            with pytest.raises(ValueError, match="give either context or memory"):
                layer(x, **given)

    def test_luong(self, rng, arrays):
        x, context = arrays
        weight, w_output = rng.standard_normal((6, 4)), rng.standard_normal((8, 10))
        weights = self.softmax(x @ weight @ context.swapaxes(1, 2))
        layer = LuongAttention("general", weight, backend="reference")
        result = layer(x, context, return_weights=True)
        np.testing.assert_allclose(result.weights, weights, atol=1e-12)
        np.testing.assert_allclose(result.output, weights @ context, atol=1e-12)
        np.testing.assert_array_equal(layer(x, context), result.output)
        np.testing.assert_allclose(layer(x[1], context[1]), result.output[1], atol=1e-12)
        state = np.tanh(np.concatenate([weights @ context, x], -1) @ w_output.T)
        layer = LuongAttention("general", weight, w_output=w_output, backend="reference")
        np.testing.assert_allclose(layer(x, context), state, atol=1e-12)
        result = layer(x, context, return_weights=True)
        np.testing.assert_allclose(result.output, state, atol=1e-12)
        np.testing.assert_allclose(result.weights, weights, atol=1e-12)
        near = LuongAttention("general", weight, local=1, backend="reference")
        seen = np.abs(np.arange(5) - np.arange(3)[:, None] - 1) <= 1
        expected = self.softmax(x @ weight @ context.swapaxes(1, 2), seen) @ context
        np.testing.assert_allclose(near(x, context, query_offset=1), expected, atol=1e-12)


class TestGRU:
    def weights(self, rng, d_in=5, d=4):
        return [rng.standard_normal(s) for s in ((3 * d, d_in), (3 * d, d), (3 * d,), (3 * d,))]

    def test_formula(self, rng):
        w, u, b, c = self.weights(rng)
        x, h = rng.standard_normal(5), rng.standard_normal(4)

        def sigmoid(a):
            return 1 / (1 + np.exp(-a))

        r, z = (sigmoid(w[s] @ x + b[s] + u[s] @ h + c[s]) for s in (slice(0, 4), slice(4, 8)))
        s = slice(8, 12)
        for reset_after, inner in ((True, r * (u[s] @ h + c[s])), (False, u[s] @ (r * h) + c[s])):
            n = np.tanh(w[s] @ x + b[s] + inner)
            cell = GRUCell(w, u, b, c, reset_after=reset_after)
            np.testing.assert_allclose(cell(x, h), (1 - z) * n + z * h, rtol=1e-12)
        np.testing.assert_array_equal(cell(x), cell(x, np.zeros(4)))
        bare = GRUCell(w, u, reset_after=False), GRUCell(w, u, 0 * b, 0 * c, reset_after=False)
        np.testing.assert_array_equal(bare[0](x, h), bare[1](x, h))

    @needs_torch
    def test_is_pytorchs(self, rng):
        import torch

        theirs = torch.nn.GRU(5, 4, batch_first=True, bidirectional=True)
        state = {name: x.numpy() for name, x in theirs.state_dict().items()}
        x, h = rng.standard_normal((3, 6, 5), np.float32), rng.standard_normal((2, 3, 4), np.float32)
        with torch.no_grad():
            expected, last = theirs(torch.from_numpy(x), torch.from_numpy(h))
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        for i, suffix in enumerate(("", "_reverse")):
            layer = GRU(GRUCell(*(state[name + suffix] for name in names)), reverse=bool(i))
            outputs, end = layer(x, h[i])
            np.testing.assert_allclose(outputs, expected[..., 4 * i : 4 * i + 4], atol=1e-6)
            np.testing.assert_allclose(end, last[i], atol=1e-6)
            np.testing.assert_array_equal(layer(x[0])[0], layer(x[0], np.zeros(4, np.float32))[0])

    @pytest.mark.parametrize("linear_before_reset", [0, 1])
    def test_is_onnxs(self, rng, linear_before_reset):
        """ONNX's own implementation."""
        onnx = pytest.importorskip("onnx")
        from onnx.reference import ReferenceEvaluator

        w, r, b, c = (x.astype(np.float32) for x in self.weights(rng))
        x, h = rng.standard_normal((6, 1, 5), np.float32), rng.standard_normal((1, 1, 4), np.float32)
        node = onnx.helper.make_node(
            "GRU", ["x", "w", "r", "b", "", "h"], ["y", "last"], hidden_size=4,
            linear_before_reset=linear_before_reset,
        )  # fmt: skip
        both = np.concatenate([b, c])
        _, expected = ReferenceEvaluator(node).run(
            None, {"x": x, "w": w[None], "r": r[None], "b": both[None], "h": h}
        )
        cell = GRUCell.from_onnx(w, r, both, linear_before_reset=bool(linear_before_reset))
        _, last = GRU(cell)(x[:, 0], h[0, 0])
        np.testing.assert_allclose(last, expected[0, 0], atol=1e-6)

    def test_what_does_not_fit(self, rng):
        w, u, b, _ = self.weights(rng)
        with pytest.raises(ValueError, match=r"weight_ih has 11 rows; expected 3 \* 4"):
            GRUCell(w[:11], u)
        with pytest.raises(ValueError, match=r"weight_hh has 11 rows; expected 3 \* 4"):
            GRUCell(w, u[:11])
        with pytest.raises(ValueError, match=r"b has shape \(12,\); expected \(24,\)"):
            GRUCell.from_onnx(w, u, b)
        with pytest.raises(ValueError, match="three gates"):
            GRUCell.from_onnx(w[:11], u)
