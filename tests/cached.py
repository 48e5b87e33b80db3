"""A cache as plain arrays that grow, what each storage makes of a number, and poison for all the rest."""

import numpy as np
import simulated_gpu
from ml_dtypes import bfloat16
from oracle import hold

from nbattn.cpu import kinds

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": bfloat16}
STORAGES = [*DTYPES, "int8", "int4"]


def input_dtype(storage):
    return DTYPES.get(storage, np.float32)


def stored(x, storage):
    """The numbers that a cache of this storage gives back for rows `x` (..., D)."""
    if storage in DTYPES:
        return x.astype(DTYPES[storage])
    x = x.astype(np.float32)
    if storage == "int8":
        scale = np.max(np.abs(x), axis=-1, keepdims=True) / np.float32(127)
        numbers = np.round(x / np.where(scale == 0, np.float32(1), scale))
        return (np.clip(numbers, -127, 127) * scale).astype(np.float32)
    result = np.empty_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        for i in range(0, x.shape[-1], 32):
            group = x[place][i : i + 32]
            scale = group[np.argmax(np.abs(group))] / np.float32(-8)
            numbers = np.clip(np.round(group / scale), -8, 7) if scale else group * 0
            result[place][i : i + 32] = numbers.astype(np.float32) * scale
    return result


def turn(x, positions, base, interleaved=False, width=None):
    """Rows (H, n, D) with each pair of numbers, as one complex number, turned by its position; in float64."""
    width = width or x.shape[-1]
    y = x.astype(np.float64)
    angle = np.outer(positions, base ** (-np.arange(0, width, 2) / width))
    even, odd = (
        (slice(0, width, 2), slice(1, width, 2))
        if interleaved
        else (slice(0, width // 2), slice(width // 2, width))
    )
    turned = (y[..., even] + 1j * y[..., odd]) * np.exp(1j * angle)
    y[..., even], y[..., odd] = turned.real, turned.imag
    return y


def rounds(storage, backend):
    """How queries and weights are rounded before they are multiplied, as `oracle.hold` says."""
    if storage not in ("int8", "int4") or backend == "reference":
        return ""
    return "coarse" if backend != "cuda" and kinds.read_as(storage) == "nibbles" else "fine"


def as_multiplied(query, storage, backend):
    """The numbers that queries (..., n, D) of a cache are multiplied as.

    Where the processor multiplies bytes, those that meet int4 keys are rounded to 8 bits.
    """
    if rounds(storage, backend) != "coarse":
        return query
    numbers = query.astype(np.float32)
    most = np.abs(numbers).max(axis=-1, keepdims=True)
    steps = np.float32(127) / np.where(most == 0, np.float32(1), most)
    return np.rint(numbers * steps) * (most / np.float32(127))


class Line:
    """One sequence: all of its keys and values, (Hkv, n, D) as the cache gives them back."""

    def __init__(self, kv_heads, head_dim, value_dim, storage, rotary=None):
        self.storage, self.rotary = storage, rotary
        kept = input_dtype(storage)
        self.key = np.empty((kv_heads, 0, head_dim), kept)
        self.value = np.empty((kv_heads, 0, value_dim), kept)

    def copy(self):
        other = Line(*self.key.shape[::2], self.value.shape[2], self.storage, self.rotary)
        other.key, other.value = self.key, self.value
        return other

    def __len__(self):
        return self.key.shape[1]

    def append(self, key, value):
        if self.rotary:
            key = turn(key, len(self) + np.arange(key.shape[1]), **self.rotary)
        self.key = np.concatenate((self.key, stored(key, self.storage)), axis=1)
        self.value = np.concatenate((self.value, stored(value, self.storage)), axis=1)

    def truncate(self, length):
        self.key, self.value = self.key[:, :length], self.value[:, :length]

    def hold(self, output, lse, query, mask=None, *, ulp=4, backend=None, **options):
        """Hold attention of `query` (Hq, n, D), the last n positions, to the formula."""
        offset = len(self) - query.shape[1]
        if self.rotary:
            query = turn(query, offset + np.arange(query.shape[1]), **self.rotary).astype(query.dtype)
        options = {"is_causal": True, "query_offset": offset, "ulp": ulp, **options}
        options["rounds"] = rounds(self.storage, backend)
        query = as_multiplied(query, self.storage, backend)
        lse = None if lse is None else lse[None]
        hold(output[None], lse, query[None], self.key[None], self.value[None], mask, **options)


def poison(pages, used):
    """Fill what `used` (pages, page_size) leaves with NaN, quantised rows with a NaN scale."""
    arrays = (pages.key, pages.key_scales), (pages.value, pages.value_scales)
    for numbers, scales in (map(simulated_gpu.view, pair) for pair in arrays):
        numbers[~used] = np.nan if scales is None else 77
        if scales is not None:
            scales[~used] = np.nan


def snapshot(pages):
    return [None if x is None else simulated_gpu.view(x).tobytes() for x in pages[:4]]
