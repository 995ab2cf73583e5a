# SPDX-License-Identifier: Apache-2.0
"""Roles of layers, found without their names: what names say where there are some; and nothing where it is unclear."""

import re
from pathlib import Path

import onnx
import pytest

from sw.graph.linears import find_linears
from sw.graph.roles import find_roles
from tests.sw.fixtures.float_twins import DATA

NAMED = ["optimum_qwen2", "optimum_qwen2_float16"]


@pytest.mark.parametrize("name", NAMED)
def test_roles_are_what_the_names_say(name):
    linears = find_linears(DATA / f"{name}.onnx")
    found = re.findall(r"layers\.(\d+)/\w+/(\w+_proj)/", " ".join(linears.names))
    expected = {f"{layer}.{role}": index for index, (layer, role) in enumerate(found)} | {"lm_head": 14}
    assert find_roles(linears, 2) == expected
    assert find_roles(linears, 3) == {}


def test_own_graph(smollm2):
    """Of a GroupQueryAttention graph with a cache that the attention writes."""
    linears = find_linears(smollm2)
    found = re.findall(r"layers\.(\d+)/\w+/(\w+_proj)/", " ".join(linears.names))
    assert len(found) == 210
    expected = {f"{layer}.{role}": index for index, (layer, role) in enumerate(found)} | {"lm_head": 210}
    assert find_roles(linears, 30) == expected


def changed(change, folder: Path) -> Path:
    """optimum's graph, by what it does to {output of a linear layer's name: its node}."""
    model = onnx.load(DATA / "optimum_qwen2.onnx")
    nodes = {node.name: node for node in model.graph.node}
    change(lambda role: nodes[f"/model/layers.1/{role}/MatMul_Q4"])
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _swap(a: onnx.NodeProto, b: onnx.NodeProto) -> None:
    a.output[0], b.output[0] = b.output[0], a.output[0]


def test_gate_and_up_in_the_other_order(tmp_path):
    path = changed(lambda node: _swap(node("mlp/gate_proj"), node("mlp/up_proj")), tmp_path)
    linears = find_linears(path)
    roles = find_roles(linears, 2)
    # The node that is called up_proj makes what goes into the sigmoid.
    assert linears.names[roles["1.gate_proj"]] == "/model/layers.1/mlp/up_proj/MatMul_Q4"
    assert linears.names[roles["1.up_proj"]] == "/model/layers.1/mlp/gate_proj/MatMul_Q4"


@pytest.mark.parametrize(
    "change",
    [
        lambda node: _swap(node("self_attn/v_proj"), node("self_attn/k_proj")),
        lambda node: _swap(node("self_attn/q_proj"), node("self_attn/k_proj")),
        lambda node: node("mlp/up_proj").CopyFrom(
            onnx.helper.make_node("Identity", [node("mlp/gate_proj").output[0]], node("mlp/up_proj").output)
        ),
    ],
    ids=["v before k", "k before q", "no up"],
)
def test_unclear(change, tmp_path):
    assert find_roles(find_linears(changed(change, tmp_path)), 2) == {}
