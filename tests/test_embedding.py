"""Safe to embed: many threads, forks, pools, interrupts, exits, and the kernel cache."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from ml_dtypes import bfloat16

import nbattn
from nbattn import scaled_dot_product_attention as attend
from nbattn.cpu import handover, runtime, sleeping, team
from nbattn.cpu.sleeping import SLEEPS

PACKAGE = Path(nbattn.__file__).parent
DTYPES = [np.float32, np.float64, np.float16, bfloat16]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
from nbattn import scaled_dot_product_attention as attend

rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 1, 4, 200, 64)).astype(np.float32)
truth = attend(q, k, v, backend="reference")


def right():
    return bool(np.abs(attend(q, k, v) - truth).max() < 1e-5)


def in_child(function):
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)
        os._exit(0 if function() else 3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

# A kernel that compiles in a moment: factor * fibonacci(x + 1) + 1. Recursion keeps `part` out of line.
TINY = """
import os, sys, time
import numpy as np
from nbattn.cpu import runtime


def build(jit, inline, factor=2, pause=0.0):
    time.sleep(pause)

    @jit
    def part(x):
        return factor if x < 2 else part(x - 1) + part(x - 2)

    def kernel(x):
        return part(x) + 1

    return kernel
"""


def script(code, prelude=PRELUDE, timeout=200, **environment):
    """What Python code prints in a process of its own; it must say nothing on stderr and exit with 0."""
    with start(code, prelude, **environment) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    return output


def start(code, prelude=PRELUDE, **environment):
    # Python warns of every fork of a process that has threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", prelude + textwrap.dedent(code)]
    search = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "PYTHONPATH": search} | environment
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Every process that a test starts finds its kernels on disk."""
    for dtype in DTYPES:
        x = np.ones((1, 1), dtype)
        attend(x, x, x)


class TestThreads:
    @pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
    def test_eight_threads_at_once(self, rng, seconds):
        def inputs(dtype, heads, queries, keys, head_dim):
            shape = (1, heads, queries, head_dim)
            q = rng.standard_normal(shape).astype(dtype)
            k, v = rng.standard_normal((2, 1, heads, keys, head_dim)).astype(dtype)
            return q, k, v, {"is_causal": queries == keys, "softcap": 5.0 if heads == 3 else None}

        shapes = [(1, 1, 7, 3), (2, 300, 300, 64), (3, 65, 1000, 40), (8, 1, 3000, 128)]
        calls = [inputs(dtype, *shape) for dtype in DTYPES for shape in shapes]
        serial = [attend(q, k, v, **options) for q, k, v, options in calls]
        end = time.monotonic() + seconds

        def work(seed):
            order = np.random.default_rng(seed)
            done = 0
            while time.monotonic() < end:
                n = order.integers(len(calls))
                q, k, v, options = calls[n]
                np.testing.assert_array_equal(attend(q, k, v, **options), serial[n])
                done += 1
            return done

        with ThreadPoolExecutor(8) as pool:
            assert min(pool.map(work, range(8))) > 0

    def test_first_call_from_eight_threads(self):
        script("""
            outcomes = []
            threads = [threading.Thread(target=lambda: outcomes.append(right())) for _ in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert outcomes == [True] * 8
        """)

    @pytest.mark.parametrize(("configured", "set_later"), [(1, None), (3, None), (4, 1), (4, 2)])
    def test_thread_count_is_respected(self, configured, set_later):
        code = "" if set_later is None else f"import numba; numba.set_num_threads({set_later})\n"
        code += "assert right(); print(sum(t.name == 'nbattn' for t in threading.enumerate()))"
        helpers = int(script(code, NUMBA_NUM_THREADS=str(configured)))
        assert helpers == (set_later or configured) - 1

    def test_numba_threads_stay_unused(self):
        script("""
            assert right()
            import numba
            try:
                numba.threading_layer()
            except ValueError:
                sys.exit()
            sys.exit("Numba's threading layer was started")
        """)

    @pytest.mark.parametrize("layer", ["workqueue", "omp"])
    def test_beside_parallel_functions(self, layer):
        if layer == "omp" and importlib.util.find_spec("numba.np.ufunc.omppool") is None:
            pytest.skip("this Numba has no OpenMP")
        script(
            """
            import numba

            @numba.njit(parallel=True)
            def total(x):
                s = 0.0
                for i in numba.prange(len(x)):
                    s += x[i]
                return s

            ones = np.ones(100_000)
            assert right()
            assert total(ones) == 100_000
            assert right()
            outcomes = []
            others = [threading.Thread(target=lambda: outcomes.append(right())) for _ in range(4)]
            [thread.start() for thread in others]
            assert all(total(ones) == 100_000 for _ in range(200))
            [thread.join() for thread in others]
            assert outcomes == [True] * 4
            assert in_child(right) == 0
            assert total(ones) == 100_000
            """,
            NUMBA_THREADING_LAYER=layer,
        )

    def test_no_more_threads_to_be_had(self, rng, monkeypatch):
        def start(self):
            msg = "can't start new thread"
            raise RuntimeError(msg)

        x = rng.standard_normal((4, 300, 64))
        expected = attend(x, x, x)
        monkeypatch.setattr(team, "_team", team._Team())
        monkeypatch.setattr(threading.Thread, "start", start)
        np.testing.assert_array_equal(attend(x, x, x), expected)
        assert team._team.calls.empty()

    @pytest.mark.skipif(
        not SLEEPS or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
    )
    def test_helpers_wake_on_other_processors(self, rng, monkeypatch):
        cpus = os.sched_getaffinity(0)
        x = rng.standard_normal((4, 300, 64))
        monkeypatch.setattr(team, "_team", team._Team())
        monkeypatch.setattr(runtime, "threads", lambda: 2)
        expected = attend(x, x, x)
        slot = team._team.board[0]
        until(lambda: slot[0] % team.ROUND == team.ASLEEP)
        np.testing.assert_array_equal(attend(x, x, x), expected)
        bits = np.unpackbits(slot[sleeping.OTHERS // 8 :].view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits)) == cpus - {slot[sleeping.CPU]}
        (helper,) = team._team.resting() or [int(slot[sleeping.THREAD])]
        until(lambda: os.sched_getaffinity(helper) == cpus)  # free again, once it is awake

    @pytest.mark.skipif(not SLEEPS, reason="needs Linux")
    def test_a_helper_that_is_claimed_as_it_falls_asleep_comes_back(self, monkeypatch):
        """It may be awake before it is sent away."""
        cpus = os.sched_getaffinity(0)
        monkeypatch.setattr(team, "_team", team._Team())
        assert team._team.grow(1) == 1
        slot = team._team.board[0]
        until(lambda: slot[0] % team.ROUND == team.ASLEEP)
        claimed = int(slot[0]) - team.ASLEEP + team.ROUND
        slot[0] = claimed + handover.CLAIMED
        ctypes.CDLL(None).syscall(sleeping.FUTEX, ctypes.c_void_p(slot.ctypes.data), sleeping.WAKE, 1, 0)
        time.sleep(0.01)
        helper = int(slot[sleeping.THREAD])
        os.sched_setaffinity(helper, {min(cpus)})
        slot[sleeping.CPUS // 8] = sum(1 << cpu for cpu in cpus if cpu < 63)
        slot[sleeping.SENT] = 8
        slot[0] = claimed + handover.IDLE
        until(lambda: os.sched_getaffinity(helper) == {cpu for cpu in cpus if cpu < 63})

    def test_what_cannot_sleep_asks_for_no_system_call(self):
        """Where a symbol is missing, as `syscall` on Windows, LLVM ends the process."""
        output = script(
            """
            from nbattn.cpu import sleeping

            sleeping.SLEEPS = False
            from nbattn.cpu import handover, runtime

            kernel = runtime.compiled("awake", handover.build, on_disk=False, nogil=False)
            print("syscall" in kernel.overloads[runtime.SIGNATURE.args].library.get_asm_str())
            """,
            prelude="",
        )
        assert output == "False\n"

    @pytest.mark.skipif(not SLEEPS, reason="needs Linux")
    def test_sleeping_helpers_take_calls_without_python(self, rng, monkeypatch):
        """From no queue, and again and again."""
        x = rng.standard_normal((4, 300, 64))
        monkeypatch.setattr(team, "_team", team._Team())
        monkeypatch.setattr(runtime, "threads", lambda: 3)
        expected = attend(x, x, x, backend="cpu")  # not in the short way of calls that repeat

        def asleep():
            return all(slot[0] % team.ROUND == team.ASLEEP for slot in team._team.board[:2])

        until(asleep)  # on a busy machine they may not have begun to watch before
        monkeypatch.setattr(team._Team, "put", None)
        offer, reached = team._Call.offer, []
        monkeypatch.setattr(team._Call, "offer", lambda own, n: reached.append(offer(own, n)) or reached[-1])
        for _ in range(5):
            np.testing.assert_array_equal(attend(x, x, x, backend="cpu"), expected)
            until(asleep)
        assert reached == [2] * 5

    def test_what_waits_in_the_queue_is_taken_by_who_sleeps_or_ends_a_call(self, rng, monkeypatch):
        monkeypatch.setattr(team, "_team", team._Team())
        mates, done = team._team, []

        class Waiting:
            def help(self):
                done.append(threading.current_thread())

        assert mates.grow(2) == 2
        for _ in range(20):
            mates.put(Waiting(), 2)
            mates.rouse(2), mates.rouse(2)  # a sleeper that saw an empty queue looks again
            until(lambda: mates.calls.empty() and mates.queued[0] == 0)
            until(lambda: len(done) % 2 == 0)
        assert len(done) == 40
        until(lambda: len(mates.resting()) == 2)

    def test_short_calls_share_with_who_is_awake(self, rng, monkeypatch):
        """Helpers are woken where short calls follow each other closely; results never change."""
        monkeypatch.setattr(team, "_team", team._Team())
        cache = nbattn.KVCache(1, 8, 300, 64)
        cache.append(*rng.standard_normal((2, 1, 8, 200, 64), np.float32))
        query = rng.standard_normal((1, 32, 1, 64), np.float32)
        monkeypatch.setattr(runtime, "threads", lambda: 1)
        expected, rouse, roused = cache.attend(query), team._Team.rouse, []
        monkeypatch.setattr(runtime, "threads", lambda: 3)
        monkeypatch.setattr(
            team._Team, "rouse", lambda own, n, *after: (roused.append(n), rouse(own, n, *after))
        )
        monkeypatch.setattr(team, "CLOSELY", 60.0)
        for _ in range(300):
            np.testing.assert_array_equal(cache.attend(query), expected)
        assert set(roused) == {2}
        assert 1 < team._team.size <= 2
        # Nobody has anything left to do.
        until(lambda: len(team._team.resting()) == team._team.size)

    def test_an_interrupt_of_a_short_call_that_a_helper_is_in(self, rng, monkeypatch):
        """The call is over before the interrupt leaves it, and before a second one does."""
        monkeypatch.setattr(runtime, "threads", lambda: 2)
        cache = nbattn.KVCache(1, 8, 300, 64)
        cache.append(*rng.standard_normal((2, 1, 8, 200, 64), np.float32))
        query = rng.standard_normal((1, 32, 1, 64), np.float32)
        expected, hand_over, asked = cache.attend(query), team._hand_over(), []

        def slow(record):
            asked.append(record)
            state = hand_over(record)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return team.RUNNING if len(asked) < 4 else state

        def interrupt(seconds):
            raise KeyboardInterrupt

        monkeypatch.setattr(team, "_hand_over", lambda: slow)
        with monkeypatch.context() as patch:
            patch.setattr(team.time, "sleep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                cache.attend(query)
        assert len(asked) >= 4
        np.testing.assert_array_equal(cache.attend(query), expected)

    def test_helpers_that_are_awake_are_reached_without_python(self, rng, monkeypatch):
        x = rng.standard_normal((4, 300, 64))
        monkeypatch.setattr(team, "_team", team._Team())
        monkeypatch.setattr(runtime, "threads", lambda: 3)
        expected, offer, awake = attend(x, x, x, backend="cpu"), team._Call.offer, []

        def counted(call, helpers):
            awake.append(offer(call, helpers))
            return awake[-1]

        monkeypatch.setattr(team._Call, "offer", counted)

        def reached():
            np.testing.assert_array_equal(attend(x, x, x, backend="cpu"), expected)
            return any(awake)

        until(reached)
        assert max(awake) <= 2


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@needs_fork
class TestForks:
    def test_after_use(self):
        script("""
            assert right()
            assert in_child(right) == 0
            assert in_child(lambda: in_child(right) == 0) == 0
            assert right()
        """)

    def test_thread_of_a_child(self):
        script("""
            def in_thread():
                outcomes = []
                thread = threading.Thread(target=lambda: outcomes.append(right()))
                thread.start()
                thread.join()
                return outcomes == [True]

            assert right()
            assert in_child(in_thread) == 0
        """)

    def test_a_child_goes_on_with_a_cache_of_its_own(self):
        script("""
            from nbattn import KVCache, PagedKVCache

            tokens = rng.standard_normal((3, 1, 2, 2000, 32)).astype(np.float32)
            query = rng.standard_normal((1, 8, 1, 32)).astype(np.float32)

            def grown(cache, *handle):
                cache.append(*handle, *tokens[:2])
                for _ in range(4):
                    got = cache.attend(*handle, query)
                lengths = [cache.lengths[h] for h in handle or (0,)]
                exact = attend(query, *tokens[:2], backend="reference")
                return lengths == [2000] and bool(np.abs(got - exact).max() < 1e-5)

            contiguous, paged = KVCache(1, 2, 4000, 32), PagedKVCache(300, 16, 2, 32)
            handle = paged.add()
            for cache, *handles in ((contiguous,), (paged, handle)):
                assert grown(cache, *handles)
                before = cache.attend(*handles, query)

                def child():
                    same = np.array_equal(cache.attend(*handles, query), before)
                    cache.append(*handles, tokens[2], tokens[2])
                    moved = not np.array_equal(cache.attend(*handles, query), before)
                    last = cache.attend(*handles, query, window_size=(0, None))  # the last position alone
                    right = np.allclose(last[0, ::4, 0], tokens[2, 0, :, -1])
                    return same and moved and right

                assert in_child(child) == 0
                assert cache.lengths[handle if handles else 0] == 2000
                assert np.array_equal(cache.attend(*handles, query), before)
            assert paged.free_pages == 300 - 125
        """)

    def test_while_others_are_in_a_call(self):
        script("""
            assert right()
            over = threading.Event()
            outcomes = []

            def work():
                while not over.is_set():
                    outcomes.append(right())

            threads = [threading.Thread(target=work) for _ in range(4)]
            [thread.start() for thread in threads]
            assert [in_child(right) for _ in range(20)] == [0] * 20
            over.set()
            [thread.join() for thread in threads]
            assert outcomes and all(outcomes)
        """)

    def test_while_another_compiles(self, tmp_path):
        script(
            """
            import threading
            from numba.core.compiler_lock import global_compiler_lock

            def compile():
                with global_compiler_lock:  # as Numba holds it while it compiles
                    runtime.compiled("slow", lambda jit, inline: build(jit, inline, pause=0.5))

            slow = threading.Thread(target=compile)
            slow.start()
            time.sleep(0.1)
            if (pid := os.fork()) == 0:
                os._exit(0 if runtime.compiled("quick", build)(5) == 17 else 3)
            assert os.waitpid(pid, 0)[1] == 0
            slow.join()
            """,
            prelude=TINY,
            timeout=60,
            NBATTN_CACHE_DIR=str(tmp_path),
        )

    def test_helpers_do_not_keep_a_child_alive(self):
        script("""
            assert right()
            if (pid := os.fork()) == 0:
                assert right()
                sys.exit(5)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        """)

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_pools(self, method, tmp_path):
        program = tmp_path / "program.py"
        program.write_text(
            PRELUDE
            + f"""
def work(n):
    return right()

if __name__ == "__main__":
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    context = get_context({method!r})
    assert right()
    with context.Pool(2) as pool:
        assert all(pool.map(work, range(6)))
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert all(pool.map(work, range(6)))
"""
        )
        script(f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')")


class TestInterrupts:
    @pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
    def test_ctrl_c(self):
        script("""
            x = rng.standard_normal((1, 8, 700, 64)).astype(np.float32)
            expected = attend(x, x, x)
            out = np.empty_like(x)
            for n in range(20):
                timer = threading.Timer(0.002 + 0.001 * n, os.kill, (os.getpid(), signal.SIGINT))
                try:
                    timer.start()  # it may fire before this returns
                    while True:
                        attend(x, x, x, out=out)
                except KeyboardInterrupt:
                    out[...] = 7
                    time.sleep(0.02)
                    assert (out == 7).all(), "a helper wrote after the call was left"
                timer.join()
                assert (attend(x, x, x) == expected).all()
        """)

    @pytest.mark.skipif(os.name != "posix", reason="sends SIGALRM")
    def test_call_in_a_signal_handler(self):
        script("""
            x = rng.standard_normal((1, 8, 700, 64)).astype(np.float32)
            y = 2 * x[:, :, :333]
            expected, inner = attend(x, x, x), attend(y, y, y)
            outcomes = []
            signal.signal(signal.SIGALRM, lambda *_: outcomes.append((attend(y, y, y) == inner).all()))
            for n in range(200):
                signal.setitimer(signal.ITIMER_REAL, 0.0002 * (1 + n % 40))
                assert (attend(x, x, x) == expected).all()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert outcomes and all(outcomes)
        """)

    def test_exit_after_a_call(self):
        script("assert right()")

    def test_exit_while_threads_are_in_a_call(self):
        for milliseconds in range(4):
            script(f"""
            assert right()

            def work():
                while True:
                    right()

            for _ in range(4):
                threading.Thread(target=work, daemon=True).start()
            time.sleep(0.05 + {milliseconds} / 1000)
            """)

    def test_call_at_exit(self):
        # Late enough that Python starts no more threads; Numba can be imported no more either.
        output = script("""
            import atexit
            attend(q[0, 0, :1], k[0, 0], v[0, 0])
            atexit.register(lambda: print(right()))
        """)
        assert output == "True\n"


class TestCache:
    @pytest.fixture
    def folder(self, tmp_path):
        return {"prelude": TINY, "NBATTN_CACHE_DIR": str(tmp_path / "cache")}

    CALL = 'assert runtime.compiled("tiny", build)(5) == 17\nprint(runtime._kernels["tiny"]._cache.hit)'

    def test_second_process_loads(self, folder):
        assert [script(self.CALL, **folder) for _ in range(2)] == ["False\n", "True\n"]

    def test_cold_processes_at_once(self, folder, tmp_path):
        processes = [start(self.CALL, **folder) for _ in range(6)]
        assert [p.communicate(timeout=100)[1] for p in processes] == [""] * 6
        assert [p.returncode for p in processes] == [0] * 6
        files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert [path.name for path in files] == ["tiny"]
        assert script(self.CALL, **folder) == "True\n"

    @pytest.mark.slow
    def test_cold_processes_at_once_for_real(self, tmp_path):
        code = "assert right()"
        processes = [start(code, NBATTN_CACHE_DIR=str(tmp_path)) for _ in range(6)]
        assert [p.communicate(timeout=300)[1] for p in processes] == [""] * 6
        assert [p.returncode for p in processes] == [0] * 6
        files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert files - {"runtime-handover"} == {"attention-float32"}  # helpers need the other

    @pytest.mark.parametrize(
        "damage",
        [lambda blob: blob[:-1], lambda blob: blob[:-1] + b"\0", lambda blob: b"garbage"],
        ids=["truncated", "changed", "garbage"],
    )
    def test_damaged_file_is_compiled_again(self, folder, tmp_path, damage):
        script(self.CALL, **folder)
        (path,) = (tmp_path / "cache").rglob("tiny")
        path.write_bytes(damage(path.read_bytes()))
        assert [script(self.CALL, **folder) for _ in range(2)] == ["False\n", "True\n"]

    @pytest.mark.parametrize("kind", ["file", "under a file", "read-only", "null"])
    def test_folder_that_cannot_be_written(self, folder, tmp_path, kind):
        (tmp_path / "file").touch()
        (tmp_path / "read-only").mkdir(mode=0o500)
        if kind == "read-only" and os.access(tmp_path / "read-only", os.W_OK):
            pytest.skip("this user may write everywhere")
        places = {"file": tmp_path / "file", "under a file": tmp_path / "file" / "x", "null": "/dev/null/x"}
        folder["NBATTN_CACHE_DIR"] = str(places.get(kind, tmp_path / "read-only"))
        assert script(self.CALL + "\nprint(runtime.cache_folder())", **folder) == "False\nNone\n"

    def test_folder_that_disappears(self, folder, tmp_path):
        code = "import shutil; shutil.rmtree(runtime.cache_folder())\n" + self.CALL
        assert script(code, **folder) == "False\n"

    def test_full_disk(self, folder, tmp_path):
        code = """
def full(*args):
    raise OSError(28, "No space left on device")

os.replace = full
"""
        assert script(code + self.CALL, **folder) == "False\n"
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_kernels_of_other_processes_are_not_mixed_up(self, folder):
        """Two kernels compiled in processes of their own have parts of one name; both run in a third."""
        one = 'print(runtime.compiled("one", build)(5))\n'
        two = 'print(runtime.compiled("two", lambda jit, inline: build(jit, inline, factor=3))(5))\n'
        assert script(one, **folder) == "17\n"
        assert script(two, **folder) == "25\n"
        assert script(one + two, **folder) == "17\n25\n"
        assert script(two + one, **folder) == "25\n17\n"

    @pytest.mark.slow
    def test_dtypes_compiled_in_processes_of_their_own(self, tmp_path):
        code = """
            import ml_dtypes

            for name, tolerance in {tolerances}.items():
                x, y, z = (a.astype(name) for a in (q, k, v))
                exact = attend(*(a.astype(np.float64) for a in (x, y, z)), backend="reference")
                assert np.abs(attend(x, y, z).astype(np.float64) - exact).max() < tolerance, name
        """
        tolerances = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-3, "bfloat16": 1e-2}
        for one in tolerances.items():
            script(code.format(tolerances=dict([one])), NBATTN_CACHE_DIR=str(tmp_path))
        script(code.format(tolerances=tolerances), NBATTN_CACHE_DIR=str(tmp_path))

    def test_folder_depends_on_every_source(self, tmp_path):
        shutil.copytree(PACKAGE, tmp_path / "nbattn", ignore=shutil.ignore_patterns("__pycache__"))
        sources = [tmp_path / "nbattn" / "problem.py", *(tmp_path / "nbattn" / "cpu").glob("*.py")]
        assert len(sources) >= 5
        # One process for all: the digest is computed from the files as they are.
        code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom nbattn.cpu import runtime\n"
        code += "folder = runtime.cache_folder.__wrapped__\nseen = {folder()}\n"
        for source in sources:
            code += f"open({str(source)!r}, 'a').write('# edited')\nseen.add(folder())\n"
        code += "print(len(seen), runtime.__file__)"
        count, place = script(
            f"import sys; sys.argv.append({str(tmp_path)!r})\n" + code,
            prelude="",
            NBATTN_CACHE_DIR=str(tmp_path / "cache"),
        ).split()
        assert Path(place).is_relative_to(tmp_path)
        assert int(count) == 1 + len(sources)

    def test_folder_depends_on_the_processor(self, folder):
        code = "print(runtime.cache_folder())"
        processors = [{}, {"NUMBA_CPU_NAME": "haswell"}, {"NUMBA_CPU_NAME": "x86-64"},
                      {"NUMBA_CPU_FEATURES": "+sse4.2"}]  # fmt: skip
        assert len({script(code, **folder, **processor) for processor in processors}) == 4

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_only_the_dtype_compiles(self, rng, dtype, monkeypatch):
        q = rng.standard_normal((2, 4, 9, 8)).astype(dtype)
        k, v = rng.standard_normal((2, 2, 2, 11, 8)).astype(dtype)
        computes = [None, "bfloat16"] if dtype == np.float32 else [None]
        for compute in computes:
            attend(q, k, v, compute_dtype=compute)
            attend(q, k, v, compute_dtype=compute, return_weights=True)  # on tiles, where few queries are not
        before = set(runtime._kernels)
        monkeypatch.setattr(runtime, "jit_for", None)  # a compile would need it
        q.flags.writeable = False
        for options in (
            {"is_causal": True, "query_offset": "end"},
            {"mask": rng.random((9, 11)) < 0.5, "return_weights": True},
            {"mask": np.ones((1, 1, 1, 11), np.int64)},
            *({"bias": rng.standard_normal((4, 9, 11)).astype(other)} for other in DTYPES),
            {"window_size": (3, 2), "query_offset": [1, 2], "key_lengths": [11, 4]},
            {"softcap": 3.0, "scale": 0.5, "alibi_slopes": np.ones(4), "sinks": np.zeros(4)},
            {"return_lse": True, "out": np.empty((2, 4, 9, 8), dtype)},
        ):
            for compute in computes:
                attend(q, k, v, compute_dtype=compute, **options)
        attend(q[0, 0, :1], k[0, 0], v[0, 0])
        attend(q[:, :, ::-1], k[:, ::-1], v[..., ::2])
        packed = q.transpose(0, 2, 1, 3).reshape(18, 4, 8)
        nbattn.varlen_attention(packed, packed, packed, [0, 5, 5, 18], [0, 9, 10, 18], is_causal=True)
        assert set(runtime._kernels) == before


class TestMemory:
    @pytest.mark.slow
    def test_long_sequences(self):
        """16k x 16k scores would be 1 GB."""
        extra = script("""
            import resource
            x = rng.standard_normal((3, 16384, 64)).astype(np.float32)
            out = np.zeros((16384, 64), np.float32)
            assert right()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            attend(*x, out=out)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """)
        assert int(extra) * 1024 < 32e6

    def test_nothing_is_kept(self, rng):
        x = rng.standard_normal((4, 8, 512, 64), dtype=np.float32)
        attend(x, x, x)
        process = psutil.Process()
        before = process.memory_info().rss
        for _ in range(20):
            attend(x, x, x)
        assert process.memory_info().rss - before < 4 * x.nbytes
