# SPDX-License-Identifier: Apache-2.0
"""Float graphs of every source: they have the results of a plain numpy decoder, and hold each table once."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest

from sw.awq.sizes import float16_bytes
from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.huggingface import decoder_config
from sw.checkpoints.rotary import llama3_factors
from sw.checkpoints.settings import read_settings
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.synthetic import write_float
from sw.text.folder import TextFolder
from tests.sw.export.test_gguf import gguf_logits, write_gguf
from tests.sw.fixtures.checkpoints import (
    IDS,
    LLAMA,
    QWEN2,
    awq_config,
    empty_cache,
    make_checkpoint,
    read_tensors,
    reference_logits,
    relative_error,
    step,
    write_tensors,
)

DATA = Path(__file__).parents[1] / "fixtures" / "data"
LAYERS = QWEN2["num_hidden_layers"]


def onnx_logits(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return step(session, IDS, empty_cache(session), len(IDS))[0]


def make_float(folder: Path, config=QWEN2, **options) -> dict[str, np.ndarray]:
    """A float checkpoint; returns its tensors as they are in the files."""
    write_float(folder, config, seed=5, **options)
    return read_tensors(folder)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize(("dtype", "shards"), [("F16", 1), ("BF16", 3), ("F32", 2)])
def test_checkpoint(dtype, shards, family, tied, tmp_path):
    config = awq_config(family, tie_word_embeddings=tied, head_dim=None if tied else 32)
    tensors = make_float(tmp_path / "in", config, dtype=dtype, shards=shards)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) == shards
    done = []
    path = float_model(tmp_path / "in", tmp_path / "out", lambda *counts: done.append(counts))
    expected = reference_logits(tensors, decoder_config(read_settings(tmp_path / "in" / "config.json")), IDS)
    assert relative_error(onnx_logits(path), expected) < 1e-5
    kinds = operators(path)
    assert kinds.count("FusedMatMul") == 7 * LAYERS + 1
    assert "MatMulNBits" not in kinds
    # Every weight is stored once, also a tied table.
    assert float16_bytes(path) == 2 * sum(values.size for values in tensors.values())
    assert done == [(i, LAYERS + 1) for i in range(LAYERS + 2)]
    assert TextFolder(path.parent).stop_ids == {256, 258}


def test_weights_are_exact(tmp_path):
    tensors = make_float(tmp_path / "in", dtype="BF16")
    model = onnx.load(float_model(tmp_path / "in", tmp_path / "out"))
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, values in tensors.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], values)


def test_llama3_rotary_scaling(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = awq_config(LLAMA, head_dim=32, rope_theta=100.0, rope_scaling={"rope_type": "llama3", **scaling})
    tensors = make_float(tmp_path / "in", config)
    path = float_model(tmp_path / "in", tmp_path / "out")
    shape = decoder_config(read_settings(tmp_path / "in" / "config.json"))
    frequencies = shape.rotary_frequencies()
    factors = llama3_factors(frequencies, *scaling.values())
    expected = reference_logits(tensors, shape, IDS, frequencies=frequencies / factors)
    assert relative_error(onnx_logits(path), expected) < 1e-5
    # config.json beside the graph describes the same rotary embedding.
    again = decoder_config(read_settings(path.with_name("config.json")))
    assert again.rope_factors is not None
    assert np.array_equal(again.rope_factors, factors)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("kind", "table"), [("Q4_1", "Q8_0"), ("Q8_0", "Q4_1"), ("Q5_0", "Q5_0"), ("F16", "F16")])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gguf(family, kind, table, tied, tmp_path):
    """Block formats without an exact MatMulNBits form work, too, because they become floats."""
    source = tmp_path / "m.gguf"
    tensors = write_gguf(source, family, kind, tied, table=table)
    path = float_model(source, tmp_path / "out")
    assert relative_error(onnx_logits(path), gguf_logits(source, tensors)) < 1e-5
    assert operators(path).count("FusedMatMul") == 7 * LAYERS + 1
    assert not {"MatMulNBits", "GatherBlockQuantized"} & set(operators(path))
    assert float16_bytes(path) == 2 * sum(values.size for values in tensors.values())


def test_gguf_is_dequantized_on_demand(tmp_path):
    tensors = write_gguf(tmp_path / "m.gguf", kind="Q4_0", table="Q8_0")
    model = GgufFile(tmp_path / "m.gguf", dequantize=True)
    table = model.table("token_embd")
    assert isinstance(table, np.ndarray)
    assert np.array_equal(table, tensors["token_embd.weight"])
    assert not isinstance(GgufFile(tmp_path / "m.gguf").table("token_embd"), np.ndarray)
    layer = model.linear("blk.0.ffn_up")
    assert np.array_equal(layer.weight, tensors["blk.0.ffn_up.weight"])  # pyright: ignore[reportAttributeAccessIssue]


def test_llama3_factors_of_gguf_are_described(tmp_path):
    """A GGUF file has only the factors; if they are Llama 3.1's, config.json has Hugging Face's description."""
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192.0
    for factors, expected in (
        (llama3_factors(frequencies, *scaling.values()), {"rope_type": "llama3", **scaling}),
        (np.linspace(1, 9, 8, dtype=np.float32), None),
    ):
        source = tmp_path / "m.gguf"
        write_gguf(source)
        _add_tensor(source, "rope_freqs.weight", factors)
        path = float_model(source, tmp_path / "out")
        assert json.loads(path.with_name("config.json").read_text()).get("rope_scaling") == expected


def _add_tensor(path: Path, name: str, values: np.ndarray) -> None:
    """Rewrites a GGUF file with one more tensor."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def test_float_onnx_is_used_unchanged(tmp_path):
    source = DATA / "optimum_qwen2_unquantized.onnx"
    assert float_model(source, tmp_path / "out") == source
    shutil.copyfile(source, tmp_path / "model.onnx")
    assert float_model(str(tmp_path), tmp_path / "out") == tmp_path / "model.onnx"
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


QUANTIZED = {
    "torch_qwen2_opset18.onnx": "has MatMulNBits weights",
    "torch_qwen2_opset21.onnx": "has DequantizeLinear weights",
    "genai_qwen2_tied.onnx": "has GatherBlockQuantized weights",
    "same_weights/genai": "has MatMulNBits weights",
    "same_weights/autoawq": "config.json says awq",
}


@pytest.mark.parametrize(("name", "message"), QUANTIZED.items())
def test_quantized_already(name, message, tmp_path):
    with pytest.raises(UserError, match=f"is quantized already: .*{message}"):
        float_model(DATA / name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refused(tmp_path):
    source = tmp_path / "in"

    def refused(model: Path, message: str) -> None:
        before = sorted(item.name for item in tmp_path.iterdir())
        with pytest.raises(UserError, match=message) as error:
            float_model(model, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert sorted(item.name for item in tmp_path.iterdir()) == before

    tensors = make_float(source, dtype="F32")
    refused(tmp_path / "none", "no such model")
    refused(source / "model.safetensors", "is one file of a checkpoint: name its folder")
    refused(tmp_path, r"holds no model")
    name = "model.layers.1.mlp.up_proj.weight"
    for values, message in (
        (tensors[name][:, :8], r"up_proj is \[96, 8\], but the model's configuration asks for \[96, 64\]"),
        (tensors[name] * np.nan, f"tensor {name} holds values that are not finite"),
        (np.ones(96, np.float32), f"the shapes of {name} and bias do not fit"),
        (tensors[name].astype(np.int32), f"tensor {name} is I32, not one of F16, BF16, F32"),
    ):
        write_tensors(source / "model.safetensors", {**tensors, name: values})
        refused(source, message)
    write_tensors(source / "model.safetensors", {key: values for key, values in tensors.items() if key != name})
    refused(source, f"has no tensor {name}")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    refused(source, "model.safetensors is damaged")
    # Quantized tensors with a config.json that does not declare them.
    make_checkpoint(tmp_path / "awq")
    (tmp_path / "awq" / "config.json").write_text(json.dumps({**QWEN2, "quantization_config": None}))
    refused(tmp_path / "awq", r"has no tensor model\.layers\.0\.self_attn\.q_proj\.weight")
    for text, message in (
        (json.dumps({**QWEN2, "quantization_config": {"quant_method": "gptq"}}), "is quantized already: .* says gptq"),
        (json.dumps({**QWEN2, "quantization_config": 4}), "quantization_config is an object, not 4"),
        (json.dumps({**QWEN2, "quantization_config": None, "model_type": "gemma"}), "model_type 'gemma'"),
        ("{", r"config\.json is not JSON"),
    ):
        (source / "config.json").write_text(text)
        refused(source, message)
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07nonsense")
    refused(tmp_path / "bad.onnx", "is not a complete ONNX file")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "bad.gguf", "is not a complete GGUF file")
