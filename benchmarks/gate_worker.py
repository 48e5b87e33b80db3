"""One side of `gate`: a process that runs rows of the asv suites with the nbattn that lies beside it.

It reads an order a line on standard input and answers each with a line of JSON:

    rows                     the names of all rows
    row NAME                 prepare this row: seconds of one call, or why there is none
    turn NUMBER BATCHES      seconds of a call: the median of batches of so many calls each
"""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .suite import Suite

SLOW = 0.02
"""Seconds from which on a call needs no other one before it that brings its numbers into the caches."""


Row = tuple[bool, type, str, tuple[Any, ...]]
"""Whether it has its benchmark's first parameters, its suite, method and parameters."""


@cache
def rows(stem: str) -> dict[str, Row]:
    """The rows of a file of suites, by name."""
    module, found = importlib.import_module(f"benchmarks.{stem}"), {}
    for label, suite in inspect.getmembers(module, inspect.isclass):
        own = suite.__module__ == module.__name__ and not label.startswith("_")
        if not own or not issubclass(suite, Suite):
            continue
        lists: Any = getattr(suite, "params", ())
        if lists and not isinstance(lists[0], (list, tuple)):
            lists = [lists]
        for method in (name for name in dir(suite) if name.startswith("time_")):
            for i, params in enumerate(itertools.product(*lists)):
                words = f"({', '.join(map(str, params))})" if params else ""
                found[f"{stem}.{label}.{method}{words}"] = i == 0, suite, method, params
    return found


def all_rows() -> list[tuple[str, bool]]:
    stems = [
        file.stem for file in sorted(Path(__file__).parent.glob("*.py")) if "(Suite)" in file.read_text()
    ]
    return [(name, first) for stem in stems for name, (first, *_) in rows(stem).items()]


def prepared(suite: type, method: str, params: tuple[Any, ...]) -> tuple[Callable[[], Any], float]:
    """A row's body after a call of it, and how long that call took."""
    instance = suite()
    if hasattr(instance, "setup"):
        instance.setup(*params)
    function = getattr(instance, method)

    def body() -> Any:
        return function(*params)

    body()
    start = time.perf_counter()
    body()
    return body, time.perf_counter() - start


def turn(body: Callable[[], Any], number: int, batches: int, warm: bool) -> float:
    if warm:
        body()
    seconds = []
    gc.disable()
    try:
        for _ in range(batches):
            start = time.perf_counter()
            for _ in range(number):
                body()
            seconds.append((time.perf_counter() - start) / number)
    finally:
        gc.enable()
    return statistics.median(seconds)


def main() -> None:
    # What a benchmark prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        import nbattn

        folder = Path(nbattn.__file__).resolve().parents[1]
        if folder != Path.cwd().resolve():
            msg = f"nbattn was imported from {folder}"
            raise ImportError(msg)
    except Exception as error:
        answer(failed=f"{type(error).__name__}: {error}")
        return
    answer(ready=True)
    body, warm = None, True
    for line in sys.stdin:
        order, _, rest = line.strip().partition(" ")
        try:
            if order == "rows":
                answer(rows=all_rows())
            elif order == "row":
                body = None  # its memory is free before the next one takes some
                _, *what = rows(rest.partition(".")[0])[rest]
                body, seconds = prepared(*what)
                warm = seconds < SLOW
                answer(seconds=seconds)
            else:
                number, batches = map(int, rest.split())
                answer(seconds=turn(body, number, batches, warm))  # type: ignore[arg-type]
        except NotImplementedError as error:
            answer(lacking=str(error))
        except Exception as error:
            answer(failed=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
