# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ folders made from ONNX decoders: the round trip has no loss, and models without such a form give one line."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from sw.awq.int8_head import quantize_head
from sw.checkpoints.autoawq_writer import write_autoawq_folder
from sw.checkpoints.huggingface import decoder_config
from sw.checkpoints.settings import read_settings
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.export.gguf import export_gguf
from sw.export.huggingface import export_checkpoint
from sw.export.resolve import resolve_model
from sw.graph.linears import find_linears
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import quantize_int8
from sw.synthetic import write_float
from sw.text.folder import TextFolder
from tests.sw.export.test_gguf import write_gguf
from tests.sw.fixtures.checkpoints import (
    IDS,
    LINEARS,
    LLAMA,
    QWEN2,
    awq_config,
    empty_cache,
    float_tensors,
    make_checkpoint,
    read_tensors,
    reference_logits,
    relative_error,
    slow_linear,
    step,
)
from tests.sw.fixtures.float_twins import FOREIGN, float_twin, logits, products, quantize_all, round_to_nearest
from tests.sw.graph.test_rewrite import HEAD, rewritten

DATA = Path(__file__).parents[1] / "fixtures" / "data"
LAYERS = QWEN2["num_hidden_layers"]
NORM = "model.layers.1.post_attention_layernorm.weight"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def quantized(folder: Path, config=QWEN2, head=quantize_int8, **options) -> Path:
    """A decoder in the quantizer's form: random 4-bit layers, an int8 head, a norm that is not exact in float16."""
    write_float(folder / "float", config, seed=5, **options)
    source = float_model(folder / "float", folder / "graph")
    layers = quantize_all(source)
    if head is None:
        del layers[HEAD]
    else:
        layers[HEAD] = head(products(source)[HEAD])
    gamma = np.random.default_rng(6).uniform(0.5, 2, 64).astype(np.float32)
    path = rewritten(source, folder / "onnx", layers, {NORM: gamma})
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(source.with_name(name), path.with_name(name))
    return path


def same(path: Path, other: Path) -> None:
    """Asserts that every layer, norm and table is equal."""
    a, b = find_linears(path), find_linears(other)
    assert len(a) == len(b) >= 7 * LAYERS
    for x, y in zip(a, b):
        assert (x.name, x.group_size, x.bits) == (y.name, y.group_size, y.bits)
        assert np.array_equal(x.q, y.q)
        assert np.array_equal(x.scales, y.scales)
        assert np.array_equal(x.zero_points, y.zero_points)
        assert (x.bias is None) == (y.bias is None)
        assert x.bias is None or np.array_equal(x.bias, np.asarray(y.bias))
    values = [{t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer} for file in (path, other)]
    assert values[0].keys() == values[1].keys()
    for name, tensor in values[0].items():
        assert np.array_equal(tensor, values[1][name]), name
    assert np.array_equal(logits(path), logits(other))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_round_trip(family, tied, dtype, tmp_path):
    config = awq_config(family, tie_word_embeddings=tied, head_dim=None if tied else 32)
    path = quantized(tmp_path, config, dtype=dtype)
    done = []
    write_autoawq_folder(path, tmp_path / "awq", lambda *counts: done.append(counts))
    assert done == sorted(done)
    assert done[-1] == (2 * LAYERS, 2 * LAYERS)
    tensors = read_tensors(tmp_path / "awq")
    assert ("lm_head.weight" in tensors) == (not tied)
    assert tensors[NORM].dtype == np.float32
    assert tensors["model.norm.weight"].dtype == np.float16
    # Read by the format's description, element by element, as another program would read it.
    for layer, name in zip(find_linears(path), [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS]):
        q, zero_points, scales = slow_linear(tensors, name)
        assert np.array_equal(q, layer.q)
        assert np.array_equal(zero_points, layer.zero_points)
        assert np.array_equal(scales, layer.scales)
    shape = decoder_config(read_settings(tmp_path / "awq" / "config.json"))
    expected = reference_logits(float_tensors(tensors, LAYERS), shape, IDS)
    session = onnxruntime.InferenceSession(path)
    found = step(session, IDS, empty_cache(session), len(IDS))[0]
    # For other programs the integer table is rounded to float16, but not more.
    assert relative_error(found, expected) < 2e-3
    same(path, export_checkpoint(tmp_path / "awq", tmp_path / "back"))
    same(path, resolve_model_in(tmp_path, tmp_path / "awq"))


def resolve_model_in(cache: Path, model: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(cache / "cache"))
        return resolve_model(model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_a_checkpoint_comes_back(dtype, tied, tmp_path):
    """AutoAWQ -> ONNX -> AutoAWQ: the same tensors, bit for bit, except an untied head, which has become int8."""
    config = awq_config(tie_word_embeddings=tied)
    before = make_checkpoint(tmp_path / "in", config, dtype=dtype)
    path = export_checkpoint(tmp_path / "in", tmp_path / "onnx")
    write_autoawq_folder(path, tmp_path / "awq")
    after = read_tensors(tmp_path / "awq")
    head = after.pop("lm_head.weight", None)
    expected = before.pop("lm_head.weight", None)
    assert after.keys() == before.keys()
    assert all(np.array_equal(values, before[name]) for name, values in after.items())
    assert (head is None) == (expected is None) == tied
    if head is not None and expected is not None:
        assert 0 < np.abs(head - expected).max() < np.abs(expected).max() / 127
        assert head.dtype == np.float16
    # A tied head is made from the table again, so there is no file of scales.
    assert len(list((tmp_path / "awq").glob("*.npy"))) == (0 if tied else 1)
    same(path, export_checkpoint(tmp_path / "awq", tmp_path / "back"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("table", ["Q8_0", "Q4_0", "F16", "F32"])
def test_gguf_tables(table, tied, tmp_path):
    """Q4_0 layers are AutoAWQ's with zero points of 8; tables of 8 and 4 bits keep their integers."""
    source = tmp_path / "m.gguf"
    write_gguf(source, "qwen2", "Q4_0", tied, table=table)
    path = export_gguf(source, tmp_path / "onnx")
    write_autoawq_folder(path, tmp_path / "awq")
    same(path, export_checkpoint(tmp_path / "awq", tmp_path / "back"))
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    tables = config.get("integer_tables", {})
    if table == "Q8_0":
        assert tables == {name: {"bits": 8, "group_size": 32} for name in names}
    elif table == "Q4_0":
        assert tables == {name: {"bits": 4, "group_size": 32} for name in names}


def test_q8_0_of_a_gguf_is_kept(tmp_path):
    """GGUF -> float -> quantized -> AutoAWQ -> ONNX: at the end the table has the blocks of the GGUF file."""
    write_gguf(tmp_path / "m.gguf", table="Q8_0")
    source = float_model(tmp_path / "m.gguf", tmp_path / "float")
    layers = quantize_all(source)
    layers[HEAD] = quantize_head(products(source)[HEAD])
    path = rewritten(source, tmp_path / "onnx", layers)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(source.with_name(name), path.with_name(name))
    write_autoawq_folder(path, tmp_path / "awq")
    back = find_linears(export_checkpoint(tmp_path / "awq", tmp_path / "back"))[-1]
    original = find_linears(export_gguf(tmp_path / "m.gguf", tmp_path / "direct"))[-1]
    assert np.array_equal(back.q, original.q)
    assert np.array_equal(back.scales, original.scales)
    assert back.group_size == original.group_size == 32
    assert np.load(tmp_path / "awq" / "model.embed_tokens.weight.scales.npy").dtype == np.float16


def test_files(tmp_path):
    """The files have the keys that transformers reads, and the text settings are unchanged."""
    path = quantized(tmp_path)
    write_autoawq_folder(path, tmp_path / "awq")
    names = ["config.json", "generation_config.json", "model.embed_tokens.weight.scales.npy"]
    names += ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(item.name for item in (tmp_path / "awq").iterdir()) == names
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["torch_dtype"] == "float16"
    assert "chat_template" not in config
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    before, after = TextFolder(path.parent), TextFolder(tmp_path / "awq")
    assert before.prompt_ids("hi") == after.prompt_ids("hi")
    assert before.stop_ids == after.stop_ids
    # Existing files have priority.
    (path.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "Mine", "eos_token": "<|endoftext|>"}')
    (path.parent / "chat_template.jinja").write_text("j")
    write_autoawq_folder(path, tmp_path / "awq")
    tokens = json.loads((tmp_path / "awq" / "tokenizer_config.json").read_text())
    assert tokens == {"tokenizer_class": "Mine", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    assert (tmp_path / "awq" / "chat_template.jinja").read_text() == "j"
    first = {item.name: item.read_bytes() for item in (tmp_path / "awq").iterdir()}
    write_autoawq_folder(path, tmp_path / "awq")
    assert {item.name: item.read_bytes() for item in (tmp_path / "awq").iterdir()} == first


@pytest.mark.parametrize("place", ["float", "awq"])
def test_rotary_scaling(place, tmp_path):
    """Llama 3.1's factors are in the graph's tables, and config.json has their description."""
    config = awq_config(LLAMA, head_dim=32, rope_theta=100.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    if place == "float":
        path = quantized(tmp_path, config)
    else:
        make_checkpoint(tmp_path / "in", config)
        path = export_checkpoint(tmp_path / "in", tmp_path / "onnx")
    write_autoawq_folder(path, tmp_path / "awq")
    same(path, export_checkpoint(tmp_path / "awq", tmp_path / "back"))
    values = json.loads(path.with_name("config.json").read_text())
    del values["rope_scaling"]
    path.with_name("config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"the rotary tables \(cos_cache\) are not those of config\.json's rope_theta"):
        write_autoawq_folder(path, tmp_path / "bad")


def test_layers_that_stay_float(tmp_path):
    """They are named in modules_to_not_convert; a float head that is tied stays tied."""
    path = quantized(tmp_path, head=None)
    source = tmp_path / "graph" / "model.onnx"
    layers = {name: layer for name, layer in quantize_all(source).items() if "v_proj" not in name and name != HEAD}
    path = rewritten(source, tmp_path / "onnx", layers)
    write_autoawq_folder(path, tmp_path / "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    floats = [f"model.layers.{i}.self_attn.v_proj" for i in range(LAYERS)]
    assert config["quantization_config"]["modules_to_not_convert"] == floats
    assert config["tie_word_embeddings"]
    back = export_checkpoint(tmp_path / "awq", tmp_path / "back", lm_head="float")
    assert relative_error(logits(back), logits(path)) < 1e-6


def test_scales_are_part_of_the_checkpoint(tmp_path):
    """A change of the scales changes the name of the export in the cache."""
    write_autoawq_folder(quantized(tmp_path), tmp_path / "awq")
    first = resolve_model_in(tmp_path, tmp_path / "awq")
    assert resolve_model_in(tmp_path, tmp_path / "awq") == first
    os.utime(tmp_path / "awq" / "model.embed_tokens.weight.scales.npy", ns=(0, 0))
    assert resolve_model_in(tmp_path, tmp_path / "awq") != first


def test_biases_of_a_llama(tmp_path):
    """transformers loads them if config.json says so; for Qwen2 it always does."""
    for family, biased in ((QWEN2, True), (LLAMA, False)):
        path = quantized(tmp_path / family["model_type"], family)
        config = json.loads(path.with_name("config.json").read_text())
        path.with_name("config.json").write_text(json.dumps(config | {"model_type": "llama"}))
        write_autoawq_folder(path, tmp_path / "awq")
        written = json.loads((tmp_path / "awq" / "config.json").read_text())
        assert (written["architectures"], written["attention_bias"]) == (["LlamaForCausalLM"], biased)
        same(path, export_checkpoint(tmp_path / "awq", tmp_path / "back"))


def test_head_of_four_bits(tmp_path):
    """It is a quantized layer like the others, and the embedding, which was tied to it, becomes a float table."""
    path = quantized(tmp_path, head=lambda weight: round_to_nearest(weight, "head"))
    write_autoawq_folder(path, tmp_path / "awq")
    tensors = read_tensors(tmp_path / "awq")
    assert {"model.embed_tokens.weight", "lm_head.qweight", "lm_head.qzeros", "lm_head.scales"} <= set(tensors)
    same(path, export_checkpoint(tmp_path / "awq", tmp_path / "back"))


def test_same_weights(tmp_path):
    """One model in three formats gives the same checkpoint, with the names and values of AutoAWQ's own."""
    folder = DATA / "same_weights"
    expected = read_tensors(folder / "autoawq")
    shutil.copytree(folder / "genai", tmp_path / "genai")
    shutil.copyfile(folder / "autoawq" / "config.json", tmp_path / "genai" / "config.json")
    sources = {
        "autoawq": export_checkpoint(folder / "autoawq", tmp_path / "a"),
        "gguf": export_gguf(folder / "model.gguf", tmp_path / "g"),
        "genai": tmp_path / "genai" / "model.onnx",
    }
    for name, path in sources.items():
        write_autoawq_folder(path, tmp_path / name / "out")
        found = read_tensors(tmp_path / name / "out")
        assert found.keys() == expected.keys()
        for tensor, values in found.items():
            assert np.array_equal(values, expected[tensor]), (name, tensor)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_foreign_graph(tied, tmp_path):
    """optimum's float graph, quantized: its names are Hugging Face's, and config.json has all other settings."""
    source = DATA / "optimum_qwen2_unquantized.onnx"
    if not tied:
        source = float_twin(DATA / "optimum_qwen2.onnx", tmp_path / "float.onnx")
    layers = quantize_all(source)
    head = list(layers)[-1]
    layers[head] = quantize_int8(products(source)[head])
    path = rewritten(source, tmp_path / "onnx", layers)
    beside(path, intermediate_size=64 if tied else 96, tie_word_embeddings=tied)
    write_autoawq_folder(path, tmp_path / "awq")
    assert ("lm_head.weight" in read_tensors(tmp_path / "awq")) == (not tied)
    back = export_checkpoint(tmp_path / "awq", tmp_path / "back")
    assert relative_error(logits(back), logits(path)) < 1e-5


NAMELESS = [name for name in FOREIGN if name.startswith(("torch", "transformers"))]


def beside(path: Path, **changes) -> None:
    """The files of same_weights, whose shape the other fixtures share."""
    shutil.copyfile(DATA / "same_weights/autoawq/tokenizer.json", path.with_name("tokenizer.json"))
    config = json.loads((DATA / "same_weights/autoawq/config.json").read_text())
    path.with_name("config.json").write_text(json.dumps(config | {"architectures": None} | changes))


@pytest.mark.parametrize("name", [name for name in NAMELESS if "fused" not in name])
def test_layers_without_names(name, tmp_path):
    """torch.onnx keeps the names of norms and embeddings; the layers are found by their roles."""
    source = float_twin(DATA / f"{name}.onnx", tmp_path / "float.onnx")
    layers = quantize_all(source)
    head = list(layers)[-1]
    layers[head] = quantize_int8(products(source)[head])
    path = rewritten(source, tmp_path / "onnx", layers)
    llama = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    beside(path, **(llama if "llama" in name else {}))
    write_autoawq_folder(path, tmp_path / "awq")
    back = export_checkpoint(tmp_path / "awq", tmp_path / "back")
    assert relative_error(logits(back), logits(path)) < 1e-5


def test_packed_layers_are_refused(tmp_path):
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    shutil.copyfile(DATA / "transformers_llama_fused.onnx", path)
    beside(path, model_type="llama")
    refused(
        path, tmp_path, "has no linear layer model.layers.0.self_attn.q_proj that can be identified by its name or role"
    )


UNKNOWN = {
    "neighbours": ("rotary_interleaved", "layer model.layers.0.self_attn: it rotates neighbours (rotary_interleaved)"),
    "layers": ("num_hidden_layers", "the graph has 2 layers, and config.json says 1"),
}


@pytest.mark.parametrize(("key", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_the_format_cannot_say(key, message, tmp_path):
    """Readers would compute something else."""
    path = quantized(tmp_path)
    if key == "num_hidden_layers":
        config = json.loads(path.with_name("config.json").read_text())
        path.with_name("config.json").write_text(json.dumps(config | {key: 1}))
    else:
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.attribute.append(onnx.helper.make_attribute(key, 1))
        onnx.save(model, path)
    refused(path, tmp_path, message)


def test_an_operator_that_does_not_fit(tmp_path):
    """It is named: a layer is not taken for what it is called."""
    path = quantized(tmp_path)
    model = onnx.load(path, load_external_data=False)
    (target,) = (node for node in model.graph.node if node.name == "/model/layers.1/mlp/down_proj/MatMulNBits")
    made = onnx.helper.make_node("Tanh", [target.input[0]], ["odd"], name="odd_one")
    target.input[0] = "odd"
    model.graph.node.insert(list(model.graph.node).index(target), made)
    onnx.save(model, path)
    expected = "has no known form of model.layers.1.mlp that can be identified by its name or role: Tanh odd_one: "
    refused(path, tmp_path, expected + "where the product of activated gate and up is expected")


def refused(path: Path, folder: Path, message: str) -> None:
    """The error is one line, and no file remains."""
    before = sorted(item.name for item in folder.iterdir())
    with pytest.raises(UserError) as error:
        write_autoawq_folder(path, folder / "awq")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(item.name for item in folder.iterdir()) == before


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """A float graph whose layers the tests quantize in forms that AutoAWQ does not support."""
    folder = tmp_path_factory.mktemp("graph")
    write_float(folder / "in", QWEN2, seed=5)
    return float_model(folder / "in", folder / "out")


def _scale(layer: QuantizedLinear) -> QuantizedLinear:
    scales = layer.scales.copy()
    scales[5, 1] = 1e5
    return replace(layer, scales=scales)


FIRST, LAST = "/model/layers.0/self_attn/q_proj/FusedMatMul", "/model/layers.1/mlp/down_proj/FusedMatMul"
FORMS = {
    "scale": (FIRST, _scale, "layer model.layers.0.self_attn.q_proj: a scale is 100000, which float16 does not hold"),
    "fine scale": (
        LAST,
        lambda layer: replace(layer, scales=layer.scales * np.float32(1 + 2**-12)),
        "layer model.layers.1.mlp.down_proj: a scale is ",
    ),
    "float": (
        LAST,
        lambda layer: replace(layer, zero_points=layer.zero_points.astype(np.float32)),
        "layer model.layers.1.mlp.down_proj: its zero points are floats, and AutoAWQ GEMM holds integers",
    ),
    "8 bits": (FIRST, lambda layer: replace(layer, bits=8), "its weights have 8 bits, and AutoAWQ GEMM holds 4"),
    "groups": (
        LAST,
        lambda layer: replace(layer, group_size=16, scales=np.ones((64, 6), np.float32), zero_points=layer.q[:, :6]),
        "layer model.layers.1.mlp.down_proj: group_size is 16, that of layers before 32; AutoAWQ has one",
    ),
    "short group": (
        LAST,
        lambda layer: replace(layer, group_size=64, scales=layer.scales[:, :2], zero_points=layer.zero_points[:, :2]),
        "layer model.layers.1.mlp.down_proj: K is 96, no multiple of group_size 64",
    ),
    "head": (
        HEAD,
        lambda layer: replace(layer, bits=8, zero_points=layer.zero_points + 1),
        "layer /lm_head/MatMulNBits: a table with zero points of its own has no float form",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), FORMS.values(), ids=FORMS)
def test_unsupported_forms(name, change, message, graph, tmp_path):
    layers = {key: value for key, value in quantize_all(graph).items() if key != HEAD or name == HEAD}
    layers[name] = change(layers[name])
    path = rewritten(graph, tmp_path / "onnx", layers)
    for file in ("config.json", "tokenizer.json"):
        shutil.copyfile(graph.with_name(file), path.with_name(file))
    refused(path, tmp_path, message)


def test_other_damage(graph, tmp_path):
    path = rewritten(graph, tmp_path / "onnx", quantize_all(graph))
    refused(path, tmp_path, "config.json cannot be read")
    config = json.loads(graph.with_name("config.json").read_text())
    path.with_name("config.json").write_text(json.dumps(config))
    refused(path, tmp_path, "has no tokenizer.json")
    shutil.copyfile(graph.with_name("tokenizer.json"), path.with_name("tokenizer.json"))
    for changes, message in (
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported"),
        (
            {"num_hidden_layers": 3},
            "has no constant model.layers.2.input_layernorm.weight that can be identified",
        ),
        ({"intermediate_size": 128}, "model.layers.0.mlp.gate_proj is [96, 64], and config.json asks for [128, 64]"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj is [32, 64], and config.json asks for [64, 64]"),
        ({"vocab_size": 300}, "model.embed_tokens.weight is [264, 64], and config.json asks for [300, 64]"),
        ({"rope_theta": 50.0}, "the rotary tables (cos_cache) are not those of config.json's rope_theta"),
    ):
        path.with_name("config.json").write_text(json.dumps(config | changes))
        refused(path, tmp_path, message)
    refused(graph, tmp_path, "has no quantized linear layers")
    path.with_name("config.json").write_text(json.dumps(config))
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-5000])
    refused(path, tmp_path, "is truncated")
