# SPDX-License-Identifier: Apache-2.0
"""What the command lines that run a model on a device share: device and hardware options, and the hardware it needs."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np

from hw.spec import kv260 as board
from hw.spec.config import AcceleratorConfig
from sw.common.errors import UserError
from sw.devices import check_device, make_config, pack
from sw.devices.kv260 import board_config, check_config
from sw.devices.library import MEMORIES, check_preset
from sw.devices.rtl import DEFAULT_MEMORY
from sw.graph.linears import Linears

FABRIC_HZ = float(board.FABRIC_HZ)
"""Clock at which cycles become seconds: what the KV260's bitstream is timed for."""
ONNXRUNTIME = "onnxruntime"
"""The device option that means none: the whole model in onnxruntime."""
MODEL_HELP = "an ONNX or GGUF file, a folder with an ONNX file or an AutoAWQ checkpoint, or smollm2"
"""See sw.export.resolve."""
AUTO = ("weight_bits", "zero_point")
"""Fields of AcceleratorConfig that may be left to the model."""
NATIVE_BITS = 4
"""Layers of more bits do not make the hardware wider: they run as two planes of half their width."""


class Parser(argparse.ArgumentParser):
    """Reports wrong options like every other user error: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_device_options(parser: Parser, names: str, default: str | None = None) -> None:
    """Adds --device and --memory. names: help on the former's values. default: None makes it a must."""
    text = names if default is None else f"{names} (default: {default})"
    parser.add_argument("--device", required=default is None, default=default, help=text)
    parser.add_argument(
        "--memory", metavar="PRESET", help=f"rtl's memory: {', '.join(MEMORIES)} (default: {DEFAULT_MEMORY})"
    )


def add_hardware_options(parser: Parser, **defaults: int) -> None:
    """Adds an option for every field of AcceleratorConfig. defaults: where they are not the field's own."""
    hardware = parser.add_argument_group("hardware", "options of python -m hw.build; auto is what the model needs")
    for item in fields(AcceleratorConfig):
        auto = item.name in AUTO
        kind = str if item.name == "zero_point" else _number_or_auto if auto else int
        default = "auto" if auto else defaults.get(item.name, item.default)
        option = f"--{item.name.replace('_', '-')}"
        hardware.add_argument(option, type=kind, default=default, action=_Given, help=f"(default: {default})")


class _Given(argparse.Action):
    """Stores an option, and that it was given: hardware that exists already has its own defaults."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = getattr(namespace, "given", frozenset()) | {self.dest}


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def check_devices(names: Sequence[str], memory: str | None, others: Sequence[str] = ()) -> str:
    """Checks --device, one or several, and --memory; returns the memory preset to open devices with.

    others: what --device may name besides devices. Raises UserError for an unknown device or preset, and for a memory
    without a device that has one.
    """
    for name in names:
        if name not in others:
            try:
                check_device(name)
            except UserError as error:
                raise UserError(", ".join([str(error), *others])) from None
    if memory is not None:
        check_preset(memory)
        if "rtl" not in names:
            raise UserError(f"--memory is for --device rtl, not {','.join(names)}")
    return memory or DEFAULT_MEMORY


def hardware_options(options: Namespace) -> tuple[dict[str, int | str], AcceleratorConfig]:
    """The values of `add_hardware_options`, for `choose_config`, and the hardware as far as no model decides it.

    With --device kv260 that is the board's, for the other devices too, and options that were given must be its own.
    Raises UserError for values that no hardware has, or this board's does not, before a model is read.
    """
    values = {item.name: getattr(options, item.name) for item in fields(AcceleratorConfig)}
    if "kv260" in options.device.split(","):
        config, given = board_config(), getattr(options, "given", frozenset())
        check_config(config, {name: value for name, value in values.items() if name in given and value != "auto"})
        return config.to_dict(), config
    return values, make_config(**{name: value for name, value in values.items() if value != "auto"})


def check_positive(value: int | None, option: str) -> None:
    """Raises UserError unless an option is absent or at least 1."""
    if value is not None and value < 1:
        raise UserError(f"{option} is 1 or more, not {value}")


@dataclass(frozen=True)
class LayerShape:
    """What decides whether a layer fits the hardware, without its weights. zero_points: the extreme ones."""

    name: str
    k: int
    n: int
    group_size: int
    bits: int
    zero_points: np.ndarray
    has_fractions: bool

    def fit(self, config: AcceleratorConfig) -> None:
        """Raises UserError if the layer does not fit."""
        pack.fit(config, self.name, self.k, self.n, self.group_size, self.bits, self.zero_points)


def layer_shapes(linears: Linears) -> list[LayerShape]:
    """Reads every layer once, keeps none."""
    shapes = []
    for layer in linears:
        zeros = layer.zero_points
        fractions = zeros[zeros != np.rint(zeros)]
        extremes = np.array([zeros.min(), zeros.max(), *fractions[:1]], np.float64)
        values = (layer.name, layer.k, layer.n, layer.group_size, layer.bits)
        shapes.append(LayerShape(*values, extremes, bool(len(fractions))))
    return shapes


def choose_config(shapes: Sequence[LayerShape], options: dict[str, int | str]) -> AcceleratorConfig:
    """The hardware for these layers: options (fields of AcceleratorConfig), where "auto" is the least that does.

    Raises UserError if that hardware does not exist or a layer does not fit it.
    """
    if options["weight_bits"] == "auto":
        options = options | {"weight_bits": _least_weight_bits([shape.bits for shape in shapes])}
    if options["zero_point"] == "auto":
        options = options | {"zero_point": "fixed" if any(shape.has_fractions for shape in shapes) else "integer"}
    config = make_config(**options)
    for shape in shapes:
        shape.fit(config)
    return config


def _least_weight_bits(bits: Sequence[int]) -> int:
    """A model's layers are of few bits and stream at full density; its head may have twice as many."""
    native = [value for value in bits if value <= NATIVE_BITS]
    return max(2, *native, -(-max(bits) // 2)) if native else max(bits)
