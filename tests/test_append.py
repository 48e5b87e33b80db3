"""Writing into caches: kernels against the formulas, bit for bit, and nothing but the new tokens' places."""

import dataclasses

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from oracle import normal

from nbattn.cpu import append as cpu
from nbattn.problem import CACHE_DTYPES, INT4_GROUP, AppendProblem
from nbattn.reference import append as reference
from nbattn.reference import decode as reading

QUANTISED = {"int8": np.int8, "int4": np.uint8}
PAGES = ("key_pages", "value_pages", "key_scales", "value_scales")


def dtype_of(storage):
    """Of the tokens."""
    return np.dtype(bfloat16 if storage == "bfloat16" else "float32" if storage in QUANTISED else storage)


def pages(storage, count, page_size, heads, dim, heads_inside):
    """Pages and scales full of something, heads in memory inside the rows or outside."""
    dtype = QUANTISED.get(storage, dtype_of(storage))
    inner = [dim // 2 if storage == "int4" else dim]
    scales = {"int8": [], "int4": [dim // INT4_GROUP]}.get(storage)

    def fill(kind, rest):
        if heads_inside:
            return np.full((count, page_size, heads, *rest), 7, kind)
        return np.full((count, heads, page_size, *rest), 7, kind).swapaxes(1, 2)

    return fill(dtype, inner), None if scales is None else fill(np.float32, scales)


def problem(rng, storage, *, batch=2, heads=3, tokens=21, head_dim=40, value_dim=24, page_size=8, ring=0,
            pairs=None, interleaved=False, heads_inside=True, counts=None):  # fmt: skip
    """Random tokens, some of each sequence's, for random places."""
    if storage == "int4":
        head_dim, value_dim = -(-head_dim // INT4_GROUP) * INT4_GROUP, INT4_GROUP
    starts = rng.integers(0, 50, batch)
    each = -(-(ring or 50 + tokens) // page_size)
    (key_pages, key_scales), (value_pages, value_scales) = (
        pages(storage, batch * each + 2, page_size, heads, dim, heads_inside) for dim in (head_dim, value_dim)
    )
    return AppendProblem(
        key=normal(rng, (batch, tokens, heads, head_dim), dtype_of(storage)).swapaxes(1, 2),
        value=normal(rng, (batch, heads, tokens, value_dim), dtype_of(storage)),
        key_pages=key_pages,
        value_pages=value_pages,
        key_scales=key_scales,
        value_scales=value_scales,
        storage=storage,
        page_table=rng.permutation(batch * each + 2)[: batch * each].reshape(batch, each),
        ring=ring,
        starts=starts,
        counts=rng.integers(0, tokens + 1, batch) if counts is None else np.asarray(counts),
        frequencies=None if pairs is None else 1e4 ** -np.linspace(0, 1, pairs),
        interleaved=interleaved,
    )


def copied(p):
    """The same problem on pages of its own."""
    mine = {name: getattr(p, name) for name in PAGES}
    return dataclasses.replace(p, **{k: None if x is None else x.copy("K") for k, x in mine.items()})


def check(p, write=cpu.append):
    """The kernel fills pages as the reference does, and touches nothing else."""
    expected, got = copied(p), copied(p)
    reference.append(expected)
    write(got)
    for name in PAGES:
        x, y = getattr(got, name), getattr(expected, name)
        if x is not None:
            # Sines of two makers may differ in the last bit.
            error = 1e-15 if p.storage == "float64" and p.frequencies is not None else 0
            np.testing.assert_allclose(
                x.astype(np.float64), y.astype(np.float64), rtol=0, atol=error * 8, err_msg=name
            )
    return got


@pytest.mark.isa
@pytest.mark.parametrize("storage", CACHE_DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens": 1, "counts": [1, 1]},
        {"ring": 13},
        {"pairs": 20, "heads_inside": False},
        {"pairs": 20, "interleaved": True, "ring": 16},
        {"pairs": 5},
        {"pairs": 5, "interleaved": True, "head_dim": 37},
        {"pairs": 0, "head_dim": 3, "value_dim": 1},
        {"head_dim": 130, "value_dim": 65, "page_size": 1},
    ],
    ids=repr,
)
def test_is_the_reference(rng, storage, options):
    check(problem(rng, storage, **options))


@pytest.mark.isa
@given(data=st.data())
def test_any_problem_is_the_reference(data):
    pairs = data.draw(st.none() | st.integers(0, 16))
    draw = {
        "batch": st.integers(0, 3),
        "heads": st.integers(1, 3),
        "tokens": st.integers(0, 40),
        "head_dim": st.integers(max(1, 2 * (pairs or 0)), 80),
        "value_dim": st.integers(1, 80),
        "page_size": st.integers(1, 20),
        "ring": st.integers(0, 20),
        "interleaved": st.booleans(),
        "heads_inside": st.booleans(),
    }
    options = {name: data.draw(some, name) for name, some in draw.items()}
    storage = data.draw(st.sampled_from(CACHE_DTYPES))
    check(problem(np.random.default_rng(data.draw(st.integers(0, 99))), storage, pairs=pairs, **options))


@pytest.mark.isa
@pytest.mark.parametrize("storage", QUANTISED)
@pytest.mark.parametrize("dim", [3, 32, 160])
def test_extreme_tokens(rng, storage, dim):
    """Zeros, denormals, the largest numbers, ties, NaN and inf: as the reference, and never swallowed."""
    p = problem(rng, storage, batch=1, heads=9, tokens=30, head_dim=dim, counts=[30])
    x = p.key.copy()
    width = x.shape[3]
    x[0, 0] = 0
    x[0, 1] *= np.float32(1e-43)
    x[0, 2] *= np.float32(1e-40)
    x[0, 3, :, width // 2] = np.nan
    x[0, 4, :, -1] = np.inf
    x[0, 5] = np.clip(x[0, 5], -1, 1) * np.float32(3e38)
    x[0, 6] = np.rint(4 * x[0, 6]) / 4
    x[0, 7] = rng.choice(np.array([-3, 3, 0.5], np.float32), x[0, 7].shape)
    x[0, 8, :, 0], x[0, 8, :, -1] = -np.inf, np.nan
    got = check(dataclasses.replace(p, key=x))
    places = reading.places_of(p, 0, p.starts[0] + np.arange(30))
    with np.errstate(invalid="ignore"):
        back = reading.dequantised(got.key_pages[places], got.key_scales[places], storage).transpose(1, 0, 2)
    for head in (3, 4, 8):
        broken = back[head] if storage == "int8" else back[head, :, -INT4_GROUP // 2 :]
        assert np.isnan(broken).all() or head == 3
        assert np.isnan(back[head]).any(axis=-1).all()
    step = {"int8": 127, "int4": 8}[storage]
    for head in (0, 2, 5, 6, 7):
        limit = np.abs(x[0, head]).max(axis=-1, keepdims=True) / step * (0.51 if storage == "int8" else 1.01)
        assert (np.abs(back[head].astype(float) - x[0, head]) <= limit + 1e-44).all()


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_threads_change_nothing(rng, storage, monkeypatch):
    monkeypatch.setattr(cpu, "SERIAL", 0)
    p = problem(rng, storage, batch=3, tokens=200, pairs=16, counts=[200, 117, 0])
    before = numba.get_num_threads()
    try:
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            check(p)
    finally:
        numba.set_num_threads(before)


def test_plan_goes_on(rng):
    """One plan serves tokens of any number and layout, where the lengths say."""
    p = problem(rng, "float32", tokens=40, pairs=7)
    plan = cpu.Plan(got := copied(p))
    expected = copied(p)
    starts = p.starts.copy()
    for n in (1, 3, 17, 1):
        new = problem(rng, "float32", tokens=n, heads_inside=n == 3)
        part = dataclasses.replace(expected, key=new.key, value=new.value, starts=starts, counts=new.counts)
        reference.append(part)
        plan.append(new.key, new.value, starts, new.counts)
        starts = starts + new.counts
    np.testing.assert_array_equal(got.key_pages, expected.key_pages)
    np.testing.assert_array_equal(got.value_pages, expected.value_pages)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(rng, backend, dtype, interleaved):
    """Queries turn by their positions, far ones as exactly as near ones; what is left over stays."""
    module = {"cpu": cpu, "reference": reference}[backend]
    query = normal(rng, (2, 5, 3, 4, 22), dtype)[:, :, 1]  # not contiguous
    frequencies = 100.0 ** (-np.arange(9) / 9)
    offset = np.array([0, 10**6])
    out = np.empty((2, 5, 4, 22), dtype)
    module.rotate(query, out, offset, frequencies, interleaved)
    angle = np.multiply.outer(offset[:, None] + np.arange(4), frequencies)[:, None].astype(np.longdouble)
    cos, sin = np.cos(angle), np.sin(angle)
    x = query.astype(np.longdouble)
    first, second = (
        (np.s_[..., 0:18:2], np.s_[..., 1:18:2]) if interleaved else (np.s_[..., :9], np.s_[..., 9:18])
    )
    expected = x.copy()
    expected[first], expected[second] = x[first] * cos - x[second] * sin, x[second] * cos + x[first] * sin
    eps = {"float32": 2**-22, "float64": 2**-51, "float16": 2**-9, "bfloat16": 2**-7}[np.dtype(dtype).name]
    np.testing.assert_allclose(out.astype(np.longdouble), expected, rtol=0, atol=eps * 4)
    np.testing.assert_array_equal(out[..., 18:], query[..., 18:])


def test_stays_inside(rng, guarded):
    """Nothing is read or written beyond arrays that end at a page that must not be touched."""
    for storage in ("float32", "bfloat16", "int8", "int4"):
        for side in ("start", "end"):
            p = copied(problem(rng, storage, pairs=3, head_dim=7, value_dim=5))
            arrays = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
            kept = {k: guarded(x, side) for k, x in arrays.items() if isinstance(x, np.ndarray)}
            check_ = dataclasses.replace(p, **kept)
            reference.append(p)
            cpu.append(check_)
            np.testing.assert_array_equal(check_.key_pages, p.key_pages)
