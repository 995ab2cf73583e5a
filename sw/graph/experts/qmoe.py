# SPDX-License-Identifier: Apache-2.0
"""Reads onnxruntime's QMoE nodes (com.microsoft): a router's choice and all experts in one node.

    router_probs         float [tokens, E]: logits. The weights of the k largest are their softmax, as in onnxruntime's
                         CPU kernel, which does not read normalize_routing_weights
    fc1, fc2, fc3        uint8 [E, N, K * bits / 8], element 0 in a byte's low bits; scales [E, N] or
                         [E, N, K / block_size]; zero points packed like weights, absent: 2^(bits - 1)
    swiglu_fusion        0: fc1 is gate, fc3 up; 1: rows of fc1 are gate and up in turn; 2: gate's rows, then up's
Source: the operator's schema in onnxruntime 1.32. Biases, limits and other activations than SiLU are refused, and so
are layouts for CUDA alone and floats of 4 and 8 bits.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import onnx

from sw.common.bits import unpack_bits
from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB, attributes, name_of, read
from sw.model.experts import EXPERT, Routing
from sw.model.linear import QuantizedLinear

FC = {"fc1": (2, 3, 11), "fc2": (5, 6, 12), "fc3": (8, 9, 13)}
"""Layer -> inputs with its weights, scales and zero points."""
OTHERS = {4: "fc1's bias", 7: "fc2's bias", 10: "fc3's bias", 14: "router_weights", 15: "global scales"}
PLAIN: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "quant_type": (b"int", (b"int",)),
    "weights_prepacked": (-1, (-1, 0)),
    "use_sparse_mixer": (0, (0,)),
    "activation_alpha": (1.0, (1.0,)),
    "activation_beta": (0.0, (0.0,)),
    "swiglu_limit": (math.inf, (math.inf,)),
    "swiglu_limit_after_activation": (0, (0,)),
    "normalize_routing_weights": (0, (0, 1)),
    "swiglu_fusion": (0, (0, 1, 2)),
}
"""Attribute -> its default, and the values that are read."""
LEAST_BLOCK, MOST_BLOCK = 16, 128
"""One scale for a whole row becomes equal ones for groups of a power of two."""


def matches(node: onnx.NodeProto) -> bool:
    """Whether the node is a QMoE."""
    return node.op_type == "QMoE" and node.domain == CONTRIB


@dataclass(frozen=True)
class QMoE:
    """One node. Raises UserError, with its name, for attributes and shapes that are not read."""

    file: OnnxFile
    node: onnx.NodeProto

    def __post_init__(self) -> None:
        values = self._values
        for key, (default, known) in PLAIN.items():
            if values.get(key, default) not in known:
                self._refuse(f"{key} {values[key]} is not supported, only {' and '.join(map(str, known))}")
        for index, what in OTHERS.items():
            if read(self.node, index):
                self._refuse(f"{what} is not supported")
        expected = (b"swiglu",) if self.fusion else (b"silu", b"swiglu")
        if (
            values.get("activation_type", b"relu") not in expected
            or bool(read(self.node, FC["fc3"][0])) == self.fusion > 0
        ):
            self._refuse("it is no mlp with SiLU, a gate and the layers that swiglu_fusion says")
        count, rows, hidden = self._shape("fc1")
        if not 1 <= self.used <= count:
            self._refuse(f"k is 1 to the number of experts {count}, not {self.used}")
        size = rows // 2 if self.fusion else rows
        wanted = {"fc1": (count, 2 * size if self.fusion else size, hidden), "fc2": (count, hidden, size)}
        wanted |= {} if self.fusion else {"fc3": (count, size, hidden)}
        for name, shape in wanted.items():
            if self._shape(name) != shape:
                self._refuse(f"{name} is {list(self._shape(name))}, and the other layers need {list(shape)}")
            self._check(name, shape)

    @property
    def fusion(self) -> int:
        """swiglu_fusion."""
        return self._values.get("swiglu_fusion", 0)

    @property
    def used(self) -> int:
        """Experts of a token."""
        return self._values.get("k", 1)

    @property
    def hidden(self) -> int:
        """hidden_size."""
        return self._shape("fc1")[2]

    @property
    def routing(self) -> Routing:
        """The sizes of the mixture. The weights of a token's experts have the sum 1."""
        count, rows, _ = self._shape("fc1")
        return Routing(count, self.used, rows // 2 if self.fusion else rows)

    @property
    def dtype(self) -> type[np.floating]:
        """Element type of the scales, which is that of the activations or float32."""
        tensor = next(item for item in self.file.graph.initializer if item.name == self.node.input[FC["fc1"][1]])
        return np.float16 if tensor.data_type == onnx.TensorProto.FLOAT16 else np.float32

    def experts(self) -> Iterator[Mapping[str, QuantizedLinear]]:
        """The layers of each expert."""
        parts = {name: self._read(name) for name in (("fc1", "fc2") if self.fusion else FC)}
        for index in range(self.routing.count):
            first, down = self._layer("fc1", parts["fc1"], index), self._layer("fc2", parts["fc2"], index)
            if self.fusion == 1:
                gate, up = (first.with_rows(slice(start, None, 2)) for start in (0, 1))
            elif self.fusion:
                gate, up = first.with_rows(slice(first.n // 2)), first.with_rows(slice(first.n // 2, None))
            else:
                gate, up = first, self._layer("fc3", parts["fc3"], index)
            yield dict(zip(EXPERT, (gate, up, down), strict=True))

    @property
    def _values(self) -> dict[str, Any]:
        return attributes(self.node)

    def _bits(self, name: str) -> int:
        values = self._values
        bits = values.get(f"{name}_expert_weight_bits", values.get("expert_weight_bits", 4))
        if bits not in (2, 4, 8):
            self._refuse(f"{name} has {bits} bits, and 2, 4 and 8 are read")
        return bits

    def _block(self, name: str) -> int:
        """Features of a scale."""
        return self._values.get("block_size", 0) or self._shape(name)[2]

    def _shape(self, name: str) -> tuple[int, int, int]:
        """(experts, N, K) of a layer by its weights."""
        shape = self._constant_shape(name, FC[name][0])
        if len(shape) != 3 or 0 in shape:
            self._refuse(f"the weights of {name} are {list(shape)}, not three axes")
        return shape[0], shape[1], shape[2] * 8 // self._bits(name)

    def _constant_shape(self, name: str, index: int) -> tuple[int, ...]:
        tensor = read(self.node, index)
        if not self.file.is_constant(tensor):
            self._refuse(f"{name}'s input {tensor or index} is not a constant of the model")
        return self.file.shape(tensor, name_of(self.node))

    def _check(self, name: str, shape: tuple[int, int, int]) -> None:
        count, n, k = shape
        block, bits = self._block(name), self._bits(name)
        if k % block or block % LEAST_BLOCK:
            self._refuse(f"K {k} of {name} is no whole number of groups of {block}, a multiple of {LEAST_BLOCK}")
        groups = k // block
        packed = -(-groups * bits // 8) if self._values.get("block_size", 0) else 0
        sizes = {"scales": (FC[name][1], count * n * groups)}
        if read(self.node, FC[name][2]):
            sizes["zero points"] = FC[name][2], count * (n * packed if packed else -(-n * bits // 8))
        for what, (index, size) in sizes.items():
            found = self._constant_shape(name, index)
            if math.prod(found) != size:
                self._refuse(f"{what} of {name} are {list(found)}, not {size} elements")

    def _read(self, name: str) -> list[np.ndarray]:
        """Weights, scales and, if there are any, zero points, with an axis of the experts first."""
        count = self._shape(name)[0]
        arrays = [
            self.file.constant(tensor, name_of(self.node)) for index in FC[name] if (tensor := read(self.node, index))
        ]
        return [array.reshape(count, -1) for array in arrays]

    def _layer(self, name: str, arrays: list[np.ndarray], index: int) -> QuantizedLinear:
        _, n, k = self._shape(name)
        bits, block = self._bits(name), self._block(name)
        groups = k // block
        q, scales = unpack_bits(arrays[0][index].reshape(n, -1), bits), arrays[1][index].reshape(n, groups)
        zero_points = np.full((n, groups), 1 << (bits - 1), np.uint8)
        if len(arrays) > 2:
            packed = arrays[2][index]
            rows = packed.reshape(n, -1) if self._values.get("block_size", 0) else packed.reshape(1, -1)
            found = unpack_bits(rows, bits)
            zero_points = found[:, :groups] if len(rows) == n and groups * bits <= 8 * rows.shape[1] else found
            zero_points = np.ascontiguousarray(zero_points.reshape(-1)[: n * groups].reshape(n, groups))
        size = block if block & (block - 1) == 0 else min(block & -block, MOST_BLOCK)
        if not self._values.get("block_size", 0):
            size = min(k & -k, MOST_BLOCK)
        times = block // size
        scales, zero_points = (np.repeat(values, times, axis=1) for values in (scales, zero_points))
        return QuantizedLinear(f"{name_of(self.node)}/{name}", q, scales.astype(np.float32), zero_points, size, bits)

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self.file.path}: QMoE {name_of(self.node)}: {problem}")
