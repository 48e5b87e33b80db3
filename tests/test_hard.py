"""Hard attention: the selected key is the best one, or the one whose part of the weights holds the number."""

import tracemalloc

import numpy as np
import pytest
from ml_dtypes import bfloat16, finfo
from oracle import SIZES, assert_same_bits, compute_dtype_of, formula, inputs, normal, see
from test_errors import BAD, GOOD, OUT
from test_memory import LAYOUTS
from test_scores import raises

import nbattn
from nbattn import BlockMask, hard_attention, scaled_dot_product_attention

HALVES = [np.float16, bfloat16]
isa = [pytest.param(dtype, marks=pytest.mark.isa) for dtype in (np.float32, np.float64)]
dtypes = pytest.mark.parametrize("dtype", [*isa, *HALVES], ids=lambda d: np.dtype(d).name)
modes = pytest.mark.parametrize("mode", ["argmax", "sample"])
ISA = {"float32": np.float32, "float64": np.float64}


def exact(query, key, value, mask=None, **options):
    wide = [np.asarray(x).astype(np.float64) for x in (query, key, value)]
    compute = np.longdouble if query.dtype == np.float64 else np.float64
    return formula(*wide, mask, compute=compute, **options)


def selected(value, index, heads):
    """The rows of (B, Hkv, Sk, Dv) values that (B, Hq, Sq) indices name; 0 for -1."""
    value = np.repeat(value, heads // value.shape[1], axis=1)
    rows = np.take_along_axis(value, np.maximum(index, 0)[..., None], axis=2)
    return np.where(index[..., None] < 0, value.dtype.type(0), rows)


def check(backend, query, key, value, mask=None, *, given=None, **options):
    """Hold both modes to the formula's weights, and the outputs to the values that they name.

    `given` is what the door gets in place of the mask and options that it stands for.
    """
    result = exact(query, key, value, mask, **options)
    weights = result.weights
    eps = float(finfo(compute_dtype_of(query.dtype)).eps)
    unit = 16 * eps * (1 + result.condition)
    empty = result.lse == -np.inf
    call = {"backend": backend} | ({"mask": mask, **options} if given is None else given)
    best = hard_attention(query, key, value, **call)
    drawn = hard_attention(query, key, value, mode="sample", rng=3, **call)
    for got in (best, drawn):
        assert got.index.dtype == np.int64
        np.testing.assert_array_equal(got.index == -1, empty)
        assert (got.index < key.shape[2]).all()
        assert_same_bits(got.output, selected(value, got.index, query.shape[1]))
    if not weights.size:
        return best, drawn
    mine = np.take_along_axis(weights, np.maximum(best.index, 0)[..., None], axis=3)[..., 0]
    short = np.log(weights.max(axis=3), where=~empty, out=np.zeros(empty.shape, weights.dtype))
    short -= np.log(mine, where=~empty, out=np.zeros(empty.shape, weights.dtype))
    assert (short <= unit).all(), short.max()
    sums = weights.cumsum(axis=3)
    upper = np.take_along_axis(sums, np.maximum(drawn.index, 0)[..., None], axis=3)[..., 0]
    mine = np.take_along_axis(weights, np.maximum(drawn.index, 0)[..., None], axis=3)[..., 0]
    numbers = np.random.default_rng(3).random(empty.shape)
    assert (mine[~empty] > 0).all()
    assert (empty | (numbers < upper + unit)).all()
    assert (empty | (numbers >= upper - mine - unit)).all()
    return best, drawn


class Numbers:
    """What takes the place of a generator, and gives one number again and again."""

    def __init__(self, number):
        self.number = number

    def random(self, shape):
        return np.broadcast_to(self.number, shape).copy()


@pytest.fixture
def uniform(monkeypatch):
    """Have every row's number be this one."""
    return lambda number: monkeypatch.setattr("nbattn.check.check_rng", lambda rng: Numbers(number))


class TestFormula:
    @dtypes
    def test_ragged_sizes(self, backend, dtype, rng):
        others = [rng.permutation(SIZES) for _ in range(3)]
        for queries, keys, head_dim, value_dim in zip(SIZES, *others, strict=True):
            q, k, v = inputs(rng, 2, 2, 1, queries, keys, head_dim, value_dim, dtype)
            check(backend, q, k, v)
            check(backend, q, k, v, is_causal=True, query_offset="end")

    @dtypes
    def test_long(self, backend, dtype, rng):
        q, k, v = inputs(rng, 1, 2, 1, 260, 517, 64, 40, dtype)
        check(backend, q, k, v, is_causal=True, query_offset=257)
        check(backend, q, k, v, window_size=(100, 30), query_offset="end")

    @pytest.mark.parametrize("heads", [(1, 1), (5, 5), (6, 2), (12, 3), (40, 1)])
    def test_groups(self, backend, heads, rng):
        for queries in (1, 2, 9, 70):
            q, k, v = inputs(rng, 2, *heads, queries, 50, 8)
            check(backend, q, k, v, is_causal=True, query_offset=20, alibi_slopes=rng.random(heads[0]))

    @pytest.mark.isa
    @pytest.mark.parametrize(
        "options",
        [
            {"scale": 0.3},
            {"scale": -0.5},
            {"scale": 1e-3, "softcap": 0.5},
            {"softcap": 2.0, "scale": 1.5},
            {"alibi_slopes": np.array([1.0, 0.25, 0.01, -0.3]), "query_offset": [5, -2]},
            {"window_size": (40, 7), "query_offset": 11},
            {"window_size": (3, None), "is_causal": True, "query_offset": "end", "key_lengths": [70, 50]},
            {"key_lengths": [0, 69]},
            {"is_causal": True, "query_offset": -9},
        ],
        ids=str,
    )
    def test_options(self, backend, options, rng):
        check(backend, *inputs(rng), **options)

    @pytest.mark.parametrize("dtype", [np.float32, *HALVES], ids=lambda d: np.dtype(d).name)
    def test_mask_and_bias(self, backend, dtype, rng):
        q, k, v = inputs(rng, 2, 4, 2, 100, 300, dtype=dtype)
        kinds = np.array([0.0, 0.5, 1.0])[rng.integers(0, 3, (4, 6))]
        mask = rng.random((100, 300)) < np.repeat(np.repeat(kinds, 25, axis=0), 50, axis=1)
        mask[7] = False
        check(backend, q, k, v, mask)
        check(backend, q, k, v, BlockMask.from_dense(mask))
        check(backend, q, k, v, BlockMask.from_dense(mask), window_size=(90, 9), query_offset=150)
        for kind in (np.float32, np.float64, np.float16):
            bias = normal(rng, (2, 1, 100, 300), kind)
            bias[rng.random(bias.shape) < 0.2] = -np.inf
            bias[:, :, 4:7] = -np.inf
            check(backend, q, k, v, bias=bias)
        check(backend, q, k, v, mask, bias=bias, is_causal=True, query_offset=150)
        check(backend, q, k, v, np.arange(300) % 3 > 0, bias=bias[:, :, :1])

    @pytest.mark.parametrize("missing", [1, 2])
    def test_fewer_dimensions(self, backend, missing, rng):
        q, k, v = inputs(rng, 1, 1, 1, 5, 7, 3)
        drop = (0,) * missing
        for mode in ("argmax", "sample"):
            full = hard_attention(q, k, v, mode=mode, rng=1, backend=backend)
            small = hard_attention(q[drop], k[drop], v[drop], mode=mode, rng=1, backend=backend)
            for a, b in zip(small, full, strict=True):
                np.testing.assert_array_equal(a, b[drop], strict=True)

    @modes
    @pytest.mark.parametrize("sizes", [(2, 2, 0, 5), (2, 2, 3, 0), (0, 2, 3, 5), (2, 0, 3, 5), (0, 0, 0, 0)])
    def test_empty(self, backend, mode, sizes):
        batch, heads, queries, keys = sizes
        q, k, v = (np.ones((batch, heads, *s), np.float32) for s in ((queries, 4), (keys, 4), (keys, 6)))
        output, index = hard_attention(q, k, v, mode=mode, backend=backend)
        assert output.shape == (batch, heads, queries, 6)
        assert index.shape == (batch, heads, queries)
        assert (index == -1).all()
        assert not output.any()

    @modes
    def test_dead_rows(self, backend, mode, rng):
        q, k, v = inputs(rng, 1, 1, 1, 3, 5, 4)
        for options in (
            {"mask": np.zeros((3, 5), bool)},
            {"bias": np.full((3, 5), -np.inf)},
            {"is_causal": True, "query_offset": -3},
            {"window_size": (1, 1), "query_offset": 50},
            {"key_lengths": [0]},
        ):
            output, index = hard_attention(q, k, v, mode=mode, backend=backend, **options)
            assert (index == -1).all()
            assert not output.any()


def from_table(score, batch, head, q_index, kv_index, table):
    return score + table[q_index, kv_index]


def two_of_three(batch, head, q_index, kv_index):
    return (q_index + kv_index + head) % 3 != 0


class TestFunctions:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_are_what_they_say(self, backend, dtype, rng):
        q, k, v = inputs(rng, 2, 4, 2, 70, 300, dtype=dtype)
        table = normal(rng, (70, 300), dtype)
        seen = (np.arange(300) + np.arange(70)[:, None] + np.arange(4)[:, None, None]) % 3 != 0
        own = {"score_mod": from_table, "mask_mod": two_of_three, "mod_args": (table,)}
        for options in ({}, {"is_causal": True, "query_offset": 200}):
            check(backend, q, k, v, seen, bias=table, given=own | options, **options)
        check(backend, q, k, v, seen, given={"mask_mod": two_of_three})

    @modes
    def test_special_scores(self, backend, mode, rng):
        q, k, v = inputs(rng, 1, 2, 2, 40, 200)
        table = np.zeros((40, 200), np.float32)
        table[3, [60, 150]] = np.nan
        table[5, 170] = np.inf
        table[7] = -np.inf
        table[9, :190] = -np.inf
        call = {"score_mod": from_table, "mod_args": (table,), "mode": mode, "rng": 0, "backend": backend}
        index = hard_attention(q, k, v, **call).index[0]
        np.testing.assert_array_equal(index[:, [3, 5, 7]], [[60, 170, -1]] * 2)
        assert (index[:, 9] >= 190).all()

    @modes
    def test_that_raise(self, backend, mode):
        x = np.zeros((1, 2, 5, 4), np.float32)
        with pytest.raises((RuntimeError, ValueError), match="score_mod 'raises'"):
            hard_attention(x, x, x, score_mod=raises, mode=mode, backend=backend)


class TestArgmax:
    @pytest.mark.isa
    def test_first_of_several(self, backend, rng):
        # Small whole numbers: every score is exact, and most occur again in other tiles of keys.
        q, k = (rng.integers(-2, 3, (1, 2, n, 3)).astype(np.float32) for n in (100, 700))
        v = normal(rng, (1, 2, 700, 4))
        for options in ({}, {"is_causal": True, "query_offset": 300}, {"window_size": (200, 0)}):
            scores = np.where(see((1, 2, 100, 700), **options), q @ k.swapaxes(2, 3), -np.inf)
            got = hard_attention(q, k, v, scale=1.0, backend=backend, **options)
            np.testing.assert_array_equal(got.index, scores.argmax(axis=3))
        zero = hard_attention(np.zeros_like(q), k, v, window_size=(5, None), backend=backend)
        np.testing.assert_array_equal(zero.index[0, 0], np.maximum(np.arange(100) - 5, 0))

    def test_sharp_soft_attention_selects_the_same(self, backend, rng):
        q, k, v = inputs(rng, 1, 4, 2, 40, 60, 16, dtype=np.float64)
        soft = scaled_dot_product_attention(q, k, v, scale=1e5, backend=backend)
        np.testing.assert_allclose(hard_attention(q, k, v, backend=backend).output, soft, rtol=1e-12)

    def test_many_keys(self):
        """float32 could not count so many."""
        k = np.zeros((2**24 + 5, 1), np.float32)
        k[-1] = 1
        assert hard_attention(np.ones((1, 1), np.float32), k, k).index[0] == 2**24 + 4


class TestSpecialNumbers:
    def check(self, backend, q, k, v, mask=None, **options):
        """Against the scores as they are, with NaN as in `numpy.argmax`."""
        heads = q.shape[1]
        wide_q, wide_k = (x.astype(compute_dtype_of(q.dtype)) for x in (q, k))
        with np.errstate(all="ignore"):
            scores = wide_q @ np.repeat(wide_k, heads // k.shape[1], axis=1).swapaxes(2, 3)
            scores = scores + options.get("bias", 0)
        seen = see(scores.shape, mask, **options)
        scores = np.where(seen, scores, -np.inf)
        expected = np.where((scores == -np.inf).all(axis=3), -1, scores.argmax(axis=3))
        special = ~np.isfinite(scores.max(axis=3))
        for mode in ("argmax", "sample"):
            got = hard_attention(q, k, v, mask, scale=1.0, mode=mode, rng=0, backend=backend, **options)
            rows = special if mode == "sample" else np.ones_like(special)
            np.testing.assert_array_equal(got.index[rows], expected[rows])
            assert_same_bits(got.output, selected(v, got.index, heads))
            assert np.take_along_axis(seen, np.maximum(got.index, 0)[..., None], axis=3)[got.index >= 0].all()

    @pytest.mark.parametrize("dtype", [*isa, np.float16], ids=lambda d: np.dtype(d).name)
    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_keys(self, backend, dtype, poison, rng):
        # Whole numbers, so that scores are exact and the order of equal ones is known.
        q, k = (rng.integers(-3, 4, (1, h, n, 5)).astype(dtype) for h, n in ((4, 70), (2, 300)))
        q[:, :, :2] = abs(q[:, :, :2]) + 1
        v = normal(rng, (1, 2, 300, 3), dtype)
        k[0, 0, [40, 250, 260]] = poison
        k[0, 1, 290] = poison
        bias = np.where((np.arange(300) + np.arange(70)[:, None]) % 3 == 0, 0.25, -np.inf)
        for options in (
            {},
            {"mask": np.arange(300) % 7 != 5},
            {"bias": bias},
            {"bias": bias.astype(np.float32), "is_causal": True, "query_offset": 200},
            {"is_causal": True, "query_offset": 9},
            {"window_size": (20, 4), "query_offset": 230},
            {"key_lengths": [250]},
        ):
            self.check(backend, q, k, v, **options)

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    def test_one_query(self, backend, poison, rng):
        q, k, v = inputs(rng, 2, 4, 2, 70, 150, 3)
        q, k = np.round(2 * q), np.round(2 * k)
        q[1, 2, 5] = poison
        self.check(backend, q, k, v, is_causal=True, query_offset=40)

    def test_values_are_only_copied(self, backend, rng):
        q, k, v = inputs(rng, 1, 2, 1, 20, 30, 4)
        clean = hard_attention(q, k, v, backend=backend).index
        v[0, 0, :, 1] = np.nan
        v[0, 0, :, 2] = -0.0
        got = hard_attention(q, k, v, backend=backend)
        np.testing.assert_array_equal(got.index, clean)
        assert_same_bits(got.output, selected(v, clean, 2))

    @modes
    def test_signalling_nan_is_copied_as_it_is(self, backend, mode):
        v = np.array([[0x7D01, 0x7C01, 0x8000]], np.uint16).view(np.float16)
        one = np.ones((1, 3), np.float16)
        assert_same_bits(hard_attention(one, one, v, mode=mode, backend=backend).output, v)


class TestSample:
    @pytest.mark.isa
    def test_frequencies(self, backend):
        import scipy.stats

        count, keys = 20_000, 200
        rng = np.random.default_rng(7)
        q, k, _ = inputs(rng, 1, 1, 1, 1, keys, 8)
        v = np.arange(keys, dtype=np.float32)[None, None, :, None]
        mask = np.arange(keys) % 5 != 2
        weights = exact(q, k, v, mask).weights[0, 0, 0]
        queries = np.broadcast_to(q, (1, 1, count, 8))
        output, index = hard_attention(queries, k, v, mask, mode="sample", rng=rng, backend=backend)
        counts = np.bincount(index[0, 0], minlength=keys)
        assert not counts[~mask].any()
        assert scipy.stats.chisquare(counts[mask], count * weights[mask]).pvalue > 0.01
        soft = scaled_dot_product_attention(q, k, v, mask, backend=backend)[0, 0, 0, 0]
        spread = np.sqrt(weights @ (np.arange(keys) - soft) ** 2 / count)
        assert abs(output.mean() - soft) < 3 * spread

    def test_numbers_come_from_the_generator(self, backend, rng):
        q, k, v = inputs(rng)
        call = {"mode": "sample", "backend": backend}
        generator, twin = np.random.default_rng(5), np.random.default_rng(5)
        first, second = (hard_attention(q, k, v, rng=generator, **call).index for _ in range(2))
        assert (first != second).any()
        np.testing.assert_array_equal(hard_attention(q, k, v, rng=5, **call).index, first)
        twin.random((2, 4, 33))
        np.testing.assert_array_equal(hard_attention(q, k, v, rng=twin, **call).index, second)
        assert (hard_attention(q, k, v, **call).index != hard_attention(q, k, v, **call).index).any()

    def test_argmax_takes_no_number(self, backend, rng):
        q, k, v = inputs(rng)
        generator = np.random.default_rng(5)
        hard_attention(q, k, v, rng=generator, backend=backend)
        assert generator.random() == np.random.default_rng(5).random()

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_ends_of_the_line(self, backend, dtype, uniform, rng):
        """Weights of 0 at both ends, in tiles of their own too, are never drawn, however rounding falls."""
        q, k, v = inputs(rng, 1, 3, 1, 70, 900, 8, dtype=dtype)
        bias = np.full(900, -1e4)
        bias[[140, 300, 301, 302, 500, 700]] = 0
        for number, expected in ((0.0, 140), (1 - 2.0**-53, 700)):
            uniform(number)
            for seen in (np.arange(900) != 650, np.arange(900) < 701):
                index = hard_attention(q, k, v, seen, bias=bias, mode="sample", backend=backend).index
                assert (index == expected).all()

    @pytest.mark.parametrize("number", [1 - 2.0**-53, 1 - 2.0**-24, 1 - 2.0**-22, 1e-30])
    def test_numbers_near_the_ends(self, backend, number, uniform, rng):
        q, k, v = inputs(rng, 1, 2, 1, 300, 1500, 16)
        result = exact(q, k, v, is_causal=True, query_offset=1200)
        uniform(number)
        index = hard_attention(
            q, k, v, is_causal=True, query_offset=1200, mode="sample", backend=backend
        ).index
        assert (index >= 0).all()
        sums = np.take_along_axis(result.weights.cumsum(axis=3), index[..., None], axis=3)[..., 0]
        share = np.take_along_axis(result.weights, index[..., None], axis=3)[..., 0]
        assert (number < sums + 1e-5).all()
        assert (number >= sums - share - 1e-5).all()


class TestMemory:
    @modes
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, backend, mode, layout, rng):
        arrays = inputs(rng, value_dim=9)
        mask, bias = rng.random((2, 4, 33, 70)) < 0.5, normal(rng, (2, 4, 33, 70))
        call = {"mode": mode, "rng": 0, "backend": backend}
        expected = hard_attention(*arrays, mask, bias=bias, **call)
        move = LAYOUTS[layout]
        moved = [move(x) for x in (*arrays, mask, bias)]
        got = hard_attention(*moved[:4], bias=moved[4], **call)
        out = np.full_like(expected.output, np.nan) if layout == "read-only" else move(expected.output + 1)
        beside = hard_attention(*arrays, mask, bias=bias, out=out, **call)
        assert beside.output is out
        for result in (got, beside):
            for x, y in zip(result, expected, strict=True):
                np.testing.assert_array_equal(x, y, strict=True)
        for x, y in zip(moved, (*arrays, mask, bias), strict=True):
            np.testing.assert_array_equal(x, y)

    def test_bfloat16_as_it_lies(self, backend, rng):
        arrays = inputs(rng, 2, 4, 2, 33, 150, 18, 7, dtype=bfloat16)
        expected = hard_attention(*arrays, backend=backend)
        for layout in ("part of a wider row", "every other number", "batch, sequence, heads"):
            got = hard_attention(*(LAYOUTS[layout](x) for x in arrays), backend=backend)
            np.testing.assert_array_equal(got.index, expected.index)
            assert_same_bits(got.output, expected.output)

    @dtypes
    @pytest.mark.parametrize("side", ["start", "end"])
    def test_nothing_outside_the_arrays_is_touched(self, backend, dtype, side, guarded, rng):
        for queries, keys in zip(SIZES[::2], rng.permutation(SIZES[::2]), strict=True):
            head_dim, value_dim = rng.choice(SIZES, 2)
            arrays = inputs(rng, 1, 4, 2, queries, keys, head_dim, value_dim, dtype)
            mask, bias = rng.random((queries, keys)) < 0.7, normal(rng, (4, queries, keys), dtype)
            q, k, v, mask, bias = (guarded(x, side) for x in (*arrays, mask, bias))
            out = guarded(np.full((1, 4, queries, value_dim), np.nan, dtype), side)
            for mode in ("argmax", "sample"):
                hard_attention(q, k, v, mode=mode, out=out, backend=backend)
                options = {"is_causal": True, "query_offset": 1, "bias": bias}
                hard_attention(q, k, v, mask, mode=mode, out=out, backend=backend, **options)
                assert np.isfinite(out.astype(np.float32)).all()
            k[0, 0, keys // 2] = np.nan
            hard_attention(q, k, v, mask, bias=bias, out=out, backend=backend)

    def test_is_linear(self, rng):
        """A 4096 x 4096 score matrix would be 64 MB."""
        q, k, v = inputs(rng, 1, 1, 1, 4096, 4096, 64)
        call = {"is_causal": True, "backend": "cpu", "mode": "sample"}
        hard_attention(q[:, :, :2], k, v, **call)
        tracemalloc.start()
        try:
            hard_attention(q, k, v, np.ones(4096, bool), bias=np.zeros((4096, 1)), **call)
            assert tracemalloc.get_traced_memory()[1] < 8e6
        finally:
            tracemalloc.stop()

    @modes
    def test_alone_in_a_batch_and_on_any_threads(self, mode, uniform, rng):
        import numba

        uniform(0.7)
        q, k, v = inputs(rng, 5, 4, 2, 300, 310, 20)
        k[3, 0, 7] = np.nan
        lengths = np.array([310, 40, 1, 309, 96])
        results = []
        before = numba.get_num_threads()
        try:
            for threads in (1, numba.config.NUMBA_NUM_THREADS):
                numba.set_num_threads(threads)
                results += [hard_attention(q, k, v, mode=mode, key_lengths=lengths) for _ in range(3)]
        finally:
            numba.set_num_threads(before)
        for result in results[1:]:
            np.testing.assert_array_equal(result.index, results[0].index)
        for b in range(5):
            one = slice(b, b + 1)
            alone = hard_attention(q[one], k[one], v[one], mode=mode, key_lengths=lengths[one])
            np.testing.assert_array_equal(alone.index, results[0].index[one])


HARD_BAD = {
    "mode": ({"mode": "best"}, ValueError, "mode is 'best'; expected 'argmax' or 'sample'"),
    "mode kind": ({"mode": 1}, TypeError, "mode is 1; expected 'argmax' or 'sample'"),
    "rng": ({"rng": -1}, ValueError, "rng is -1; expected None, a seed .* or a numpy.random.Generator"),
    "rng kind": ({"rng": "seed"}, TypeError, "rng is 'seed'; expected None, a seed"),
    "rng float": ({"rng": 0.5}, TypeError, "rng is 0.5; expected"),
    **{name: case for name, case in BAD.items() if not {
        "sinks", "compute_dtype", "return_lse", "return_weights"} & case[0].keys()},
}  # fmt: skip


@pytest.mark.parametrize("case", HARD_BAD)
def test_bad_argument(backend, case):
    changed, kind, message = HARD_BAD[case]
    dtype = getattr(changed.get("query"), "dtype", np.float32)
    out = np.full(OUT, 7, dtype)
    generator = np.random.default_rng(0)
    call = {"out": out, "backend": backend, "mode": "sample", "rng": generator, **GOOD}
    with pytest.raises(kind, match=message) as caught:
        hard_attention(**call | changed)
    assert type(caught.value) is kind
    assert (out == 7).all()
    assert generator.random() == np.random.default_rng(0).random()


def test_bad_out(backend):
    base = np.zeros((2, 4, 3, 8), np.float32)
    with pytest.raises(ValueError, match="out shares memory"):
        hard_attention(**GOOD | {"query": base}, out=base[..., :6], backend=backend)
    with pytest.raises(ValueError, match=r"out has shape \(2, 4, 3, 8\); expected \(2, 4, 3, 6\)"):
        hard_attention(**GOOD, out=base, backend=backend)


def test_result_is_a_named_tuple(backend):
    result = hard_attention(**GOOD, backend=backend)
    assert isinstance(result, nbattn.HardAttentionOutput)
    assert result._fields == ("output", "index")
