# SPDX-License-Identifier: Apache-2.0
"""Feeds for other exporters' decoders: position ids, 32-bit token ids, float16 caches, head sizes not given."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.ort.feeds import build_feeds

IDS = TensorProto.INT32
CACHE = ["b", 3, "p", "head"]


def open_model(folder, inputs):
    """A graph that copies every input to an output."""
    nodes = [helper.make_node("Identity", [name], [f"{name}.out"]) for name in inputs]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(f"{name}.out", kind, shape) for name, (kind, shape) in inputs.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), folder / "m.onnx")
    file = OnnxFile(folder / "m.onnx")
    return file, onnxruntime.InferenceSession(file.path)


def test_decoder(tmp_path):
    inputs = {
        "input_ids": (IDS, ["b", "s"]),
        "attention_mask": (TensorProto.INT64, ["b", "t"]),
        "position_ids": (TensorProto.INT64, ["b", "s"]),
        "past_key_values.0.key": (TensorProto.FLOAT16, ["b", 3, "p", 16]),
    }
    file, session = open_model(tmp_path, inputs)
    feeds = build_feeds(file, session, [5, 6, 7])
    assert feeds["input_ids"].dtype == np.int32
    assert feeds["input_ids"].tolist() == [[5, 6, 7]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2]]
    cache = feeds["past_key_values.0.key"]
    assert (cache.shape, cache.dtype) == ((1, 3, 0, 16), np.float16)
    session.run(None, feeds)


@pytest.mark.parametrize(
    ("name", "content"),
    [("genai_config.json", {"model": {"decoder": {"head_size": 48}}}), ("config.json", {"head_dim": 48})],
)
def test_head_size_from_configuration(name, content, tmp_path):
    inputs = {"input_ids": (IDS, ["b", "s"]), "past_key_values.0.key": (TensorProto.FLOAT, CACHE)}
    file, session = open_model(tmp_path, inputs)
    with pytest.raises(UserError, match=r"nothing says the head size of past_key_values\.0\.key"):
        build_feeds(file, session, [1])
    (tmp_path / name).write_text(json.dumps(content))
    assert build_feeds(file, session, [1])["past_key_values.0.key"].shape == (1, 3, 0, 48)
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        build_feeds(file, session, [1])


def test_noise(tmp_path):
    inputs = {"a": (TensorProto.FLOAT, ["b", "t", 8]), "c": (TensorProto.FLOAT16, ["t", 4]), "d": (1, [2, 3])}
    feeds = build_feeds(*open_model(tmp_path, inputs), None, tokens=5)
    assert {name: values.shape for name, values in feeds.items()} == {"a": (1, 5, 8), "c": (5, 4), "d": (2, 3)}
    assert feeds["c"].dtype == np.float16


@pytest.mark.parametrize(
    ("kind", "message"), [(TensorProto.INT64, "none that a decoder has"), (TensorProto.BOOL, "bool")]
)
def test_inputs_that_cannot_be_fed(kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_feeds(*open_model(tmp_path, {"use_cache": (kind, [1])}), None)
