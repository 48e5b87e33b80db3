"""The ONNX operator tests of attention, through adapters from its arguments to this library's."""

import math
import warnings

import numpy as np
import pytest

from nbattn import linear_attention, scaled_dot_product_attention

onnx = pytest.importorskip("onnx", minversion="1.23", reason="needs onnx>=1.23")

CASES = 93
LINEAR_CASES = 14
FLEX_CASES = 11
BFLOAT16_TOLERANCE = 2.0**-6


@pytest.fixture(scope="module")
def nodes():
    """Every case whose model is an operator itself, not its expansion."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    return [c for c in found if "_expanded" not in c.name]


@pytest.fixture(scope="module")
def cases(nodes):
    return [c for c in nodes if c.name.startswith("test_attention_")]


def split_heads(x, heads):
    """(B, S, heads * D) as (B, heads, S, D)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def padded(mask, keys):
    """A mask that is shorter than the keys does not let the rest be seen."""
    nothing = False if mask.dtype == bool else -np.inf
    return np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])], constant_values=nothing)


def attention(
    attributes, Q, K, V, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *, backend
):
    """ONNX's Attention: output, present key and value, and the scores or weights that the mode asks for."""
    packed = Q.ndim == 3
    if packed:
        Q = split_heads(Q, attributes["q_num_heads"])
        K, V = (split_heads(x, attributes["kv_num_heads"]) for x in (K, V))
    queries = Q.shape[2]
    offset = 0
    if past_key is not None:
        offset = past_key.shape[2]
        K, V = np.concatenate((past_key, K), axis=2), np.concatenate((past_value, V), axis=2)
    elif nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen - queries

    mask = bias = None
    if attn_mask is not None:
        attn_mask = padded(attn_mask, K.shape[2])
        mask, bias = (attn_mask, None) if attn_mask.dtype == bool else (None, attn_mask)
    scale = attributes.get("scale", 1 / np.sqrt(Q.shape[3]))
    softcap = attributes.get("softcap")
    position = {
        "is_causal": bool(attributes.get("is_causal", 0)),
        "window_size": (attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)),
        "query_offset": offset,
        "key_lengths": nonpad_kv_seqlen,
    }
    # The softmax runs in float32 or better whatever is asked; only float64 needs to be said.
    double = attributes.get("softmax_precision") == onnx.TensorProto.DOUBLE
    q, k, v = (x.astype(np.float64) if double else x for x in (Q, K, V))
    result = scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        return_weights=True,
        backend=backend,
        **position,
    )
    output = result.output.astype(Q.dtype)
    if packed:
        output = output.transpose(0, 2, 1, 3).reshape(output.shape[0], queries, -1)

    mode = attributes.get("qk_matmul_output_mode", 0)
    if mode == 3:
        return output, K, V, result.weights.astype(Q.dtype)
    keys = np.repeat(K, Q.shape[1] // K.shape[1], axis=1).astype(np.float64)
    scores = scale * (Q.astype(np.float64) @ keys.transpose(0, 1, 3, 2))
    if mode >= 1 and softcap:
        scores = softcap * np.tanh(scores / softcap)
    if mode == 2:
        seen = np.tri(queries, K.shape[2], offset, dtype=bool) if position["is_causal"] else True
        scores = np.where(seen, scores + (0 if bias is None else bias), -np.inf)
    return output, K, V, scores.astype(Q.dtype)


def run(case, backend):
    """What is wrong with one case's outputs; nothing if all is well."""
    (node,) = case.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for given, wanted in case.data_sets:
        numbers = iter(given)
        inputs = [next(numbers) if name else None for name in node.input]
        results = attention(attributes, *inputs, backend=backend)
        wanted = iter(wanted)
        for name, got in zip(node.output, results, strict=False):
            if not name:
                continue
            expected = next(wanted)
            rtol = BFLOAT16_TOLERANCE if expected.dtype.name == "bfloat16" else case.rtol
            assert got.dtype == expected.dtype, name
            got, expected = got.astype(np.float64), expected.astype(np.float64)
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=case.atol, err_msg=name)
        assert next(wanted, None) is None


def test_every_case(backend, cases):
    assert len(cases) == CASES
    failures = {}
    for case in cases:
        try:
            run(case, backend)
        except (AssertionError, TypeError, ValueError) as error:
            failures[case.name] = str(error)
    assert not failures


def linear(attributes, q, k, v, past_state=None, decay=None, beta=None, *, backend):
    """ONNX's LinearAttention, whose arrays have their heads packed into the last axis."""
    rule = attributes.get("update_rule", b"gated_delta").decode()
    heads, kv_heads = attributes["q_num_heads"], attributes["kv_num_heads"]

    def unpack(x, heads):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    key = unpack(k, kv_heads)
    if decay is not None:
        decay = unpack(decay, kv_heads)
        decay = decay if decay.shape == key.shape else decay[..., 0]
    output, state = linear_attention(
        unpack(q, heads), key, unpack(v, kv_heads),
        decay=decay if "gated" in rule else None,
        beta=beta.transpose(0, 2, 1) if "delta" in rule else None,
        scale=attributes.get("scale") or None, state=past_state, return_state=True, backend=backend,
    )  # fmt: skip
    dtype = q.dtype if past_state is None else past_state.dtype
    return output.transpose(0, 2, 1, 3).reshape(*q.shape[:2], -1), state.astype(dtype)


def test_every_linear_case(backend, nodes):
    cases = [c for c in nodes if c.name.startswith("test_linear_attention_")]
    assert len(cases) == LINEAR_CASES
    for case in cases:
        (node,) = case.model.graph.node
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for given, wanted in case.data_sets:
            numbers = iter(given)
            arrays = [next(numbers) if name else None for name in node.input]
            results = linear(attributes, *arrays, backend=backend)
            for got, expected in zip(results, wanted, strict=True):
                assert got.dtype == expected.dtype, case.name
                np.testing.assert_allclose(got, expected, rtol=case.rtol, atol=case.atol, err_msg=case.name)


# The graphs of FlexAttention's cases, as functions of one score.
SCORE_MODS = {
    "test_flexattention_score_mod": lambda score, batch, head, q_index, kv_index: score + 0.5,
    "test_flexattention_causal_mask": lambda s, batch, head, q, k: s if q >= k else -math.inf,
    "test_flexattention_soft_cap": lambda s, batch, head, q, k: 20.0 * math.tanh(s / 20.0),
    "test_flexattention_relative_positional": lambda s, batch, head, q, k: s + (q - k),
}
PROB_MODS = {"test_flexattention_prob_mod": lambda weights: 0.5 * weights}


def test_every_flex_case(backend, nodes):
    cases = [c for c in nodes if c.name.startswith("test_flexattention")]
    assert len(cases) == FLEX_CASES
    for case in cases:
        (node,) = case.model.graph.node
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert ("score_mod" in attributes) == (case.name in SCORE_MODS)
        assert ("prob_mod" in attributes) == (case.name in PROB_MODS)
        for (query, key, value), (expected,) in case.data_sets:
            result = scaled_dot_product_attention(
                query, key, value, scale=attributes.get("scale"), score_mod=SCORE_MODS.get(case.name),
                return_weights=True, backend=backend,
            )  # fmt: skip
            output = result.output
            if case.name in PROB_MODS:  # of the weights, which are a result here
                output = PROB_MODS[case.name](result.weights) @ value
            assert output.dtype == expected.dtype
            np.testing.assert_allclose(output, expected, rtol=case.rtol, atol=case.atol, err_msg=case.name)
