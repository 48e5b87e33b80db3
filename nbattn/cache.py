"""The key/value cache of a batch, contiguous or as a ring. Its memory is in `store.py`."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import check
from .attention import AttentionOutput
from .check_cache import check_held, check_no_lengths, check_size, refuse
from .store import Places, Store

GRAPH_REACH = 1 << 30
"""Positions that attention in a CUDA graph tells apart."""


class KVCache:
    """Keys and values of the positions so far, in memory that is taken once.

    Sequence b holds the positions 0 to ``lengths[b] - 1``; `append` adds to its end, and the queries of
    `attend` are its last ones. Nothing is moved: an append writes the new tokens alone, and attention reads
    the keys where they lie. Memory that no position uses is never read.

    Any number of threads may call `attend` at once. Nobody may call a method that changes the cache
    meanwhile.

    Parameters
    ----------
    batch, kv_heads, capacity, head_dim : int
        The cache takes ``batch * kv_heads * capacity`` keys of `head_dim` numbers, and as many values.
    dtype : {"float32", "float64", "float16", "bfloat16", "int8", "int4"} or dtype
        What the cache stores. "int8" keeps 8 bits of each number and one float32 factor for each token and
        head; a number is off by at most 1/254 of the token's largest in its head. (Where the processor
        multiplies bytes, queries and weights are rounded to 16 bits, which hardly counts beside that.) "int4"
        keeps 4 bits and a float32 factor for each 32 numbers, and is off by at most 1/8, mostly under 1/16,
        of the largest of them; it needs head_dims that are multiples of 32. (There the same processors round
        queries to 8 bits, by at most 1/254 of their largest, and weights to 8, by less than 1/127 of the
        largest of 128: 1 to 2.5 % of the output by itself.) In the Euclidean norm that makes the outputs of a
        layer, token by token, wrong by 0.5 to 0.9 % ("int8") and 8 to 14 % ("int4") on glassllm's keys and
        values, where "bfloat16" makes 0.3 to 0.4 %; on 1200 tokens of SmolLM2-135M, whose attention is
        sharper, by 0.7 to 2.8 % and 9 to 36 %, where "bfloat16" makes 0.2 to 1.0 %.
    value_dim : int, optional
        Dv, where the values have another head_dim than the keys.
    window : int, optional
        Makes the cache a ring: each query sees the last `window` positions, its own included, of a stream
        that may have any length. Older ones are overwritten; `capacity`, at least `window`, is how many
        remain, so that ``capacity - window + 1`` tokens may be appended before they are attended.
    rotary_base : float, optional
        Turns keys by their position when they are appended, and queries by theirs in `attend`, with
        frequencies ``rotary_base ** (-2 * n / rotary_dim)``. Do not turn them yourself, then.
    rotary_interleaved : bool
        Whether the pairs that turn are ``(2 * n, 2 * n + 1)``, as in GPT-J and the RoFormer paper; else
        ``(n, n + rotary_dim / 2)``, as in GPT-NeoX and Llama.
    rotary_dim : int, optional
        How many of the first numbers turn; all unless given.
    backend : {None, "cpu", "reference", "cuda"}
        Who writes, and attends unless `attend` is told otherwise. With "cuda" the cache lies on the current
        GPU: see the notes.

    Attributes
    ----------
    lengths : ndarray of int64, shape (B,)
    batch, capacity : int
    window : int or None
    dtype : str
    nbytes : int
        The bytes that its keys and values take, with their scales.

    Raises
    ------
    TypeError, ValueError
        For sizes that make no cache. A call that raises leaves any cache as it was.

    Notes
    -----
    On a GPU:

    - The cache takes arrays of PyTorch, CuPy and others that lie there and gives back that library's, or
      NumPy's. Masks, biases and `out` lie where the query does; slopes and sinks may be on the host, lengths
      must be. Arrays of another GPU are a ValueError.
    - Attention of at most 16 queries a sequence, and 64 for each key head, without mask and bias, up to
      head_dim 256, of "float32" 128 and of "float64" none, on tensor cores (compute capability 8.0), reads
      the cache as it lies, in chunks over the whole GPU [2]_. "float32" is multiplied as three bfloat16
      numbers, with no loss that counts, but infinite ones make NaN; of "int8" and "int4" queries and weights
      are rounded to 16 bits. Other calls read a contiguous cache of floats as it lies, and gather others, in
      float32 where they are quantised.
    - Work goes to the stream that is current in PyTorch or CuPy, or the array's own, and nothing waits for
      it. A call on another stream than the one before waits for the whole GPU, as the cache cannot know what
      the caller orders.
    - A step can be captured in a CUDA graph [3]_: see `advance`.
    - A call that is refused launches nothing. One that the driver fails raises RuntimeError with the driver's
      name for it, and the cache is as it was; what the GPU itself finds wrong comes with a later call.

    References
    ----------
    .. [1] Rotary positions: Su et al., 2021, https://arxiv.org/abs/2104.09864.
    .. [2] Dao et al., "Flash-Decoding for long-context inference", 2023,
       https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    .. [3] NVIDIA, CUDA C++ Programming Guide, "CUDA Graphs",
       https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs.

    Examples
    --------
    >>> import numpy as np
    >>> from nbattn import KVCache
    >>> rng = np.random.default_rng(0)
    >>> cache = KVCache(batch=2, kv_heads=2, capacity=100, head_dim=16)
    >>> prompt = rng.standard_normal((2, 2, 7, 16), np.float32)
    >>> cache.append(prompt, prompt)
    >>> token = rng.standard_normal((2, 2, 1, 16), np.float32)
    >>> cache.append(token, token)
    >>> query = rng.standard_normal((2, 8, 1, 16), np.float32)
    >>> cache.attend(query).shape, cache.lengths
    ((2, 8, 1, 16), array([8, 8]))

    A long prompt goes into a ring in pieces of at most ``capacity - window + 1`` tokens:

    >>> ring = KVCache(batch=2, kv_heads=2, capacity=100, head_dim=16, window=37)
    >>> prompt = rng.standard_normal((2, 2, 500, 16), np.float32)
    >>> for start in range(0, 500, 64):
    ...     piece = prompt[:, :, start : start + 64]
    ...     ring.append(piece, piece)
    ...     output = ring.attend(piece)
    >>> output.shape, ring
    ((2, 2, 52, 16), KVCache(batch=2, capacity=100, window=37, float32))
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: DTypeLike = "float32",
        *,
        value_dim: int | None = None,
        window: int | None = None,
        rotary_base: float | None = None,
        rotary_interleaved: bool = False,
        rotary_dim: int | None = None,
        backend: str | None = None,
    ) -> None:
        batch, capacity = check_size(batch, "batch", least=0), check_size(capacity, "capacity")
        self._capacity, self._window = capacity, window
        if window is not None:
            self._window = check_size(window, "window")
            if self._window > capacity:
                msg = f"window is {window} but capacity {capacity}; a ring must hold the window"
                raise ValueError(msg)
        sizes = (batch, capacity, kv_heads, head_dim, value_dim)
        rotary = (rotary_base, rotary_interleaved, rotary_dim)
        self._store = Store(sizes, dtype, rotary, self._window, backend)
        self._places = Places(np.arange(batch)[:, None], capacity if window is not None else 0)
        if self._store.is_on_gpu:
            # Launches before the first `advance` find nobody's lengths.
            self._places.there = self._store.gpu.placed(self._nobody)

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self._places.lengths)

    @property
    def capacity(self) -> int:
        """How many positions of each sequence there is memory for."""
        return self._capacity

    @property
    def window(self) -> int | None:
        """How many positions a query of a ring sees; None where the cache is none."""
        return self._window

    @property
    def dtype(self) -> str:
        """What the cache stores."""
        return self._store.pages.storage

    @property
    def nbytes(self) -> int:
        """The bytes that its keys and values take, with their scales."""
        return self._store.nbytes

    def __repr__(self) -> str:
        ring = "" if self.window is None else f", window={self.window}"
        return f"KVCache(batch={self.batch}, capacity={self.capacity}{ring}, {self.dtype})"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many positions each sequence has, (B,); in a ring, also those that are overwritten."""
        return self._places.lengths.copy()

    def append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """Add new positions to the end of each sequence.

        Parameters
        ----------
        key, value : array_like, shapes (B, Hkv, S, D) and (B, Hkv, S, Dv)
            In the cache's dtype; for "int8" and "int4" float32, float16 or bfloat16.
        lengths : int array_like (B,), optional
            How many of the S each sequence gets, the first ones; all unless given.

        Raises
        ------
        TypeError, ValueError
            For arrays that do not fit; ValueError also where they do not fit into the capacity. The cache is
            then as it was, on a GPU also where the launch fails. While a graph is captured, ValueError for
            `lengths` and for arrays on the host.
        """
        places = self._places
        if lengths is None and places.rewrite is not None:
            rows, run, counts = places.rewrite
            if places.ring:
                done = self._append_to_ring(key, value)
            else:
                fits = places.longest + rows <= self._capacity
                done = fits and run(key, value, places.lengths, out=counts) is not None
            if done:
                places.grow(counts, rows)
                return
        k, v, counts = self._store.check_new(key, value, lengths, len(places.lengths))
        if self._store.in_a_graph(places, k) is not None:
            check_no_lengths(lengths)
            self._store.write(places, k, v, counts)
            return
        if not places.ring and places.longest + k.shape[2] > self._capacity:
            self._check_room(counts)
        if places.is_told:
            self._take_back()
        before = places.starts.copy() if self._store.is_on_gpu else None
        places.make_room(counts)
        try:
            self._store.write(places, k, v, counts)
        except Exception:
            if before is not None:  # a launch that fails writes nothing
                places.starts[:] = before
            raise
        places.grow(counts, k.shape[2] if lengths is None else None)

    def _append_to_ring(self, key: Any, value: Any) -> bool:
        """Write as the latest append did, if the arrays lie as that one's."""
        places, done = self._places, True
        rows, run, counts = cast(Any, places.rewrite)
        try:
            done = run(key, value, places.lengths, out=counts) is not None
        finally:
            if done:  # or interrupted
                places.make_room(counts, rows)
        return done

    def advance(self, count: int = 1) -> None:
        """Have every sequence be longer, before a CUDA graph fills the new positions and attends.

        While a graph is captured, `append` and `attend` of a cache on a GPU record what every launch of the
        graph does: write the last S positions, and attend from the sequences' ends. `lengths` stay as they
        are. Before each launch `advance` checks that there is room, counts the positions that the graph will
        write, and tells the GPU on the current stream: PyTorch's, or CuPy's where that captured. What the
        recorded calls are given must lie on the GPU, and `attend` be of few queries, on tensor cores. Before
        the first `advance`, and once the cache has changed in another way, launches write nothing and their
        outputs are NaN. A graph keeps neither the cache nor arrays alive: keep them with it.

        Parameters
        ----------
        count : int
            How many positions each sequence gets: S.

        Raises
        ------
        TypeError, ValueError
            For a cache on the host, and where the positions do not fit; the cache is then as it was.

        Examples
        --------
        A decoder's step, with tensors of PyTorch, after one that was not captured and had kernels loaded::

            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                cache.append(key, value)         # (B, Hkv, 1, D), filled anew before each launch
                output = cache.attend(query)
            for _ in range(100):
                cache.advance()
                graph.replay()
        """
        places = self._places
        if places.there is None:
            msg = 'advance is for graphs of a cache with backend="cuda"; append to others'
            raise ValueError(msg)
        size = check_size(count, "count", least=0)
        counts = np.full(len(places.lengths), size)
        if not places.ring:
            self._check_room(counts)
        elif places.longest + size >= GRAPH_REACH:
            msg = f"a sequence would have {places.longest + size} positions; graphs reach {GRAPH_REACH - 1}"
            raise ValueError(msg)
        else:
            check_held(places.starts, places.lengths + counts - places.reach, 0)
        here = self._store.on_current_stream()
        self._store.order(here, writes=True)
        self._store.gpu.write(places.lengths + counts, places.there, here.stream)
        places.is_told = True
        places.make_room(counts)
        places.lengths += counts
        places.measure()

    def attend(
        self,
        query: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        bias: ArrayLike | None = None,
        is_causal: bool = True,
        window_size: tuple[int | None, int | None] | None = None,
        lengths: ArrayLike | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        return_lse: bool = False,
        out: NDArray[Any] | None = None,
        backend: str | None = None,
    ) -> NDArray[Any] | AttentionOutput:
        """Attention of the last positions' queries over the cached keys and values.

        Parameters
        ----------
        query : array_like, shape (B, Hq, Sq, D)
            Query i of sequence b stands at position ``lengths[b] - Sq + i`` of the cache. In the cache's
            dtype; for "int8" and "int4" float32, float16 or bfloat16. A query before position 0, of a
            sequence shorter than Sq, sees nothing where attention is causal: output 0.
        mask, bias : array_like, optional
            As in `scaled_dot_product_attention`, broadcastable to (B, Hq, Sq, longest length), by position;
            for a ring too, whose lengths are those of the whole stream.
        is_causal : bool
            True unless given.
        lengths : int array_like (B,), optional
            How many of the Sq queries each sequence has, the first ones, after an append with the same
            `lengths`: query i then stands at position ``cache.lengths[b] - lengths[b] + i``. Rows beyond give
            output 0 and log-sum-exp -inf.
        window_size, scale, softcap, alibi_slopes, sinks
            As in `scaled_dot_product_attention`.
        return_lse : bool
            Also return the log-sum-exp ``(B, Hq, Sq)``.
        out : ndarray, optional
            Where to write the output: right shape and dtype, writable, no memory shared with an input.
        backend : {None, "cpu", "reference", "cuda"}
            The cache's own unless given.

        Returns
        -------
        ndarray or AttentionOutput
            The output ``(B, Hq, Sq, Dv)`` in the query's dtype, with `return_lse` in the named tuple
            ``(output, None, lse)``.

        Raises
        ------
        TypeError, ValueError
            As `scaled_dot_product_attention`; ValueError also where a ring no longer holds what a query sees.
            While a graph is captured, ValueError for `lengths`, arrays on the host, and what is no call of
            few queries on tensor cores, as the notes of `KVCache` have it.

        Notes
        -----
        There is no `score_mod` or `mask_mod`: give what they add or hide as `bias` and `mask`, ALiBi and a
        window by their own arguments.
        """
        options = (mask, bias, is_causal, window_size, scale, softcap, alibi_slopes, sinks)
        return self._store.attend(self._places, query, options, lengths, return_lse, out, backend)

    def truncate(self, lengths: ArrayLike) -> None:
        """Forget the positions from ``lengths[b]`` on, or from one length on in every sequence.

        A ring can go back only where it still holds the window before the next position: by at most
        ``capacity - window`` tokens once it is full, or to 0. ValueError, and nothing is forgotten, where it
        cannot, and for lengths that a sequence does not have.
        """
        places = self._places
        new = np.asarray(check.as_array(lengths, "lengths"))
        if new.ndim == 0:
            new = np.full(len(places.lengths), check.check_int(new[()], "lengths"))
        new = check.check_int_vector(new, "lengths", len(places.lengths))
        refuse((new < 0) | (new > places.lengths), new, "lengths", "expected 0 to {}", places.lengths)
        if self._window is not None:
            first = new - self._window + 1  # what the query at the next position sees
            lost = (new > 0) & (new < places.lengths) & (np.maximum(first, 0) < places.starts)
            refuse(lost, new, "lengths", "but the ring holds positions from {} on", places.starts)
        if places.is_told:
            self._take_back()
        if self._window is not None:
            places.starts[new == 0] = 0
            places.went_back = True
        places.lengths[:] = new
        places.measure()

    def reset(self, sequence: int | None = None) -> None:
        """Forget every position, or those of one sequence."""
        lengths = self._places.lengths.copy()
        if sequence is None:
            lengths[:] = 0
        else:
            b = check.check_int(sequence, "sequence")
            if not 0 <= b < len(lengths):
                msg = f"sequence is {b}; expected 0 to {len(lengths) - 1}"
                raise ValueError(msg)
            lengths[b] = 0
        self.truncate(lengths)

    @property
    def _nobody(self) -> NDArray[np.int64]:
        """Lengths with which launches of graphs write nothing and give NaN."""
        return np.full(self.batch, -1, np.int64)

    def _take_back(self) -> None:
        """Have launches be nobody's until `advance`, as the cache changes."""
        here = self._store.on_current_stream()
        self._store.order(here, writes=True)
        self._store.gpu.write(self._nobody, self._places.there, here.stream)
        self._places.is_told = False

    def _parts(self, sequences: None) -> tuple[Store, Places]:
        """What `cascade_attention` attends."""
        if sequences is not None:
            msg = "value must be None where key is a KVCache"
            raise ValueError(msg)
        return self._store, self._places

    def _check_room(self, counts: NDArray[np.int64]) -> None:
        lengths = self._places.lengths
        full = counts > self._capacity - lengths  # sums may overflow
        if full.any():
            b = int(np.flatnonzero(full)[0])
            msg = (
                f"sequence {b} holds {lengths[b]} of {self._capacity} positions; {counts[b]} more do not fit "
                f"(truncate or reset, or make the cache with a larger capacity or a window)"
            )
            raise ValueError(msg)
