# SPDX-License-Identifier: Apache-2.0
"""Chooses the hardware that a model's layers need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hw.spec.config import AcceleratorConfig
from sw.devices import make_config, pack
from sw.graph.linears import Linears

ONNXRUNTIME = "onnxruntime"
"""The value of --device that means no device: the whole model runs in onnxruntime."""
AUTO = ("weight_bits", "zero_point", "max_k", "score_words")
"""Fields of AcceleratorConfig that may be chosen from the model."""
NATIVE_BITS = 4
"""Weights of more bits do not need wider hardware: they run as two planes of half their width."""


@dataclass(frozen=True)
class LayerShape:
    """The properties of a layer that decide whether it fits the hardware.

    zero_points: the least and the greatest. needs_fixed: they are no unsigned integers of the weights' width.
    """

    name: str
    k: int
    n: int
    group_size: int
    bits: int
    zero_points: np.ndarray
    needs_fixed: bool


def layer_shapes(linears: Linears) -> list[LayerShape]:
    """Reads the zero points of every layer, and keeps none."""
    shapes = []
    for layer in linears.outlines():
        zeros = layer.zero_points
        fractions = zeros[zeros != np.rint(zeros)]
        extremes = np.array([zeros.min(), zeros.max(), *fractions[:1]], np.float64)
        values = (layer.name, layer.k, layer.n, layer.group_size, layer.bits)
        needs_fixed = bool(len(fractions)) or extremes[0] < 0 or extremes[1] >= 1 << layer.bits
        shapes.append(LayerShape(*values, extremes, needs_fixed))
    return shapes


def choose_config(shapes: Sequence[LayerShape], options: dict[str, int | str]) -> AcceleratorConfig:
    """The hardware for these layers: options are fields of AcceleratorConfig; "auto" means the least sufficient value.

    Layers take no score_words, so "auto" is 0: see `sw.program.whole` for attention.
    Raises UserError if that hardware does not exist or a layer does not fit it.
    """
    if options["zero_point"] == "auto":
        options = options | {"zero_point": "fixed" if any(shape.needs_fixed for shape in shapes) else "integer"}
    if options["weight_bits"] == "auto":
        is_fixed = options["zero_point"] == "fixed"
        options = options | {"weight_bits": _least_weight_bits([shape.bits for shape in shapes], is_fixed)}
    auto_k = options.get("max_k") == "auto"
    config = make_config(**{name: value for name, value in options.items() if value != "auto"})
    if auto_k:
        # Prefer the default where it is enough, so that most models run on the same hardware, which is built once.
        config = replace(config, max_k=max(pack.needed_max_k(config, shape) for shape in shapes))
    for shape in shapes:
        pack.plan_layer(config, shape)
    return config


def _least_weight_bits(bits: Sequence[int], is_fixed: bool) -> int:
    """The least weight_bits: layers have few bits and stream at full density; the head may have twice as many bits.

    If all layers have many bits and zero points are fixed, they run as two planes, too: a fixed zero point is small.
    """
    native = [value for value in bits if value <= NATIVE_BITS]
    if not native and is_fixed:
        return max(2, -(-max(bits) // 2))
    return max(2, *native, -(-max(bits) // 2)) if native else max(bits)
