"""The readers of weight files: what they read, and what they refuse, byte by byte."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from nbattn.layers import Linear
from nbattn.models.weights import Weights

GAMMA = np.array([[1.0, -2.0, 3.0], [0.5, 1e-3, 4.0]])
BETA = np.array([7.0, -8.0])
# Where a half byte's two numbers lie, factors of both signs, the largest and the smallest numbers.
QUANTISED = np.random.default_rng(0).standard_normal((2, 64))


def safetensors(tensors, change=None, metadata=None):
    """A file of (name, dtype, shape, bytes); `change(header)` makes it another."""
    header, place = ({"__metadata__": metadata} if metadata else {}), 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    text = header if change is None else change(header) or header
    text = (text if isinstance(text, str) else json.dumps(text)).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors)


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(tensors, metadata=(), alignment=32, version=3, count=None):
    """A file of (name, kind, shape, bytes) and of metadata, (name, kind, value as bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if count is None else count, len(metadata))
    for name, kind, value in metadata:
        head += gguf_string(name) + struct.pack("<I", kind) + value
    body = b""
    for name, kind, shape, data in tensors:
        body += bytes(-len(body) % alignment)
        head += gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += data
    return head + bytes(-len(head) % alignment) + body


def q8_0(x):
    scales = np.abs(x.reshape(-1, 32)).max(-1) / 127
    scales = scales.astype(np.float16)
    numbers = np.rint(x.reshape(-1, 32) / scales[:, None].astype(float)).clip(-127, 127).astype(np.int8)
    data = b"".join(s.tobytes() + n.tobytes() for s, n in zip(scales, numbers, strict=True))
    return data, (numbers * scales[:, None].astype(np.float32)).reshape(x.shape)


def q4(x, offsets):
    data, result = b"", []
    for block in x.reshape(-1, 32):
        low = np.float16(block.min() if offsets else -8 * np.ptp(block) / 15)
        scale = np.float16(np.ptp(block) / 15)
        numbers = np.rint((block - float(low)) / float(scale)).clip(0, 15).astype(np.uint8)
        data += scale.tobytes() + (low.tobytes() if offsets else b"")
        data += (numbers[:16] | numbers[16:] << 4).tobytes()
        low = np.float32(low) if offsets else np.float32(-8) * np.float32(scale)
        result.append(numbers * np.float32(scale) + low)
    return data, np.concatenate(result).reshape(x.shape)


def varint(n):
    n &= (1 << 64) - 1
    parts = []
    while n > 127:
        parts.append(n & 127 | 128)
        n >>= 7
    return bytes([*parts, n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def proto(name, kind, shape, data, where=9):
    """A TensorProto; `where` is the field that its numbers are in."""
    return (
        b"".join(field(1, n) for n in shape) + field(2, kind) + field(8, name.encode()) + field(where, data)
    )


def onnx(*initialisers):
    graph = field(2, b"graph") + b"".join(field(5, x) for x in initialisers)
    return field(1, 8) + field(2, b"producer") + field(7, graph)


def save(tmp_path, suffix, content):
    path = tmp_path / f"some.{suffix}"
    path.write_bytes(content)
    return Weights(path)


def raw(array, dtype):
    return array.astype(dtype).tobytes()


FLOATS = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}
SAFETENSORS = {"float32": "F32", "float16": "F16", "float64": "F64", "bfloat16": "BF16"}
GGUF = {"float32": 0, "float16": 1, "float64": 28, "bfloat16": 30}
ONNX = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}


def whole(suffix, kind="float32"):
    """A small file with GAMMA and BETA."""
    both = [("gamma", GAMMA), ("beta", BETA)]
    if suffix == "safetensors":
        content = [(n, SAFETENSORS[kind], list(x.shape), raw(x, FLOATS[kind])) for n, x in both]
        return safetensors(content, metadata={"format": "np"})
    if suffix == "gguf":
        tensors = [(n, GGUF[kind], x.shape, raw(x, FLOATS[kind])) for n, x in both]
        words = struct.pack("<IQ", 8, 2) + gguf_string("a") + gguf_string("ü")
        sizes = struct.pack("<IQ3i", 5, 3, 1, -2, 3)
        metadata = [("general.name", 8, gguf_string("tiny")), ("words", 9, words), ("sizes", 9, sizes)]
        return gguf(tensors, [*metadata, ("flag", 7, b"\1")])
    return onnx(*(proto(n, ONNX[kind], x.shape, raw(x, FLOATS[kind])) for n, x in both))


class TestWhole:
    @pytest.mark.parametrize("kind", FLOATS)
    @pytest.mark.parametrize("suffix", ["safetensors", "gguf", "onnx"])
    def test_numbers(self, tmp_path, suffix, kind):
        weights = save(tmp_path, suffix, whole(suffix, kind))
        assert weights.names == ["gamma", "beta"]
        expected = GAMMA.astype(FLOATS[kind])
        gamma = weights.tensor("gamma", (2, 3))
        assert gamma.dtype == np.float32
        np.testing.assert_array_equal(gamma, expected.astype(np.float32))
        np.testing.assert_array_equal(weights.tensor("beta", (2,)), BETA)
        stored, scales = weights.stored("gamma", (2, 3))
        assert scales is None
        assert stored.tobytes() == expected.tobytes()
        assert not stored.flags.owndata
        np.testing.assert_allclose(Linear(stored)(np.ones(3)), expected.astype(float).sum(1))

    @pytest.mark.parametrize("suffix", ["safetensors", "gguf", "onnx"])
    def test_wrong_use(self, tmp_path, suffix):
        weights = save(tmp_path, suffix, whole(suffix))
        with pytest.raises(ValueError, match=rf"some\.{suffix} lacks alpha"):
            weights.tensor("alpha", (2,))
        with pytest.raises(
            ValueError, match=rf"some\.{suffix}: gamma has shape \(2, 3\) and dtype float32; expec"
        ):
            weights.tensor("gamma", (3, 2))
        with pytest.raises(ValueError, match="lacks config"):
            weights.json("config")

    @pytest.mark.parametrize("suffix", ["safetensors", "gguf", "onnx"])
    def test_missing_and_empty(self, tmp_path, suffix):
        with pytest.raises(FileNotFoundError, match=r"cannot read the weight file .*none\.\w+: No such file"):
            Weights(tmp_path / f"none.{suffix}")
        with pytest.raises(ValueError, match=rf"some\.{suffix} is not a whole {suffix} file"):
            save(tmp_path, suffix, b"")
        (tmp_path / f"folder.{suffix}").mkdir()
        with pytest.raises(OSError, match=rf"cannot read the weight file .*folder\.{suffix}"):
            Weights(tmp_path / f"folder.{suffix}")

    def test_unknown_format(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"some\.pt is no weight file; expected a name that ends in \.npz"
        ):
            save(tmp_path, "pt", b"")

    def test_nan_and_integers(self, tmp_path):
        numbers = np.array([1.0, np.nan], np.float32)
        tensors = [("x", "F32", [2], raw(numbers, np.float32)), ("n", "I8", [2], b"\1\2"),
                   ("large", "F64", [1], raw(np.array([1e300]), np.float64))]  # fmt: skip
        weights = save(tmp_path, "safetensors", safetensors(tensors))
        for name, shape in (("x", (2,)), ("large", (1,))):
            with pytest.raises(ValueError, match=rf"some\.safetensors: {name} holds NaN or inf"):
                weights.tensor(name, shape)
        with pytest.raises(ValueError, match=r"n has shape .* and dtype int8; expected floating"):
            weights.tensor("n", (2,))

    def test_metadata(self, tmp_path):
        assert save(tmp_path, "safetensors", whole("safetensors")).metadata == {"format": "np"}
        metadata = save(tmp_path, "gguf", whole("gguf")).metadata
        assert metadata == {"general.name": "tiny", "words": ["a", "ü"], "sizes": [1, -2, 3], "flag": True}

    def test_is_what_safetensors_writes(self, tmp_path):
        numpy = pytest.importorskip("safetensors.numpy")
        rng = np.random.default_rng(0)
        arrays = {
            f"x{n}": rng.standard_normal((n, 3)).astype(dtype) for n, dtype in enumerate(FLOATS.values())
        }
        numpy.save_file(arrays, tmp_path / "some.safetensors", metadata={"a": "b"})
        weights = Weights(tmp_path / "some.safetensors")
        assert sorted(weights.names) == sorted(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(weights.tensor(name, array.shape), array.astype(np.float32))

    def test_is_what_onnx_writes(self, tmp_path):
        package = pytest.importorskip("onnx")
        rng = np.random.default_rng(0)
        values = {
            "FLOAT": np.float32, "DOUBLE": np.float64, "FLOAT16": np.float16, "BFLOAT16": ml_dtypes.bfloat16,
            "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "INT8": np.int8, "BOOL": bool,
            "UINT32": np.uint32, "UINT64": np.uint64,
        }  # fmt: skip
        initialisers, arrays = [], {}
        for kind, dtype in values.items():
            for is_raw in (False, True):
                name = f"{kind}{is_raw}"
                arrays[name] = array = rng.integers(0, 100, (2, 3)).astype(dtype)
                number = getattr(package.TensorProto, kind)
                own = array.view(np.uint16) if kind.endswith("FLOAT16") else array + 0
                made = package.TensorProto(name=name, data_type=number, dims=array.shape)
                if is_raw:
                    made.raw_data = array.tobytes()
                else:
                    where = {"FLOAT": "float_data", "DOUBLE": "double_data", "INT64": "int64_data"}
                    where |= {"UINT32": "uint64_data", "UINT64": "uint64_data"}
                    getattr(made, where.get(kind, "int32_data")).extend(own.reshape(-1).tolist())
                initialisers.append(made)
        graph = package.helper.make_graph([], "graph", [], [], initialisers)
        package.save(package.helper.make_model(graph), tmp_path / "some.onnx")
        weights = Weights(tmp_path / "some.onnx")
        assert weights.names == list(arrays)
        for name, array in arrays.items():
            assert weights._tensors[name].data.tobytes() == array.tobytes(), name


class TestQuantised:
    def quantised(self, tmp_path):
        (eight, x), (four, y), (offset, z) = q8_0(QUANTISED), q4(QUANTISED, False), q4(QUANTISED, True)
        tensors = [("q8", 8, (2, 64), eight), ("q4", 2, (2, 64), four), ("q4_1", 3, (2, 64), offset)]
        return save(tmp_path, "gguf", gguf(tensors)), {"q8": x, "q4": y, "q4_1": z}

    def test_numbers(self, tmp_path):
        weights, arrays = self.quantised(tmp_path)
        for name, array in arrays.items():
            np.testing.assert_allclose(weights.tensor(name, (2, 64)), array, rtol=1e-6, atol=1e-6)
            assert np.abs(array - QUANTISED).max() < (0.5 if name.startswith("q4") else 0.02)
        for name in ("q8", "q4"):
            numbers, scales = weights.stored(name, (2, 64))
            x = np.random.default_rng(1).standard_normal((1, 64), np.float32)
            np.testing.assert_allclose(Linear(numbers, scales=scales)(x), x @ arrays[name].T, atol=1e-5)
        with pytest.raises(ValueError, match=r"q4_1 has shape .* and dtype q4_1"):
            weights.stored("q4_1", (2, 64))
        with pytest.raises(ValueError, match="q8 has shape"):
            weights.tensor("q8", (64, 2))

    def test_is_llama_cpps(self, tmp_path):
        package = pytest.importorskip("gguf")
        kinds = {"Q8_0": 8, "Q4_0": 2, "Q4_1": 3}
        writer = package.GGUFWriter(tmp_path / "some.gguf", "llama")
        writer.add_array("words", ["a", "b"])
        exact = {}
        for name, number in kinds.items():
            quantisation = package.GGMLQuantizationType(number)
            packed = package.quants.quantize(QUANTISED.astype(np.float32), quantisation)
            exact[name] = package.quants.dequantize(packed, quantisation)
            writer.add_tensor(name, packed, raw_dtype=quantisation)
        writer.add_tensor("plain", QUANTISED.astype(np.float32))
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        weights = Weights(tmp_path / "some.gguf")
        assert weights.metadata["words"] == ["a", "b"]
        for name, array in exact.items():
            np.testing.assert_array_equal(weights.tensor(name, (2, 64)), array)
        np.testing.assert_array_equal(weights.tensor("plain", (2, 64)), QUANTISED.astype(np.float32))


class TestDamaged:
    """Whatever happens to a byte, a file is refused or gives arrays of the right shapes."""

    def read_or_refuse(self, path, suffix):
        try:
            weights = Weights(path)
            arrays = [weights.tensor("gamma", (2, 3)), weights.tensor("beta", (2,))]
        except ValueError as error:
            assert f"some.{suffix}" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            return None
        return arrays

    @pytest.mark.parametrize("suffix", ["safetensors", "gguf", "onnx"])
    def test_cut_off(self, tmp_path, suffix):
        content, path = whole(suffix), tmp_path / f"some.{suffix}"
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert self.read_or_refuse(path, suffix) is None, length

    @pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
    def test_longer(self, tmp_path, suffix):
        content, path = whole(suffix), tmp_path / f"some.{suffix}"
        path.write_bytes(content + bytes(33))
        assert self.read_or_refuse(path, suffix) is None

    @pytest.mark.parametrize("suffix", ["safetensors", "gguf", "onnx"])
    def test_every_byte(self, tmp_path, suffix):
        content, path = whole(suffix), tmp_path / f"some.{suffix}"
        read = 0
        for position in range(len(content)):
            for flip in (0x01, 0x80, 0xFF):
                damaged = bytearray(content)
                damaged[position] ^= flip
                path.write_bytes(damaged)
                arrays = self.read_or_refuse(path, suffix)
                if arrays is not None:
                    read += 1
                    changed = (arrays[0] != GAMMA.astype(np.float32)).sum() + (arrays[1] != BETA).sum()
                    # At most the number that the byte is part of.
                    assert changed <= 1, position
        assert 0 < read < 3 * len(content)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda h: "{}" + " " * 3, "has more behind them"),
            (lambda h: "[1]", "a JSON list; expected an object"),
            (lambda h: "[" * 100_000, "nested too deeply"),
            (lambda h: '{"a": 1, "a": 2}', "a name comes twice"),
            (lambda h: '{"gamma": {"dtype": "F32", "dtype": "F32"}}', "a name comes twice"),
            (lambda h: "{", "Expecting"),
            (lambda h: h | {"__metadata__": {"a": 1}}, "no object of strings"),
            (lambda h: h | {"__metadata__": []}, "no object of strings"),
            (lambda h: h["gamma"].pop("dtype") and None, "gamma has no dtype, shape and data_offsets"),
            (lambda h: h["gamma"].update(dtype="F8"), "gamma has the dtype F8; expected one of F64"),
            (lambda h: h["gamma"].update(dtype=["F32"]), "gamma has the dtype"),
            (lambda h: h["gamma"].update(dtype="F16"), "gamma has shape .* with 16 bits .* 24 bytes"),
            (lambda h: h["gamma"].update(shape=[2, 4]), "gamma has shape .* but 24 bytes"),
            (lambda h: h["gamma"].update(shape=[-2, -3]), r"gamma has the shape \[-2, -3\]"),
            (lambda h: h["gamma"].update(shape=[True, 6]), "gamma has the shape"),
            (lambda h: h["gamma"].update(shape=[2.0, 3]), "gamma has the shape"),
            (lambda h: h["gamma"].update(shape=[1] * 17), "gamma has the shape"),
            (lambda h: h["gamma"].update(shape=[1 << 62, 1 << 62]), "gamma has shape .* but 24 bytes"),
            (lambda h: h["gamma"].update(shape=[10**400]), "gamma has the shape"),
            (lambda h: h["gamma"].update(data_offsets=[24, 0]), "expected a begin and an end"),
            (lambda h: h["gamma"].update(data_offsets=[0]), "expected a begin and an end"),
            (lambda h: h["beta"].update(data_offsets=[0, 8]), "it overlaps another tensor"),
            (lambda h: h["beta"].update(data_offsets=[20, 28]), "it overlaps another tensor"),
            (lambda h: h["beta"].update(data_offsets=[26, 34]), "it leaves a gap before it"),
            (lambda h: h["gamma"].update(data_offsets=[8, 32]), "it leaves a gap before it|overlaps"),
        ],
    )  # fmt: skip
    def test_headers_of_safetensors(self, tmp_path, change, complaint):
        both = [("gamma", "F32", [2, 3], raw(GAMMA, np.float32)), ("beta", "F32", [2], raw(BETA, np.float32))]
        with pytest.raises(
            ValueError, match=rf"some\.safetensors is not a whole safetensors file.*({complaint})"
        ):
            save(tmp_path, "safetensors", safetensors(both, change))

    @pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 9])
    def test_absurd_headers_of_safetensors(self, tmp_path, length):
        with pytest.raises(ValueError, match=f"its header would take {length} bytes of 16"):
            save(tmp_path, "safetensors", struct.pack("<Q", length) + b"{}      ")

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"GGML" + bytes(40), "it does not begin with GGUF"),
            (gguf([], version=1), "it has version 1; expected 2 or 3"),
            (b"GGUF" + struct.pack(">I", 3) + bytes(40), "it has version 50331648"),
            (gguf([], count=1 << 60), "it ends within its head"),
            (gguf([], [("a", 13, b"")]), "metadata of the kind 13"),
            (gguf([], [("a", 9, struct.pack("<IQ", 9, 0))]), "metadata of the kind 9"),
            (gguf([], [("a", 9, struct.pack("<IQ", 0, 1 << 60))]), "an array of 1152921504606846976"),
            (gguf([], [("a", 8, struct.pack("<Q", 1 << 62))]), "it ends within its head"),
            (gguf([], [("a", 8, struct.pack("<Q", 1) + b"\xff")]), "utf-8"),
            (gguf([], [("a", 7, b"\2")]), "for a boolean"),
            (gguf([], [("a", 0, b"\2"), ("a", 0, b"\2")]), "its metadata has a twice"),
            (gguf([], [("general.alignment", 4, struct.pack("<I", 33))]), "its alignment is 33"),
            (gguf([], [("general.alignment", 4, struct.pack("<I", 0))]), "its alignment is 0"),
            (gguf([("a", 0, (1,), bytes(4)), ("a", 0, (1,), bytes(4))]), "the tensor a twice"),
            (gguf([("a", 14, (256,), bytes(210))]), "a is of the kind 14; expected one of float32"),
            (gguf([("a", 8, (33,), bytes(34))]), r"a has shape \(33,\), but q8_0 has blocks of 32"),
            (gguf([("a", 8, (), bytes(34))]), "blocks of 32"),
            (gguf([("a", 0, (1 << 40, 1 << 40), bytes(4))]), "it is cut off"),
            (gguf([("a", 0, (1,) * 17, bytes(4))]), "a has 17 dimensions"),
            (gguf([("a", 0, (1,), bytes(4)), ("b", 0, (1,), bytes(4))], alignment=64), "it leaves a gap"),
        ],
    )  # fmt: skip
    def test_heads_of_gguf(self, tmp_path, content, complaint):
        with pytest.raises(ValueError, match=rf"some\.gguf is not a whole gguf file.*({complaint})"):
            save(tmp_path, "gguf", content)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (field(1, 8), "it holds 0 graphs"),
            (field(7, b"") * 2, "it holds 2 graphs"),
            (field(7, 5), "it holds 1 graphs; expected one"),
            (b"\x80" * 11, "a broken number"),
            (b"\x0b", "wire type 3"),
            (b"\x02\x00", "it has a field 0"),
            (field(7, field(5, 3)), "a number where bytes should be"),
            (field(7, field(15, b"")), "sparse"),
            (varint(7 << 3 | 2) + varint(1 << 62), "a field of 4611686018427387904 bytes"),
            (onnx(proto("a", 1, (2,), bytes(4))), r"a has shape \(2,\) with 32 bits a number, but 4 bytes"),
            (onnx(proto("a", 1, (1 << 62, 1 << 62), bytes(4))), "but 4 bytes"),
            (onnx(proto("a", 1, (-1,), bytes(4))), "a has the shape"),
            (onnx(proto("a", 8, (1,), b"x", where=6)), "a is of the kind 8; expected numbers"),
            (onnx(proto("a", 99, (1,), bytes(4))), "a is of the kind 99"),
            (onnx(proto("a", 1, (1,), bytes(4)) + field(9, bytes(4))), "the field 9 twice"),
            (onnx(proto("a", 1, (1,), bytes(4)) + field(4, bytes(4))), "expected numbers, in one field"),
            (onnx(proto("a", 1, (1,), bytes(3), where=4)), "a has part of a number"),
            (onnx(proto("a", 1, (1,), bytes(8), where=10)), "its numbers are in a field of float64"),
            (onnx(proto("a", 3, (1,), varint(128), where=5)), "numbers that no int8 is"),
            (onnx(proto("a", 1, (1,), bytes(4)) + field(14, 1)), "keeps its numbers in another file"),
            (onnx(proto("a", 1, (1,), bytes(4)), proto("a", 1, (1,), bytes(4))), "the initialiser a twice"),
            (onnx(proto("", 1, (1,), bytes(4))), "an initialiser without a name"),
        ],
    )  # fmt: skip
    def test_fields_of_onnx(self, tmp_path, content, complaint):
        with pytest.raises(ValueError, match=rf"some\.onnx is not a whole onnx file.*({complaint})"):
            save(tmp_path, "onnx", content)
