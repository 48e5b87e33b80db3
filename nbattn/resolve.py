"""From the arguments of a call of attention to its `Problem`, and from that to the arrays it fills."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import check, device
from .block_mask import BlockMask
from .device import DeviceArray
from .problem import Problem, storage_name
from .scores import check_mods


class Options(NamedTuple):
    """The keyword arguments that the doors of attention share, as the caller gave them."""

    mask: ArrayLike | BlockMask | None
    bias: ArrayLike | None
    is_causal: bool
    window_size: Any
    query_offset: Any
    key_lengths: ArrayLike | None
    scale: float | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    compute_dtype: str | None
    score_mod: Any = None
    mask_mod: Any = None
    mod_args: Any = ()


class Call(NamedTuple):
    """A checked call of (B, H, S, D) inputs."""

    problem: Problem
    dtype: np.dtype[Any]  # the caller's
    missing: int  # leading dimensions that the inputs leave out


def placed(
    backend: str | None, query: Any, key: Any, value: Any, out: Any, options: Options
) -> tuple[str | None, Any, Any, Any, Any, Options]:
    """The backend for arrays as they lie, and these; described, where they lie on a GPU."""
    large = {"query": query, "key": key, "value": value, "out": out, "bias": options.bias}
    large["mask"] = None if isinstance(options.mask, BlockMask) else options.mask
    small = {"alibi_slopes": options.alibi_slopes, "sinks": options.sinks}
    found = device.placed(large, small)
    if not found:
        return backend, query, key, value, out, options
    query, key, value, out = (found.pop(name) for name in ("query", "key", "value", "out"))
    if isinstance(options.mask, BlockMask):
        found["mask"] = options.mask
    return check.gpu_backend(backend, query), query, key, value, out, options._replace(**found)


def resolve_batch(query: ArrayLike, key: ArrayLike, value: ArrayLike, options: Options) -> Call:
    """Check and resolve a call whose inputs are not packed."""
    q, k, v = check.check_inputs(query, key, value)
    missing = check.missing_dimensions(q, k, v)
    if missing:
        q, k, v = (check.with_leading(x, missing) for x in (q, k, v))
    check.check_heads(q, k, v)
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    problem = resolve(
        (q, k, v),
        query_lengths=np.full(batch, queries, np.int64),
        key_limits=np.full(batch, keys, np.int64),
        max_queries=queries,
        max_keys=keys,
        options=options,
    )
    return Call(problem, q.dtype, missing)


def resolve(
    inputs: tuple[NDArray[Any], ...],
    *,
    query_lengths: NDArray[np.int64],
    key_limits: NDArray[np.int64],
    max_queries: int,
    max_keys: int,
    options: Options,
    starts: tuple[NDArray[np.int64], NDArray[np.int64]] | tuple[None, None] = (None, None),
) -> Problem:
    """Resolve every option of a call whose inputs are checked (B, H, S, D) arrays."""
    q, k, v = (check.kernel_view(x) for x in inputs)
    storage = cast(str, storage_name(q.dtype))
    heads = q.shape[1]
    shape = (len(query_lengths), heads, max_queries, max_keys)
    compute = np.float64 if storage == "float64" else np.float32
    blocks = options.mask if isinstance(options.mask, BlockMask) else None
    left, right = check.check_window(options.window_size, check.check_flag(options.is_causal, "is_causal"))
    lengths = check.check_key_lengths(options.key_lengths, key_limits)
    score_mod, mask_mod = check_mods(options.score_mod, options.mask_mod, options.mod_args)
    return Problem(
        query=q,
        key=k,
        value=v,
        storage=storage,
        batch=len(query_lengths),
        max_queries=max_queries,
        max_keys=max_keys,
        scale=check.check_scale(options.scale, q.shape[3], compute),
        softcap=check.check_softcap(options.softcap, compute),
        left=left,
        right=right,
        offset=check.check_offset(options.query_offset, query_lengths, lengths),
        key_lengths=lengths,
        mask=check.check_mask(options.mask, shape) if blocks is None else None,
        blocks=None if blocks is None else blocks.fit(shape),
        bias=check.check_bias(options.bias, shape),
        alibi_slopes=check.check_per_head(options.alibi_slopes, "alibi_slopes", heads, compute),
        sinks=check.check_per_head(options.sinks, "sinks", heads, compute),
        score_mod=score_mod,
        mask_mod=mask_mod,
        bfloat16_products=check.check_compute_dtype(options.compute_dtype, storage),
        query_starts=starts[0],
        key_starts=starts[1],
    )


def check_starts(starts: ArrayLike, name: str, total: int, what: str) -> NDArray[np.int64]:
    array = check.on_host(starts, name)
    if array.ndim != 1 or len(array) == 0:
        msg = f"{name} has shape {array.shape}; expected (batch + 1,)"
        raise ValueError(msg)
    array = check.check_int_vector(array, name, len(array))
    if array[0] != 0:
        msg = f"{name} starts at {array[0]}; expected 0"
        raise ValueError(msg)
    if (falls := array[1:] < array[:-1]).any():  # differences may overflow
        b = int(np.flatnonzero(falls)[0])
        step = f"from {array[b]} to {array[b + 1]} at entry {b + 1}"
        msg = f"{name} decreases {step}; sequences cannot have negative lengths"
        raise ValueError(msg)
    if array[-1] != total:
        msg = f"{name} ends at {array[-1]} but {what} has {total} rows; both must match"
        raise ValueError(msg)
    return array


def arrays_of(given: tuple[Any, ...], problem: Problem) -> tuple[NDArray[Any] | None, ...]:
    """Every array that `out` must not overlap, the caller's own ones where a copy was made."""
    own = tuple(x for x in given if isinstance(x, np.ndarray))
    options = (problem.mask, problem.bias, problem.alibi_slopes, problem.sinks)
    mods = (mod for mod in (problem.score_mod, problem.mask_mod) if mod is not None)
    read = (x for mod in mods for x in mod.arguments if isinstance(x, np.ndarray))
    return (*own, problem.query, problem.key, problem.value, *options, *read)


def zero_weights(problem: Problem) -> NDArray[Any]:
    shape = (problem.batch, problem.query.shape[1], problem.max_queries, problem.max_keys)
    if type(problem.query) is DeviceArray:
        return check.new_array(problem.query, shape, problem.compute)  # which the backend clears
    # Zeros: kernels write only what a row can see.
    return np.zeros(shape, problem.compute)


def run(module: ModuleType, problem: Problem, out: NDArray[Any], *others: NDArray[Any] | None) -> None:
    """Let the backend write its results, through a contiguous array where kernels cannot write `out`."""
    target = out if check.kernel_view(out) is out else np.empty(out.shape, out.dtype.newbyteorder("="))
    module.forward(problem, target, *others)
    if target is not out:
        out[...] = target
