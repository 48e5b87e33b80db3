"""Block masks: builders against dense formulas, what combines them, and attention through them."""

import pickle
import re

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from nbattn import BlockMask, masks

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

    def test_mask_mod(self, rng):
        table = rng.random((2, 130)) < 0.5

        def mask_mod(batch, head, q_index, kv_index, table, far):
            return table[batch, kv_index] & (kv_index <= q_index + far * head)

        mask = BlockMask.from_mask_mod(mask_mod, 200, 130, batch=2, heads=3, mod_args=(table, 40))
        i, j = grid(200, 130)
        seen = [[table[b] & (j <= i + 40 * h) for h in range(3)] for b in range(2)]
        assert_sees(mask, seen)

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
