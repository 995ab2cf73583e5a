# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.layers``: the attention of every block is exact and close to onnxruntime, and one line says so."""

import numpy as np
import onnx
import pytest

from sw import layers
from sw.graph.attention import group_query_attention
from sw.graph.file import OnnxFile
from sw.graph.match import match_decoder
from sw.layers import main
from sw.model.parts import Decoder
from sw.ort.capture_attention import capture_attention, rotated
from sw.ort.feeds import build_feeds
from sw.ort.session import exact_session
from sw.program import alone
from sw.program.load import attention_of
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_decoder import DATA, IDS, changed
from tests.sw.runtime.test_device_attention import narrow
from tests.sw.test_layers import ASYMMETRIC, SYMMETRIC, document

GRAPHS = {"plain": {"head_size": 32}, "padded": {"head_size": 80}, "normed": {"head_size": 32, "head_norms": "qk"}}


def notes(capsys, *arguments):
    """(status, lines of stdout, notes on stderr)."""
    status = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return status, out.splitlines(), [line for line in err.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize(
    ("device", "model"),
    [
        ("reference", SYMMETRIC),
        ("reference", ASYMMETRIC),
        pytest.param("rtl", SYMMETRIC, marks=pytest.mark.full),
    ],
)
def test_genai_builder(device, model, capsys):
    """With queries in one tensor with k and v, or of their own; keys with a bias have 16 bits."""
    status, values = document(capsys, model, "--device", device, "--tile", 8)
    assert status == 0 and values["config"]["score_words"] > 0
    assert [block["name"] for block in values["attention"]] == ["layers.0.self_attn", "layers.1.self_attn"]
    for block in values["attention"]:
        assert block["exact"] and (block["tokens"], block["positions"]) == (16, 32)
        assert block["key_bits"] in (8, 16) and 0 < block["relative_error"] < 0.02
        assert (block["cycles"] > 0) == (device == "rtl") and block["beats"] > 0
    assert values["totals"]["layers"] == len(values["layers"]) == 11


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs(graph, tokens, tmp_path, capsys):
    path = write_random(tmp_path, context=64, **GRAPHS[graph])
    status, values = document(capsys, path, "--device", "reference", "--tokens", tokens, "--max-tokens", 16)
    assert status == 0 and len(values["attention"]) == 2
    for block in values["attention"]:
        assert block["exact"] and 0 < block["relative_error"] < 0.05


def test_windows(tmp_path, capsys):
    path = changed(write_random(tmp_path, context=64, head_size=32), tmp_path, lambda graph: narrow(graph, 5))
    status, values = document(capsys, path, "--device", "reference", "--tokens", 7)
    assert status == 0
    assert all(block["exact"] and 0 < block["relative_error"] < 0.05 for block in values["attention"])


def test_rotation(tmp_path):
    """The node's keys in the cache are its inputs, rotated by the function that rotates the queries."""
    file = OnnxFile(write_random(tmp_path, context=64, head_size=32))
    decoder = match_decoder(file)
    assert isinstance(decoder, Decoder)
    for block in decoder.blocks:
        attention, rotary = attention_of(block), block.rotary
        inputs = group_query_attention(file.producers[attention.output])
        assert inputs is not None and inputs.key and rotary is not None and rotary.in_attention
        (found,) = capture_attention(file, [(attention, rotary)], IDS)
        again = OnnxFile(file.path)
        session = exact_session(again, again.model, [inputs.query, inputs.key])
        query, key = map(np.asarray, session.run([inputs.query, inputs.key], build_feeds(again, session, IDS)))
        rows = [values.reshape(len(IDS), -1, attention.head_size) for values in (query, key)]
        assert np.allclose(found.k, rotated(file, rotary, rows[1]), rtol=1e-5, atol=1e-5)
        assert np.array_equal(found.q, rotated(file, rotary, rows[0])) and not np.allclose(found.q, rows[0])


def test_difference_is_found(monkeypatch, capsys):
    """One wrong bit in one result of one block gives status 1."""
    plain = alone.defined

    def wrong(config, part, heads, *rest):
        y = plain(config, part, heads, *rest)
        if wrong.calls == 1:
            y.view(np.uint32)[3, 0, 5] ^= 1
        wrong.calls += 1
        return y

    wrong.calls = 0
    monkeypatch.setattr(alone, "defined", wrong)
    status, out, _ = notes(capsys, SYMMETRIC, "--device", "reference", "--tile", 8)
    assert status == 1
    assert "NOT equal: layers.1.self_attn" in out
    assert any(line.startswith("attention of 1 of 2 blocks equals its numpy definition") for line in out)


NOTES = {
    "attention": ([SYMMETRIC], "attention runs on the accelerator as well"),
    "host": ([SYMMETRIC, "--operators", "host"], "only linear layers run on the accelerator: --operators host"),
    "words": (
        [SYMMETRIC, "--score-words", "0"],
        "only linear layers run on the accelerator: the hardware has no attention",
    ),
    "short": (
        [SYMMETRIC, "--score-words", "64", "--tokens", "64", "--max-tokens", "64", "--prompt", "x" * 128],
        "attention runs on the accelerator as well",
    ),
    "graph": (
        [str(DATA / "torch_qwen2_opset18.onnx")],
        "only linear layers run on the accelerator, because of layers.0.self_attn: Softmax node_Softmax_",
    ),
}


@pytest.mark.parametrize(("arguments", "line"), NOTES.values(), ids=NOTES)
def test_notes(arguments, line, capsys):
    status, out, lines = notes(capsys, *arguments, "--device", "reference", "--tile", 8)
    assert status == 0 and len(lines) == 1 and lines[0].startswith(f"note: {line}")
    assert any(text.startswith("attention of 2 of 2") for text in out) == line.startswith("attention")


def test_some_layers_only(capsys):
    assert notes(capsys, SYMMETRIC, "--device", "reference", "--limit", 2)[2] == []


def test_not_finite(tmp_path, capsys):
    """Values that are not finite give one line."""

    def spoil(graph: onnx.GraphProto) -> None:
        tensor = next(one for one in graph.initializer if one.name.endswith("cos_cache"))
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[3] = np.inf
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    path = changed(write_random(tmp_path, context=64, head_size=32), tmp_path, spoil)
    with pytest.raises(layers.UserError, match="not finite"):
        main([str(path), "--device", "reference"])
