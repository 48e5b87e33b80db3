"""The parts of `gpu.py` for caches: proved against float64, and timed as a share of what copying reaches."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu_cases import FLOOR, judged, relative_error
from benchmarks.gpu_timing import _rounds
from benchmarks.peers import ratio

ALLOWED = FLOOR | {"int8": 1e-4, "int4": 1e-4}
"""Relative errors that pass, of quantised caches beside the same numbers dequantised."""


class CacheCase(NamedTuple):
    """A cache, what it holds, and how it is attended."""

    storage: str
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    queries: int = 1
    page_size: int = 0  # 0 for a contiguous cache
    window: int | None = None
    lengths: tuple[int, ...] = (700, 1, 130)
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        kind = (
            f"pages of {self.page_size}" if self.page_size else f"ring {self.window}" if self.window else ""
        )
        sizes = f"{self.heads}/{self.kv_heads}x{self.queries} D {self.head_dim}"
        return " ".join(filter(None, ("cache", self.storage, sizes, kind, *self.options)))


OPTIONS: dict[str, Callable[[Any, CacheCase], dict[str, Any]]] = {
    "window": lambda rng, c: {"window_size": (90, None)},
    "softcap": lambda rng, c: {"softcap": 5.0},
    "alibi": lambda rng, c: {"alibi_slopes": rng.random(c.heads).astype("float32")},
    "sinks": lambda rng, c: {"sinks": rng.standard_normal(c.heads).astype("float32")},
}


def cases() -> list[CacheCase]:
    """Every storage and kind of cache, groups on and off tensor cores' tiles, every option."""
    found = []
    for storage in ALLOWED:
        more = [CacheCase(storage, heads, 2, queries=n) for heads, n in ((2, 1), (16, 3), (34, 1), (8, 20))]
        more += [CacheCase(storage, head_dim=dim) for dim in (128, 256)]
        more += [CacheCase(storage, page_size=size, queries=2) for size in (1, 16, 48)]
        more += [CacheCase(storage, window=100, queries=2), CacheCase(storage, options=tuple(OPTIONS))]
        found += [case for case in more if storage != "int4" or case.head_dim % 32 == 0]
    return found


def caches(seconds: float, seed: int) -> dict[str, Any]:
    """Every cache beside the same one in float64, alone as in the batch, and in a graph."""
    rows = []
    end = time.perf_counter() + seconds
    for case in cases():
        if time.perf_counter() > end:
            break
        rows.append(judged(case.name, partial(_beside_the_formula, case, seed)))
    left_out = len(cases()) - len(rows)
    for storage in ("bfloat16", "int8"):
        rows += [judged(f"graph {storage}", partial(_graph, storage, 0))]
        rows += [judged(f"graph {storage} pages of 16", partial(_graph, storage, 16))]
    rows += [judged(f"steps {kind}", partial(_steps, kind)) for kind in STEPS]
    rows += [judged("uneven pages", _uneven)]
    return {"rows": rows, "left_out": left_out}


def small_caches(seed: int) -> list[dict[str, Any]]:
    """What the sanitizer watches: chunks that are merged, pages, bytes."""
    chosen = [
        CacheCase("float16", queries=2), CacheCase("bfloat16", page_size=16),
        CacheCase("int8", page_size=16), CacheCase("int4", lengths=(70, 1)),
    ]  # fmt: skip
    return [judged(case.name, partial(_beside_the_formula, case, seed)) for case in chosen]


def _made(case: CacheCase, storage: str, backend: str) -> Any:
    import nbattn

    if case.page_size:
        pages = sum(-(-n // case.page_size) for n in case.lengths)
        cache = nbattn.PagedKVCache(
            pages, case.page_size, case.kv_heads, case.head_dim, storage, backend=backend
        )
        handles = [cache.add() for _ in case.lengths]
        return partial(cache.append, handles), partial(cache.attend, handles)
    room = case.window + 40 if case.window else max(case.lengths)
    ring = nbattn.KVCache(
        len(case.lengths), case.kv_heads, room, case.head_dim, storage, window=case.window, backend=backend
    )
    return ring.append, ring.attend


def _beside_the_formula(case: CacheCase, seed: int) -> dict[str, Any]:
    import numpy as np
    import torch

    rng = np.random.default_rng((seed, zlib.crc32(case.name.encode())))
    quantised = case.storage in ("int8", "int4")
    dtype = getattr(torch, "float32" if quantised else case.storage)
    options: dict[str, Any] = {}
    for name in case.options:
        options |= OPTIONS[name](rng, case)
    append, attend = _made(case, case.storage, "cuda")
    wide_append, wide_attend = _made(case, case.storage if quantised else "float64", "reference")

    def draw(heads: int, n: int) -> Any:
        x = torch.from_numpy(rng.standard_normal((len(case.lengths), heads, n, case.head_dim)))
        return x.to(dtype).cuda()

    def on_host(x: Any) -> Any:
        return x.float().cpu().numpy() if quantised else x.double().cpu().numpy()

    done = np.zeros(len(case.lengths), int)
    while (done < case.lengths).any():
        counts = np.minimum(np.array(case.lengths) - done, 40 if case.window else 10**6)
        key, value = (draw(case.kv_heads, int(counts.max())) for _ in range(2))
        append(key, value, counts)
        wide_append(on_host(key), on_host(value), counts)
        done += counts
    query = draw(case.heads, case.queries)
    exact = wide_attend(on_host(query), return_lse=True, **options)
    got = attend(query, return_lse=True, **options)
    again = attend(query, **options)
    error = relative_error(got.output.double().cpu(), exact.output)
    lse_error = relative_error(got.lse.double().cpu(), exact.lse)
    same = bool(torch.equal(got.output, again))
    allowed = ALLOWED[case.storage]
    passed = error <= allowed and lse_error <= max(1e-5, allowed if quantised else 0) and same
    return {
        "error": error, "lse_error": lse_error, "allowed": allowed, "same_bits_again": same, "passed": passed,
    }  # fmt: skip


def _graph(storage: str, page_size: int) -> dict[str, Any]:
    """A captured step, launched while the cache grows, beside the same steps one by one."""
    import torch

    import nbattn

    batch, heads, dim, steps = 2, 8, 64, 5
    dtype = torch.float32 if storage == "int8" else torch.bfloat16
    x = torch.randn(steps + 1, 3, batch, heads, 1, dim, device="cuda", dtype=dtype)
    prompt = torch.randn(batch, 2, 300, dim, device="cuda", dtype=dtype)
    plain: Any
    recorded: Any
    sequences: tuple[Any, ...] = ()
    if page_size:
        plain, recorded = (
            nbattn.PagedKVCache(60, page_size, 2, dim, storage, rotary_base=1e4, backend="cuda")
            for _ in range(2)
        )
        sequences = ([(plain.add(), recorded.add())[0] for _ in range(batch)],)
    else:
        plain, recorded = (
            nbattn.KVCache(batch, 2, 400, dim, storage, rotary_base=1e4, backend="cuda") for _ in range(2)
        )
    for cache in (plain, recorded):
        cache.append(*sequences, prompt, prompt, [300, 7])
    query, key, value = x[0, 0].clone(), x[0, 1, :, :2].clone(), x[0, 2, :, :2].clone()
    recorded.append(*sequences, key, value)
    recorded.attend(*sequences, query)
    plain.append(*sequences, key, value)
    if page_size:
        recorded.reserve(*sequences, 300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.append(*sequences, key, value)
        output = recorded.attend(*sequences, query)
    graph.replay()  # before the first `advance`, and once a sequence has changed, nothing may be mistaken
    same = bool(output.isnan().all())
    for q, k, v in x[1:]:
        for old, new in ((query, q), (key, k[:, :2]), (value, v[:, :2])):
            old.copy_(new)
        recorded.advance(*sequences)
        graph.replay()
        plain.append(*sequences, key, value)
        same &= bool(torch.equal(output, plain.attend(*sequences, query)))
    recorded.truncate(*[handles[0] for handles in sequences], 1)
    graph.replay()
    same &= bool(output.isnan().all())
    return {"passed": same, "error": 0.0 if same else 1.0, "allowed": 0.0}


STEPS: dict[str, dict[str, Any]] = {
    "rotary": {"rotary_base": 1e4}, "ring": {"window": 90}, "ragged": {}, "pages": {"page_size": 16},
    "rotary ragged pages": {"page_size": 16, "rotary_base": 1e4},
}  # fmt: skip


def _steps(kind: str) -> dict[str, Any]:
    """Steps of which the launch is packed already, beside the long way that a log-sum-exp takes."""
    import torch

    import nbattn

    options = dict(STEPS[kind])
    make: Any = nbattn.KVCache
    sizes, sequences = (2, 2, 120 if "window" in options else 200, 64), ()
    page_size = options.pop("page_size", 0)
    if page_size:
        make, sizes = nbattn.PagedKVCache, (60, page_size, 2, 64)
    cache: Any = make(*sizes, "bfloat16", backend="cuda", **options)
    if page_size:
        sequences = ([cache.add(), cache.add()],)
    lengths = [100, 37] if "ragged" in kind else None
    x = torch.randn(2, 2, 100, 64, device="cuda", dtype=torch.bfloat16)
    for i in range(0, 100, 50):
        part = None if lengths is None else [min(max(n - i, 0), 50) for n in lengths]
        cache.append(*sequences, x[:, :, i : i + 50], x[:, :, i : i + 50], part)
    same = True
    for _ in range(40):
        token, query = (torch.randn(2, h, 1, 64, device="cuda", dtype=torch.bfloat16) for h in (2, 8))
        cache.append(*sequences, token, token)
        got = cache.attend(*sequences, query)
        same &= bool(torch.equal(got, cache.attend(*sequences, query, return_lse=True).output))
    return {"passed": same, "error": 0.0 if same else 1.0, "allowed": 0.0}


def _uneven() -> dict[str, Any]:
    """A sequence among many short ones, so that launches are several, beside the same one alone."""
    import torch

    import nbattn

    batch, keys = 64, 40000
    cache = nbattn.PagedKVCache(keys // 16 + batch, 16, 8, 128, "bfloat16", backend="cuda")
    handles = [cache.add() for _ in range(batch)]
    x = torch.randn(1, 8, keys, 128, device="cuda", dtype=torch.bfloat16)
    token = torch.randn(batch, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    cache.append(handles[20], x[:, :, 1:], x[:, :, 1:])
    cache.append(handles, token, token)
    query = torch.randn(batch, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    together = cache.attend(handles, query)
    same = True
    for b in (0, 20, batch - 1):
        same &= bool(torch.equal(together[b : b + 1], cache.attend(handles[b], query[b : b + 1])))
    return {"passed": same, "error": 0.0 if same else 1.0, "allowed": 0.0}


# --- timing -------------------------------------------------------------------------------------------------


def decode(seconds: float, seed: int) -> dict[str, Any]:
    """One token for 32 heads in groups over 32k keys, as a share of the bytes a second that copying moves."""
    end = time.perf_counter() + seconds
    rate = _copy_rate()
    rows: list[dict[str, Any]] = [{"name": "copy", "passed": True, "bytes_per_second": rate}]
    for batch in (1, 16):
        for group in (4, 8, 1):
            for storage, page_size in (("bfloat16", 0), ("int8", 0), ("int4", 0), ("bfloat16", 16)):
                kind = f" pages of {page_size}" if page_size else ""
                name = f"{storage} batch {batch} groups of {group}{kind}"
                if time.perf_counter() > end:
                    rows.append({"name": name, "passed": True, "skipped": "no time left"})
                    continue
                rows.append(judged(name, partial(_decoded, rate, batch, group, storage, page_size)))
    return {"rows": rows}


def _copy_rate() -> float:
    """Bytes read and written a second by a copy of 2 GB."""
    import torch

    x = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    seconds = statistics.median(r["copy"] for r in _rounds({"copy": lambda: y.copy_(x)}, seconds=0.5))
    return 2 * x.numel() / seconds


def _decoded(rate: float, batch: int, group: int, storage: str, page_size: int) -> dict[str, Any]:
    import torch

    import nbattn

    heads, keys, dim, pieces = 32, 32768, 128, 4
    kv_heads = heads // group
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    if page_size:
        pages = batch * keys // page_size
        paged = nbattn.PagedKVCache(pages, page_size, kv_heads, dim, storage, backend="cuda")
        handles = [paged.add() for _ in range(batch)]
        append, attend = partial(paged.append, handles), partial(paged.attend, handles)
        advance = partial(paged.advance, handles, 0)
        paged.reserve(handles, keys)
    else:
        cache = nbattn.KVCache(batch, kv_heads, keys, dim, storage, backend="cuda")
        append, attend, advance = cache.append, cache.attend, partial(cache.advance, 0)
    key, value = torch.empty(2, batch, kv_heads, keys, dim, device="cuda", dtype=torch.bfloat16)
    for i in range(pieces):
        part = slice(i * keys // pieces, (i + 1) * keys // pieces)
        key[:, :, part].normal_()
        value[:, :, part].normal_()
        append(key[:, :, part], value[:, :, part])
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, enable_gqa=group > 1)
    times = max(1, 64 // batch)
    advance()
    # In a graph, so that the processor's part does not count.
    calls: dict[str, Callable[[], Any]] = {"nbattn": _repeated(partial(attend, query), times)}
    troubles = {}
    try:
        exact = sdpa().float()
        calls["sdpa"] = _repeated(sdpa, times)
        apart = float((attend(query).float() - exact).norm() / exact.norm())
        if apart > {"int8": 0.02, "int4": 0.3}.get(storage, 4 * FLOOR["bfloat16"]):
            troubles["nbattn"] = f"differs by {apart:.2e}"
    except (RuntimeError, TypeError) as failure:
        troubles["sdpa"] = str(failure).splitlines()[0][:200]
    rounds = _rounds(calls, seconds=0.5)
    row_bytes = {"int8": 2 * (dim + 4), "int4": dim + dim // 4}.get(storage, 4 * dim)
    own = statistics.median(r["nbattn"] for r in rounds) / times
    moved = batch * kv_heads * keys * row_bytes
    return {
        "passed": "nbattn" not in troubles,
        "seconds": own,
        "bytes_per_second": moved / own,
        "share": moved / own / rate,
        "ratios": {label: ratio(rounds, label) for label in calls if label != "nbattn"},
        "troubles": troubles,
    }


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    """A graph of so many calls."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay
