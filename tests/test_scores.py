"""score_mod and mask_mod: the user's functions equal formulas of their own, on both backends."""

import functools
import math
import re
import subprocess
import sys
import textwrap
import threading

import numba
import numpy as np
import pytest
from ml_dtypes import bfloat16
from oracle import DTYPES, assert_same_bits, inputs, normal

from nbattn import BlockMask, scores, varlen_attention
from nbattn import scaled_dot_product_attention as attention
from nbattn.scores import check_mod

FULL = {"return_weights": True, "return_lse": True}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
SLOPES = np.array([0.5, 0.25, 0.125, -0.3], np.float32)


def by_slope(score, batch, head, q_index, kv_index, slopes):
    return score + slopes[head] * (kv_index - q_index)


def capped(score, batch, head, q_index, kv_index):
    return 2.0 * math.tanh(score / 2.0)


def from_table(score, batch, head, q_index, kv_index, table):
    return score + table[batch, head, q_index, kv_index]


def backwards(batch, head, q_index, kv_index):
    return q_index >= kv_index


def banded(batch, head, q_index, kv_index):
    return q_index - kv_index <= 3 * head and kv_index - q_index <= batch + 1


def equal_ids(batch, head, q_index, kv_index, ids):
    return ids[batch, q_index] == ids[batch, kv_index]


def scale_of(q):
    return 1 / np.sqrt(q.shape[-1])


def formula(q, k, v, change, seen=True):
    """softmax(change(scores)) @ v over what is seen, in float64; `change` of arrays (B, H, Sq, Sk)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    with np.errstate(all="ignore"):
        s = change(np.einsum("bhid,bhjd->bhij", q, k) * scale_of(q))
        s = np.where(np.broadcast_to(seen, s.shape), s, -np.inf)
        largest = s.max(-1, keepdims=True, initial=-np.inf)
        e = np.exp(s - np.where(largest == -np.inf, 0, largest))
        total = e.sum(-1, keepdims=True)
        weights = e / np.where(total == 0, 1, total)
        return weights @ v, weights, (np.log(total) + largest)[..., 0]


def hold(result, truth, rtol=2e-5):
    for got, exact in zip(result, truth, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=rtol, atol=rtol)


def grids(q, k):
    """batch, head, q_index and kv_index that broadcast to (B, H, Sq, Sk)."""
    return np.ogrid[: q.shape[0], : q.shape[1], : q.shape[2], : k.shape[2]]


class TestScoreMod:
    @pytest.mark.gpu
    def test_alibi_as_a_function(self, backend, rng):
        q, k, v = inputs(rng)
        got = attention(q, k, v, score_mod=by_slope, mod_args=(SLOPES,), backend=backend, **FULL)
        _, h, i, j = grids(q, k)
        hold(got, formula(q, k, v, lambda s: s + SLOPES.astype(np.float64)[h] * (j - i)))
        built_in = attention(q, k, v, alibi_slopes=SLOPES, backend=backend, **FULL)
        hold(got, [np.asarray(x, np.float64) for x in built_in])

    @dtypes
    def test_dtypes(self, backend, dtype, rng):
        q, k, v = inputs(rng, dtype=dtype, queries=70, keys=150)
        got = attention(q, k, v, score_mod=capped, backend=backend, **FULL)
        tolerance = {"float32": 2e-5, "float64": 1e-13, "float16": 2e-3, "bfloat16": 2e-2}
        hold(got, formula(q, k, v, lambda s: 2 * np.tanh(s / 2)), tolerance[np.dtype(dtype).name])
        assert got.output.dtype == dtype

    def test_bfloat16_products(self, backend, rng):
        q, k, v = (x.astype(bfloat16).astype(np.float32) for x in inputs(rng))
        got = attention(q, k, v, score_mod=capped, compute_dtype="bfloat16", backend=backend)
        hold([got], formula(q, k, v, lambda s: 2 * np.tanh(s / 2))[:1], 2e-2)

    @pytest.mark.parametrize(
        ("queries", "keys"), [(1, 1), (1, 300), (3, 5), (64, 128), (130, 257), (0, 4), (4, 0)]
    )
    def test_every_score_has_its_indices(self, backend, queries, keys, rng):
        q, k, v = inputs(rng, 2, 4, 2, queries, keys, 8)
        table = normal(rng, (2, 4, queries, keys), np.float64)
        got = attention(q, k, v, score_mod=from_table, mod_args=(table,), backend=backend, **FULL)
        hold(got, formula(q, k, v, lambda s: s + table))

    def test_between_the_other_options(self, backend, rng):
        q, k, v = inputs(rng)
        bias, mask, sinks = normal(rng, (33, 70)), rng.random((2, 4, 33, 70)) < 0.7, normal(rng, (4,))
        options = {"bias": bias, "softcap": 3.0, "alibi_slopes": SLOPES, "sinks": sinks, "scale": 0.4}
        positions = {
            "is_causal": True,
            "query_offset": "end",
            "key_lengths": [70, 41],
            "window_size": (50, 3),
        }
        got = attention(
            q,
            k,
            v,
            mask,
            score_mod=lambda s, b, h, i, j: s * abs(s),
            backend=backend,
            **options,
            **positions,
            **FULL,
        )
        # The same as a bias: a score that was 0, and what the function makes of the true one.
        _, _, i, j = grids(q, k)
        offset = np.array([70, 41])[:, None, None, None] - 33
        s = 0.4 * np.einsum("bhid,bhjd->bhij", q, np.repeat(k, 2, axis=1)).astype(np.float64)
        s = 3 * np.tanh(s / 3) + bias + SLOPES[:, None, None] * (j - i - offset)
        check_against = attention(
            q * 0,
            k,
            v,
            mask,
            bias=(s * abs(s)).astype(np.float32),
            sinks=sinks,
            backend="reference",
            **positions,
            **FULL,
        )
        hold(got, [np.asarray(x, np.float64) for x in check_against], 1e-4)

    def test_strides_and_out(self, backend, rng):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in normal(rng, (3, 2, 40, 4, 16)))
        out = np.empty((2, 40, 4, 16), np.float32).transpose(0, 2, 1, 3)
        table = normal(rng, (40, 40, 4, 2)).T
        got = attention(q, k, v, score_mod=from_table, mod_args=(table,), out=out, backend=backend)
        assert got is out
        hold([got], formula(q, k, v, lambda s: s + table)[:1])

    def test_varlen_counts_within_sequences(self, backend, rng):
        lengths = [(5, 9), (0, 3), (70, 130), (1, 1)]
        starts = np.concatenate((np.zeros((1, 2), int), np.cumsum(lengths, axis=0)))
        q, k, v = normal(rng, (76, 4, 8)), normal(rng, (143, 2, 8)), normal(rng, (143, 2, 8))
        table = normal(rng, (4, 4, 70, 130))
        got = varlen_attention(
            q, k, v, *starts.T, score_mod=from_table, mask_mod=lambda b, h, i, j: (i + j + b) % 3 != 0,
            mod_args=(table,), backend=backend, return_lse=True,
        )  # fmt: skip
        for b, ((n, m), (first, key)) in enumerate(zip(lengths, starts[:-1], strict=True)):
            x, y, z = (
                a.swapaxes(0, 1)[None] for a in (q[first : first + n], k[key : key + m], v[key : key + m])
            )
            seen = (np.arange(n)[:, None] + np.arange(m) + b) % 3 != 0
            output, _, lse = formula(x, y, z, lambda s: s + table[b, :, :n, :m], seen)  # noqa: B023
            hold(
                [got.output[first : first + n].swapaxes(0, 1), got.lse[first : first + n].T],
                [output[0], lse[0]],
            )

    def test_minus_infinity_masks(self, backend, rng):
        q, k, v = inputs(rng, keys=200)
        k[:, :, 7], v[:, :, 13] = np.nan, np.nan
        v[:, :, 130, 2], v[:, :, 60] = np.inf, -np.inf
        hidden = np.isin(np.arange(200), (7, 13, 60, 130))

        def hides(score, batch, head, q_index, kv_index, hidden):
            return -math.inf if hidden[kv_index] or q_index == 5 else score

        got = attention(q, k, v, score_mod=hides, mod_args=(hidden,), backend=backend, **FULL)
        seen = ~hidden & (np.arange(33) != 5)[:, None]
        k, v = (np.where(hidden[:, None], 0, x) for x in (k, v))
        hold(got, formula(q, k, v, lambda s: s, seen))
        assert (got.lse[:, :, 5] == -np.inf).all()
        assert not got.output[:, :, 5].any()

    def test_nan_reaches_its_row_alone(self, backend, rng):
        q, k, v = inputs(rng)

        def breaks(score, batch, head, q_index, kv_index):
            return math.nan if (q_index == 3 and kv_index == 69) or kv_index == 68 else score

        got = attention(q, k, v, score_mod=breaks, mask=np.arange(70) != 68, backend=backend)
        assert np.isnan(got[:, :, 3]).all()
        assert np.isfinite(np.delete(got, 3, axis=2)).all()

    @pytest.mark.gpu
    def test_if_and_loops(self, backend, rng):
        q, k, v = inputs(rng, queries=9, keys=20)

        def stepped(score, batch, head, q_index, kv_index, steps):
            total = score
            for n in range(head):
                if kv_index > q_index + n:
                    total -= steps[n]
            return total

        steps = np.array([0.5, 1.0, 2.0])
        _, h, i, j = grids(q, k)
        less = sum(np.where((h > n) & (j > i + n), steps[n], 0) for n in range(3))
        got = attention(q, k, v, score_mod=stepped, mod_args=(steps,), backend=backend, **FULL)
        hold(got, formula(q, k, v, lambda s: s - less))

    @pytest.mark.gpu
    def test_kinds_of_functions(self, backend, rng):
        q, k, v = inputs(rng)
        factor, pair = 3.0, (0.5, 2)
        three, half, two = np.array([3], np.float16), np.array([0.5], bfloat16), np.float16(2)

        @numba.njit
        def helper(x):
            return x / factor

        def plain(x):
            return helper(x) + pair[0]

        kinds = [
            lambda s, b, h, i, j: plain(s) * pair[1],
            numba.njit(lambda s, b, h, i, j: (s / 3.0 + 0.5) * 2),
            lambda s, b, h, i, j, third=1 / 3, two=2: (s * third + 0.5) * two,
            lambda s, *indices: (np.where(indices[0] < 0, s, s / 3) + np.float32(0.5)) * 2,
            lambda s, b, h, i, j: (s / three[0] + half[0] * h**0) * two,
            lambda s, b, h, i, j: (s / 3 + math.pow(2, -1 - h * 0)) * 2,
        ]
        truth = formula(q, k, v, lambda s: (s / 3 + 0.5) * 2)
        for function in kinds:
            hold(attention(q, k, v, score_mod=function, backend=backend, **FULL), truth)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "x",
        [3, 2.5, True, np.float64(2), np.uint8(4), *(np.array([2, 1], d) for d in "bBhHiIlLefd?")],
        ids=lambda x: f"{np.asarray(x).dtype}{np.ndim(x)}",
    )  # fmt: skip
    def test_kinds_of_arguments(self, backend, x, rng):
        q, k, v = inputs(rng, 1, 1, 1, 3, 4, 2)
        function = (lambda s, b, h, i, j, x: s * x[0]) if np.ndim(x) else (lambda s, b, h, i, j, x: s * x)
        got = attention(q, k, v, score_mod=function, mod_args=(x,), backend=backend, **FULL)
        hold(got, formula(q, k, v, lambda s: s * float(np.ravel(x)[0])))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", "bBhHiI")
    def test_small_integers_do_not_wrap_around(self, backend, dtype, rng):
        q, k, v = inputs(rng, 1, 1, 1, 4, 4, 2)
        x = np.array([1, 0, 100, 127], dtype)
        got = attention(
            q, k, v, score_mod=lambda s, b, h, i, j, x: s + (x[i] - x[j]) * (x[i] + x[j]) / 9999,
            mod_args=(x,), backend=backend, **FULL,
        )  # fmt: skip
        square = x.astype(np.float64) ** 2
        hold(got, formula(q, k, v, lambda s: s + (square[:, None] - square) / 9999))

    @pytest.mark.gpu
    def test_arguments_are_read_with_each_call(self, backend, rng):
        q, k, v = inputs(rng, 1, 1, 1, 3, 4, 2)
        x = np.array([1.0])
        for number in (1.0, 5.0, -2.0):
            x[0] = number
            got = attention(
                q, k, v, score_mod=lambda s, b, h, i, j, x: s * x[0], mod_args=(x,), backend=backend
            )
            hold([got], formula(q, k, v, lambda s: s * number)[:1])  # noqa: B023

    def test_same_bits_whatever_the_threads_and_the_batch(self, rng):
        q, k, v = inputs(rng, 3, 4, 2, 150, 300)
        options = {"score_mod": capped, "mask_mod": lambda b, h, i, j: i * 2 >= j}
        whole = attention(q, k, v, **options)
        before = numba.get_num_threads()
        try:
            numba.set_num_threads(1)
            assert_same_bits(attention(q, k, v, **options), whole)
        finally:
            numba.set_num_threads(before)
        for b in range(3):
            assert_same_bits(attention(q[b], k[b], v[b], **options), whole[b])


class TestMaskMod:
    @dtypes
    def test_causal_as_a_function(self, backend, dtype, rng):
        q, k, v = inputs(rng, dtype=dtype, queries=150, keys=300)
        got = attention(q, k, v, mask_mod=backwards, backend=backend, **FULL)
        wanted = attention(q, k, v, is_causal=True, backend=backend, **FULL)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 300), (64, 128), (130, 257), (0, 4), (4, 0)])
    def test_equals_a_dense_mask(self, backend, queries, keys, rng):
        q, k, v = inputs(rng, 3, 4, 2, queries, keys, 8)
        b, h, i, j = grids(q, k)
        dense = (i - j <= 3 * h) & (j - i <= b + 1)
        got = attention(q, k, v, mask_mod=banded, backend=backend, **FULL)
        hold(got, formula(q, k, v, lambda s: s, dense))

    def test_with_masks(self, backend, rng):
        q, k, v = inputs(rng, 2, 4, 2, 130, 300)
        mask, ids = rng.random((2, 1, 130, 300)) < 0.6, rng.integers(0, 3, (2, 300))
        got = attention(
            q, k, v, mask, mask_mod=equal_ids, mod_args=(ids,), is_causal=True, query_offset=40,
            key_lengths=[300, 77], backend=backend, **FULL,
        )  # fmt: skip
        b, _, i, j = grids(q, k)
        seen = mask & (ids[b, i] == ids[b, j]) & (j <= i + 40) & (j < np.array([300, 77])[b])
        hold(got, formula(q, k, v, lambda s: s, seen))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: np.dtype(d).name)
    def test_with_a_block_mask(self, backend, dtype, rng):
        q, k, v = inputs(rng, 2, 4, 2, 130, 300, dtype=dtype)
        dense = rng.random((130, 300)) < 0.6
        dense[:70, 100:200], dense[70:, :64] = False, True
        options = {"mask_mod": banded, "is_causal": True, "query_offset": 40, "backend": backend}
        got = attention(q, k, v, BlockMask.from_dense(dense), **options, **FULL)
        for x, y in zip(got, attention(q, k, v, dense, **options, **FULL), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_what_is_masked_may_hold_anything(self, backend, rng):
        q, k, v = inputs(rng, 2, 4, 2, 70, 300)
        for place, x in ((11, np.nan), (150, np.inf), (299, -np.inf)):
            k[:, :, place], v[:, :, place] = x, x

        def seen(batch, head, q_index, kv_index):
            return kv_index != 11 and kv_index != 150 and kv_index != 299

        for options in ({}, {"score_mod": capped}, {"mask": rng.random((70, 300)) < 0.5}):
            got = attention(q, k, v, mask_mod=seen, backend=backend, **options)
            assert np.isfinite(got).all()
            zeros = [np.where(np.isfinite(x), x, 0) for x in (k, v)]
            assert_same_bits(got, attention(q, *zeros, mask_mod=seen, backend=backend, **options))

    def test_a_nan_that_some_rows_see(self, backend, rng):
        q, k, v = inputs(rng, 1, 2, 1, 100, 200)
        v[:, :, 150, 3] = np.nan
        got = attention(q, k, v, mask_mod=lambda b, h, i, j: i + j < 200, backend=backend)
        assert np.isnan(got[:, :, :50, 3]).all()
        assert np.isfinite(got[:, :, 50:]).all()
        assert np.isfinite(np.delete(got, 3, axis=3)).all()

    def test_shared_by_heads_or_not(self, rng):
        """A function that reads neither batch nor head is asked once for all; that must not show."""
        q, k, v = inputs(rng, 2, 4, 4, 200, 400)

        def alike(batch, head, q_index, kv_index):
            return (q_index // 7 + kv_index // 50) % 3 == 1

        def named(batch, head, q_index, kv_index):
            return (q_index // 7 + kv_index // 50 + 0 * batch * head) % 3 == 1

        assert_same_bits(attention(q, k, v, mask_mod=alike), attention(q, k, v, mask_mod=named))

    @pytest.mark.parametrize(
        "shape", [(1, 1, 300, 200), (2, 3, 64, 64), (2, 1, 1, 1), (1, 2, 65, 129), (1, 1, 0, 5)]
    )
    def test_block_words(self, shape):
        from nbattn.cpu import masks, mods

        states, words = mods.block_words(check_mod(banded, "mask_mod"), shape)
        b, h, i, j = np.ogrid[tuple(slice(n) for n in shape)]
        seen = np.broadcast_to((i - j <= 3 * h) & (j - i <= b + 1), shape)
        some = iter(words)
        for place in np.ndindex(*states.shape):
            rows, columns = (slice(64 * n, 64 * n + 64) for n in place[2:])
            block = seen[*place[:2], rows, columns]
            if states[place] == masks.SOME:
                assert block.any()
                assert not block.all()
                each = sum(block[r].astype(np.uint64) << np.uint64(r) for r in range(len(block)))
                np.testing.assert_array_equal(next(some), np.pad(each, (0, 64 - len(each))))
            else:
                assert (block if states[place] == masks.EVERYTHING else ~block).all()
        assert next(some, None) is None


class TestReadyMade:
    def test_alibi(self, backend, rng):
        q, k, v = inputs(rng)
        got = attention(q, k, v, score_mod=scores.alibi(SLOPES, query_offset=7), backend=backend, **FULL)
        wanted = attention(q, k, v, alibi_slopes=SLOPES, query_offset=7, backend=backend, **FULL)
        hold(got, [np.asarray(x, np.float64) for x in wanted])

    def test_softcap(self, backend, rng):
        q, k, v = inputs(rng)
        got = attention(q, k, v, score_mod=scores.softcap(1.5), backend=backend, **FULL)
        hold(got, formula(q, k, v, lambda s: 1.5 * np.tanh(s / 1.5)))

    def test_relative_position(self, backend, rng):
        q, k, v = inputs(rng)
        table = normal(rng, (4, 21))
        got = attention(q, k, v, score_mod=scores.relative_position(table, 5), backend=backend, **FULL)
        _, h, i, j = grids(q, k)
        hold(got, formula(q, k, v, lambda s: s + table[h, np.clip(j - i - 5, -10, 10) + 10]))

    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_t5(self, backend, bidirectional, rng):
        q, k, v = inputs(rng, queries=200, keys=320)
        table = normal(rng, (32, 4))
        mod = scores.t5_bias(table, bidirectional=bidirectional, query_offset=3)
        _, _, i, j = grids(q, k)
        # Its formula, in float32 as published.
        distance, buckets = j - i - 3, 32
        first = 0
        if bidirectional:
            buckets = 16
            first, distance = 16 * (distance > 0), abs(distance)
        else:
            distance = -np.minimum(distance, 0)
        exact = buckets // 2
        with np.errstate(divide="ignore"):
            ratio = np.log(distance.astype(np.float32) / np.float32(exact)) / np.float32(
                math.log(128 / exact)
            )
        large = exact + np.nan_to_num(ratio * np.float32(buckets - exact), neginf=0).astype(int)
        bucket = first + np.where(distance < exact, distance, np.minimum(large, buckets - 1))
        bias = table[bucket[0, 0]].transpose(2, 0, 1)
        hold(attention(q, k, v, score_mod=mod, backend=backend, **FULL), formula(q, k, v, lambda s: s + bias))

    def test_beside_mod_args_of_another(self, backend, rng):
        q, k, v = inputs(rng)
        ids = rng.integers(0, 2, (2, 70))
        got = attention(
            q, k, v, score_mod=scores.alibi(SLOPES), mask_mod=equal_ids, mod_args=(ids,), backend=backend
        )
        b, h, i, j = grids(q, k)
        wanted = formula(q, k, v, lambda s: s + SLOPES[h] * (j - i), ids[b, i] == ids[b, j])
        hold([got], wanted[:1])

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: scores.softcap(0), ValueError, "cap must be positive, got 0"),
            (lambda: scores.alibi([[1.0]]), ValueError, r"slopes has shape \(1, 1\)"),
            (lambda: scores.alibi([1, 2]), TypeError, "slopes has dtype int64"),
            (lambda: scores.relative_position(np.ones((2, 4))), ValueError, "table has 4 columns"),
            (lambda: scores.t5_bias(np.ones((2, 4))), ValueError, "table has 2 buckets"),
            (lambda: scores.t5_bias(np.ones((32, 4)), max_distance=8), ValueError, "max_distance is 8"),
        ],
    )
    def test_errors(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


# --- what bad input gets ------------------------------------------------------------------------------------


def returns_array(score, batch, head, q_index, kv_index, table):
    return table


def calls_unknown(score, batch, head, q_index, kv_index):
    return unknown(score)  # noqa: F821


def writes(score, batch, head, q_index, kv_index, table):
    table[0] = 1
    return score


def makes_a_list(score, batch, head, q_index, kv_index):
    numbers = [score]
    numbers.append(score)
    return numbers[1]


def prints(score, batch, head, q_index, kv_index):
    print(score)
    return score


def power_of_two(n):
    n += 1
    x = 2
    x **= n
    return x


def raises(score, batch, head, q_index, kv_index):
    if kv_index == 3:
        raise ValueError
    return score


class Callable:
    def __call__(self, score, batch, head, q_index, kv_index):
        return score

    def method(self, score, batch, head, q_index, kv_index):
        return score


TABLE = np.ones(3)
BOTH = {
    "partial": (
        {"score_mod": functools.partial(by_slope, slopes=SLOPES)}, TypeError,
        "score_mod must be a Python function.*got partial; pass the function that it holds, and .* mod_args",
    ),
    "method": (
        {"score_mod": Callable().method}, TypeError,
        "got method; pass a function, and what it reads of the object as mod_args",
    ),
    "callable": (
        {"score_mod": Callable()}, TypeError,
        "got Callable; pass a function, and what it reads of the object as mod_args",
    ),
    "builtin": ({"mask_mod": max}, TypeError, "got builtin_function_or_method; call it in a function of"),
    "no function": ({"score_mod": 3}, TypeError, "score_mod must be a Python function.*got int"),
    "ufunc": ({"score_mod": np.tanh}, TypeError, "score_mod must be a Python function.*got ufunc"),
    "class": ({"mask_mod": int}, TypeError, "mask_mod must be a Python function.*got type"),
    "too few": (
        {"score_mod": lambda s, b, h, i: s}, TypeError,
        r"score_mod '<lambda>' \(.*test_scores.py:\d+\) takes 4 arguments; expected 5: \(score, batch, head,",
    ),
    "too many": ({"score_mod": by_slope}, TypeError, r"'by_slope' \(.*:\d+\) takes 6 arguments; expected 5"),
    "mask": ({"mask_mod": capped}, TypeError, r"'capped' .* takes 5 arguments; expected 4: \(batch,"),
    "mod_args": (
        {"score_mod": by_slope, "mod_args": (1, 2)}, TypeError, "takes 6 .* expected 5.* the 2 of mod_args",
    ),
    "unused": ({"score_mod": capped, "mod_args": (1,)}, TypeError, "1 entries, .* 'capped'.*takes none"),
    "for nothing": ({"mod_args": (1,)}, TypeError, "1 entries, but there is no score_mod or mask_mod"),
    "no tuple": ({"score_mod": capped, "mod_args": 3}, TypeError, "mod_args must be a tuple, got int"),
    "an object": (
        {"score_mod": by_slope, "mod_args": (object(),)}, TypeError, r"mod_args\[0\] has dtype object",
    ),
    "text": ({"score_mod": by_slope, "mod_args": ("abc",)}, TypeError, r"mod_args\[0\] has dtype <U3"),
    "complex": ({"score_mod": by_slope, "mod_args": (1j,)}, TypeError, r"mod_args\[0\] has dtype complex128"),
    "large": ({"score_mod": by_slope, "mod_args": (2**63,)}, ValueError, r"mod_args\[0\] is 92233720"),
    "keyword": ({"score_mod": lambda s, b, h, i, j, *, x: s}, TypeError, "takes keyword arguments"),
    "array": (
        {"score_mod": returns_array, "mod_args": (TABLE,)}, TypeError,
        r"score_mod 'returns_array' \(.*:\d+\) returns an array; expected a number, the new score",
    ),
    "tuple": ({"score_mod": lambda s, b, h, i, j: (s, s)}, TypeError, "returns a? ?tuple; expected a number"),
    "None": ({"score_mod": lambda s, b, h, i, j: None}, TypeError, "returns None.*; expected a number"),
    "float mask": ({"mask_mod": lambda b, h, i, j: 0.5}, TypeError, "returns float.*; expected a bool"),
    "unknown": (
        {"score_mod": calls_unknown}, ValueError, r"'calls_unknown' \(.*:\d+\).*NameError: name 'unk",
    ),
    "njit": ({"score_mod": numba.njit(calls_unknown)}, ValueError, "'calls_unknown'.*name 'unknown' is not"),
}  # fmt: skip
COMPILED = {
    "writes": (
        {"score_mod": writes, "mod_args": (TABLE,)},
        "'writes'.*cannot be compiled: .*setitem.*readonly",
    ),
    "list": (
        {"score_mod": makes_a_list},
        "'makes_a_list'.*cannot be compiled: it makes a list.*; it may use numbers",
    ),
    # Numba itself fails at np.ones, as of 0.68.
    "new array": (
        {"score_mod": lambda s, b, h, i, j: np.ones(3)},
        r"'<lambda>' \(.*:\d+\) cannot be compiled: .*; it may use numbers",
    ),
    "sum of a new array": (
        {"score_mod": lambda s, b, h, i, j: s * np.ones(3)[0]},
        r"'<lambda>' \(.*:\d+\) cannot be compiled: .*; it may use numbers",
    ),
    "print": ({"score_mod": prints}, r"'prints' \(.*:\d+\) cannot be compiled: it calls print \(line \d+\);"),
    "inf": ({"score_mod": lambda s, b, h, i, j: s * float("inf")}, r"of a string, .* write math\.inf"),
    "power": (
        {"score_mod": lambda s, b, h, i, j: s + 2 ** -(h + 1)},
        r"int to the power.*\(line \d+\); write a",
    ),
    "pow": (
        {"score_mod": lambda s, b, h, i, j: s + pow(2, -h)},
        r"int to the power.*\(line \d+\); write a",
    ),
    "NumPy's power": (
        {"score_mod": lambda s, b, h, i, j: s + np.power(2, -h)},
        r"np\.power of two ints; write .*\(line \d+\)",
    ),
    "power of a helper": (
        {"mask_mod": lambda b, h, i, j: power_of_two(-i) * j < 1},
        r"int to the power.*\(line \d+\); write a",
    ),
    "global": ({"score_mod": lambda s, b, h, i, j: s * BOTH["a"]}, "Untyped global name 'BOTH'"),
    "sum of bools": (
        {"score_mod": lambda s, b, h, i, j: s + ((i > j) + (j > h))},
        r"with bools as if they were numbers \(line \d+\); write and, or, not, or int\(x\)",
    ),
    "minus": (
        {"score_mod": lambda s, b, h, i, j, x: s - -x[j], "mod_args": (np.ones(3, bool),)},
        "with bools as if they were numbers",
    ),
}


class TestErrors:
    @pytest.mark.parametrize("case", BOTH)
    def test_one_sentence(self, backend, case):
        x = np.zeros((1, 2, 3, 4), np.float32)
        options, error, message = BOTH[case]
        out = np.full_like(x, 7)
        with pytest.raises(error, match=message) as caught:
            attention(x, x, x, backend=backend, out=out, **options)
        assert "\n" not in str(caught.value)
        assert (out == 7).all()
        assert backend == "reference" or caught.value.__suppress_context__ or caught.value.__context__ is None

    @pytest.mark.parametrize("case", COMPILED)
    def test_what_cannot_be_compiled(self, case):
        x = np.zeros((1, 2, 3, 4), np.float32)
        options, message = COMPILED[case]
        with pytest.raises(ValueError, match=message) as caught:
            attention(x, x, x, **options)
        assert "\n" not in str(caught.value)

    def test_arguments_stay(self):
        x, table = np.zeros((1, 2, 3, 4), np.float32), np.ones(3)
        with pytest.raises(ValueError, match=r"'writes'.*read-only"):
            attention(x, x, x, score_mod=writes, mod_args=(table,), backend="reference")
        assert (table == 1).all()

    def test_what_raises(self, backend):
        x = np.zeros((1, 2, 5, 4), np.float32)
        with pytest.raises(ValueError, match=r"score_mod 'raises' \(.*:\d+\) (raised|fails with)"):
            attention(x, x, x, score_mod=raises, backend=backend)
        with pytest.raises(ValueError, match="mask_mod '<lambda>'"):
            attention(x, x, x, mask_mod=lambda b, h, i, j: raises(0.0, b, h, i, j) == 0, backend=backend)
        attention(x[:, :, :3], x[:, :, :3], x[:, :, :3], score_mod=raises, backend=backend)  # has no key 3

    def test_bools_beside_numbers(self, backend, rng):
        q, k, v = inputs(rng)
        _, _, i, j = grids(q, k)
        got = attention(
            q, k, v, backend=backend, **FULL,
            score_mod=lambda s, b, h, i, j: s * (i > j) + int(j > 2) + int(i > 1),
            mask_mod=lambda b, h, i, j, yes=True: (i >= j) & ~(i == 3 + 2 * j) | (j < 2) | ~yes,
        )  # fmt: skip
        seen = (i >= j) & (i != 3 + 2 * j) | (j < 2)
        hold(got, formula(q, k, v, lambda s: s * (i > j) + (j > 2) + 1 * (i > 1), seen))

    def test_out_may_not_be_an_argument(self, backend):
        x = np.zeros((1, 1, 3, 3), np.float32)
        with pytest.raises(ValueError, match="out shares memory"):
            attention(
                x, x, x, score_mod=from_table, mod_args=(x2 := np.zeros_like(x),), out=x2, backend=backend
            )


# --- compiled functions -------------------------------------------------------------------------------------


def compile_mod(function, *mod_args, name="score_mod", dtype=np.float32):
    """The kernel of a function, compiled in this process: from the disk it would bring no code to read."""
    from nbattn.cpu import mods, runtime

    kernel_name, build, _ = mods.named(check_mod(function, name, mod_args), dtype)
    runtime._kernels.pop(kernel_name, None)
    return runtime.compiled(kernel_name, build, on_disk=False)


def many(score, batch, head, q_index, kv_index):
    near = math.exp(-0.1 * abs(q_index - kv_index)) + math.log1p(score * score) + math.log(2.0 + head)
    turned = math.sin(0.1 * q_index) * math.cos(0.2 * kv_index) + np.exp2(score) + math.pow(2.0, -score)
    return np.where(score > 0, near, turned) + np.maximum(score, np.sqrt(abs(score)))


VECTORS = {
    "slope": (by_slope, (SLOPES,), "score_mod"),
    "tanh": (capped, (), "score_mod"),
    "table": (scores.relative_position(np.ones((4, 9))), (), "score_mod"),
    "many": (many, (), "score_mod"),
    "causal": (backwards, (), "mask_mod"),
    "band": (banded, (), "mask_mod"),
    "ids": (equal_ids, (np.ones((2, 9), np.int64),), "mask_mod"),
}


class TestCompiled:
    @pytest.mark.isa
    @pytest.mark.parametrize("case", VECTORS)
    def test_loops_are_vectors_without_calls(self, case):
        from nbattn.cpu import emitters

        if case == "table" and emitters.REGISTER_BYTES == 16:
            pytest.skip("reads a table number by number, without an instruction that gathers")
        function, mod_args, name = VECTORS[case]
        kernel = compile_mod(function, *mod_args, name=name)
        code = kernel.overloads[kernel.signatures[0]].library.get_llvm_str()
        body = next(
            f
            for f in re.split(r"^(?=define)", code, flags=re.M)
            if f.startswith("define") and "i64 %arg" in f
        )
        inner = [b for b in re.split(r"\n(?=[\w.]+:)", body) if b.startswith("vector.body")]
        assert inner, "no loop became vectors"
        called = set(re.findall(r"call [^@]*@([\w.]+)", "".join(inner)))
        assert all(c.startswith("llvm.") for c in called), called
        work = "".join(inner)
        assert re.search(r"<\d+ x (float|double)>" if name == "score_mod" else r"<\d+ x i(64|32|8|1)>", work)
        assert not re.search(r"@(tanhf?|expf?|logf?|sinf?|cosf?|powf?|exp2f?|log1pf?)\b", body)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: np.dtype(d).name)
    def test_elementary_functions(self, dtype, rng):
        """To a few units in the last place of the true value, for any number."""
        names = ["exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "tanh", "sin", "cos", "tan"]

        def pick(score, batch, head, q_index, kv_index, x):
            y = x[kv_index]
            if head == 0:
                return math.exp(y)
            if head == 1:
                return np.exp2(y)
            if head == 2:
                return math.expm1(y)
            if head == 3:
                return math.log(y)
            if head == 4:
                return math.log2(y)
            if head == 5:
                return math.log10(y)
            if head == 6:
                return math.log1p(y)
            if head == 7:
                return math.tanh(y)
            if head == 8:
                return math.sin(y)
            if head == 9:
                return math.cos(y)
            return math.tan(y)

        got, x = evaluate(pick, len(names), special_numbers(rng, dtype))
        wide = np.longdouble if dtype == np.float64 else np.float64
        for values, name in zip(got, names, strict=True):
            with np.errstate(all="ignore"):
                truth = getattr(np, name)(x.astype(wide))
                exact = truth.astype(dtype)
            usable = np.abs(x) < (1e5 if name in ("sin", "cos", "tan") else np.inf)
            usable |= ~np.isfinite(x)
            special = ~np.isfinite(exact)
            np.testing.assert_array_equal(values[special & usable], exact[special & usable], err_msg=name)
            rest = usable & ~special
            unit = np.spacing(np.maximum(np.abs(exact), np.finfo(dtype).smallest_normal))
            error = np.abs(values[rest].astype(wide) - truth[rest]) / unit[rest]
            assert error.max() <= (8 if name in ("expm1", "tanh") else 4), (
                name,
                error.max(),
                x[rest][error.argmax()],
            )

    def test_power(self, rng):
        x = special_numbers(rng, np.float32)
        y = rng.permutation(np.concatenate((x[: len(x) // 2], np.arange(len(x) - len(x) // 2) % 9 - 4.0)))

        def raised(score, batch, head, q_index, kv_index, x, y):
            return math.pow(x[kv_index], y[kv_index])

        got, _ = evaluate(raised, 1, x, y.astype(np.float32))
        with np.errstate(all="ignore"):
            truth = np.power(x.astype(np.float64), y.astype(np.float32).astype(np.float64))
            exact = truth.astype(np.float32)
        special = ~np.isfinite(exact)
        np.testing.assert_array_equal(got[0][special], exact[special])
        unit = np.spacing(np.maximum(np.abs(exact[~special]), np.finfo(np.float32).smallest_normal))
        assert (np.abs(got[0].astype(np.float64)[~special] - truth[~special]) / unit).max() <= 2

    def test_what_is_made_anew_is_not_compiled_anew(self, rng):
        from nbattn.cpu import runtime

        x = normal(rng, (1, 2, 5, 4))
        for _ in range(3):
            attention(x, x, x, score_mod=lambda s, b, h, i, j: s * 1.5)
            attention(x, x, x, score_mod=scores.alibi(rng.random(2)))
            attention(x, x, x, score_mod=scores.softcap(rng.random()))
            count = len(runtime._kernels)
        for _ in range(3):
            attention(x, x, x, score_mod=lambda s, b, h, i, j: s * 1.5)
            attention(x, x, x, score_mod=scores.alibi(rng.random(2)))
            attention(x, x, x, score_mod=scores.softcap(rng.random()))
        assert len(runtime._kernels) == count

    def test_never_stale(self, rng):
        """Closures, globals, helpers' globals, module attributes and arrays count by what they hold."""
        x = normal(rng, (1, 2, 5, 4))
        module = type(math)("settings")
        space = {"number": 2.0, "module": module, "table": np.ones(2)}
        exec("def helper(s):\n    return s * number * module.factor * table[1]", space)
        helper = space["helper"]

        def make(closed):
            return lambda s, b, h, i, j: helper(s) + closed * j

        def expected(closed):
            factor = space["number"] * module.factor * space["table"][1]
            return formula(x, x, x, lambda s: s * factor + closed * np.arange(5))[:1]

        for number, factor, entry, closed in (
            (2.0, 1, 1, 0),
            (3.0, 1, 1, 0),
            (3.0, 2, 1, 0),
            (3.0, 2, 3, 0),
            (3.0, 2, 3, 1),
        ):
            space["number"], module.factor, space["table"][1] = number, factor, entry
            hold([attention(x, x, x, score_mod=make(closed))], expected(closed))

    def test_recursion_and_cycles_of_helpers(self, rng):
        x = normal(rng, (1, 2, 5, 4))
        space = {}
        exec("def count(n):\n    return 0 if n <= 0 else 1 + count(n - 1)", space)
        count = space["count"]
        got = attention(x, x, x, score_mod=lambda s, b, h, i, j: s - count(j))
        hold([got], formula(x, x, x, lambda s: s - np.arange(5))[:1])

    def test_many_threads_at_once(self, rng):
        x = normal(rng, (1, 2, 70, 8))
        results = {}

        def run(n):
            results[n] = attention(x, x, x, score_mod=lambda s, b, h, i, j: s * 0.375 + 1e-3 * j)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for n in range(8):
            assert_same_bits(results[n], results[0])

    def test_from_disk(self, tmp_path):
        script = tmp_path / "mod.py"
        script.write_text(
            textwrap.dedent("""
                import math, sys, numpy as np, nbattn
                from nbattn.cpu import mods, runtime
                from nbattn.scores import check_mod
                __name__ = sys.argv[1]  # of a module that the next process does not have
                STEP = 0.25
                def helper(x):
                    return math.exp(-x)
                def mod(score, batch, head, q_index, kv_index, table):
                    return score + helper(STEP) * table[kv_index]
                table = np.arange(3.0)
                x = np.eye(3, dtype=np.float32)
                print(nbattn.scaled_dot_product_attention(x, x, x, score_mod=mod, mod_args=(table,)).tolist())
                name, _, _ = mods.named(check_mod(mod, "score_mod", (table,)), np.float32)
                print(runtime._kernels[name]._cache.hit)
            """)
        )
        first, second = (
            subprocess.run(
                [sys.executable, script, name], capture_output=True, text=True, check=True, cwd="."
            ).stdout
            for name in ("first", "second")
        )
        assert first.splitlines()[0] == second.splitlines()[0]
        assert second.splitlines()[1] == "True"


def special_numbers(rng, dtype):
    info = np.finfo(dtype)
    edges = [0.0, -0.0, 1.0, -1.0, 2.0, 8.0, 1e-3, info.max, -info.max, info.smallest_normal, np.inf, -np.inf,
             info.smallest_subnormal, np.nan, np.log(info.max), -np.log(info.max), 88.5, -103.5, 709.5,
             -744.0]  # fmt: skip
    spread = rng.standard_normal(300) * 10.0 ** rng.uniform(-8, 4, 300)
    return np.concatenate((edges, spread, rng.uniform(-20, 20, 300))).astype(dtype)


def evaluate(function, heads, x, *more):
    """function(..., head, 0, j, x, *more) for each head and number, by the kernel that attention calls."""
    from nbattn.cpu import mods, runtime

    mod = check_mod(function, "score_mod", (x, *more))
    results = np.zeros((heads, len(x)), x.dtype)
    per_row = 256 // x.itemsize
    entry, arguments = mods.ready(mod, x.dtype.type)
    kernel = runtime.compiled(*mods.named(mod, x.dtype.type))
    assert runtime.entry(kernel) == entry
    call = np.zeros(mods.CALL.itemsize // 8, np.int64)
    tile = np.zeros((128, per_row), x.dtype)
    for head in range(heads):
        for key0 in range(0, len(x), 128):
            keys = min(128, len(x) - key0)
            fields = {"arguments": runtime.address(arguments), "target": runtime.address(tile), "head": head,
                      "rows": per_row, "key0": key0, "keys": keys}  # fmt: skip
            for name, value in fields.items():
                call[mods.CALL.fields[name][1] // 8] = value
            kernel(runtime.address(call))
            np.testing.assert_array_equal(tile[:keys], tile[:keys, :1].repeat(per_row, 1))
            results[head, key0 : key0 + keys] = tile[:keys, 0]
    return results, x
