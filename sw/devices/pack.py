# SPDX-License-Identifier: Apache-2.0
"""Packs a model's quantised linear layer into the weight stream of one accelerator."""

from dataclasses import dataclass, replace

import numpy as np

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout, fit_layer
from hw.spec.memory.packing import pack
from hw.spec.numerics.linear import NumericsError, Weights
from hw.spec.numerics.planes import plane_count, plane_zero_points, quantise_weights
from sw.common.arrays import slices
from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """A layer in the accelerator's format.

    Members
    -------
    name: the layer's name in the model.
    k: the true in_features.
    planes: 2 for weights of more bits than the hardware's (see hw.spec.numerics.planes), else 1.
    layout: the layer's place in the weight stream. Its groups may be parts of the model's; its K holds every plane,
        each padded to whole groups.
    beats: uint8 [layout.beats, beat_bytes], the weight stream.
    """

    name: str
    k: int
    planes: int
    layout: LayerLayout
    beats: np.ndarray

    def pad(self, x: np.ndarray) -> np.ndarray:
        """Activations [M, k] as contiguous float32 [M, layout.k]: a copy for every plane, zeros in the padding."""
        if x.ndim != 2 or x.shape[1] != self.k:
            raise UserError(f"layer {self.name}: activations are [M, {self.k}], not {list(x.shape)}")
        padded = np.zeros((len(x), self.planes, self.layout.k // self.planes), np.float32)
        padded[:, :, : self.k] = x[:, None]
        return padded.reshape(len(x), -1)


def fit(
    config: AcceleratorConfig, name: str, k: int, n: int, group_size: int, bits: int, zero_points: np.ndarray
) -> LayerLayout:
    """The layout of a layer on this hardware, from its shape and some or all of its zero points.

    This is fast, so a whole model can be checked before long work starts. Raises UserError, with the layer's name, the
    rule and the value, if the hardware cannot run the layer.
    """
    try:
        planes = plane_count(config, bits)
        plane_zero_points(config, bits, zero_points)
        layout = fit_layer(config, k, n, group_size)
        return layout if planes == 1 else LayerLayout(config, planes * layout.k, n, layout.group_size)
    except (ConfigError, NumericsError) as error:
        raise UserError(f"layer {name}: {error}") from None


def integer_weights(config: AcceleratorConfig, linear: QuantizedLinear, layout: LayerLayout) -> Weights:
    """The layer in the hardware's number formats and groups, one plane after the other, K padded with zero weights.

    The parts of a split group share its scale and zero point, which changes no result: all sums are exact.
    Raises UserError, with the layer's name, for values that the formats cannot hold.
    """
    try:
        planes = quantise_weights(config, linear.bits, linear.q, linear.scales, linear.zero_points)
    except NumericsError as error:
        raise UserError(f"layer {linear.name}: {error}") from None
    k, groups = layout.k // len(planes), layout.groups // len(planes)
    # The model's group that contains each of the hardware's groups: its size is a multiple of the hardware's.
    source = np.arange(groups) * layout.group_size // linear.group_size
    q = planes[0].q
    if (k, len(planes)) != (linear.k, 1):
        q = np.zeros((linear.n, len(planes), k), np.uint8)
        for index, plane in enumerate(planes):
            q[:, index, : linear.k] = plane.q
    return Weights(
        q.reshape(linear.n, layout.k),
        np.concatenate([plane.zero_points[:, source] for plane in planes], axis=1),
        np.concatenate([plane.scale_mantissas[:, source] for plane in planes], axis=1),
        planes[0].exponents,
    )


def prepare(config: AcceleratorConfig, linear: QuantizedLinear, weights: Weights | None = None) -> PreparedLayer:
    """Packs a layer for the hardware of `config`. weights: the result of `integer_weights` if the caller has it.

    Weights of fewer bits than the hardware's need no conversion. Raises UserError like `fit` and `integer_weights`.
    """
    zero_points = linear.zero_points
    layout = fit(config, linear.name, linear.k, linear.n, linear.group_size, linear.bits, zero_points)
    beats = np.empty((layout.out_tiles, layout.tile_beats, config.beat_bytes), np.uint8)
    # Some rows at a time: the intermediate arrays of a head of 150,000 rows would take a gigabyte.
    for rows in slices(linear.n):
        start = rows.start
        if weights is None:
            part = linear.with_rows(rows)
            if start:
                part = replace(part, name=f"{linear.name}, rows from {start} on")
            some = integer_weights(config, part, layout)
        else:
            some = Weights(*(values[rows] for values in weights))
        shape = LayerLayout(config, layout.k, len(some.q), layout.group_size)
        tiles = slice(start // config.tile, start // config.tile + shape.out_tiles)
        try:
            beats[tiles] = pack(shape, some).reshape(-1, *beats.shape[1:])
        except ConfigError as error:
            raise UserError(f"layer {linear.name}: {error}") from None
    planes = plane_count(config, linear.bits)
    return PreparedLayer(linear.name, linear.k, planes, layout, beats.reshape(layout.beats, config.beat_bytes))
