"""Attention's formula written a second time, apart from the package, and the rule that results are held to.

The truth is this formula in a wider precision, and ``backend="reference"`` on float64 copies of the inputs is
held to it to the last few bits. A result passes where its error is at most twice the error of this formula in
the result's own compute dtype, plus a few ulp: a tolerance that no dtype or size makes loose.
"""

from typing import NamedTuple

import numpy as np
from ml_dtypes import bfloat16, finfo

import nbattn

DTYPES = [np.float32, np.float64, np.float16, bfloat16]
HALF = (np.dtype(np.float16), np.dtype(bfloat16))
SIZES = [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 97, 100, 130]


class Result(NamedTuple):
    output: np.ndarray
    weights: np.ndarray
    lse: np.ndarray
    seen: np.ndarray
    magnitude: np.ndarray
    """weights @ abs(value): the size of what cancels in the output."""
    condition: np.ndarray
    """Per row, the size of what cancels in its scores."""


def normal(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


USUAL = {"queries": 33, "keys": 70, "head_dim": 17}
SMALL = {"queries": 9, "keys": 14, "head_dim": 5}
"""For who takes a millisecond for what others do in a microsecond."""


def inputs(
    rng,
    batch=2,
    heads=4,
    kv_heads=2,
    queries=None,
    keys=None,
    head_dim=None,
    value_dim=None,
    dtype=np.float32,
):
    """Random query, key and value, of the usual sizes where none are given."""
    queries = USUAL["queries"] if queries is None else queries
    keys = USUAL["keys"] if keys is None else keys
    head_dim = USUAL["head_dim"] if head_dim is None else head_dim
    return (
        normal(rng, (batch, heads, queries, head_dim), dtype),
        normal(rng, (batch, kv_heads, keys, head_dim), dtype),
        normal(rng, (batch, kv_heads, keys, value_dim or head_dim), dtype),
    )


def compute_dtype_of(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def positions(shape, query_offset=0, key_lengths=None):
    """The position of each query among the keys, (B, 1, Sq, 1), and the keys' lengths, (B,)."""
    batch, _, queries, keys = shape
    lengths = np.full(batch, keys) if key_lengths is None else np.asarray(key_lengths)
    offset = lengths - queries if isinstance(query_offset, str) else np.broadcast_to(query_offset, batch)
    return (np.arange(queries) + offset[:, None])[:, None, :, None], lengths


def see(
    shape, mask=None, *, bias=None, is_causal=False, window_size=None, query_offset=0, key_lengths=None, **_
):
    """Which key each query sees, (B, H, Sq, Sk)."""
    position, lengths = positions(shape, query_offset, key_lengths)
    j = np.arange(shape[3])
    seen = np.ones(shape, bool) & (j < lengths[:, None, None, None])
    if is_causal:
        seen &= j <= position
    left, right = window_size or (None, None)
    if left not in (None, -1):
        seen &= j >= position - left
    if right not in (None, -1):
        seen &= j <= position + right
    if mask is not None:
        seen &= np.asarray(mask) != 0
    if bias is not None:
        seen &= np.asarray(bias) != -np.inf
    return seen


def formula(query, key, value, mask=None, *, compute, **options):
    """softmax(scores) @ value in the dtype `compute`, for (B, H, S, D) inputs.

    A NaN in a query or key makes every row NaN that meets it, one in a value that column of every row that
    sees it, and nothing else.
    """
    q, k, v = (np.asarray(x).astype(compute) for x in (query, key, value))
    batch, heads, queries, head_dim = q.shape
    group, keys = heads // max(k.shape[1], 1), k.shape[2]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    seen = see((batch, heads, queries, keys), mask, **options)
    broken = (seen & (np.isnan(q).any(-1)[..., None] | np.isnan(k).any(-1)[:, :, None])).any(-1)
    broken_value = seen.astype(np.float64) @ np.isnan(v) > 0
    q, k, v = (np.where(np.isnan(x), compute(0), x) for x in (q, k, v))
    scale = options.get("scale")
    scale = compute(1 / np.sqrt(head_dim) if scale is None else scale)
    with np.errstate(all="ignore"):
        scores = q @ k.transpose(0, 1, 3, 2) * scale
        condition = np.abs(q) @ np.abs(k).transpose(0, 1, 3, 2) * abs(scale)
        if softcap := options.get("softcap"):
            scores = compute(softcap) * np.tanh(scores / compute(softcap))
        if (bias := options.get("bias")) is not None:
            scores = scores + np.asarray(bias).astype(compute)
            condition = condition + np.abs(np.asarray(bias).astype(compute))
        if (slopes := options.get("alibi_slopes")) is not None:
            position, _ = positions(seen.shape, options.get("query_offset", 0), options.get("key_lengths"))
            term = np.asarray(slopes).astype(compute)[:, None, None] * (np.arange(keys) - position).astype(
                compute
            )
            scores, condition = scores + term, condition + np.abs(term)
        scores = np.where(seen, scores, compute(-np.inf))
        largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        if (sinks := options.get("sinks")) is not None:
            sinks = np.asarray(sinks).astype(compute)[:, None, None]
            largest = np.maximum(largest, sinks)
        largest = np.where(largest == -np.inf, compute(0), largest)
        exponentials = np.exp(scores - largest)
        total = exponentials.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks - largest)
        weights = exponentials / np.where(total == 0, compute(1), total)
        lse = (largest + np.log(total))[..., 0]
    condition = np.where(seen & np.isfinite(condition), condition, 0).max(axis=-1, initial=0)
    return Result(
        output=np.where(broken[..., None] | broken_value, np.nan, weights @ v),
        weights=np.where(broken[..., None] & seen, np.nan, weights),
        lse=np.where(broken, np.nan, lse),
        seen=seen,
        magnitude=weights @ np.abs(v),
        condition=condition,
    )


def assert_same_bits(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    bits = np.dtype(f"u{x.dtype.itemsize}")
    np.testing.assert_array_equal(x.copy().view(bits), y.copy().view(bits))


def assert_accurate(got, truth, plain, unit, *, ulp, what, rounding=0.0):
    """`got` is as close to `truth` as twice what `plain` is, plus `ulp`, all counted in `unit`; but for the
    `rounding` of what was multiplied.
    """
    assert got.shape == truth.shape, what
    finite = np.isfinite(truth)
    got, truth, plain = (x if x.dtype == np.longdouble else x.astype(np.float64) for x in (got, truth, plain))
    np.testing.assert_array_equal(got[~finite], truth[~finite], err_msg=what)
    assert np.isfinite(got[finite]).all(), f"{what}: not finite where the truth is"
    unit, rounding = (np.broadcast_to(x, truth.shape)[finite] for x in (unit, rounding))
    error, allowed = (
        (np.maximum(np.abs(x[finite] - truth[finite]) - r, 0) / unit).max(initial=0)
        for x, r in ((got, rounding), (plain, 0))
    )
    assert error <= 2 * allowed + ulp, f"{what}: error {error:.3g} of {2 * allowed + ulp:.3g} allowed"


def check(backend, query, key, value, mask=None, *, given=None, ulp=4, **options):
    """Run attention in every form that the door has, and hold output, weights and lse to the rule.

    The mask may be `given` to the door in another form.
    """
    given = mask if given is None else given
    attention = nbattn.scaled_dot_product_attention
    dtype = np.asarray(query).dtype
    compute = compute_dtype_of(dtype)
    wider = np.longdouble if compute == np.float64 else np.float64
    wide = [np.asarray(x).astype(np.float64) for x in (query, key, value)]
    plain, exact = (formula(*wide, mask, compute=c, **options) for c in (compute, wider))
    oracle = attention(*wide, mask, backend="reference", return_weights=True, return_lse=True, **options)

    call = {"mask": given, "backend": backend, **options}
    alone = attention(query, key, value, **call)
    with_lse = attention(query, key, value, return_lse=True, **call)
    full = attention(query, key, value, return_weights=True, return_lse=True, **call)
    if backend == "cpu":  # which is the default, and may be quicker about a layout that it has met
        for _ in range(4):
            assert_same_bits(attention(query, key, value, given, **options), alone)
    assert alone.dtype == full.output.dtype == dtype
    assert full.weights.dtype == full.lse.dtype == with_lse.lse.dtype == compute
    assert with_lse.weights is None

    units, few = bounds(exact, dtype, ulp)
    plain = plain._replace(output=plain.output.astype(dtype))
    # What a row that met a NaN says of the keys that it does not see is left open.
    weights = np.where(exact.seen | ~np.isnan(exact.lse)[..., None], full.weights, 0)
    assert not weights[~exact.seen].any()
    results = {
        "output": (alone, with_lse.output, full.output),
        "weights": (weights,),
        "lse": (with_lse.lse, full.lse),
    }
    for name, unit in units.items():
        truth = getattr(exact, name)
        assert_accurate(getattr(oracle, name), truth, truth, unit, ulp=2.0**-48, what=f"the oracle's {name}")
        for result in results[name]:
            assert_accurate(result, truth, getattr(plain, name), unit, ulp=few[name], what=name)
    return full


def bounds(exact, dtype, ulp):
    """The units that errors of output, weights and lse are counted in, and what is always allowed."""
    compute = compute_dtype_of(dtype)
    eps = float(finfo(compute).eps)
    # A weight below the least normal number may be 0.
    lost = float(finfo(compute).smallest_normal) / eps
    tiny = max(lost, float(finfo(dtype).smallest_subnormal))
    factor = np.maximum(1, exact.condition / 4)
    largest = np.nan_to_num(exact.weights).max(axis=-1, keepdims=True, initial=0)
    units = {
        "output": exact.magnitude * (1 if dtype in HALF else factor[..., None]) + tiny,
        "weights": largest * factor[..., None] + lost,
        "lse": np.maximum(1, np.abs(exact.lse)) * factor,
    }
    half_ulp = float(finfo(dtype).eps) / 2 if dtype in HALF else 0
    return units, {name: ulp * eps + (half_ulp if name == "output" else 0) for name in units}


def rounding_of(exact, query, key, value, scale=None, fine=True):
    """What rounding may change in output and lse at most.

    Where it is `fine`, of queries to multiples of their largest / 32512, and of weights to those of their
    largest / 32767. Else queries are what they were rounded to, and weights are off by less than their
    largest / 127, up or down by turns: of n such errors no more than 2 sqrt(n) are taken to add up.
    """
    q, k, v = (np.abs(np.asarray(x).astype(np.float64)) for x in (query, key, value))
    q, k, v = (np.where(np.isfinite(x), x, 0) for x in (q, k, v))
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else abs(scale)
    sums = np.where(exact.seen, k.sum(axis=3)[:, :, None], 0).max(axis=3, initial=0)
    score = scale * q.max(axis=3, initial=0) * sums / 65024
    seen, step = exact.seen.sum(axis=3), 1 / 65534
    if not fine:
        seen, step = np.minimum(seen, 2 * np.sqrt(seen)), 1 / 127
    largest = np.nan_to_num(exact.weights).max(axis=3, initial=0) * seen
    most = v.max(axis=(2, 3), initial=0)[:, :, None]
    return 2 * score[..., None] * np.nan_to_num(exact.magnitude) + (largest * most)[..., None] * step, score


def hold(output, lse, query, key, value, mask=None, *, ulp=4, rounds="", **options):
    """Hold the output, and the lse where there is one, that another door gave to the rule.

    int8 and int4 keys and values may be multiplied by whole numbers that queries and weights are rounded to:
    then it `rounds`, to 16 bits ("fine") or weights to 8 ("coarse").
    """
    dtype = query.dtype
    compute = compute_dtype_of(dtype)
    wide = [np.asarray(x).astype(np.float64) for x in (query, key, value)]
    wider = np.longdouble if compute == np.float64 else np.float64
    plain, exact = (formula(*wide, mask, compute=c, **options) for c in (compute, wider))
    units, few = bounds(exact, dtype, ulp)
    assert output.dtype == dtype
    rounded = plain.output.astype(dtype)
    less, less_lse = (
        rounding_of(exact, *wide, options.get("scale"), rounds == "fine") if rounds else (0.0, 0.0)
    )
    assert_accurate(
        output, exact.output, rounded, units["output"], ulp=few["output"], what="output", rounding=less
    )
    if lse is not None:
        assert lse.dtype == compute
        assert_accurate(
            lse, exact.lse, plain.lse, units["lse"], ulp=few["lse"], what="lse", rounding=less_lse
        )
