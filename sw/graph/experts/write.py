# SPDX-License-Identifier: Apache-2.0
"""Writes a mixture of experts with operators of ONNX, so that onnxruntime can run it by itself.

    logits = gate(x)                              a float layer
    values, indices = TopK(Softmax(logits))       [.., used]; values are divided by their sum where the family does it
    weights = ScatterElements(zeros, indices, values)                                         [.., experts]
    w_0, w_1, ... = Split(weights)                                                            [.., 1] each
    y = w_0 * expert_0(x) + w_1 * expert_1(x) + ...                                           in this order

An expert is an mlp with linear layers of its own, /model/layers.{i}/mlp/experts.{e}/gate_proj and so on. onnxruntime
computes all experts of all tokens, which is right and slow: weights of 0 change nothing. sw.graph.experts.match finds
the parts again, and sw.runtime.experts computes only what the router chose.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from onnx import numpy_helper

from sw.graph.writer import GraphBuilder, tensor_name
from sw.model.decoder import expect_shape
from sw.model.experts import EXPERT, Experts, Routing
from sw.model.linear import FloatLinear
from sw.model.lm_head import Linear

WriteLinear = Callable[[str, str, Linear, tuple[int, int]], str]
"""(path, input, layer, (N, K)) -> output."""
Activate = Callable[[str, str], str]
"""(path, gate) -> output."""


def write_experts(
    w: GraphBuilder,
    linear: WriteLinear,
    activate: Activate,
    path: str,
    x: str,
    hidden: int,
    experts: Experts,
    routing: Routing,
) -> str:
    """Adds the nodes of a block's mixture, and returns its output.

    path: of the block's mlp. x: tensor [batch, sequence, hidden]. Raises UserError where weights and routing disagree.
    """
    router = FloatLinear(f"{path}/gate", experts.router)
    logits = linear(f"{path}/gate", x, router, (routing.count, hidden))
    weights = write_choice(w, f"{path}/gate", logits, routing, np.float32)
    return write_sum(w, linear, activate, path, x, weights, experts.experts, routing.shapes(hidden), routing.count)


def write_choice(w: GraphBuilder, path: str, logits: str, routing: Routing, dtype: type[np.floating]) -> Sequence[str]:
    """Adds the router's choice, and returns the weight of each expert, [.., 1]: 0 if it is not chosen.

    logits: tensor [.., experts] with elements of `dtype`.
    """
    tensor = tensor_name(path)
    used = w.tensor(f"{tensor}.used", np.array([routing.used], np.int64))
    probabilities = w.node(f"{path}/Softmax", "Softmax", [logits], axis=-1)
    chosen = [f"{path}/TopK/output_{index}" for index in range(2)]
    values = w.node(f"{path}/TopK", "TopK", [probabilities, used], chosen, axis=-1)
    if routing.normalised:
        last = w.tensor(f"{tensor}.last_axis", np.array([-1], np.int64))
        values = w.node(f"{path}/Div", "Div", [values, w.node(f"{path}/ReduceSum", "ReduceSum", [values, last])])
    shape = w.node(f"{path}/Shape", "Shape", [probabilities])
    zero = numpy_helper.from_array(np.zeros(1, dtype))
    zeros = w.node(f"{path}/ConstantOfShape", "ConstantOfShape", [shape], value=zero)
    weights = w.node(f"{path}/ScatterElements", "ScatterElements", [zeros, chosen[1], values], axis=-1)
    sizes = w.tensor(f"{tensor}.ones", np.ones(routing.count, np.int64))
    names = [f"{path}/Split/output_{index}" for index in range(routing.count)]
    w.node(f"{path}/Split", "Split", [weights, sizes], names, axis=-1)
    return names


def write_sum(
    w: GraphBuilder,
    linear: WriteLinear,
    activate: Activate,
    path: str,
    x: str,
    weights: Sequence[str],
    experts: Iterable[Mapping[str, Linear]],
    shapes: Mapping[str, tuple[int, int]],
    count: int,
    output: Sequence[str] = (),
) -> str:
    """Adds the experts and their weighted sum, and returns it. output: its name, or nothing.

    Raises UserError for another number of experts than `count`.
    """
    total, done = "", 0
    for layers in experts:
        if done == count:
            done += 1
            break
        expert = f"{path}/experts.{done}"

        def layer(name: str, tensor: str, layers: Mapping[str, Linear] = layers, expert: str = expert) -> str:
            return linear(f"{expert}/{name}", tensor, layers[name], shapes[name])

        last = output if done == count - 1 else ()
        gate, up, down = EXPERT
        activated = activate(f"{expert}/act_fn", layer(gate, x))
        product = layer(down, w.node(f"{expert}/Mul", "Mul", [activated, layer(up, x)]))
        weighted = w.node(f"{expert}/Mul_1", "Mul", [product, weights[done]], () if done else last)
        total = w.node(f"{expert}/Add", "Add", [total, weighted], last) if done else weighted
        done += 1
    expect_shape(f"{path}: the number of experts", (done,), (count,))
    return total
