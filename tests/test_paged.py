"""PagedKVCache: random walks of sequences that grow, fork, shrink and end beside plain arrays."""

import copy

import numpy as np
import pytest
from cached import STORAGES, Line, input_dtype, poison, snapshot
from oracle import assert_same_bits, normal

from nbattn import KVCache, PagedKVCache
from nbattn.cpu import arrays

storages = pytest.mark.parametrize("storage", STORAGES)
native = pytest.mark.skipif(not arrays.KNOWN, reason="keeps its arrays in another way")


def used_rows(cache):
    """Which rows of which pages some sequence sees, told from its tables."""
    used = np.zeros((len(cache._uses), cache._page_size), bool)
    for row in cache._rows.values():
        at = np.arange(cache._lengths[row])
        used[cache._table[row, at // cache._page_size], at % cache._page_size] = True
    return used


class Walk:
    """A cache and its model under random calls; memory that holds no position is NaN all the time."""

    def __init__(self, seed, storage, backend, *, rotary=None, alike=0.0):
        self.rng = rng = np.random.default_rng(seed)
        self.alike = alike  # how many of the calls are as a decoder's steps: those that are made natively
        self.storage, self.rotary, self.backend = storage, rotary, backend
        self.pages, self.page_size = int(rng.integers(15, 30)), int(rng.choice([1, 2, 4, 5]))
        self.kv_heads, self.group = int(rng.integers(1, 3)), int(rng.choice([1, 4]))
        self.dims = (32, 64) if storage == "int4" else (8, 20)
        self.cache = PagedKVCache(
            self.pages, self.page_size, self.kv_heads, self.dims[0], storage, value_dim=self.dims[1],
            backend=backend, **({} if rotary is None else {"rotary_base": rotary["base"]}),
        )  # fmt: skip
        self.lines = {}
        self.ended = []

    def some(self, least=0):
        """A few handles, in any order."""
        handles = list(self.rng.permutation(list(self.lines)))
        return [int(h) for h in handles[: self.rng.integers(least, len(handles) + 1)]]

    def new(self, n, heads, tokens, dim):
        return normal(self.rng, (n, heads, tokens, dim), input_dtype(self.storage))

    def add(self):
        handle = self.cache.add()
        assert handle not in self.lines
        assert handle not in self.ended
        self.lines[handle] = Line(self.kv_heads, *self.dims, self.storage, self.rotary)

    def fork(self):
        if self.lines:
            source = int(self.rng.choice(list(self.lines)))
            handle = self.cache.fork(source)
            assert handle not in self.lines
            assert handle not in self.ended
            self.lines[handle] = self.lines[source].copy()

    def free(self):
        if self.lines:
            handle = int(self.rng.choice(list(self.lines)))
            self.cache.free(handle)
            del self.lines[handle]
            self.ended.append(handle)

    def truncate(self):
        for handle in self.some()[:2]:
            length = int(self.rng.integers(0, len(self.lines[handle]) + 1))
            self.cache.truncate(handle, length)
            self.lines[handle].truncate(length)

    def reset(self):
        if self.rng.random() < 0.1:
            self.cache.reset()
            self.ended += self.lines
            self.lines = {}
            assert self.cache.free_pages == self.pages

    def append(self):
        handles = self.some()
        tokens = int(self.rng.choice([1, 1, 1, 0, 3, 9]))
        counts = self.rng.integers(0, tokens + 1, len(handles)) if self.rng.random() < 0.4 else None
        if self.rng.random() < self.alike:
            handles, tokens, counts = sorted(self.lines)[:2], 1, None
        key, value = (self.new(len(handles), self.kv_heads, tokens, dim) for dim in self.dims)
        before = snapshot(self.cache._store.pages), self.cache.free_pages
        each = [tokens] * len(handles) if counts is None else counts.tolist()
        if self.pages_for(handles, each) > self.cache.free_pages:
            with pytest.raises(ValueError, match="pages and"):
                self.cache.append(handles, key, value, counts)
            assert (snapshot(self.cache._store.pages), self.cache.free_pages) == before
            return
        self.cache.append(handles, key, value, counts)
        for i, handle in enumerate(handles):
            self.lines[handle].append(key[i, :, : each[i]], value[i, :, : each[i]])

    def pages_for(self, handles, counts):
        """How many new pages it takes, of which copies of begun pages that remain somebody else's."""
        needed, leaving = 0, {}
        for handle, n in zip(handles, counts, strict=True):
            length = len(self.lines[handle])
            needed += -(-(length + n) // self.page_size) - -(-length // self.page_size)
            if n and length % self.page_size:
                page = self.cache._table[self.cache._rows[handle], length // self.page_size]
                leaving[page] = leaving.get(page, 0) + 1
        return needed + sum(min(n, self.cache._uses[page] - 1) for page, n in leaving.items())

    def attend(self):
        rng, handles = self.rng, self.some()
        if rng.random() < self.alike:
            handles = sorted(self.lines)[:2]
            query = self.new(len(handles), self.kv_heads * self.group, 1, self.dims[0])
            output = self.cache.attend(handles, query)
            for i, handle in enumerate(handles):
                self.lines[handle].hold(output[i], None, query[i], ulp=40, backend=self.backend)
            return
        if handles and rng.random() < 0.2:
            handles.append(handles[0])
        queries, heads = int(rng.choice([1, 1, 2, 4])), self.kv_heads * self.group
        query = self.new(len(handles), heads, queries, self.dims[0])
        options = {"sinks": normal(rng, heads)} if rng.random() < 0.2 else {}
        if rng.random() < 0.2:
            options["window_size"] = (int(rng.integers(0, 9)), None)
        if rng.random() < 0.2:
            options["scale"] = float(rng.normal())
        if rng.random() < 0.2:
            options["is_causal"] = False
        longest, bias = max((len(self.lines[handle]) for handle in handles), default=0), None
        if rng.random() < 0.2:
            bias = normal(rng, (len(handles), int(rng.choice([1, heads])), queries, longest))
        result = self.cache.attend(handles, query, bias=bias, return_lse=True, **options)
        out = np.empty_like(result.output) if rng.random() < 0.5 else None
        again = self.cache.attend(handles, query, bias=bias, out=out, **options)
        assert out is None or again is out
        assert_same_bits(again, result.output)
        for i, handle in enumerate(handles):
            ulp = 4 if self.rotary is None else 40
            line, added = (
                self.lines[handle],
                None if bias is None else bias[i : i + 1, ..., : len(self.lines[handle])],
            )
            options_ = {"bias": added, "ulp": ulp, "backend": self.backend, **options}
            line.hold(result.output[i], result.lse[i], query[i], **options_)

    def go(self, steps):
        kinds = ["append"] * 8 + ["attend"] * 7 + ["fork", "fork", "truncate", "add", "add", "free", "reset"]
        for _ in range(steps):
            getattr(self, self.rng.choice(kinds))()
            used = used_rows(self.cache)
            poison(self.cache._store.pages, used)
            assert self.cache.lengths == {handle: len(line) for handle, line in self.lines.items()}
            assert self.cache.free_pages == self.pages - used.any(axis=1).sum()
            assert self.cache._holds == self.cache._uses.sum()


WALKS = [
    *({"storage": storage} for storage in STORAGES),
    {"storage": "float32", "rotary": {"base": 100.0}},
    *({"storage": storage, "alike": 0.8} for storage in ("float32", "int8")),
]


@pytest.mark.parametrize("options", WALKS, ids=repr)
def test_walk(backend, options):
    for seed in range(3):
        Walk(seed, backend=backend, **options).go(80)


@pytest.mark.slow
@pytest.mark.parametrize("options", WALKS, ids=repr)
def test_long_walk(backend, options):
    for seed in range(100, 103):
        Walk(seed, backend=backend, **options).go(1000)


def filled(backend, tokens, pages=20, page_size=4, storage="float32"):
    rng = np.random.default_rng(1)
    cache = PagedKVCache(pages, page_size, 2, 32, storage, backend=backend)
    sequence = cache.add()
    new = normal(rng, (1, 2, tokens, 32), input_dtype(storage))
    cache.append(sequence, new, new)
    return cache, sequence, new


class TestPages:
    def test_a_fork_takes_no_memory_until_it_grows(self, backend, rng):
        cache, first, prompt = filled(backend, 10)
        assert cache.free_pages == 17
        second, third = cache.fork(first), cache.fork(first)
        assert cache.free_pages == 17
        assert cache.lengths == {first: 10, second: 10, third: 10}
        query, token = normal(rng, (3, 4, 1, 32)), normal(rng, (3, 2, 1, 32))
        together = cache.attend([first, second, third], np.repeat(query[:1], 3, axis=0))
        assert_same_bits(together[1], together[0])
        cache.append([first, second, third], token, token)  # two copies of the last page, one is left
        assert cache.free_pages == 15
        got = cache.attend([third, first, second], query)
        for i, handle in enumerate((third, first, second)):
            line = Line(2, 32, 32, "float32")
            line.append(prompt[0], prompt[0]), line.append(token[handle], token[handle])
            line.hold(got[i], None, query[i])

    def test_full_pages_are_never_copied(self, backend, rng):
        cache, first, _ = filled(backend, 8)
        second = cache.fork(first)
        token = normal(rng, (1, 2, 1, 32))
        cache.append([second], token, token)
        assert cache.free_pages == 20 - 3

    def test_who_gets_no_token_copies_no_page(self, backend, rng):
        cache, first, _ = filled(backend, 10)
        sequences, token = [first, cache.fork(first), cache.fork(first)], normal(rng, (3, 2, 1, 32))
        cache.append(sequences, token, token, [0, 0, 1])
        assert cache.free_pages == 17 - 1

    def test_pages_return(self, backend):
        cache, first, _ = filled(backend, 10)
        second = cache.fork(first)
        cache.free(first)
        assert cache.free_pages == 17
        cache.truncate(second, 4)
        assert cache.free_pages == 19
        cache.truncate(second, 0)
        assert cache.free_pages == 20
        cache.free(second)
        assert cache.free_pages == 20
        assert cache.lengths == {}

    def test_a_sequence_gets_pages_in_their_order(self, backend):
        """In which memory is read fastest; after others have been there, too."""
        cache = PagedKVCache(9, 2, 2, 32, backend=backend)
        for _ in range(2):
            first, second = cache.add(), cache.add()
            for count in (3, 4, 1):
                cache.append(first, rows(1, count), rows(1, count))
            cache.append(second, rows(1, 10), rows(1, 10))
            for sequence, pages in ((first, range(4)), (second, range(4, 9))):
                assert cache._table[cache._row(sequence)][: len(pages)].tolist() == list(pages)
            cache.free(second)
            cache.free(first)

    def test_reserved(self, backend, rng):
        """Appends that were reserved take no page, forks none of what is empty."""
        cache, first, _ = filled(backend, 6)
        second, third = cache.fork(first), cache.add()
        cache.reserve([first, third], 9)  # and copies the page that is begun
        assert cache.free_pages == 20 - 2 - 3 - 3
        token, query = normal(rng, (3, 2, 9, 32)), normal(rng, (3, 4, 1, 32))
        for part in (slice(0, 2), slice(2, 9)):
            cache.append([first, third], token[:2, :, part], token[:2, :, part])
            assert cache.free_pages == 20 - 2 - 3 - 3
        cache.append(second, token[2:], token[2:])
        assert cache.free_pages == 20 - 2 - 3 - 3 - 2
        plain, start, _ = filled(backend, 6)
        plain.append(start, token[:1], token[:1])
        assert_same_bits(cache.attend(first, query[:1]), plain.attend(start, query[:1]))
        cache.reserve(second, 0)
        fourth = cache.add()
        cache.reserve(fourth, 40)
        assert cache.free_pages == 0
        for call in (lambda: cache.reserve(fourth, 41), lambda: cache.append(fourth, *[token[:1]] * 2, [-1])):
            with pytest.raises(ValueError, match=r"1 pages and 0 are free|lengths"):
                call()
        cache.truncate(fourth, 0)
        assert cache.free_pages == 10
        for count in (2**62, 2**63 - 1, 2**64):
            with pytest.raises(ValueError, match=rf"count is {count}, and all pages together hold 80 pos"):
                cache.reserve([first, fourth], count)
        assert cache.free_pages == 10
        with pytest.raises(ValueError, match='for graphs of a cache with backend="cuda"'):
            cache.advance(first)

    @storages
    def test_same_bits_as_a_contiguous_cache(self, backend, storage, rng):
        cache, sequence, prompt = filled(backend, 50, storage=storage)
        plain = KVCache(1, 2, 50, 32, storage, backend=backend)
        plain.append(prompt, prompt)
        for queries in (1, 3):
            query = normal(rng, (1, 4, queries, 32), input_dtype(storage))
            for _ in range(3):
                got = cache.attend([sequence], query, return_lse=True)
                expected = plain.attend(query, return_lse=True)
                np.testing.assert_allclose(
                    got.output.astype(float), expected.output.astype(float), rtol=1e-5, atol=1e-6
                )
                np.testing.assert_allclose(got.lse, expected.lse, rtol=1e-6)

    @native
    def test_native_appends(self, rng):
        """They take no pages, write into none that others hold, and see what others changed."""
        cache, line = PagedKVCache(6, 4, 2, 32), Line(2, 32, 32, "float32")
        sequence = cache.add()

        def step():
            token, query = normal(rng, (1, 2, 1, 32)), normal(rng, (1, 4, 1, 32))
            cache.append(sequence, token, token)
            line.append(token[0], token[0])
            line.hold(cache.attend(sequence, query)[0], None, query[0])

        for _ in range(6):
            step()
        assert cache._places((sequence,)).rewrite is not None
        fork, other = cache.fork(sequence), line.copy()
        for _ in range(3):
            step()
        query = normal(rng, (1, 4, 1, 32))
        other.hold(cache.attend(fork, query)[0], None, query[0])
        for length in (5, 2):  # into pages that the fork has
            cache.truncate(sequence, length), line.truncate(length)
            for _ in range(2):
                step()
            other.hold(cache.attend(fork, query)[0], None, query[0])
        cache.free(fork), cache.reserve(sequence, 1)
        for _ in range(20):
            step()
        with pytest.raises(ValueError, match="1 more positions need 1 pages and 0 are free"):
            step()
        assert (cache.lengths, cache.free_pages) == ({sequence: 24}, 0)

    @native
    def test_a_shared_prompt_costs_later_appends_nothing(self, rng, monkeypatch):
        """Once each has its own last page, no append looks for pages to copy."""
        cache, first, _ = filled(None, 10, page_size=8)
        sequences, token = [first, cache.fork(first)], normal(rng, (2, 2, 1, 32))
        looked, lacking = [], cache._lacking
        monkeypatch.setattr(cache, "_lacking", lambda *a: looked.append(a) or lacking(*a))
        seen = []
        for _ in range(14):
            cache.append(sequences, token, token)
            seen.append(len(looked))
        assert cache._has_shared
        assert seen[3:6] == [seen[2]] * 3
        assert seen[7:] == [seen[7]] * 7
        assert cache.free_pages == 20 - 1 - 2 * 2

    def test_groups_of_sequences_stay_apart(self, backend, rng):
        """Groups that were attended before see what was appended since, whoever appended."""
        cache, first, prompt = filled(backend, 5)
        second = cache.fork(first)
        lines = {handle: Line(2, 32, 32, "float32") for handle in (first, second)}
        for line in lines.values():
            line.append(prompt[0], prompt[0])
        for step in range(12):
            who = [first, second] if step % 3 == 0 else [second] if step % 3 == 1 else [second, first]
            token = normal(rng, (len(who), 2, 1, 32))
            cache.append(who, token, token)
            for i, handle in enumerate(who):
                lines[handle].append(token[i], token[i])
            for group in ([first], [second], [first, second], [second, first], (first, second)):
                query = normal(rng, (len(group), 4, 1, 32))
                for i, handle in enumerate(group):
                    lines[handle].hold(cache.attend(group, query)[i], None, query[i])

    def test_a_freed_sequence_is_gone_from_every_group(self, backend, rng):
        cache, first, _ = filled(backend, 9)
        second = cache.fork(first)
        token, query = normal(rng, (2, 2, 1, 32)), normal(rng, (2, 4, 1, 32))
        for _ in range(4):
            cache.append([first, second], token, token), cache.attend([first, second], query)
        cache.free(first)
        for call in (
            lambda: cache.attend([first, second], query),
            lambda: cache.append([first, second], token, token),
        ):
            with pytest.raises(ValueError, match=f"sequence {first} is not in the cache"):
                call()
        assert cache.lengths == {second: 13}

    def test_copies_are_caches_of_their_own(self, backend, rng):
        cache, sequence, _ = filled(backend, 9)
        token, query = normal(rng, (1, 2, 1, 32)), normal(rng, (1, 4, 1, 32))
        for _ in range(3):
            cache.append([sequence], token, token), cache.attend([sequence], query)
        expected = cache.attend([sequence], query)
        other = copy.deepcopy(cache)
        other.append([sequence], token + 1, token), other.free(sequence)
        assert_same_bits(cache.attend([sequence], query), expected)
        assert (other.free_pages, cache.lengths) == (20, {sequence: 12})

    def test_one_sequence_needs_no_list(self, backend, rng):
        cache, sequence, _ = filled(backend, 9)
        query = normal(rng, (1, 4, 1, 32))
        expected = cache.attend([sequence], query)
        for one in (sequence, np.int64(sequence), np.array([sequence]), (sequence,)):
            assert_same_bits(cache.attend(one, query), expected)
        cache.free(np.array(sequence))
        assert cache.lengths == {}

    def test_handles_are_never_given_twice(self):
        cache = PagedKVCache(4, 4, 1, 8, backend="reference")
        handles = []
        for _ in range(20):
            handles += [cache.add(), cache.add()]
            cache.free(handles[-1]), cache.free(handles[-2])
        assert len(set(handles)) == 40
        assert len(cache._lengths) < 8

    def test_groups_are_kept(self):
        """Twenty batches in turn keep their tables, and a sequence that ends takes only its own with it."""
        cache = PagedKVCache(40, 4, 1, 8, backend="reference")
        handles = [cache.add() for _ in range(20)]
        query = np.zeros((1, 1, 1, 8), np.float32)
        for handle in handles:
            cache.attend([handle], query)
        kept = dict(cache._groups)
        cache.free(handles[3])
        for handle in handles[:3] + handles[4:]:
            cache.attend([handle], query)
            assert cache._groups[(handle,)] is kept[(handle,)]
        assert (handles[3],) not in cache._groups

    def test_groups_are_bounded(self, monkeypatch):
        monkeypatch.setattr("nbattn.paged.GROUPS", 3)
        cache = PagedKVCache(40, 4, 1, 8, backend="reference")
        for handle in [cache.add() for _ in range(5)]:
            cache.attend([handle], np.zeros((1, 1, 1, 8), np.float32))
        assert list(cache._groups) == [(2,), (3,), (4,)]

    def test_what_it_says_of_itself(self):
        cache = PagedKVCache(10, 4, 2, 8, "int8")
        cache.add()
        assert repr(cache) == "PagedKVCache(1 sequences, 10 of 10 pages of 4 free, int8)"
        assert (cache.pages, cache.page_size, cache.dtype) == (10, 4, "int8")
        assert cache.nbytes == 10 * 4 * 2 * 2 * (8 + 4)


def rows(n=1, tokens=1, dim=32, heads=2, dtype=np.float32):
    return np.ones((n, heads, tokens, dim), dtype)


BAD = {
    "freed twice": (lambda c: (c.free(1), c.free(1)), ValueError, "sequence 1 is not in the cache"),
    "never added": (
        lambda c: c.free(7),
        ValueError,
        "sequence 7 is not in the cache: it never was, or is freed",
    ),
    "negative": (lambda c: c.free(-1), ValueError, "sequence -1 is not"),
    "no handle": (lambda c: c.free("a"), TypeError, "sequence must be an integer, got str"),
    "bool": (lambda c: c.attend([True], rows(heads=4)), TypeError, "sequence must be an integer, got bool"),
    "fork of nothing": (lambda c: c.fork(7), ValueError, "sequence 7 is not"),
    "truncate nothing": (lambda c: c.truncate(7, 0), ValueError, "sequence 7 is not"),
    "truncate to more": (
        lambda c: c.truncate(0, 11),
        ValueError,
        "length is 11; expected 0 to 10, what sequence 0 has",
    ),
    "truncate to less": (lambda c: c.truncate(0, -1), ValueError, "length is -1"),
    "append to nothing": (lambda c: c.append([0, 7], rows(2), rows(2)), ValueError, "sequence 7 is not"),
    "append twice": (
        lambda c: c.append([0, 0], rows(2), rows(2)),
        ValueError,
        r"sequences are \[0, 0\]; an append can",
    ),
    "other count": (
        lambda c: c.append([0, 1], rows(1), rows(1)),
        ValueError,
        r"key has shape .*expected \(2, 2, new",
    ),
    "out of pages": (
        lambda c: c.append([0, 1], rows(2, 40), rows(2, 40)),
        ValueError,
        "80 more positions need 21 pages and 16 are free",
    ),
    "out of pages for a copy": (
        lambda c: (c.append(c.add(), rows(1, 64), rows(1, 64)), c.append([0], rows(), rows())),
        ValueError,
        "1 more positions need 1 pages and 0 are free",
    ),
    "dtype": (lambda c: c.append([0], rows(dtype=np.float64), rows()), TypeError, "key has dtype float64"),
    "attend nothing": (lambda c: c.attend([7], rows(heads=4)), ValueError, "sequence 7 is not"),
    "attend others": (
        lambda c: c.attend([0], rows(2, heads=4)),
        ValueError,
        "query has batch size 2; expected 1",
    ),
    "lengths": (lambda c: c.attend([0], rows(heads=4), lengths=[2]), ValueError, r"lengths\[0\] is 2"),
    "nested": (lambda c: c.attend([[0]], rows(heads=4)), TypeError, "sequence must be an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(backend, case):
    call, kind, message = BAD[case]
    cache, first, _ = filled(backend, 10)
    second = cache.fork(first)
    cache.append([second], rows(), rows())
    cache.fork(first)
    query = np.ones((2, 4, 1, 32), np.float32)
    expected = cache.attend([first, second], query)
    with pytest.raises(kind, match=message):
        call(cache)
    if "freed" not in case:
        assert_same_bits(cache.attend([first, second], query), expected)
        assert (cache.lengths[first], cache.lengths[second]) == (10, 11)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"pages": 0}, ValueError, "pages is 0; expected at least 1"),
        ({"page_size": 0}, ValueError, "page_size is 0"),
        ({"page_size": 2.0}, TypeError, "page_size must be an integer"),
        ({"dtype": "int4", "head_dim": 8}, ValueError, "head_dim is 8; an int4"),
    ],
)
def test_bad_caches(changed, kind, message):
    with pytest.raises(kind, match=message):
        PagedKVCache(
            **{"pages": 4, "page_size": 4, "kv_heads": 1, "head_dim": 32, "backend": "reference", **changed}
        )
