"""What a user would pick instead, one class per library, for `peers.py`.

A class is made with the number of threads and raises ImportError where the library is missing. Its methods
`attention`, `decode`, `append`, `softmax` and those in `variants_rivals.py` and `models_rivals.py` prepare a
row and return the calls to time by the name of their column; none where the library lacks it, and no method
where it lacks the operation. Inputs are bound without a copy and outputs allocated ahead where the library
can.

All read (batch, heads, positions, head_dim), but JAX and ONNX Runtime's GroupQueryAttention, which get their
own layouts, made ahead. ONNX Runtime's MultiHeadAttention gets the heads as a batch, the same bytes.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import decode_cases
from .cases import SOFTCAP, WINDOW, Attention, Call, Inputs, Softmax
from .decode_cases import ARRAYS, QUANTISED, RING, Append, Decode
from .models_rivals import OnnxModels, TorchModels
from .variants_rivals import FlexVariants, NumPyVariants, TorchVariants


class Torch:
    """What PyTorch's operators and its compiled ones share."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.version = torch, torch.__version__
        # To the end of the process, as a server would: entering it anew would be timed with small calls.
        self.inference = torch.inference_mode()
        self.inference.__enter__()

    def tensor(self, x: NDArray[Any]) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)

    def array(self, x: Any) -> NDArray[Any]:
        if x.dtype == self.torch.bfloat16:
            return x.view(self.torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()


class PyTorch(TorchVariants, TorchModels, Torch):
    name = "PyTorch"

    def attention(self, case: Attention, inputs: Inputs) -> dict[str, Call]:
        if case.products or case.feature == "softcap":
            return {}
        q, k, v = map(self.tensor, inputs[:3])
        options: dict[str, Any] = {"is_causal": True} if case.causal else {}
        for extra in (inputs.mask, inputs.bias):
            if extra is not None:
                options["attn_mask"] = self.tensor(extra)
        run = partial(self.torch.nn.functional.scaled_dot_product_attention, q, k, v, **options)
        return {self.name: Call(run, self.array)}

    def decode(self, case: Decode, inputs: decode_cases.Inputs) -> dict[str, Call]:
        if case.kept != ARRAYS:
            return {}
        q, k, v = map(self.tensor, inputs)
        options: dict[str, Any] = {"enable_gqa": True}
        if case.queries > 1:
            from torch.nn.attention.bias import causal_lower_right

            options["attn_mask"] = causal_lower_right(case.queries, case.keys)
        run = partial(self.torch.nn.functional.scaled_dot_product_attention, q, k, v, **options)
        return {self.name: Call(run, self.array)}

    def append(self, case: Append, inputs: decode_cases.Inputs) -> dict[str, Call]:
        if case.dtype in QUANTISED:
            return {}
        new = [self.tensor(x) for x in inputs[1:]]
        kept = [self.torch.zeros(*x.shape[:2], RING, case.head_dim, dtype=x.dtype) for x in new]
        return {self.name: _written(kept, new, lambda x: self.array(x.contiguous()))}

    def softmax(self, case: Softmax, x: NDArray[Any]) -> dict[str, Call]:
        options = {"out": self.torch.zeros(x.shape)} if case.out else {}
        run = partial(self.torch.softmax, self.torch.from_numpy(x), case.axis, **options)
        return {self.name: Call(run, self.array)}


class FlexAttention(FlexVariants, Torch):
    """PyTorch's attention with a user's function, compiled; needs a C++ compiler and a minute."""

    name = "PyTorch flex"

    def attention(self, case: Attention, inputs: Inputs) -> dict[str, Call]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask, bias = (None if x is None else self.tensor(x) for x in (inputs.mask, inputs.bias))
        options: dict[str, Any] = {}
        if case.feature == "softcap":
            options["score_mod"] = lambda score, b, h, i, j: SOFTCAP * self.torch.tanh(score / SOFTCAP)
        elif bias is not None:
            options["score_mod"] = lambda score, b, h, i, j: score + bias[i, j]
        if case.causal or mask is not None:
            see = {"": lambda b, h, i, j: j <= i,
                   "window": lambda b, h, i, j: (j <= i) & (i - j < WINDOW),
                   "mask": lambda b, h, i, j: mask[i, j]}[case.feature]  # fmt: skip
            options["block_mask"] = create_block_mask(see, None, None, case.length, case.length, device="cpu")
        if case.products or case.dtype == "float64" or not options:
            return {}
        self.torch.compiler.reset()
        compiled = self.torch.compile(flex_attention, dynamic=False)
        return {self.name: Call(partial(compiled, *map(self.tensor, inputs[:3]), **options), self.array)}


class OnnxRuntime(OnnxModels):
    """Models of one node; its threads stop spinning when a call ends, as they would disturb the next one."""

    name = "ONNX Runtime"

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.ort, self.version = onnx, onnxruntime, onnxruntime.__version__
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.add_session_config_entry("session.force_spinning_stop", "1")
        self.options.log_severity_level = 3

    def call(
        self,
        operator: str,
        inputs: dict[str, Any],
        outputs: list[NDArray[Any] | str],
        domain: str = "",
        **attrs: Any,
    ) -> Call:
        """A bound call of a one-node model. Inputs by name, in order; None leaves one out.

        An output that is an input's name is written over that input.
        """
        helper, results = self.onnx.helper, {f"out{i}": x for i, x in enumerate(outputs)}
        shared = {name: x for name, x in results.items() if isinstance(x, str)}
        results |= {name: inputs[x] for name, x in shared.items()}

        def info(name: str, x: NDArray[Any]) -> Any:
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)

        given = {name: x for name, x in inputs.items() if x is not None}
        names = [name if x is not None else "" for name, x in inputs.items()]
        node = helper.make_node(operator, names, list(results), domain=domain, **attrs)
        values = ([info(*item) for item in part.items()] for part in (given, results))
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(
            helper.make_graph([node], operator, *values), opset_imports=opsets, ir_version=10
        )
        session = self.ort.InferenceSession(
            model.SerializeToString(), self.options, providers=["CPUExecutionProvider"]
        )
        binding, values = session.io_binding(), {}
        for name, x in (given | results).items():
            same = values.get(shared.get(name))
            values[name] = same or self.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x))
            bind = binding.bind_ortvalue_input if name in given else binding.bind_ortvalue_output
            bind(name, values[name])
        return Call(partial(session.run_with_iobinding, binding), lambda _: values["out0"].numpy())

    def attention(self, case: Attention, inputs: Inputs) -> dict[str, Call]:
        if case.precision == "bfloat16":
            return {}
        qkv = dict(zip(("query", "key", "value"), inputs[:3], strict=True))
        out, scale = np.zeros_like(inputs.query), case.head_dim**-0.5
        softcap = SOFTCAP if case.feature == "softcap" else 0.0
        extra = inputs.mask if inputs.mask is not None else inputs.bias
        attrs: dict[str, Any] = {"is_causal": int(case.causal), "scale": scale, "softcap": softcap}
        calls = {"ORT Attention": self.call("Attention", qkv | {"mask": extra}, [out], **attrs)}
        if case.dtype == "float64":
            return calls
        if case.feature in ("", "bias"):
            heads = {name: x[0] for name, x in qkv.items()} | dict.fromkeys(("bias", "padding"))
            bias = None if inputs.bias is None else inputs.bias[None, None]
            call = self.call("MultiHeadAttention", heads | {"scores": bias}, [out[0]], "com.microsoft",
                             num_heads=1, unidirectional=int(case.causal), scale=scale)  # fmt: skip
            calls["ORT MHA"] = call._replace(read=lambda result: call.read(result)[None])
        if case.causal or case.feature == "window":
            calls["ORT GQA"] = self.grouped(case, qkv)
        return calls

    def grouped(self, case: Attention, qkv: dict[str, NDArray[Any]]) -> Call:
        shape = (1, case.length, case.heads, case.head_dim)
        flat = {name: x.transpose(0, 2, 1, 3).reshape(1, case.length, -1) for name, x in qkv.items()}
        lengths = {"last": np.array([case.length - 1], np.int32), "total": np.array([case.length], np.int32)}
        outputs = [np.zeros_like(flat["query"]), np.zeros_like(qkv["key"]), np.zeros_like(qkv["value"])]
        call = self.call(
            "GroupQueryAttention", flat | dict.fromkeys(("past_key", "past_value")) | lengths, outputs,
            "com.microsoft", num_heads=case.heads, kv_num_heads=case.heads,
            local_window_size=WINDOW if case.feature == "window" else -1,
        )  # fmt: skip
        return call._replace(read=lambda result: call.read(result).reshape(shape).transpose(0, 2, 1, 3))

    def decode(self, case: Decode, inputs: decode_cases.Inputs) -> dict[str, Call]:
        """The last tokens' keys and values come beside the cache, which the operator appends them to."""
        if case.kept != ARRAYS or case.dtype not in ("float32", "float16"):
            return {}
        flat, n = {}, case.queries
        for name, x in zip(("query", "key", "value"), inputs, strict=True):
            flat[name] = x[:, :, -n:].transpose(0, 2, 1, 3).reshape(case.batch, n, -1)
        total = {
            "last": np.full(case.batch, case.keys - 1, np.int32),
            "total": np.array([case.keys], np.int32),
        }
        call = self.call(
            "GroupQueryAttention",
            flat | {"past_key": inputs.key, "past_value": inputs.value} | total,
            [np.zeros_like(flat["query"]), "past_key", "past_value"],
            "com.microsoft", num_heads=case.heads, kv_num_heads=case.kv_heads,
        )  # fmt: skip
        shape = (case.batch, n, case.heads, case.head_dim)
        return {
            "ORT GQA": call._replace(
                read=lambda result: call.read(result).reshape(shape).transpose(0, 2, 1, 3)
            )
        }

    def softmax(self, case: Softmax, x: NDArray[Any]) -> dict[str, Call]:
        return {"ORT Softmax": self.call("Softmax", {"x": x}, [np.zeros_like(x)], axis=case.axis)}


class OpenVINO:
    name = "OpenVINO"

    def __init__(self, threads: int) -> None:
        import openvino
        from openvino import opset13

        self.ov, self.operators, self.version = openvino, opset13, openvino.__version__.split("-")[0]
        self.core = openvino.Core()
        self.config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}

    def tensor(self, x: NDArray[Any]) -> Any:
        if x.dtype == ml_dtypes.bfloat16:  # which it does not know from NumPy
            return self.ov.Tensor(x.view(np.uint16), self.ov.Shape(x.shape), self.ov.Type.bf16)
        return self.ov.Tensor(x, shared_memory=True)

    def call(self, operator: Any, arrays: list[NDArray[Any]], hint: str, **attrs: Any) -> Call:
        tensors = [self.tensor(x) for x in arrays]
        parameters = [self.operators.parameter(list(t.shape), t.element_type) for t in tensors]
        model = self.ov.Model([operator(*parameters, **attrs)], parameters)
        compiled = self.core.compile_model(model, "CPU", self.config | {"INFERENCE_PRECISION_HINT": hint})
        request, out = compiled.create_infer_request(), np.zeros_like(arrays[0])
        for i, tensor in enumerate(tensors):
            request.set_input_tensor(i, tensor)
        request.set_output_tensor(0, self.tensor(out))
        return Call(request.infer, lambda _: out)

    def attention(self, case: Attention, inputs: Inputs) -> dict[str, Call]:
        if case.feature == "softcap" or case.dtype == "float64":  # computed in float32
            return {}
        arrays = [x for x in inputs if x is not None]
        hint = "bf16" if case.precision == "bfloat16" else "f32"
        operator = self.operators.scaled_dot_product_attention
        return {self.name: self.call(operator, arrays, hint, causal=case.causal)}

    def decode(self, case: Decode, inputs: decode_cases.Inputs) -> dict[str, Call]:
        """The heads of a group are given as more queries of one head, which it computes fastest."""
        if case.kept != ARRAYS or case.queries > 1 or case.dtype == "float64":
            return {}
        shape = (case.batch, case.kv_heads, -1, case.head_dim)
        hint = "bf16" if case.dtype == "bfloat16" else "f32"
        operator = self.operators.scaled_dot_product_attention
        call = self.call(operator, [inputs.query.reshape(shape), *inputs[1:]], hint, causal=False)
        return {self.name: call._replace(read=lambda result: call.read(result).reshape(inputs.query.shape))}

    def softmax(self, case: Softmax, x: NDArray[Any]) -> dict[str, Call]:
        return {self.name: self.call(self.operators.softmax, [x], "f32", axis=case.axis % x.ndim)}


class JAX:
    """Threads follow PJRT_NPROC, which JAX does not document.

    Its decode took 4 to 13 times PyTorch's time, which would leave a quick run none for the rest.
    """

    name = "JAX"

    def __init__(self, threads: int) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        self.jax, self.version = jax, jax.__version__

    def attention(self, case: Attention, inputs: Inputs) -> dict[str, Call]:
        if case.products or case.feature == "softcap":
            return {}
        q, k, v = (self.jax.device_put(x.transpose(0, 2, 1, 3).copy()) for x in inputs[:3])
        options: dict[str, Any] = {"is_causal": case.causal or case.feature == "window"}
        arrays = {}
        if case.feature == "window":
            options["local_window_size"] = (WINDOW - 1, 0)
        elif inputs.mask is not None:
            arrays["mask"] = self.jax.device_put(inputs.mask[None, None])
        if inputs.bias is not None:
            arrays["bias"] = self.jax.device_put(inputs.bias[None, None])
        attend = self.jax.jit(partial(self.jax.nn.dot_product_attention, **options))
        return {
            self.name: Call(
                lambda: attend(q, k, v, **arrays).block_until_ready(),
                lambda result: np.asarray(result).transpose(0, 2, 1, 3),
            )
        }

    def softmax(self, case: Softmax, x: NDArray[Any]) -> dict[str, Call]:
        if case.out:
            return {}
        kept, softmax = self.jax.device_put(x), self.jax.jit(partial(self.jax.nn.softmax, axis=case.axis))
        return {self.name: Call(lambda: softmax(kept).block_until_ready(), np.asarray)}


class NumPy(NumPyVariants):
    """The formula as anyone would write it, half precisions in float32; SciPy's softmax."""

    name = "NumPy"

    def __init__(self, threads: int) -> None:
        self.version = np.__version__

    def attention(self, case: Attention, inputs: Inputs) -> dict[str, Call]:
        if case.products:
            return {}
        wide = np.float64 if case.dtype == "float64" else np.float32
        mask = np.tri(case.length, dtype=bool) if case.causal else inputs.mask

        def attend() -> NDArray[Any]:
            q, k, v = (x.astype(wide, copy=False) for x in inputs[:3])
            scores = q @ k.swapaxes(-1, -2) * wide(case.head_dim**-0.5)
            if case.feature == "softcap":
                scores = wide(SOFTCAP) * np.tanh(scores / wide(SOFTCAP))
            if inputs.bias is not None:
                scores += inputs.bias
            if mask is not None:
                scores = np.where(mask, scores, wide(-np.inf))
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return (weights @ v / weights.sum(axis=-1, keepdims=True)).astype(inputs.query.dtype, copy=False)

        # OpenBLAS's threads spin for a tenth of a second.
        return {self.name: Call(attend, np.asarray, settle=0.12)}

    def decode(self, case: Decode, inputs: decode_cases.Inputs) -> dict[str, Call]:
        # Nobody would convert a whole cache in each step.
        if case.kept != ARRAYS or case.dtype not in ("float32", "float64"):
            return {}
        q, k, v = inputs
        grouped = q.reshape(case.batch, case.kv_heads, -1, case.head_dim)
        hidden = ~np.tri(case.queries, case.keys, case.keys - case.queries, bool)

        def attend() -> NDArray[Any]:
            scores = grouped * q.dtype.type(case.head_dim**-0.5) @ k.swapaxes(-1, -2)
            if case.queries > 1:
                scores.reshape(case.batch, case.heads, case.queries, -1)[..., hidden] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return (weights @ v / weights.sum(axis=-1, keepdims=True)).reshape(q.shape)

        return {self.name: Call(attend, np.asarray, settle=0.12)}

    def append(self, case: Append, inputs: decode_cases.Inputs) -> dict[str, Call]:
        if case.dtype in QUANTISED:
            return {}
        new = list(inputs[1:])
        kept = [np.zeros((*x.shape[:2], RING, case.head_dim), x.dtype) for x in new]
        return {self.name: _written(kept, new, np.copy)}

    def softmax(self, case: Softmax, x: NDArray[Any]) -> dict[str, Call]:
        from scipy.special import softmax

        return {} if case.out else {"SciPy": Call(partial(softmax, x, axis=case.axis), np.asarray)}


def _written(kept: list[Any], new: list[Any], read: Any) -> Call:
    """Assignment to a slice of keys and one of values, each time to the next place."""
    tokens = new[0].shape[2]
    places = itertools.cycle(range(0, RING - tokens + 1, tokens))

    def write() -> int:
        place = next(places)
        for whole, part in zip(kept, new, strict=True):
            whole[:, :, place : place + tokens] = part
        return place

    return Call(write, lambda place: read(kept[1][:, :, place : place + tokens]))


LIBRARIES = (PyTorch, FlexAttention, OnnxRuntime, OpenVINO, JAX, NumPy)
COLUMNS = ("PyTorch", "PyTorch f32", "PyTorch flex", "ONNX Runtime", "ORT Attention", "ORT MHA", "ORT GQA",
           "ORT Softmax", "OpenVINO", "JAX", "NumPy", "SciPy")  # fmt: skip
