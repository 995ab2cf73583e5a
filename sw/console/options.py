# SPDX-License-Identifier: Apache-2.0
"""Device and hardware options, which the command lines that run a model on a device share."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from hw.spec.config import DEFAULT_LANES_TEXT, DEFAULT_OPERATORS, RULES, AcceleratorConfig, option
from sw.common.command_line import Parser
from sw.common.errors import UserError
from sw.devices import check_device, make_config
from sw.devices.kv260 import board_config, check_config
from sw.devices.library import MEMORIES, check_preset
from sw.devices.rtl import DEFAULT_MEMORY
from sw.program.attention import KEY_CHOICES
from sw.program.keys import AUTO_BITS
from sw.runtime.hardware import AUTO

HOST = "host"
"""The value of --operators with which the device runs the linear layers alone: simulated hardware has operators linear
then, and a board keeps what it has."""

MODEL_HELP = "an ONNX or GGUF file, a folder with a model, org/name on the Hugging Face Hub, or smollm2"
"""See sw.export.resolve."""


def add_device_options(parser: Parser, names: str, default: str | None = None) -> None:
    """Adds --device and --memory. names: help on the values of --device. default: None makes --device mandatory."""
    text = names if default is None else f"{names} (default: {default})"
    parser.add_argument("--device", required=default is None, default=default, help=text)
    parser.add_argument(
        "--memory", metavar="PRESET", help=f"rtl's memory: {', '.join(MEMORIES)} (default: {DEFAULT_MEMORY})"
    )


def add_hardware_options(parser: Parser, **defaults: int) -> None:
    """Adds an option for every field of AcceleratorConfig. defaults: values that replace the field's own default."""
    hardware = parser.add_argument_group("hardware", "options of python -m hw.build; auto chooses what the model needs")
    values = {"operators": DEFAULT_OPERATORS, **defaults}
    for item in fields(AcceleratorConfig):
        auto = item.name in AUTO
        kind = _number_or_auto if auto and isinstance(item.default, int) else type(item.default)
        default = "auto" if auto else values.get(item.name, item.default)
        shown, rule = default, RULES[item.name].text
        if item.name == "lanes":
            # It depends on tile and operators.
            default, shown = None, DEFAULT_LANES_TEXT
        if item.name == "operators":
            rule += f"; {HOST}: the linear layers alone, on any hardware"
        text = f"{rule} (default: {shown})"
        hardware.add_argument(option(item.name), type=kind, default=default, action=_Given, help=text)


def add_cache_options(parser: Parser) -> None:
    """Adds --key-bits."""
    parser.add_argument(
        "--key-bits",
        choices=KEY_CHOICES,
        default=AUTO_BITS,
        help="bits of cached keys, if the accelerator computes attention; auto: 16 for KV heads whose biases need it"
        " (default: auto)",
    )


class _Given(argparse.Action):
    """Stores an option, and the fact that it was given, because hardware that exists already has its own defaults."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = getattr(namespace, "given", frozenset()) | {self.dest}


def _number_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto, not {text!r}") from None


@dataclass(frozen=True)
class Devices:
    """The values of a command line's device options.

    Members
    -------
    names: names of the devices.
    memory: preset of the simulated memory, for sw.devices.open_device.
    hardware: fields of AcceleratorConfig, for sw.runtime.hardware.choose_config.
    known: config of the hardware, without the fields that depend on the model.
    host: the operators between linear layers stay on the host, also if the hardware has them.
    """

    names: Sequence[str]
    memory: str
    hardware: dict[str, int | str]
    known: AcceleratorConfig
    host: bool

    @property
    def shown_memory(self) -> str | None:
        """The preset for a report: None if no device is simulated."""
        return self.memory if "rtl" in self.names else None


def chosen_devices(options: Namespace, names: Sequence[str], others: Sequence[str] = ()) -> Devices:
    """The values of the options of `add_device_options` and `add_hardware_options`, before a model is read.

    names: values of --device, one or several. others: values that are allowed besides devices.
    Raises UserError as `check_devices` and `hardware_options` do.
    """
    memory = check_devices(names, options.memory, others)
    return Devices(names, memory, *hardware_options(options), options.operators == HOST)


def check_devices(names: Sequence[str], memory: str | None, others: Sequence[str] = ()) -> str:
    """Checks --device, one or several, and --memory; returns the memory preset to open devices with.

    others: values of --device that are allowed besides devices. Raises UserError for an unknown device or preset, and
    for --memory without a simulated device.
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
    """The values of `add_hardware_options` for choose_config, and the hardware without fields that depend on the model.

    With --device kv260 the hardware is the board's, for the other devices too, and each given option must equal the
    board's value. Raises UserError for impossible values, or for values that differ from the board's, before a model is
    read.
    """
    names = (item.name for item in fields(AcceleratorConfig))
    values = {name: value for name in names if (value := getattr(options, name)) is not None}
    given = getattr(options, "given", frozenset())
    if values["operators"] == HOST:
        values["operators"] = "linear"
        given -= {"operators"}
    if "kv260" in options.device.split(","):
        config = board_config()
        check_config(config, {name: value for name, value in values.items() if name in given and value != "auto"})
        return config.to_dict(), config
    return values, make_config(**{name: value for name, value in values.items() if value != "auto"})
