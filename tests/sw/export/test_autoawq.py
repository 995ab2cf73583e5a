# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ checkpoints: exact weights, graphs with the results of a plain numpy decoder, one line for bad folders."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sw.checkpoints.autoawq import pack_words, unpack_words
from sw.checkpoints.huggingface import decoder_config
from sw.checkpoints.settings import read_settings
from sw.export.huggingface import export_checkpoint
from sw.graph.linears import find_linears
from sw.synthetic import encode
from sw.text.folder import TextFolder
from tests.sw.fixtures.checkpoints import (
    IDS,
    LINEARS,
    LLAMA,
    QWEN2,
    awq_config,
    empty_cache,
    float_tensors,
    make_checkpoint,
    nibble,
    read_tensors,
    reference_logits,
    refused,
    relative_error,
    slow_linear,
    step,
    write_tensors,
)

ROOT = Path(__file__).resolve().parents[3]
LAYERS = QWEN2["num_hidden_layers"]


def decoder_logits(folder: Path, tensors: dict[str, np.ndarray], head: np.ndarray | None = None, **options: Any):
    """The logits of the folder's decoder, by default with the checkpoint's own head."""
    values = float_tensors(tensors, LAYERS) | ({} if head is None else {"lm_head.weight": head})
    return reference_logits(values, decoder_config(read_settings(folder / "config.json")), IDS, **options)


def onnx_logits(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return step(session, IDS, empty_cache(session), len(IDS))[0]


def test_words():
    rng = np.random.default_rng(1)
    words = rng.integers(-(1 << 31), 1 << 31, (5, 3)).astype(np.int32)
    values = unpack_words(words)
    assert values.tolist() == [[nibble(words, row, column) for row in range(5)] for column in range(24)]
    assert np.array_equal(pack_words(values), words)


@pytest.mark.parametrize("group_size", [32, 16, -1])
@pytest.mark.parametrize(("zero_point", "qzeros"), [(True, True), (False, True), (False, False)])
def test_weights_are_exact(group_size, zero_point, qzeros, tmp_path):
    """Zero points in the file are used for any value of zero_point, as in AutoAWQ's own kernels."""
    config = awq_config(quantization={"group_size": group_size, "zero_point": zero_point, "version": "GEMM"})
    tensors = make_checkpoint(tmp_path / "in", config)
    if not qzeros:
        tensors = {name: values for name, values in tensors.items() if not name.endswith("qzeros")}
        write_tensors(tmp_path / "in" / "model.safetensors", tensors)
    linears = find_linears(export_checkpoint(tmp_path / "in", tmp_path / "out"))
    names = [f"model.layers.{i}.{linear}" for i in range(LAYERS) for linear in LINEARS]
    plain = [name.strip("/").replace("/", ".").removesuffix(".MatMulNBits") for name in linears.names]
    assert plain == [*names, "lm_head"]
    for name, layer in zip(names, linears):
        q, zero_points, scales = slow_linear(tensors, name)
        # One group over all of K is written as several equal ones.
        assert layer.group_size == (group_size if group_size > 0 else 64 if layer.k == 64 else 32)
        repeats = layer.groups // scales.shape[1]
        assert np.array_equal(layer.q, q)
        assert np.array_equal(layer.zero_points, np.repeat(zero_points, repeats, axis=1))
        assert np.array_equal(layer.scales, np.repeat(scales, repeats, axis=1))
        bias = tensors.get(f"{name}.bias")
        assert (bias is None) == (layer.bias is None) == ("mlp" in name or "o_proj" in name)
        assert bias is None or np.array_equal(np.asarray(layer.bias), bias)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize(("dtype", "shards"), [("F16", 1), ("BF16", 3), ("F32", 2)])
def test_logits(dtype, shards, family, tied, tmp_path):
    config = awq_config(family, tie_word_embeddings=tied, head_dim=None if tied else 32)
    tensors = make_checkpoint(tmp_path / "in", config, dtype=dtype, shards=shards)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) == shards
    path = export_checkpoint(tmp_path / "in", tmp_path / "float", lm_head="float")
    expected = decoder_logits(tmp_path / "in", tensors)
    assert relative_error(onnx_logits(path), expected) < 1e-5
    path = export_checkpoint(tmp_path / "in", tmp_path / "out")
    linears = find_linears(path)
    assert (len(linears), linears.names[-1], linears[-1].bits) == (7 * LAYERS + 1, "/lm_head/MatMulNBits", 8)
    with_head = decoder_logits(tmp_path / "in", tensors, linears[-1].dequantize())
    logits = onnx_logits(path)
    assert relative_error(logits, with_head) < 1e-5
    assert 1e-4 < relative_error(logits, expected) < 2e-2
    # The logits vary: different tokens are predicted, and there is no extreme logit.
    assert len(set(logits.argmax(axis=1))) > len(IDS) // 2
    assert np.abs(logits).max() < 10 * logits.std()


@pytest.mark.parametrize(("dtype", "stored"), [("F16", "FLOAT16"), ("BF16", "FLOAT"), ("F32", "FLOAT")])
def test_embedding_is_exact(dtype, stored, tmp_path):
    tensors = make_checkpoint(tmp_path / "in", dtype=dtype)
    path = export_checkpoint(tmp_path / "in", tmp_path / "out")
    model = onnx.load(path, load_external_data=False)
    (table,) = [tensor for tensor in model.graph.initializer if tensor.name == "model.embed_tokens.weight"]
    assert table.data_type == getattr(onnx.TensorProto, stored)
    rows = next(node for node in model.graph.node if node.op_type == "SimplifiedLayerNormalization").input[0]
    model.graph.output.append(onnx.ValueInfoProto(name=rows))
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path)
    feeds = {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), np.int64)}
    (values,) = session.run([rows], feeds | empty_cache(session))
    assert np.array_equal(np.asarray(values)[0], tensors["model.embed_tokens.weight"][IDS])


def test_brain_floats(tmp_path):
    """Scales in bfloat16 become float32 without a change, as norms, biases and the embedding do."""
    make_checkpoint(tmp_path / "in", dtype="BF16")
    tensors = read_tensors(tmp_path / "in")
    stored = {name: encode(v.astype(np.float32), "BF16") if v.dtype.kind == "f" else v for name, v in tensors.items()}
    write_tensors(tmp_path / "in" / "model.safetensors", stored)
    tensors = read_tensors(tmp_path / "in")
    path = export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float")
    for name, layer in zip(graph_names(path), find_linears(path)):
        scales = tensors[f"{name}.scales"]
        assert scales.dtype == np.float32
        assert np.array_equal(layer.scales, scales.T)
    assert relative_error(onnx_logits(path), decoder_logits(tmp_path / "in", tensors)) < 1e-5


def graph_names(path: Path) -> list[str]:
    """The checkpoint's names of a graph's quantized layers."""
    return [name.strip("/").replace("/", ".").removesuffix(".MatMulNBits") for name in find_linears(path).names]


def test_layers_that_are_not_quantized(tmp_path):
    """The layers in modules_to_not_convert have a float weight, and stay float."""
    config = awq_config(quantization={"modules_to_not_convert": ["o_proj", "layers.1.mlp"]})
    tensors = make_checkpoint(tmp_path / "in", config)
    plain = [f"model.layers.{i}.self_attn.o_proj" for i in range(LAYERS)]
    plain += [f"model.layers.1.{name}" for name in LINEARS if "mlp" in name]
    weights = float_tensors(tensors, LAYERS)
    for name in plain:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = weights[f"{name}.weight"].astype(np.float16)
    write_tensors(tmp_path / "in" / "model.safetensors", tensors)
    path = export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float")
    assert len(find_linears(path)) == 7 * LAYERS - len(plain)
    assert relative_error(onnx_logits(path), decoder_logits(tmp_path / "in", tensors)) < 1e-5


def test_quantized_head(tmp_path):
    """AutoAWQ does not quantize the head; a head that another tool has quantized is not changed."""
    config = awq_config(tie_word_embeddings=False)
    tensors = make_checkpoint(tmp_path / "in", config)
    del tensors["lm_head.weight"]
    for part in ("qweight", "qzeros", "scales"):
        # 264 columns of the same 64 rows.
        source = np.concatenate([tensors[f"model.layers.{i % 2}.mlp.up_proj.{part}"] for i in range(3)], axis=1)
        tensors[f"lm_head.{part}"] = np.ascontiguousarray(source[:, : 264 if part == "scales" else 33])
    write_tensors(tmp_path / "in" / "model.safetensors", tensors)
    head = find_linears(export_checkpoint(tmp_path / "in", tmp_path / "out"))[-1]
    q, zero_points, scales = slow_linear(tensors, "lm_head")
    assert (head.name, head.bits) == ("/lm_head/MatMulNBits", 4)
    assert np.array_equal(head.q, q)
    assert np.array_equal(head.zero_points, zero_points)
    assert np.array_equal(head.scales, scales)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_llama3_rotary_scaling(place, tmp_path):
    """The reference has the cases of transformers; the context is short, so that all of them occur."""
    scaling = {"rope_type": "llama3", **LLAMA3}
    config = awq_config(LLAMA, head_dim=32, rope_theta=100.0, **{place: scaling})
    if place == "rope_parameters":
        scaling["rope_theta"] = config.pop("rope_theta")
    tensors = make_checkpoint(tmp_path / "in", config)
    frequencies, kinds = [], set()
    for i in range(16):
        frequency = 100.0 ** (-i / 16)
        wavelength = 2 * math.pi / frequency
        if wavelength < 32 / 4:
            kinds.add("high")
        elif wavelength > 32 / 1:
            kinds.add("low")
            frequency /= 8
        else:
            kinds.add("between")
            smooth = (32 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        frequencies.append(frequency)
    assert kinds == {"high", "low", "between"}
    logits = onnx_logits(export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float"))
    expected = decoder_logits(tmp_path / "in", tensors, frequencies=np.array(frequencies))
    assert relative_error(logits, expected) < 1e-5
    assert relative_error(logits, decoder_logits(tmp_path / "in", tensors)) > 1e-3


def test_files(tmp_path):
    make_checkpoint(tmp_path / "in", awq_config(max_position_embeddings=131072))
    path = export_checkpoint(tmp_path / "in", tmp_path / "out")
    names = ["config.json", "model.onnx", "model.onnx.data", "tokenizer.json"]
    assert sorted(item.name for item in path.parent.iterdir()) == names
    assert (path.parent / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()
    config = json.loads((path.parent / "config.json").read_text())
    template = config.pop("chat_template")
    assert "<|im_start|>" in template
    assert config == {
        "model_type": "qwen2",
        "name": "in",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 264,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": [258, 256],
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
    }
    (cos,) = [t for t in onnx.load(path, load_external_data=False).graph.initializer if t.name == "cos_cache"]
    assert list(cos.dims) == [32768, 8]
    # The export has the same text settings as its source.
    for folder in (tmp_path / "in", path.parent):
        text = TextFolder(folder)
        assert text.stop_ids == {256, 258}
        ids = text.prompt_ids("hi")
        assert (ids[0], ids[-1]) == (257, text.tokenizer.token_to_id("Ċ"))
        assert text.tokenizer.decode(ids, False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    first = [path.with_name(name).read_bytes() for name in names]
    export_checkpoint(tmp_path / "in", tmp_path / "out")
    assert [path.with_name(name).read_bytes() for name in names] == first


def test_text_settings(tmp_path):
    """A separate template file has priority; special tokens may be objects; of several templates one is the default."""
    make_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps(awq_config(eos_token_id=None)))
    settings = tmp_path / "in" / "tokenizer_config.json"

    def exported() -> list[Any]:
        path = export_checkpoint(tmp_path / "in", tmp_path / "out")
        config = json.loads(path.with_name("config.json").read_text())
        return [config[key] for key in ("bos_token", "eos_token", "eos_token_id", "chat_template")]

    (tmp_path / "in" / "generation_config.json").unlink()
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    settings.write_text(json.dumps({"eos_token": {"content": "<|im_start|>"}, "chat_template": templates}))
    assert exported() == ["<|endoftext|>", "<|im_start|>", [257], "d"]
    (tmp_path / "in" / "chat_template.jinja").write_text("j\n")
    settings.write_text(json.dumps({"bos_token": "x", "eos_token": None, "chat_template": "d"}))
    assert exported() == ["x", None, [], "j\n"]
    (tmp_path / "in" / "chat_template.jinja").unlink()
    settings.unlink()
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": 258}')
    assert exported() == ["<|endoftext|>", "<|im_end|>", [258], None]


ROTARY = {"rope_type": "llama3", **LLAMA3}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"quantization_config": None}, "is not quantized: its config.json has no quantization_config"),
    "object": ({"quantization_config": [4]}, "quantization_config is an object, not [4]"),
    "architecture": ({"model_type": "gemma"}, "model_type 'gemma' is not supported (llama, qwen2, qwen3, "),
    "no architecture": ({"model_type": ["qwen2"]}, "is not supported (llama, qwen2, "),
    "class": ({"architectures": ["Qwen2ForSequenceClassification"]}, "only Qwen2ForCausalLM"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
    "window": ({"use_sliding_window": True}, "use_sliding_window 'True' is not supported, only False"),
    "windows": ({"layer_types": ["full_attention", "sliding_attention"]}, "attention with a sliding window"),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        "rotary scaling 'yarn' is not supported, only linear and llama3",
    ),
    "yarn again": ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling 'yarn' is not supported"),
    "llama3": ({"rope_scaling": {"rope_type": "llama3"}}, "factor is a positive number, not null"),
    "frequencies": ({"rope_scaling": ROTARY | {"high_freq_factor": 1}}, "high_freq_factor is above low_freq_factor, 1"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 1, not 0.5"),
    "no number": ({"hidden_size": "64"}, 'hidden_size is a whole number from 1, not "64"'),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads is a whole number from 1, not 0"),
    "truth": ({"num_hidden_layers": True}, "num_hidden_layers is a whole number from 1, not true"),
    "absent": ({"vocab_size": None}, "vocab_size is a whole number from 1, not null"),
    "epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps is a positive number, not -1"),
    "endless": ({"rope_theta": math.inf}, "rope_theta is a positive number, not Infinity"),
    "large": ({"rope_theta": 10**400}, "rope_theta is a positive number, not 1000"),
    "tie": ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is true or false, not "yes"'),
    "heads": ({"num_key_value_heads": 3}, "4 heads are not a multiple of 3 key-value heads"),
    "odd head": ({"head_dim": 15}, "head size 15 is odd"),
    "huge head": ({"head_dim": 1 << 40, "rope_scaling": ROTARY}, "head size 1099511627776 is above 1024"),
    "vocab": ({"vocab_size": 300}, "embedding is [264, 64], but the model's configuration asks for [300, 64]"),
    "layers": ({"num_hidden_layers": 3}, "has no tensor model.layers.2.input_layernorm.weight"),
    "many layers": ({"num_hidden_layers": 10**9}, "the model has 1,000,000,000 layers, which is above 4,096"),
    "head": ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    "size": ({"intermediate_size": 128}, "/model/layers.0/mlp/gate_proj is [96, 64], but the model's configuration"),
    "stop": ({"eos_token_id": "x"}, 'eos_token_id is a token id or a list of them, not "x"'),
    "stops": ({"eos_token_id": [1, -1]}, "eos_token_id is a token id or a list of them"),
}
REFUSED_FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "method": (
        {"quant_method": "hqq"},
        "is quantized by 'hqq', which is not supported: awq, gptq, compressed-tensors, auto",
    ),
    "no method": ({"quant_method": None}, "is quantized by 'None', which is not supported"),
    "version": ({"version": "gemv"}, "is AutoAWQ's version 'gemv', and only GEMM is read"),
    "marlin": ({"version": "marlin"}, "is AutoAWQ's version 'marlin', and only GEMM is read"),
    "other key": ({"version": None, "checkpoint_format": "gemv"}, "is AutoAWQ's checkpoint_format 'gemv', and only"),
    "format": ({"format": "llm-awq"}, "is AutoAWQ's format 'llm-awq', and only GEMM is read"),
    "backend": ({"backend": "llm-awq"}, 'quantization_config\'s backend is autoawq, not "llm-awq"'),
    "exllama": ({"version": "exllama"}, "is AutoAWQ's version 'exllama', and only GEMM is read"),
    "bits": ({"bits": 8}, "quantization_config's bits is 4, not 8"),
    "group": (
        {"group_size": 40},
        "group_size is -1 or a multiple of 16, not 40",
    ),
    "group of 8": ({"group_size": 8}, "group_size is -1 or a multiple of 16, not 8"),
    "other group": ({"group_size": 16}, "scales hold [2, 64] values, qweight [64, 64], and group_size is 16"),
    "long group": ({"group_size": 128}, "scales hold [2, 64] values, qweight [64, 64], and group_size is 128"),
    "zero point": ({"zero_point": 1}, "zero_point is true or false, not 1"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose config.json the tests replace."""
    folder = tmp_path_factory.mktemp("awq") / "in"
    make_checkpoint(folder)
    return folder


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_config(changes, message, checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({**QWEN2, **changes}))
    refused(checkpoint, message)


@pytest.mark.parametrize(("changes", "message"), REFUSED_FORMATS.values(), ids=REFUSED_FORMATS.keys())
def test_refused_format(changes, message, checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(awq_config(quantization=changes)))
    refused(checkpoint, message)


def _change(tensors: dict[str, np.ndarray], name: str, change) -> None:
    tensors[name] = np.ascontiguousarray(change(tensors[name]))


FIRST = "model.layers.0.self_attn.q_proj"
DAMAGED = {
    "no zeros": (lambda t: t.pop(f"{FIRST}.qzeros"), f"has no tensor {FIRST}.qzeros"),
    "no scales": (lambda t: t.pop(f"{FIRST}.scales"), f"has no tensor {FIRST}.scales"),
    "no weights": (lambda t: t.pop(f"{FIRST}.qweight"), f"has no tensor {FIRST}.qweight"),
    "no norm": (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
    "scales": (lambda t: _change(t, f"{FIRST}.scales", lambda v: v[:, :8]), "scales hold [2, 8] values"),
    "zeros": (lambda t: _change(t, f"{FIRST}.qzeros", lambda v: v[:1]), "qzeros hold [1, 64] values"),
    "vector": (lambda t: _change(t, f"{FIRST}.qweight", np.ravel), "qweight is [512], not a matrix"),
    "type": (lambda t: _change(t, f"{FIRST}.qweight", np.float32), "qweight is F32, not I32"),
    "nan": (lambda t: _change(t, f"{FIRST}.scales", lambda v: v * np.nan), "holds values that are not finite"),
    "bias": (lambda t: _change(t, f"{FIRST}.bias", lambda v: v[:8]), "bias must be float32 [64], not float32 [8]"),
    "scalar": (lambda t: _change(t, "model.norm.weight", lambda v: v[:1]), "/model/norm is [1]"),
    "narrow": (lambda t: _change(t, f"{FIRST}.qweight", lambda v: v[:, :1]), "qweight [64, 8]"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_tensors(damage, message, tmp_path):
    tensors = make_checkpoint(tmp_path / "in")
    damage(tensors)
    write_tensors(tmp_path / "in" / "model.safetensors", tensors)
    refused(tmp_path / "in", message)


FILES = {
    "tokenizer": ("tokenizer.json", None, "has no tokenizer.json"),
    "bad tokenizer": ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
    "config": ("config.json", None, "config.json cannot be read"),
    "bad config": ("config.json", "{", "config.json is not JSON"),
    "nested config": ("config.json", "[" * 100_000, "config.json is not JSON"),
    "list": ("generation_config.json", "[]", "generation_config.json is not a JSON object"),
    "template": ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is text, not 3"),
    "templates": ("tokenizer_config.json", '{"chat_template": [3, {"name": "a"}]}', "a template named default"),
    "token": ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is a token's text, not 3"),
    "not UTF-8": ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    "weights": ("model.safetensors", None, "has no .safetensors files"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES.keys())
def test_damaged_files(name, content, message, tmp_path):
    make_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path / "in", message)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999])
def test_truncated(share, tmp_path):
    make_checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    refused(tmp_path / "in", "model.safetensors is ")


def run_cli(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_line(tmp_path):
    make_checkpoint(tmp_path / "in")
    out = tmp_path / "new" / "out"
    good = run_cli("sw.awq_export", str(tmp_path / "in"), "--out", str(out), "--lm-head", "float")
    assert (good.returncode, good.stdout) == (0, f"{out / 'model.onnx'}\n")
    assert len(find_linears(out / "model.onnx")) == 7 * LAYERS
    for arguments, message in (
        ([str(tmp_path / "none"), "--out", str(tmp_path / "a")], "no such folder"),
        ([str(tmp_path), "--out", str(tmp_path / "a")], "config.json cannot be read"),
        ([str(tmp_path / "in"), "--out", str(tmp_path / "a"), "--lm-head", "int4"], "invalid choice: 'int4'"),
    ):
        bad = run_cli("sw.awq_export", *arguments)
        assert (bad.returncode, bad.stdout) == (2, "")
        assert bad.stderr.startswith("error: ")
        assert message in bad.stderr
        assert bad.stderr.count("\n") == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in", "new"]
