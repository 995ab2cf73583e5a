# SPDX-License-Identifier: Apache-2.0
"""8-bit layers with float zero points: in a graph two planes of 4 bits over activations twice, elsewhere one layer."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from sw.common.errors import UserError
from sw.graph.decoder import layer_tensors, matmul_node
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from sw.graph.matmul_nbits import planes
from sw.graph.projections import find_projections
from sw.graph.writer import OnnxWriter
from sw.model.linear import QuantizedLinear
from sw.ort.cut import cut
from tests.sw.graph.test_linears import noise, relative_error, run

N, K, GROUP = 20, 96, 16


def layer(seed=1, zero_points=None) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    shape = (N, K // GROUP)
    if zero_points is None:
        zero_points = rng.uniform(-250, 250, shape)
    scales = rng.standard_normal(shape).astype(np.float32)
    q = rng.integers(0, 256, (N, K), np.uint8)
    return QuantizedLinear("w", q, scales, np.full(shape, zero_points, np.float32), GROUP, 8)


def write(folder, linear: QuantizedLinear):
    """A graph x -> Relu -> layer -> y."""
    with OnnxWriter(folder, "g") as writer:
        x = writer.input("x", TensorProto.FLOAT, [5, K])
        writer.output("y", TensorProto.FLOAT, [5, N])
        h = writer.node("/relu", "Relu", [x])
        matmul_node(writer, "/w/MatMulNBits", h, linear, layer_tensors(writer, "/w", "w", linear), ["y"])
        writer.save({})
    return writer.path


@pytest.mark.parametrize("zero_points", [None, 0.0, 15.99, 16.0, -1e-9, 255.0, -256.0, 3.25])
def test_round_trip(zero_points, tmp_path):
    linear = layer(zero_points=zero_points)
    path = write(tmp_path, linear)
    (found,) = find_linears(path)
    assert (found.bits, found.group_size, found.k, found.input_name) == (8, GROUP, K, "/relu/output_0")
    assert np.array_equal(found.q, linear.q)
    assert np.array_equal(found.scales, linear.scales)
    assert np.abs(found.zero_points - linear.zero_points).max() <= 1e-6
    (outline,) = find_linears(path).outlines()
    assert (outline.name, outline.n, outline.k, outline.group_size, outline.bits) == (found.name, N, K, GROUP, 8)
    assert np.array_equal(outline.zero_points, found.zero_points)
    x = noise(K)
    assert relative_error(run(path, x), linear.float_output(np.maximum(x, 0))) < 1e-5
    (part,) = find_projections(OnnxFile(path))
    assert (part.n, part.k, part.input) == (N, K, "/relu/output_0")


def test_device_does_not_need_the_second_copy(tmp_path):
    """A cut graph hands over the activations themselves; the node that doubles them does not run."""
    path = write(tmp_path, layer())
    linears = find_linears(path)
    stages = cut(linears.file, linears.nodes, ["y"])
    assert [[node.op_type for node in stage.nodes] for stage in stages] == [["Relu"], []]
    assert stages[0].outputs == ["/relu/output_0"]
    assert linears.tensors == [("/relu/output_0", "y")]


def change(path, name, values):
    model = onnx.load(path)
    (tensor,) = [item for item in model.graph.initializer if item.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    onnx.save(model, path)


@pytest.mark.parametrize("what", ["scales", "high", "low"])
def test_other_graphs_are_layers_of_4_bits(what, tmp_path):
    """Two halves that are not the planes of one layer stay a layer with 2 K columns, with the same results."""
    linear = layer()
    path = write(tmp_path, linear)
    half = planes(linear)
    scales, zeros = half.scales.copy(), half.zero_points.copy()
    if what == "scales":
        scales[3, 2] *= 1.5
        change(path, "w.scales", scales)
    else:
        zeros[3, 2 if what == "high" else -1] += 0.5 if what == "high" else 20
        change(path, "w.zero_points", zeros)
    (found,) = find_linears(path)
    assert (found.bits, found.k, found.input_name) == (4, 2 * K, "/w/Concat/output_0")
    x = np.maximum(noise(K), 0)
    twice = np.concatenate([x, x], axis=1)
    assert relative_error(run(path, noise(K)), found.float_output(twice)) < 1e-5


def test_part_of_a_group(tmp_path):
    linear = layer()
    odd = QuantizedLinear("w", linear.q[:, :-8], linear.scales, linear.zero_points, GROUP, 8)
    with pytest.raises(UserError, match="layer w: K 88 is no whole number of groups of 16"):
        planes(odd)
