# SPDX-License-Identifier: Apache-2.0
"""From a model's quantised linear layer to the weight stream of one accelerator."""

from dataclasses import dataclass

import numpy as np

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.layout import LayerLayout, fit_layer, pack
from hw.spec.numerics import NumericsError, Weights, quantise_scales, quantise_zero_points
from sw.errors import UserError
from sw.linear import QuantizedLinear


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """A layer as the accelerator takes it.

    Members
    -------
    name: the model's name of the layer.
    k: the true in_features; `layout.k` is the padded one.
    layout: the layer's place in the weight stream; its groups may be parts of the model's.
    beats: uint8 [layout.beats, beat_bytes], the weight stream.
    """

    name: str
    k: int
    layout: LayerLayout
    beats: np.ndarray

    def pad(self, x: np.ndarray) -> np.ndarray:
        """Activations [M, k] as contiguous float32 [M, layout.k], zeros in the padding."""
        if x.ndim != 2 or x.shape[1] != self.k:
            raise UserError(f"layer {self.name}: activations are [M, {self.k}], not {list(x.shape)}")
        padded = np.zeros((len(x), self.layout.k), np.float32)
        padded[:, : self.k] = x
        return padded


def fit(
    config: AcceleratorConfig, name: str, k: int, n: int, group_size: int, bits: int, zero_points: np.ndarray
) -> LayerLayout:
    """The layout of a layer on this hardware, from its shape alone and any of its zero points.

    Quick, so that a whole model can be checked before long work starts. Raises UserError, with the layer's name, the
    rule and the value, if the hardware cannot run the layer.
    """
    if bits > config.weight_bits:
        raise UserError(
            f"layer {name}: its weights have {bits} bits, and weight_bits of the hardware is {config.weight_bits}"
        )
    try:
        quantise_zero_points(config, zero_points)
        return fit_layer(config, k, n, group_size)
    except (ConfigError, NumericsError) as error:
        raise UserError(f"layer {name}: {error}") from None


def integer_weights(config: AcceleratorConfig, linear: QuantizedLinear, layout: LayerLayout) -> Weights:
    """The layer in the hardware's number formats and groups, K padded with zero weights.

    The parts of a split group share its scale and zero point, which changes no result: all sums are exact.
    Raises UserError, with the layer's name, for values that the formats cannot hold.
    """
    try:
        scales, exponents = quantise_scales(linear.scales)
        zero_points = quantise_zero_points(config, linear.zero_points)
    except NumericsError as error:
        raise UserError(f"layer {linear.name}: {error}") from None
    # The model's group that each of the hardware's groups lies in: a multiple of the latter's size is the former's.
    source = np.arange(layout.groups) * layout.group_size // linear.group_size
    q = linear.q
    if layout.k != linear.k:
        q = np.zeros((linear.n, layout.k), np.uint8)
        q[:, : linear.k] = linear.q
    return Weights(q, zero_points[:, source], scales[:, source], exponents)


def prepare(config: AcceleratorConfig, linear: QuantizedLinear, weights: Weights | None = None) -> PreparedLayer:
    """Packs a layer for the hardware of `config`. weights: what `integer_weights` gave, if the caller has it already.

    Weights of fewer bits than the hardware's run as they are. Raises UserError as `fit` and `integer_weights` do.
    """
    zero_points = linear.zero_points
    layout = fit(config, linear.name, linear.k, linear.n, linear.group_size, linear.bits, zero_points)
    try:
        beats = pack(layout, weights or integer_weights(config, linear, layout))
    except ConfigError as error:
        raise UserError(f"layer {linear.name}: {error}") from None
    return PreparedLayer(linear.name, linear.k, layout, beats)
