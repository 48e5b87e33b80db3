"""Block masks: builders against dense formulas, what combines them, and attention through them."""

import pickle
import re

import numba
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import finfo
from oracle import DTYPES, assert_same_bits, check, hold, inputs, normal

import nbattn
from nbattn import BlockMask, masks, scaled_dot_product_attention, varlen_attention

LENGTHS = [(1, 1), (64, 64), (63, 65), (65, 63), (130, 200), (200, 130), (257, 64), (3, 300), (256, 384)]
lengths = pytest.mark.parametrize(("queries", "keys"), LENGTHS)


def grid(queries, keys):
    return np.arange(queries)[:, None], np.arange(keys)


def assert_sees(mask, seen):
    """The mask is the dense one, and in the form that `from_dense` gives it."""
    seen = np.asarray(seen)
    seen = seen.reshape((1,) * (4 - seen.ndim) + seen.shape)
    assert mask.shape == seen.shape
    np.testing.assert_array_equal(mask.to_dense(), seen)
    again = BlockMask.from_dense(seen)
    assert again == mask
    assert len(again.words) == len(mask.words)
    assert again.nbytes == mask.nbytes
    assert not mask.table.flags.writeable
    assert not mask.words.flags.writeable
    for b, h, i, j in np.ndindex(*mask.table.shape):
        block = seen[b, h, 64 * i : 64 * (i + 1), 64 * j : 64 * (j + 1)]
        assert min(mask.table[b, h, i, j], 2) == (0 if not block.any() else 1 if block.all() else 2)


def random_mask(rng, shape):
    """Blocks of every kind, some of them the same."""
    batch, heads, queries, keys = shape
    kinds = rng.choice([0.0, 0.5, 1.0], (batch, heads, -(-queries // 64), -(-keys // 64)))
    share = kinds.repeat(64, axis=2).repeat(64, axis=3)[:, :, :queries, :keys]
    i, j = np.indices((queries, keys)) % 64
    return np.where(rng.random(share.shape[:2])[..., None, None] < 0.5, (i * 7 + j * 3) % 10 / 10 < share,
                    rng.random(share.shape) < share)  # fmt: skip


class TestBuilders:
    @lengths
    @pytest.mark.parametrize("offset", [0, 5, -70, 64, 1000, -1000])
    def test_causal(self, queries, keys, offset):
        i, j = grid(queries, keys)
        assert_sees(masks.causal(queries, keys, offset), j <= i + offset)

    @lengths
    @pytest.mark.parametrize(
        "window", [(0, 0), (3, None), (None, 2), (-1, -1), (70, 1), (64, 128), (2**62, 0)]
    )
    def test_sliding_window(self, queries, keys, window):
        i, j = grid(queries, keys)
        left, right = (10**6 if side in (None, -1) else side for side in window)
        for offset in (0, 11, -64):
            mask = masks.sliding_window(queries, keys, left=window[0], right=window[1], offset=offset)
            assert_sees(mask, (j >= i + offset - left) & (j <= i + offset + right))

    @lengths
    @pytest.mark.parametrize("dilation", [1, 2, 7, 64, 100])
    def test_dilated_window(self, queries, keys, dilation):
        seen = np.zeros((queries, keys), bool)
        for i in range(queries):
            for n in range(-3, 3):
                if 0 <= (j := i + 9 + n * dilation) < keys:
                    seen[i, j] = True
        assert_sees(masks.dilated_window(queries, keys, left=3, right=2, dilation=dilation, offset=9), seen)
        i, j = grid(queries, keys)
        mask = masks.dilated_window(queries, keys, left=None, right=0, dilation=dilation)
        assert_sees(mask, (j <= i) & ((j - i) % dilation == 0))

    @pytest.mark.parametrize("length", [1, 64, 130, 193])
    def test_prefix_lm(self, length):
        i, j = grid(length, length)
        prefixes = np.array([0, 1, length // 2, length])
        seen = (j <= i) | (j < prefixes[:, None, None, None])
        assert_sees(masks.prefix_lm(length, prefixes), seen)
        assert_sees(masks.prefix_lm(length, length // 2), seen[2:3])

    @pytest.mark.parametrize("length", [1, 64, 130, 320])
    def test_document(self, length, rng):
        runs = np.sort(rng.integers(0, 4, (3, length)), axis=1)
        for ids in (runs, rng.permuted(runs, axis=1) - 10**15, runs[:1]):
            assert_sees(masks.document(ids), (ids[:, :, None] == ids[:, None, :])[:, None])
        assert_sees(masks.document(runs[0]), runs[0][:, None] == runs[0])

    @lengths
    def test_document_of_other_keys(self, queries, keys, rng):
        q, k = rng.integers(0, 9, (2, queries)), np.sort(rng.integers(3, 12, (2, keys)), axis=1)
        assert_sees(masks.document(q, k), (q[:, :, None] == k[:, None, :])[:, None])
        assert_sees(masks.document(q[0], k), (q[:1, :, None] == k[:, None, :])[:, None])
        assert_sees(masks.document(np.sort(q), k[0]), (np.sort(q)[:, :, None] == k[:1, None, :])[:, None])

    @pytest.mark.parametrize("length", [10, 64, 200])
    @pytest.mark.parametrize("dilation", [1, 5])
    def test_longformer(self, length, dilation):
        i, j = grid(length, length)
        for tokens in ([], [0], [3, length - 1, 7], np.arange(length)):
            mask = masks.longformer(length, left=4, right=6, global_tokens=tokens, dilation=dilation)
            local = (j - i >= -4 * dilation) & (j - i <= 6 * dilation) & ((j - i) % dilation == 0)
            assert_sees(mask, local | np.isin(i, tokens) | np.isin(j, tokens))

    @pytest.mark.parametrize("size", [1, 10, 64, 100, 128])
    @pytest.mark.parametrize("few", [0, 1, 2, 50])
    def test_big_bird(self, size, few):
        for length in (7 * size, 7 * size - size // 2):
            options = {"block_size": size, "global_blocks": 1, "random_blocks": few, "heads": 3}
            mask = masks.big_bird(length, **options, rng=5)
            assert mask == masks.big_bird(length, **options, rng=np.random.default_rng(5))
            dense = mask.to_dense()[0]
            assert_sees(mask, dense)
            coarse = dense[:, ::size, ::size]
            np.testing.assert_array_equal(
                coarse.repeat(size, axis=1).repeat(size, axis=2)[:, :length, :length], dense
            )
            i, j = grid(7, 7)
            always = (abs(i - j) <= 1) | (i == 0) | (j == 0)
            assert coarse[:, always].all()
            expected = np.minimum(always.sum(1) + few, 7)
            np.testing.assert_array_equal(coarse.sum(2), np.broadcast_to(expected, (3, 7)))
            if few == 1:
                assert (coarse[0] != coarse[1]).any()
                assert mask != masks.big_bird(length, **options, rng=6)

    @staticmethod
    def near(length, size, dilation):
        """One axis, token by token as NATTEN's reference does it."""
        seen = np.zeros((length, length), bool)
        for i in range(length):
            group = list(range(i % dilation, length, dilation))
            start = min(max(group.index(i) - size // 2, 0), len(group) - size)
            seen[i, group[start : start + size]] = True
        return seen

    @pytest.mark.parametrize(("length", "size", "dilation"), [
        (1, 1, 1), (7, 3, 1), (64, 64, 1), (200, 5, 1), (200, 70, 1), (200, 8, 1), (200, 7, 9), (131, 2, 65),
    ])  # fmt: skip
    def test_neighborhood_of_a_line(self, length, size, dilation):
        seen = self.near(length, size, dilation)
        assert (seen.sum(1) == size).all()
        assert_sees(masks.neighborhood(length, size, dilation), seen)

    @pytest.mark.parametrize(("shape", "size", "dilation"), [
        ((1, 1), 1, 1), ((5, 9), 3, 1), ((12, 11), (5, 3), 1), ((3, 70), (3, 7), (1, 2)),
        ((70, 3), (7, 3), (2, 1)), ((16, 8), 4, 2), ((4, 5, 6), 3, 1), ((6, 4, 5), (3, 2, 4), (2, 2, 1)),
    ])  # fmt: skip
    def test_neighborhood_of_more_axes(self, shape, size, dilation):
        sizes, dilations = np.broadcast_to(size, len(shape)), np.broadcast_to(dilation, len(shape))
        seen = np.ones((1, 1), bool)
        for n, k, d in zip(shape, sizes, dilations, strict=True):
            seen = np.kron(seen, self.near(n, int(k), int(d)))
        assert (seen.sum(1) == np.prod(sizes)).all()
        assert_sees(masks.neighborhood(shape, size, dilation), seen)

    def test_nothing_to_mask(self):
        for mask in (
            masks.causal(0), masks.causal(5, 0), masks.causal(0, 70), masks.prefix_lm(0, 0),
            masks.big_bird(0),
            masks.prefix_lm(5, np.empty(0, int)), masks.document([]), masks.document(np.empty((0, 5), int)),
            masks.document([], [1, 2]), masks.document([1, 2], []), masks.big_bird(5, heads=0),
            masks.longformer(0, left=1, right=1, global_tokens=[]),
        ):  # fmt: skip
            dense = mask.to_dense()
            assert dense.shape == mask.shape
            assert dense.size == 0
            assert mask & mask == mask == mask | mask
            assert mask.sparsity == 0
            assert "BlockMask" in repr(~mask)

    def test_long_ones_are_small(self):
        n = 1 << 16
        ids = np.repeat(np.arange(64), 1000)
        for mask in (
            masks.causal(n),
            masks.sliding_window(n, left=256, right=0),
            masks.neighborhood((256, 256), 7),
        ):
            assert mask.table.shape == (1, 1, 1024, 1024)
            assert len(mask.words) <= 8
        assert (masks.causal(len(ids)) & masks.document(ids)).sparsity > 0.98


class TestForms:
    @lengths
    def test_dense(self, queries, keys, rng):
        for batch, heads in ((1, 1), (2, 3)):
            seen = random_mask(rng, (batch, heads, queries, keys))
            assert_sees(BlockMask.from_dense(seen), seen)
            assert_sees(BlockMask.from_dense(seen[0]), seen[:1])
            assert_sees(BlockMask.from_dense(seen[0, 0].astype(np.int16) * 256), seen[:1, :1])
            assert_sees(BlockMask.from_dense(np.swapaxes(seen, 2, 3)), np.swapaxes(seen, 2, 3))
            mask = BlockMask.from_dense(seen)
            np.testing.assert_array_equal(np.asarray(mask), seen)
            copy = pickle.loads(pickle.dumps(mask))
            assert copy == mask
            assert not copy.table.flags.writeable

    def test_own_arrays(self, rng):
        mask = BlockMask.from_dense(random_mask(rng, (1, 2, 70, 200)))
        table, words = mask.table.copy(), np.asfortranarray(mask.words)
        own = BlockMask(table, words, 70, 200)
        assert own == mask
        table[...], words[...] = 99, 0
        assert own == mask

    def test_equal_blocks_lie_once(self, rng):
        block = rng.random((64, 64)) < 0.5
        mask = BlockMask.from_dense(np.tile(block, (3, 4)))
        assert mask.words.shape == (1, 64)
        assert mask.words[0, 5] == sum(1 << int(r) for r in np.flatnonzero(block[:, 5]))

    @lengths
    @pytest.mark.parametrize("form", ["bsr", "csr", "csc", "coo", "lil", "dok"])
    def test_sparse(self, queries, keys, form, rng):
        seen = random_mask(rng, (1, 1, queries, keys))[0, 0]
        numbers = np.where(seen, rng.choice([-1.5, 2.0], seen.shape), 0)
        for matrix in (scipy.sparse.csr_array(numbers), scipy.sparse.csr_matrix(numbers)):
            assert_sees(BlockMask.from_sparse(matrix.asformat(form)), seen)

    @pytest.mark.parametrize("size", [(1, 1), (2, 5), (64, 64), (32, 128), (200, 3)])
    def test_sparse_blocks_of_any_size(self, size, rng):
        blocks = rng.random((3, 4)) < 0.5
        seen = blocks.repeat(size[0], axis=0).repeat(size[1], axis=1)
        seen[0, 0] = False
        matrix = scipy.sparse.bsr_array(seen, blocksize=size)
        matrix.data[:, -1, -1] = False
        assert_sees(BlockMask.from_sparse(matrix), matrix.toarray())

    def test_sparse_entries_that_add_up(self):
        # Entries of one place add up, to 0 too; one of 0 is none.
        entries = ([1, -1, 2, 3, 0], ([0, 0, 1, 1, 2], [0, 0, 1, 1, 2]))
        for form in ("coo", "csr"):
            matrix = scipy.sparse.coo_array(entries, shape=(3, 3)).asformat(form)
            before = matrix.copy()
            assert_sees(BlockMask.from_sparse(matrix), np.diag([False, True, False]))
            assert matrix.nnz == before.nnz
        shared = scipy.sparse.csr_array(([1, -1, 5], [0, 0, 1], [0, 3, 3]), shape=(2, 2))
        assert_sees(BlockMask.from_sparse(shared), [[False, True], [False, False]])
        assert shared.nnz == 3

    def test_mask_mod(self, backend, rng):
        table = rng.random((2, 130)) < 0.5

        def mask_mod(batch, head, q_index, kv_index, table, far):
            if q_index >= 128 and kv_index >= 64:
                return True
            return table[batch, kv_index] and kv_index <= q_index + far * head

        mask = BlockMask.from_mask_mod(
            mask_mod, 200, 130, batch=2, heads=3, mod_args=(table, 40), backend=backend
        )
        i, j = grid(200, 130)
        seen = [
            [(table[b] & (j <= i + 40 * h)) | ((i >= 128) & (j >= 64)) for h in range(3)] for b in range(2)
        ]
        assert_sees(mask, seen)
        for size in ((0, 5), (5, 0), (0, 0)):
            mask = BlockMask.from_mask_mod(mask_mod, *size, mod_args=(table, 40), backend=backend)
            assert mask.shape == (1, 1, *size)
        empty = BlockMask.from_mask_mod(mask_mod, 5, 5, batch=0, mod_args=(table, 40), backend=backend)
        assert empty.shape == (0, 1, 5, 5)

    def test_mask_mod_as_attention_takes_it(self, rng):
        q, k, v = inputs(rng, 1, 2, 1, 200, 330, 8)

        def mask_mod(batch, head, q_index, kv_index):
            return (q_index * 5 + kv_index * 3) % 7 < 3 + head

        mask = BlockMask.from_mask_mod(mask_mod, 200, 330, heads=2)
        by_blocks = scaled_dot_product_attention(q, k, v, mask)
        np.testing.assert_allclose(
            by_blocks, scaled_dot_product_attention(q, k, v, mask_mod=mask_mod), rtol=1e-5, atol=1e-6
        )
        # The block mask and the function combine by and.
        both = mask & masks.causal(200, 330, offset=130)
        got = scaled_dot_product_attention(q, k, v, masks.causal(200, 330, offset=130), mask_mod=mask_mod)
        np.testing.assert_allclose(got, scaled_dot_product_attention(q, k, v, both), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("mask_mod", [lambda b, h, q: True, None, 3])
    def test_bad_mask_mod(self, backend, mask_mod):
        with pytest.raises(TypeError, match="mask_mod"):
            BlockMask.from_mask_mod(mask_mod, 70, 70, backend=backend)
        with pytest.raises(TypeError, match="mod_args must be a tuple, got int"):
            BlockMask.from_mask_mod(mask_mod, 70, 70, mod_args=3, backend=backend)

    def test_repr(self):
        assert repr(masks.causal(200, 130)) == (
            "BlockMask 1 x 1 x 200 x 130, 25.0 % of its 64 x 64 blocks are skipped:\n▒··\n■▒·\n■■▒\n■■■"
        )
        many = repr(
            masks.document(np.zeros((3, 10_000), int)) & masks.sliding_window(10_000, left=0, right=0)
        )
        first, *lines = many.split("\n")
        assert "3 x 1 x 10000 x 10000" in first
        assert "batch 0, head 0" in first
        assert len(lines) <= 20
        assert {len(line) for line in lines} == {len(lines)}
        assert lines[0] == "▒" + "·" * (len(lines) - 1)


class TestLogic:
    @given(
        st.sampled_from([n for n in LENGTHS if max(n) < 300]),
        st.integers(0, 2**32),
        st.integers(0, 3),
        st.integers(0, 3),
    )
    def test_against_dense_logic(self, shape, seed, left, right):
        rng = np.random.default_rng(seed)
        batch, heads = 2, 2
        a, b = (
            random_mask(rng, (1 if bits & 1 else batch, 1 if bits & 2 else heads, *shape))
            for bits in (left, right)
        )  # fmt: skip
        x, y = BlockMask.from_dense(a), BlockMask.from_dense(b)
        assert_sees(x & y, a & b)
        assert_sees(x | y, a | b)
        assert_sees(~x, ~a)
        assert (x == y) == (a.shape == b.shape and bool((a == b).all()))
        assert ~(x & y) == ~x | ~y
        assert x & ~x == x & BlockMask.from_dense(np.zeros_like(a))
        assert (x & y) | x == x | (x & y)

    def test_same_words_in_whole_and_cut_blocks(self):
        # Blocks at the ends have 36 queries or keys: what is everything there is not elsewhere.
        for axis in range(2):
            place = np.indices((100, 100))[axis]
            even, odd = (place % 64 < 36) & (place % 2 == 0), (place % 64 < 36) & (place % 2 == 1)
            x, y = BlockMask.from_dense(even), BlockMask.from_dense(odd)
            assert len(x.words) == len(y.words)
            assert_sees(x | y, even | odd)
            assert_sees(~x, ~even)
            assert_sees(~x & ~y, ~even & ~odd)

    def test_what_does_not_combine(self):
        mask = masks.causal(70)
        with pytest.raises(ValueError, match=r"\(70, 70\) and \(70, 71\)"):
            mask & masks.causal(70, 71)
        with pytest.raises(ValueError, match=r"\(2, 1\) and \(3, 1\) do not broadcast"):
            masks.document(np.zeros((2, 5), int)) | masks.document(np.zeros((3, 5), int))
        for operate in (lambda x: mask & x, lambda x: x & mask, lambda x: mask | x, lambda x: x | mask):
            for other in (np.ones((70, 70), bool), True, None):
                with pytest.raises(TypeError):
                    operate(other)
        assert mask != "mask"
        with pytest.raises(TypeError, match="unhashable"):
            hash(mask)


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def check_mask(backend, query, key, value, mask, **options):
    """Hold attention with a block mask to the rule, in all its forms."""
    check(backend, query, key, value, mask.to_dense(), given=mask, **options)


class TestAttention:
    @pytest.mark.isa
    @dtypes
    def test_blocks_of_every_kind(self, backend, dtype, rng):
        q, k, v = inputs(rng, 1, 2, 1, 140, 330, 8, dtype=dtype)
        mask = BlockMask.from_dense(random_mask(rng, (1, 2, 140, 330)))
        check_mask(backend, q, k, v, mask)
        check_mask(backend, q, k, v, mask, window_size=(170, 9), query_offset=120, key_lengths=[261])

    def test_with_other_options(self, backend, rng):
        q, k, v = inputs(rng, 2, 4, 2, 140, 200, 8)
        for shape in ((1, 1), (2, 1), (1, 4), (2, 4)):
            mask = BlockMask.from_dense(random_mask(rng, (*shape, 140, 200)))
            check_mask(backend, q, k, v, mask, query_offset=[20, -90], is_causal=True)
        bias = np.where(rng.random((4, 140, 200)) < 0.5, -np.inf, 1.0)
        check_mask(backend, q, k, v, mask, is_causal=True, query_offset="end", bias=bias, sinks=np.ones(4))
        check_mask(backend, q, k, v, mask, softcap=2.0, alibi_slopes=rng.random(4), key_lengths=[0, 97])

    @lengths
    def test_lengths(self, backend, queries, keys, rng):
        for dtype in (np.float32, np.float64):
            q, k, v = inputs(rng, 2, 6, 2, queries, keys, 5, 9, dtype=dtype)
            check_mask(backend, q, k, v, BlockMask.from_dense(random_mask(rng, (2, 6, queries, keys))))

    @pytest.mark.isa
    def test_empty_rows_and_runs(self, backend, rng):
        # Blocks far apart, with queries in each block of them that see nothing.
        q, k, v = inputs(rng, 1, 2, 1, 150, 1000, 8)
        far = BlockMask.from_dense(
            np.isin(np.arange(1000), [0, 5, 640, 999]) & (np.arange(150)[:, None] % 3 == 1)
        )
        check_mask(backend, q, k, v, far)
        check_mask(backend, q, k, v, far, is_causal=True, query_offset=600)
        nothing = far & ~far
        assert nothing.sparsity == 1
        for options in ({}, {"window_size": (9, 9)}, {"key_lengths": [130]}):
            check_mask(backend, q, k, v, nothing, **options)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_bits_of_whole_blocks(self, dtype, rng):
        # Where everything is seen, steps are those of a call without mask.
        q, k, v = inputs(rng, 1, 2, 2, 200, 330, 16, dtype=dtype)
        whole = masks.sliding_window(200, 330, left=None, right=None)
        assert whole.nbytes < 100
        for options in ({}, {"is_causal": True, "query_offset": 40}, {"key_lengths": [201]}):
            expected = scaled_dot_product_attention(q, k, v, **options)
            assert_same_bits(scaled_dot_product_attention(q, k, v, whole, **options), expected)
        causal = scaled_dot_product_attention(q, k, v, masks.causal(200, 330), is_causal=True)
        np.testing.assert_allclose(
            causal, scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.isa
    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    @dtypes
    def test_masked_never_reaches(self, backend, dtype, poison, rng):
        seen = random_mask(rng, (1, 2, 150, 260))
        seen[:, :, 100] = seen[:, :, :, 30] = False
        seen[:, 0, 3, 200] = True
        mask = BlockMask.from_dense(seen)
        clean = inputs(rng, 1, 2, 1, 150, 260, 9, dtype=dtype)
        broken = [x.copy() for x in clean]
        for j in (30, 200):
            broken[1][:, :, j] = broken[2][:, :, j] = poison
        expected, got = (scaled_dot_product_attention(*x, mask, backend=backend) for x in (clean, broken))
        spared = ~seen[..., 200]
        assert 0.2 < spared.mean() < 1
        spared = np.broadcast_to(spared, (1, 2, 150))
        assert np.isfinite(got[spared].astype(np.float32)).all()
        np.testing.assert_allclose(
            got[spared].astype(np.float64), expected[spared].astype(np.float64),
            atol=8 * float(finfo(dtype).eps),
        )  # fmt: skip
        if np.isnan(poison):
            assert np.isnan(got[~spared].astype(np.float32)).all()
        check_mask(backend, broken[0], clean[1], np.where(np.isnan(broken[2]), broken[2], clean[2]), mask)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_packed(self, backend, dtype, rng):
        counts = [(70, 100), (0, 5), (130, 40), (1, 260), (3, 0)]
        starts_q, starts_k = (np.concatenate(([0], np.cumsum(x))) for x in zip(*counts, strict=True))
        q = normal(rng, (starts_q[-1], 4, 7), dtype)
        k, v = normal(rng, (starts_k[-1], 2, 7), dtype), normal(rng, (starts_k[-1], 2, 6), dtype)
        for shape in ((5, 1), (1, 4), (5, 4)):
            seen = random_mask(rng, (*shape, 130, 260))
            got = varlen_attention(
                q, k, v, starts_q, starts_k, BlockMask.from_dense(seen), return_lse=True, backend=backend,
                query_offset="end", window_size=(90, None),
            )  # fmt: skip
            for b, (n, m) in enumerate(counts):
                rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
                alone = (x.swapaxes(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
                hold(
                    got.output[rows].swapaxes(0, 1)[None], got.lse[rows].T[None], *alone,
                    np.broadcast_to(seen, (5, *seen.shape[1:]))[b, None, :, :n, :m],
                    query_offset="end", window_size=(90, None),
                )  # fmt: skip

    def test_fewer_dimensions_and_nothing(self, backend, rng):
        q, k, v = inputs(rng, 1, 1, 1, 70, 90, 8)
        mask = masks.causal(70, 90)
        expected = scaled_dot_product_attention(q, k, v, mask.to_dense(), backend=backend)
        for drop in ((0,), (0, 0)):
            got = scaled_dot_product_attention(q[drop], k[drop], v[drop], mask, backend=backend)
            np.testing.assert_allclose(got, expected[drop], rtol=1e-5, atol=1e-6)
        for batch, queries, keys in ((0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 0, 0)):
            q, k, v = inputs(rng, batch, 1, 1, queries, keys, 8)
            got = scaled_dot_product_attention(q, k, v, masks.causal(queries, keys), backend=backend)
            assert not got.any()

    def test_threads_and_batch(self, rng):
        q, k, v = inputs(rng, 3, 4, 2, 300, 500, 16)
        mask = BlockMask.from_dense(random_mask(rng, (3, 4, 300, 500)))
        expected = scaled_dot_product_attention(q, k, v, mask)
        threads = numba.get_num_threads()
        for n in range(1, threads + 1):
            numba.set_num_threads(n)
            try:
                assert_same_bits(scaled_dot_product_attention(q, k, v, mask), expected)
            finally:
                numba.set_num_threads(threads)
        for b in range(3):
            alone = BlockMask(mask.table[b : b + 1], mask.words, 300, 500)
            assert_same_bits(scaled_dot_product_attention(q[b], k[b], v[b], alone), expected[b])

    @pytest.mark.parametrize("side", ["start", "end"])
    def test_reads_nothing_beyond(self, guarded, side, rng):
        q, k, v = (guarded(x, side) for x in inputs(rng, 1, 2, 1, 130, 200, 8))
        seen = random_mask(rng, (1, 2, 130, 200))
        seen[:, :, 128:, 64:] = False  # the search for the next block comes to the table's end
        mask = BlockMask.from_dense(seen)
        arrays = [guarded(x, side) for x in (mask.table, mask.words)]
        for array in arrays:
            array.setflags(write=False)  # else it would be copied
        close = BlockMask(*arrays, 130, 200)
        assert close.words is arrays[1]
        for options in ({}, {"key_lengths": [129]}, {"window_size": (70, 3), "query_offset": 130}):
            expected = scaled_dot_product_attention(q, k, v, mask, **options)
            assert_same_bits(scaled_dot_product_attention(q, k, v, close, **options), expected)

    @pytest.mark.parametrize(
        "shape", [(1, 1, 70, 91), (1, 1, 71, 90), (1, 1, 1, 90), (3, 1, 70, 90), (1, 2, 70, 90)]
    )
    def test_other_shapes(self, backend, shape, rng):
        q, k, v = inputs(rng, 2, 4, 2, 70, 90, 8)
        mask = BlockMask.from_dense(np.ones(shape, bool))
        message = re.escape(f"mask has shape {shape}") + r".*\(batch or 1, heads or 1.* of \(2, 4, 70, 90\)"
        with pytest.raises(ValueError, match=message):
            scaled_dot_product_attention(q, k, v, mask, backend=backend)
        packed = (x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], 8) for x in (q, k, v))
        with pytest.raises(ValueError, match=message):
            varlen_attention(*packed, [0, 70, 140], [0, 90, 180], mask, backend=backend)

    def test_doors_that_know_no_blocks(self, rng):
        cache = nbattn.KVCache(batch=1, kv_heads=1, capacity=90, head_dim=8)
        _, k, v = inputs(rng, 1, 1, 1, 1, 90, 8)
        cache.append(k, v)
        q = normal(rng, (1, 2, 70, 8))
        mask = masks.causal(70, 90, offset=20)
        assert_same_bits(
            cache.attend(q, mask, is_causal=False), cache.attend(q, mask.to_dense(), is_causal=False)
        )


BAD = {
    "float mask": (lambda: BlockMask.from_dense(np.zeros((3, 3))), TypeError, "mask has dtype float64"),
    "1 dimension": (lambda: BlockMask.from_dense([True]), ValueError, r"mask has shape \(1,\)"),
    "5 dimensions": (lambda: BlockMask.from_dense(np.ones((1,) * 5, bool)), ValueError, "mask has shape"),
    "no sparse matrix": (lambda: BlockMask.from_sparse(np.eye(3)), TypeError, "scipy.sparse.* got ndarray"),
    "sparse vector": (
        lambda: BlockMask.from_sparse(scipy.sparse.coo_array(np.ones(3))), TypeError, "2 dimensions"
    ),
    "table dtype": (
        lambda: BlockMask(np.zeros((1, 1, 1, 1)), np.zeros((0, 64), np.uint64), 1, 1), TypeError,
        "table is a ndarray of float64; expected an ndarray of int32",
    ),
    "table shape": (
        lambda: BlockMask(np.zeros((1, 1, 1, 1), np.int32), np.zeros((0, 64), np.uint64), 65, 1), ValueError,
        r"table has shape \(1, 1, 1, 1\); expected \(B, H, 2, 1\) for 65 x 1",
    ),
    "words shape": (
        lambda: BlockMask(np.zeros((1, 1, 1, 1), np.int32), np.zeros((1, 63), np.uint64), 1, 1), ValueError,
        r"words has shape \(1, 63\)",
    ),
    "words that are not there": (
        lambda: BlockMask(np.full((1, 1, 1, 1), 3, np.int32), np.zeros((1, 64), np.uint64), 1, 1), ValueError,
        "table holds 3 to 3; expected 0 to 2",
    ),
    "negative table": (
        lambda: BlockMask(np.full((1, 1, 1, 1), -1, np.int32), np.zeros((1, 64), np.uint64), 1, 1),
        ValueError, "table holds -1",
    ),
    "length": (lambda: masks.causal(-1), ValueError, "query_length must be at least 0, got -1"),
    "length kind": (lambda: masks.causal(3.0), TypeError, "query_length must be an integer, got float"),
    "offset": (lambda: masks.causal(3, offset=True), TypeError, "offset must be an integer, got bool"),
    "side": (lambda: masks.sliding_window(3, left=-2, right=0), ValueError,
        "left must be at least 0, got -2"),
    "dilation": (
        lambda: masks.dilated_window(3, left=1, right=0, dilation=0), ValueError,
        "dilation must be at least 1"
    ),
    "prefix": (lambda: masks.prefix_lm(3, [1, 4]), ValueError, r"each 0 to 3, got \[1 4\]"),
    "prefix kind": (lambda: masks.prefix_lm(3, 1.0), TypeError, "prefix_lengths must hold integers"),
    "ids": (lambda: masks.document(np.zeros(3)), TypeError,
        "query_ids must hold integers, got dtype float64"),
    "id shapes": (
        lambda: masks.document(np.zeros((2, 3), int), np.zeros((3, 3), int)), ValueError,
        r"\(2, 3\) and \(3, 3\)",
    ),
    "global tokens": (
        lambda: masks.longformer(5, left=1, right=1, global_tokens=[5]), ValueError, "each 0 to 4"
    ),
    "even window": (lambda: masks.big_bird(500, window=2), ValueError, "window is 2; expected an odd number"),
    "seed": (lambda: masks.big_bird(500, rng="a"), TypeError, "rng is 'a'; expected None, a seed"),
    "negative seed": (lambda: masks.big_bird(500, rng=-1), ValueError, "rng is -1; expected None, a seed"),
    "function": (lambda: BlockMask.from_dense(grid), TypeError, "is a function; pass .*from_mask_mod of it"),
    "sparse": (lambda: BlockMask.from_dense(scipy.sparse.eye_array(3, format="csr")), TypeError,
        "is a csr_array; pass BlockMask.from_sparse of it"),
    "kernel_size": (lambda: masks.neighborhood((9, 4), 5), ValueError, r"5 \* 1 along an axis of 4"),
    "dilated kernel": (lambda: masks.neighborhood(9, 5, 2), ValueError, r"5 \* 2 along an axis of 9"),
    "kernel sizes": (lambda: masks.neighborhood(9, (3, 3)), ValueError,
        "kernel_size has 2 numbers; expected 1"),
    "shape": (lambda: masks.neighborhood((0, 4), 1), ValueError, "shape must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text
