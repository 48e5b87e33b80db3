"""What holds for every kernel of prompts: bodies of tests that those of several share.

`attend` runs a kernel in the emulator and gives output, lse and the machine; `emulate` runs it for a problem.
"""

import numpy as np
import oracle
from oracle import inputs, normal

from nbattn.resolve import Options, check_starts, resolve

NOTHING = Options(None, None, False, None, 0, None, None, None, None, None, None)


def poisoned(shape, dtype):
    return np.full(shape, np.nan, dtype)


def best_key_alone(attend, q, k, v, best, **options):
    """Of scores that are so far apart each row's output is a value."""
    out, lse, _ = attend(q, k, v, **options)
    wanted = np.broadcast_to(v[:, :, best : best + 1], out.shape)
    if out.dtype == np.float32:
        np.testing.assert_allclose(out, wanted, rtol=2**-22)
    else:
        np.testing.assert_array_equal(out, wanted)
    return lse


def scores_whose_rounding_is_felt(attend, dim, rng):
    """The largest exponent is near 2**27: fused with its product it would be off by some units."""
    q, k, v = inputs(rng, 1, 1, 1, 40, 50, dim, dtype=np.float16)
    q[:], k[:] = 0, 0
    q[..., 0], k[..., 0] = 30001, rng.permutation(50) * 31 + 20000
    best_key_alone(attend, q, k, v, int(k[0, 0, :, 0].argmax()), scale=0.3)


def packed(emulate, tile, heads, dim, rng):
    """What lies beyond a sequence's end is the next one, with values that are not finite."""
    lengths, key_lengths = np.array([40, 0, 1, 70]), np.array([50, 3, 33, 0])
    starts, key_starts = (np.concatenate([[0], np.cumsum(x)]) for x in (lengths, key_lengths))
    q, k, v = (normal(rng, (n, heads, dim), np.float16) for n in (111, 86, 86))
    v[50], k[51] = np.inf, np.nan
    options = NOTHING._replace(is_causal=True, query_offset="end", key_lengths=[44, 3, 33, 0])
    p = resolve(
        tuple(x.transpose(1, 0, 2)[None] for x in (q, k, v)),
        query_lengths=lengths, key_limits=key_lengths, max_queries=70, max_keys=50, options=options,
        starts=(check_starts(starts, "q", 111, "q"), check_starts(key_starts, "k", 86, "k")),
    )  # fmt: skip
    out, lse = poisoned((111, heads, dim), np.float16), poisoned((111, heads), np.float32)
    emulate(p, out.transpose(1, 0, 2)[None], lse.T[None], tile)
    for b, length in enumerate([44, 3, 33, 0]):
        rows, keys = slice(*starts[b : b + 2]), slice(*key_starts[b : b + 2])
        one = [x[part].transpose(1, 0, 2)[None] for x, part in ((q, rows), (k, keys), (v, keys))]
        oracle.hold(
            out[rows].transpose(1, 0, 2)[None], lse[rows].T[None], *one,
            is_causal=True, query_offset=length - len(q[rows]), key_lengths=[length],
        )  # fmt: skip


def masked_never_reaches(attend, clean, options, poison, places, rng):
    """Keys and values of two positions are none; the first batch's row 20 does not see them."""
    dtype = clean[0].dtype.type
    exact = oracle.formula(*clean, compute=np.float64, **options)
    plain = oracle.formula(*clean, compute=np.float32, **options)
    # Row 20 does not see the first batch's bad keys, and sees the second's.
    bad = np.zeros((2, 1, 70), bool)
    for b in range(2):
        bad[b, 0, rng.choice(np.flatnonzero(exact.seen[b, 0, 20] == b), 2)] = True
    spared = ~(exact.seen & bad[:, :, None]).any(-1)
    assert spared[0, :, 20].all()
    assert not spared[1, :, 20].any()
    ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-20}[np.dtype(dtype).name]
    for where in places:
        arrays = list(clean)
        for which in where:
            arrays[which] = np.where(bad[..., None], dtype(poison), clean[which])
        out, lse, _ = attend(*arrays, **options)
        if np.isnan(poison):
            oracle.hold(out, lse, *arrays, **options)
        oracle.assert_accurate(
            *(x[spared] for x in (out, exact.output, plain.output.astype(dtype), exact.magnitude)),
            ulp=ulp, what="spared rows",
        )  # fmt: skip
        if where != (1,):
            assert not np.isfinite(out[~spared].astype(np.float32)).any()


def a_query_touches_only_its_row(attend, q, k, v):
    expected, _, _ = attend(q, k, v)
    q[0, 0, 7, 0] = np.nan
    got, _, _ = attend(q, k, v)
    assert np.isnan(got[0, 0, 7].astype(np.float32)).all()
    got[0, 0, 7] = expected[0, 0, 7]
    oracle.assert_same_bits(got, expected)


def bits_are_those_of_one_alone(attend, q, k, v):
    options = {"is_causal": True, "query_offset": 20}
    out, lse, _ = attend(q, k, v, key_lengths=[70, 44, 3], **options)
    one, one_lse, _ = attend(q[1:2], k[1:2], v[1:2], key_lengths=[44], **options)
    oracle.assert_same_bits(out[1:2], one)
    oracle.assert_same_bits(lse[1:2], one_lse)
