# SPDX-License-Identifier: Apache-2.0
"""Graphs with QMoE nodes: read as onnxruntime's own kernel computes them, or refused in one line."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from sw.common.errors import UserError
from sw.devices import open_device
from sw.export.resolve import resolve_model
from sw.graph.experts.convert import has_qmoe, write_without_qmoe
from sw.graph.experts.match import find_mixtures
from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB
from sw.model.experts import Routing
from sw.runtime import Decoder
from tests.sw.fixtures.families.qmoe import with_qmoe
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_decoder import hardware, in_blocks, relative, whole_graph

ROUTING = Routing(count=4, used=2, size=64)


def make(folder, bits=4, **options):
    """The path of a graph with QMoE, and that of the graph from which it was made."""
    formats = {f"expert.{index}.{name}_proj": (bits, 32) for index in range(4) for name in ("gate", "up", "down")}
    (folder / "plain").mkdir(exist_ok=True)
    plain = write_random(folder / "plain", formats, routing=ROUTING)
    with_qmoe(plain, folder / "qmoe.onnx", **options)
    return folder / "qmoe.onnx", plain


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-5), (2, 2e-2), (8, 5e-2)])
def test_as_onnxruntime(bits, tolerance, tmp_path):
    """The converted graph has the results of onnxruntime's kernel, and so has the device.

    With 2 and 8 bits the kernel rounds activations to 8 bits.
    """
    path, _ = make(tmp_path, bits)
    assert has_qmoe(path)
    converted = write_without_qmoe(path, tmp_path / "out", [])
    assert not has_qmoe(converted)
    wanted = whole_graph(path)
    assert relative(whole_graph(converted), wanted) < tolerance
    found = find_mixtures(OnnxFile(converted))
    assert [(len(part.experts), part.used) for part in found] == [(4, 2)] * 2
    with open_device("reference", hardware()) as device:
        rows = in_blocks(Decoder(converted, device, context=32))
    assert relative(rows, whole_graph(converted)) < 1e-3


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (4, {"swiglu_fusion": 2}),
        (4, {"swiglu_fusion": 0, "activation_type": "silu"}),
        (4, {"swiglu_fusion": 0}),
        (8, {}),
        (4, {"normalize_routing_weights": 0, "activation_alpha": 1.0, "activation_beta": 0.0}),
    ],
    ids=str,
)
def test_other_forms(bits, options, tmp_path):
    """Forms that the CPU kernel does not have, or in which it rounds activations: the graph from which they came."""
    path, plain = make(tmp_path, bits, **options)
    converted = write_without_qmoe(path, tmp_path / "out", [])
    assert relative(whole_graph(converted), whole_graph(plain)) < 1e-5


def test_scale_of_a_row(tmp_path):
    """Without block_size a row has one scale, and no zero point of its own."""
    shapes = {3: (4, 128), 6: (4, 64)}
    rng = np.random.default_rng(1)
    scales = {place: rng.uniform(0.02, 0.05, shape).astype(np.float32) for place, shape in shapes.items()}
    path, _ = make(tmp_path, block_size=None, zero_points=False, inputs=scales)
    converted = write_without_qmoe(path, tmp_path / "out", [])
    assert relative(whole_graph(converted), whole_graph(path)) < 1e-5
    zeros = {11: (4, 64), 12: (4, 32)}
    scales |= {place: rng.integers(0, 256, shape).astype(np.uint8) for place, shape in zeros.items()}
    with_qmoe(tmp_path / "plain" / "model.onnx", path, block_size=None, inputs=scales)
    converted = write_without_qmoe(path, tmp_path / "other", [])
    assert relative(whole_graph(converted), whole_graph(path)) < 1e-5


@pytest.mark.parametrize("shape", [[1, 5, 64], [5, 64]], ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_one_node(kind, shape, tmp_path):
    """A node alone: activations of both types, with two or three axes; the k of the schema and no block_size."""
    rng, dtype = np.random.default_rng(2), helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    tensors = {
        "w1": rng.integers(0, 256, (3, 64, 32)).astype(np.uint8),
        "s1": rng.uniform(0.01, 0.03, (3, 64)).astype(kind),
        "w2": rng.integers(0, 256, (3, 64, 16)).astype(np.uint8),
        "s2": rng.uniform(0.01, 0.03, (3, 64)).astype(kind),
    }
    values = {"activation_type": "swiglu", "swiglu_fusion": 1, "k": 2}
    node = helper.make_node("QMoE", ["x", "r", "w1", "s1", "", "w2", "s2"], ["y"], domain=CONTRIB, **values)
    infos = [helper.make_tensor_value_info(name, dtype, size) for name, size in (("x", shape), ("r", [5, 3]))]
    made = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    graph = helper.make_graph([node], "one", infos, [helper.make_tensor_value_info("y", dtype, shape)], made)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "one.onnx")
    converted = write_without_qmoe(tmp_path / "one.onnx", tmp_path / "out", [])
    feeds = {"x": rng.standard_normal(shape).astype(kind), "r": rng.standard_normal((5, 3)).astype(kind)}
    wanted, found = (
        np.asarray(onnxruntime.InferenceSession(path).run(None, feeds)[0], np.float32)
        for path in (tmp_path / "one.onnx", converted)
    )
    assert found.shape == tuple(shape)
    assert [(len(part.experts), part.used) for part in find_mixtures(OnnxFile(converted))] == [(3, 2)]
    assert relative(found, wanted) < (1e-5 if kind is np.float32 else 5e-3)


def test_resolved(tmp_path, monkeypatch):
    """The command lines convert a graph once, with its text files."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    path, plain = make(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = resolve_model(path)
    assert found.is_relative_to(tmp_path / "cache") and resolve_model(path) == found
    assert (found.parent / "tokenizer.json").read_text() == "{}"
    assert resolve_model(plain) == plain


REFUSED = {
    "limit": ({"swiglu_limit": 7.0}, "swiglu_limit 7.0 is not supported, only inf"),
    "alpha": ({"activation_alpha": 1.702}, "activation_alpha 1.70"),
    "mixer": ({"use_sparse_mixer": 1}, "use_sparse_mixer 1 is not supported, only 0"),
    "layout": ({"weights_prepacked": 1}, "weights_prepacked 1 is not supported, only -1 and 0"),
    "floats": ({"quant_type": "fp4"}, "quant_type b'fp4' is not supported"),
    "activation": ({"activation_type": "gelu"}, "it is no mlp with SiLU, a gate and the layers that swiglu_fusion"),
    "k": ({"k": 5}, "k is 1 to the number of experts 4, not 5"),
    "bits": ({"expert_weight_bits": 3}, "fc1 has 3 bits, and 2, 4 and 8 are read"),
    "blocks": ({"block_size": 48}, "K 64 of fc1 is no whole number of groups of 48"),
    "bias": ({"inputs": {4: np.zeros((4, 128), np.float32)}}, "fc1's bias is not supported"),
    "weights": (
        {"inputs": {5: np.zeros((4, 64, 16), np.uint8)}},
        "fc2 is [4, 64, 32], and the other layers need [4, 64",
    ),
    "experts": (
        {"inputs": {5: np.zeros((3, 64, 32), np.uint8)}},
        "fc2 is [3, 64, 64], and the other layers need [4, 64",
    ),
    "scales": ({"inputs": {6: np.ones((4, 64, 1), np.float32)}}, "scales of fc2 are [4, 64, 1], not 512 elements"),
    "zeros": ({"inputs": {11: np.ones((4, 128, 2), np.uint8)}}, "zero points of fc1 are [4, 128, 2], not 512 elements"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(options, message, tmp_path):
    path, _ = make(tmp_path, **options)
    with pytest.raises(UserError) as error:
        write_without_qmoe(path, tmp_path / "out", [])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
