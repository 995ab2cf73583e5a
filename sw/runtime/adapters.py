# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside the quantized layers of a model: both of an adapter's matrices run on the device, in int8.

    y = W x + B (A x),   B times alpha / r before it is rounded
The base's weights are not changed, so several adapters can be in the device's memory, and each request chooses one. A
and B are layers of 8 bits (see sw.model.lm_head.quantize_int8), which 4-bit hardware runs as two planes; a rank that is
no whole number of the hardware's tiles or groups is padded with zeros. After a batch of base layers follow two more: A
of all its adapted layers, then B. The host adds the results in float32.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnxruntime import OrtValue

from sw.checkpoints.adapter import Adapter, LowRank
from sw.common.errors import UserError
from sw.devices.base import Device
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import quantize_int8
from sw.ort.stages import float_array
from sw.runtime.hardware import LayerShape
from sw.runtime.placement import Batch, Placed, place
from sw.runtime.usage import Usage

SHORT = {"attn": "self_attn"}
"""Parts of names in onnxruntime-genai's graphs -> those of Hugging Face's modules."""


@dataclass(frozen=True, eq=False)
class AdapterLayer:
    """The two layers of one adapted layer. a: [r, K]. b: [N, r], with the adapter's factor in its weights."""

    a: QuantizedLinear
    b: QuantizedLinear


def module_name(node: str) -> str:
    """The module of a graph's layer: /model/layers.0/attn/q_proj/MatMulNBits is model.layers.0.self_attn.q_proj."""
    parts = node.strip("/").split("/")
    if len(parts) > 1 and parts[-1].startswith(("MatMul", "Gemm")):
        parts = parts[:-1]
    return ".".join(SHORT.get(part, part) for part in parts)


def adapter_layers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> dict[str, AdapterLayer]:
    """The adapter's layers by the names of the graph's layers. shapes: name of a quantized layer -> (N, K).

    Raises UserError for a module that the graph does not have as a quantized layer, and for another shape.
    """
    by_module = {module_name(name): name for name in shapes}
    found = {}
    for module, update in adapter.layers.items():
        if module not in by_module:
            raise UserError(f"{adapter.path} adapts {module}, which is no quantized layer of the model's graph")
        name = by_module[module]
        n, k = shapes[name]
        if (len(update.b), update.a.shape[1]) != (n, k):
            own = [len(update.b), update.a.shape[1]]
            raise UserError(f"{adapter.path} adapts {module} as a layer {own}, and the model's is {[n, k]}")
        found[name] = _int8(name, update)
    return found


def _int8(name: str, update: LowRank) -> AdapterLayer:
    b = (np.float64(update.factor) * update.b).astype(np.float32)
    return AdapterLayer(quantize_int8(update.a, f"{name}/lora_A"), quantize_int8(b, f"{name}/lora_B"))


def adapter_shapes(layers: Iterable[AdapterLayer]) -> list[LayerShape]:
    """What the hardware must be able to run, for sw.runtime.hardware.choose_config."""
    both = [layer for pair in layers for layer in (pair.a, pair.b)]
    return [
        LayerShape(layer.name, layer.k, layer.n, layer.group_size, layer.bits, np.array([128.0, 128.0]), False)
        for layer in both
    ]


class AdapterBatch:
    """The adapter's layers of one batch of base layers, in the device's memory.

    name: the adapter's, unique in the decoder. pairs: base layers in the device's memory, each with its update.
    last_only: see sw.runtime.placement.Batch.
    """

    def __init__(
        self, device: Device, name: str, pairs: Sequence[tuple[Placed, AdapterLayer]], last_only: frozenset[str]
    ):
        self._name = name
        self._outputs = [base.output_name for base, _ in pairs]
        first, second = [], []
        for base, layer in pairs:
            between, after = self._tensors(base.output_name)
            a = replace(layer.a, input_name=base.input_name, output_name=between)
            b = replace(layer.b, input_name=between, output_name=after)
            first.append(place(device, a))
            second.append(place(device, b))
        last = frozenset(
            layer.name for (base, _), *both in zip(pairs, first, second) if base.name in last_only for layer in both
        )
        self._batches = [Batch(device, layers, last, frozenset()) for layers in (first, second)]

    def _tensors(self, output: str) -> tuple[str, str]:
        return f"{output}/{self._name}/lora_A", f"{output}/{self._name}/lora_B"

    def run(
        self, tokens: int, last: bool, values: dict[str, OrtValue], places: dict[str, OrtValue], usage: Usage
    ) -> None:
        """Adds the updates to the results of the base layers, in their places in `values`; see Batch.run.

        These results must be in the host's memory (`kept` of Batch), because the device does not see the change.
        """
        for batch in self._batches:
            batch.run(tokens, last, values, places, usage)
        with np.errstate(over="ignore"):
            for name in self._outputs:
                result = float_array(values[name])
                update = float_array(values[self._tensors(name)[1]])
                np.add(result, update.reshape(result.shape), out=result, casting="same_kind")
