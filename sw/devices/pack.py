# SPDX-License-Identifier: Apache-2.0
"""Packs a model's quantized linear layer into the weight stream of one accelerator."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from hw.spec.config import MAX_K, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout, ceil_div, fit_layer
from hw.spec.memory.packing import pack
from hw.spec.numerics.linear import NumericsError, Weights
from hw.spec.numerics.planes import plane_count, plane_zero_points, quantize_weights
from sw.common.arrays import slices
from sw.common.errors import UserError
from sw.devices.base import Buffer, Device, weight_bytes, weight_image
from sw.model.linear import QuantizedLinear


class Shape(Protocol):
    """The properties that decide a layer's plan: a QuantizedLinear, or less. zero_points: some of the layer's."""

    @property
    def name(self) -> str: ...
    @property
    def k(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def zero_points(self) -> np.ndarray: ...


@dataclass(frozen=True)
class LayerPlan:
    """The placement of a layer on the hardware.

    Members
    -------
    name: the layer's name in the model.
    k: the true in_features.
    planes: 2 for weights of more bits than the hardware's (see hw.spec.numerics.planes), else 1.
    layout: the layer's place in the weight stream. Its groups may be parts of the model's; its K holds every plane,
        each padded to whole groups.
    """

    name: str
    k: int
    planes: int
    layout: LayerLayout


@dataclass(frozen=True, eq=False)
class PreparedLayer(LayerPlan):
    """A layer as the accelerator takes it: its plan, and beats, the weight stream: uint8 [layout.beats, beat_bytes]."""

    beats: np.ndarray

    def pad(self, x: np.ndarray) -> np.ndarray:
        """Activations [M, k] as contiguous float32 [M, layout.k]: a copy for every plane, zeros in the padding."""
        if x.ndim != 2 or x.shape[1] != self.k:
            raise UserError(f"layer {self.name}: activations are [M, {self.k}], not {list(x.shape)}")
        padded = np.zeros((len(x), self.planes, self.layout.k // self.planes), np.float32)
        padded[:, :, : self.k] = x[:, None]
        return padded.reshape(len(x), -1)


def plan_layer(config: AcceleratorConfig, shape: Shape) -> LayerPlan:
    """The plan of a layer on this hardware.

    This is fast, so a whole model can be checked before long work starts. Raises UserError, with the layer's name, the
    rule and the value, if the hardware cannot run the layer.
    """
    try:
        planes = plane_count(config, shape.bits)
        plane_zero_points(config, shape.bits, shape.zero_points)
        layout = fit_layer(config, shape.k, shape.n, shape.group_size)
        if planes > 1:
            layout = LayerLayout(config, planes * layout.k, shape.n, layout.group_size)
    except (ConfigError, NumericsError) as error:
        raise UserError(f"layer {shape.name}: {error}") from None
    return LayerPlan(shape.name, shape.k, planes, layout)


def needed_max_k(config: AcceleratorConfig, shape: Shape) -> int:
    """The least max_k, not below the config's own, of hardware that runs a layer.

    Raises UserError as `plan_layer` does, if no such hardware exists.
    """
    try:
        planes = plane_count(config, shape.bits)
        if planes * ceil_div(shape.k, config.tile) * config.tile <= config.max_k:
            return config.max_k
        # Room for any padding; the layout says how much there is. Beyond MAX_K the layout says so.
        longest = planes * ceil_div(shape.k + config.max_group_size, config.tile) * config.tile
        wide = replace(config, max_k=min(longest, MAX_K))
    except (ConfigError, NumericsError) as error:
        raise UserError(f"layer {shape.name}: {error}") from None
    return plan_layer(wide, shape).layout.k


def integer_weights(plan: LayerPlan, linear: QuantizedLinear) -> Weights:
    """The layer in the hardware's number formats and groups, plane after plane, K padded with zero weights.

    linear: the layer, or some of its rows. The parts of a split group share its scale and zero point, which changes no
    result: all sums are exact. Raises UserError, with the layer's name, for values that the formats cannot hold.
    """
    layout = plan.layout
    try:
        planes = quantize_weights(layout.config, linear.bits, linear.q, linear.scales, linear.zero_points)
    except NumericsError as error:
        raise UserError(f"layer {linear.name}: {error}") from None
    k, groups = layout.k // plan.planes, layout.groups // plan.planes
    # The model's group that contains each of the hardware's groups: its size is a multiple of the hardware's.
    source = np.arange(groups) * layout.group_size // linear.group_size
    q = planes[0].q
    if (k, plan.planes) != (linear.k, 1):
        q = np.zeros((linear.n, plan.planes, k), np.uint8)
        for index, plane in enumerate(planes):
            q[:, index, : linear.k] = plane.q
    return Weights(
        q.reshape(linear.n, layout.k),
        np.concatenate([plane.zero_points[:, source] for plane in planes], axis=1),
        np.concatenate([plane.scale_mantissas[:, source] for plane in planes], axis=1),
        planes[0].exponents,
    )


def prepare(config: AcceleratorConfig, linear: QuantizedLinear) -> PreparedLayer:
    """Plans and packs a layer for the hardware of `config`.

    Weights of fewer bits than the hardware's run as they are. Raises UserError as both parts do.
    """
    return pack_layer(plan_layer(config, linear), linear)


def load(device: Device, linear: QuantizedLinear) -> tuple[LayerPlan, Buffer]:
    """Packs a layer and writes its weights into a device's memory; returns its plan and the weights.

    Raises UserError if the hardware cannot run it, DeviceError if the memory is full.
    """
    prepared = prepare(device.config, linear)
    weights = device.alloc(weight_bytes(prepared.layout))
    device.write(weights, weight_image(prepared.layout, prepared.beats))
    return LayerPlan(prepared.name, prepared.k, prepared.planes, prepared.layout), weights


def pack_layer(plan: LayerPlan, linear: QuantizedLinear, weights: Weights | None = None) -> PreparedLayer:
    """Packs a layer as planned, some rows at a time: a head of 150,000 rows would take a gigabyte in between.

    weights: what `integer_weights` gave, if the caller has it already. Raises UserError as that does.
    """
    layout, config = plan.layout, plan.layout.config
    beats = np.empty((layout.out_tiles, layout.tile_beats, config.beat_bytes), np.uint8)
    # Some rows at a time: the intermediate arrays of a head of 150,000 rows would take a gigabyte.
    for rows in slices(linear.n):
        start = rows.start
        if weights is None:
            part = linear.with_rows(rows)
            if start:
                part = replace(part, name=f"{linear.name}, rows from {start} on")
            some = integer_weights(plan, part)
        else:
            some = Weights(*(values[rows] for values in weights))
        shape = LayerLayout(config, layout.k, len(some.q), layout.group_size)
        tiles = slice(start // config.tile, start // config.tile + shape.out_tiles)
        try:
            beats[tiles] = pack(shape, some).reshape(-1, *beats.shape[1:])
        except ConfigError as error:
            raise UserError(f"layer {linear.name}: {error}") from None
    beats = beats.reshape(layout.beats, config.beat_bytes)
    return PreparedLayer(plan.name, plan.k, plan.planes, layout, beats)
