"""Calls that repeat an earlier one's layout take a short way through the door: same results, same errors."""

import gc
import importlib
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import nbattn
from nbattn import attention
from nbattn import scaled_dot_product_attention as sdpa
from nbattn.cpu import repeats, runtime, team
from nbattn.cpu.sleeping import SLEEPS

softmax = importlib.import_module("nbattn.softmax")  # not the function of this name


@pytest.fixture(autouse=True)
def fresh():
    attention._repeats.clear()
    attention._latest = attention._NO_CALL
    softmax._repeats.clear()


def arrays(rng, dtype=np.float32, length=9):
    """Few enough for the kernel that reads keys once, or with 20 for the one whose lanes are queries."""
    return [rng.standard_normal((2, 3, length, 8)).astype(dtype) for _ in range(3)]


lengths = pytest.mark.parametrize("length", [9, 20])
known = pytest.mark.skipif(not repeats.arrays.KNOWN, reason="keeps its arrays in another way")
wakes = pytest.mark.skipif(not (repeats.arrays.KNOWN and SLEEPS), reason="needs Linux")


@lengths
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window_size": (2, None), "query_offset": 3}, {"scale": -0.5, "softcap": 2.0}],
)
def test_same_as_the_long_way(rng, options, length):
    for _ in range(4):
        x = arrays(rng, length=length)
        np.testing.assert_array_equal(sdpa(*x, **options), sdpa(*x, backend="cpu", **options))
    assert len(attention._repeats) == 1
    assert all(attention._repeats.values())
    assert (attention._latest is not attention._NO_CALL) == repeats.arrays.KNOWN


def test_layouts_and_options_stay_apart(rng):
    x = arrays(rng)
    strided = [np.ascontiguousarray(a.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for a in x]
    plain = sdpa(*x, backend="cpu")
    causal = sdpa(*x, backend="cpu", is_causal=True)
    for _ in range(4):
        np.testing.assert_array_equal(sdpa(*x), plain)
        np.testing.assert_array_equal(sdpa(*strided), plain)
        np.testing.assert_array_equal(sdpa(*x, is_causal=True), causal)
        np.testing.assert_array_equal(sdpa(*(a[0] for a in x)), plain[0])
    assert len(attention._repeats) == 4


def test_arrays_among_the_options_take_the_long_way(rng):
    x = arrays(rng)
    mask = rng.random((9, 9)) > 0.5
    for lengths in ([3, 9], [9, 1]):
        np.testing.assert_array_equal(
            sdpa(*x, mask, key_lengths=lengths), sdpa(*x, mask, key_lengths=lengths, backend="cpu")
        )
    sdpa(*x, query_offset=np.array([1, 2]))
    assert not attention._repeats


def test_a_copied_input_is_read_again(rng):
    x = [np.asfortranarray(a) for a in arrays(rng)]
    for _ in range(4):
        np.testing.assert_array_equal(sdpa(*x), sdpa(*x, backend="cpu"))
        x[0] *= 2
    assert not any(attention._repeats.values())


def test_bad_options_are_seen_every_time(rng):
    x = arrays(rng)
    for _ in range(4):
        sdpa(*x)
        sdpa(*x, is_causal=True)
        with pytest.raises(TypeError, match="window_size"):
            sdpa(*x, window_size=3)
        with pytest.raises(ValueError, match="softcap"):
            sdpa(*x, softcap=-1)
        with pytest.raises(ValueError, match="head_dim"):
            sdpa(x[0], x[1][..., :4], x[2])


def test_options_of_no_call_are_no_repeat(rng):
    """Before any call there is none that another's options could equal."""
    with pytest.raises(TypeError, match="is_causal must be"):
        sdpa(*arrays(rng), is_causal=None, query_offset=None)


def test_the_first_call_s_arrays_are_let_go(rng):
    x = arrays(rng)
    held = [weakref.ref(a) for a in x]
    for _ in range(3):
        result = weakref.ref(sdpa(*x))
    del x
    gc.collect()
    assert result() is None
    assert [r() for r in held] == [None] * 3


def test_results_do_not_share_memory(rng):
    x = arrays(rng)
    sdpa(*x), sdpa(*x)
    first, second = sdpa(*x), sdpa(*x)
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, second)


def test_short_calls_of_several_threads_at_once(rng):
    """They share with helpers that are awake, each with its own arrays."""
    inputs = [rng.standard_normal((3, 1, 4, 32, 32)).astype(np.float32) for _ in range(4)]
    expected = [sdpa(*x, backend="cpu") for x in inputs]

    def work(i):
        return all(np.array_equal(sdpa(*inputs[i]), expected[i]) for _ in range(300))

    sdpa(*inputs[0]), sdpa(*inputs[0])
    assert all(attention._repeats.values())
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_alike_to_the_eye(rng):
    """What compares equal, or lies nearly alike, is no repeat."""
    x = arrays(rng)
    odd = [np.frombuffer(b"_" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape) for a in x]
    for _ in range(4):
        np.testing.assert_array_equal(sdpa(*odd), sdpa(*x))
        np.testing.assert_array_equal(sdpa(*x, is_causal=True), sdpa(*x, is_causal=True, backend="cpu"))
        with pytest.raises(TypeError, match="is_causal"):
            sdpa(*x, is_causal=1)
        with pytest.raises(TypeError, match="query_offset"):
            sdpa(*x, is_causal=True, query_offset=1.0)


@known
@lengths
def test_the_next_call_may_have_any_arrays(rng, length):
    """A call that is as the latest one but for its arrays: laid out in another way, or no arrays of NumPy's
    own."""

    class Own(np.ndarray):
        pass

    x = arrays(rng, length=length)
    wide = [np.repeat(a, 2, axis=2) for a in x]
    copies = [pickle.loads(pickle.dumps(a)) for a in x]  # their dtypes are other objects
    assert not any(a.dtype is x[0].dtype for a in copies)
    others = [
        [a[:, :, ::2] for a in wide], [a[::-1] for a in x], [a[:1] for a in x], [a[0] for a in x], copies,
        [a.view(Own) for a in x], [a.astype(np.float64) for a in x], [x[0], x[1][:, :1], x[2][:, :1]],
        [a.tolist() for a in x], [np.asfortranarray(a) for a in x], [a.byteswap().view(">f4") for a in x],
        [np.broadcast_to(a[:, :1], a.shape) for a in x], [x[0][:, :, :4], *x[1:]],
    ]  # fmt: skip
    for other in others:
        expected = sdpa(*other, backend="cpu")
        for _ in range(4):
            sdpa(*x)
        assert attention._latest is not attention._NO_CALL
        for _ in range(4):
            np.testing.assert_array_equal(sdpa(*other), expected, strict=True)
            np.testing.assert_array_equal(sdpa(*x), sdpa(*x, backend="cpu"))
    with pytest.raises(TypeError, match="query"):
        sdpa(None, *x[1:])
    with pytest.raises(TypeError, match="dtype"):
        sdpa(x[0].view(np.int32), *x[1:])


@lengths
def test_an_array_reshaped_in_place(rng, length):
    x = arrays(rng, length=length)
    for _ in range(4):
        sdpa(*x)
    for a in x:
        a.shape = (3, 2, length, 8)
    assert sdpa(*x).shape == (3, 2, length, 8)
    np.testing.assert_array_equal(sdpa(*x), sdpa(*x, backend="cpu"))


def test_options_as_other_objects(rng):
    x = arrays(rng)
    for scale in (0.25, 0.5, 0.25):
        for _ in range(4):
            # A new float each time, and that of the call before.
            for factor in (float(repr(scale)), scale):
                np.testing.assert_array_equal(sdpa(*x, scale=factor), sdpa(*x, scale=scale, backend="cpu"))
        np.testing.assert_array_equal(sdpa(*x), sdpa(*x, backend="cpu"))


@known
@pytest.mark.parametrize("length", [32, pytest.param(300, marks=wakes)])
def test_an_interrupt_of_a_call_that_a_helper_is_in(rng, monkeypatch, length):
    """The call is over before the interrupt leaves it, and before a second one does."""
    monkeypatch.setattr(runtime, "threads", lambda: 2)
    x = rng.standard_normal((3, 1, 4, length, 32)).astype(np.float32)
    expected = [sdpa(*x) for _ in range(3)][-1]
    again, asked = attention._latest[-1].__self__, []
    hand_over = again.hand_over

    def slow(record):
        asked.append(record)
        state = hand_over(record)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return repeats.RUNNING if len(asked) < 4 else state

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(again, "hand_over", slow)
    with monkeypatch.context() as patch:
        patch.setattr(repeats.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sdpa(*x)
    assert len(asked) >= 4
    np.testing.assert_array_equal(sdpa(*x), expected)


@wakes
def test_calls_wake_helpers_that_sleep(rng, monkeypatch):
    """Long ones at once, short ones where they follow each other closely; results never change."""
    monkeypatch.setattr(team, "CLOSELY", 60.0)
    for length in (32, 300):
        monkeypatch.setattr(team, "_team", team._Team())
        monkeypatch.setattr(runtime, "threads", lambda: 1)
        x = rng.standard_normal((3, 1, 4, length, 32)).astype(np.float32)
        expected = [sdpa(*x) for _ in range(4)][-1]
        assert team._team.size == 0
        monkeypatch.setattr(runtime, "threads", lambda: 3)
        end = time.monotonic() + 10
        # Until both were offered calls.
        while team._team.size < 2 or any(slot[0] < team.ROUND for slot in team._team.board[:2]):
            np.testing.assert_array_equal(sdpa(*x), expected)
            assert time.monotonic() < end
        while len(team._team.resting()) < 2:
            assert time.monotonic() < end
        np.testing.assert_array_equal(sdpa(*x), expected)


def test_memory_of_layouts_is_bounded(rng):
    for n in range(1, attention.REPEATS + 20):
        x = np.ones((n, 2), np.float32)
        sdpa(x[:1], x, x), sdpa(x[:1], x, x)
    assert len(attention._repeats) <= attention.REPEATS


class TestSoftmax:
    names = pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])

    @names
    @pytest.mark.parametrize("options", [{}, {"axis": 0}, {"axis": None}, {"axis": 1, "scale": -0.5}])
    def test_same_as_the_long_way(self, rng, name, options):
        function = getattr(nbattn, name)
        for _ in range(4):
            x = rng.standard_normal((5, 300, 7)).astype(np.float32)
            for view in (x, x[::-1], x.transpose(1, 2, 0), np.asfortranarray(x)[:, ::2]):
                got, expected = function(view, **options), function(view, backend="cpu", **options)
                np.testing.assert_array_equal(got, expected, strict=True)
                assert got.strides == expected.strides
        assert any(softmax._repeats.values())

    @names
    def test_options_stay_apart(self, rng, name):
        x = rng.standard_normal((4, 4))
        function = getattr(nbattn, name)
        plain, first, scaled = (function(x, backend="cpu", **o) for o in ({}, {"axis": 0}, {"scale": 2}))
        for _ in range(4):
            np.testing.assert_array_equal(function(x), plain)
            np.testing.assert_array_equal(function(x, 0), first)
            np.testing.assert_array_equal(function(x, scale=2), scaled)
            np.testing.assert_array_equal(function(x.astype(int)), function(x.astype(int), backend="cpu"))
            with pytest.raises(TypeError, match="axis"):
                function(x, True)
            with pytest.raises(ValueError, match="axis"):
                function(x, 2)
        assert sum(map(bool, softmax._repeats.values())) == 3

    def test_kept_dimensions(self, rng):
        x = rng.standard_normal((4, 6))
        for _ in range(4):
            assert nbattn.logsumexp(x).shape == (4,)
            assert nbattn.logsumexp(x, keepdims=True).shape == (4, 1)
            assert isinstance(nbattn.logsumexp(x, None), np.float64)
            with pytest.raises(TypeError, match="keepdims"):
                nbattn.logsumexp(x, keepdims=1)

    @names
    def test_arrays_are_let_go(self, rng, name):
        x = rng.standard_normal((4, 6))
        held, results = weakref.ref(x), []
        for _ in range(4):
            results.append(weakref.ref(getattr(nbattn, name)(x)))
        del x
        gc.collect()
        assert [r() for r in (held, *results)] == [None] * 5

    def test_long_calls_are_not_remembered(self, rng):
        x = rng.standard_normal((3, 50_000))
        for _ in range(3):
            nbattn.softmax(x)
        assert not any(softmax._repeats.values())
