# SPDX-License-Identifier: Apache-2.0
"""Devices by name: "reference" computes in numpy, "rtl" simulates the generated Verilog, "kv260" is the board."""

from hw.spec.config import AcceleratorConfig, ConfigError
from sw.common.errors import UserError
from sw.devices.base import Device
from sw.devices.kv260 import KV260Device
from sw.devices.reference import ReferenceDevice
from sw.devices.rtl import DEFAULT_MEMORY, RtlDevice

DEVICES = ("reference", "rtl", "kv260")


def check_device(name: str) -> None:
    """Raises UserError if there is no device of this name."""
    if name not in DEVICES:
        raise UserError(f"no device is named {name}; there are {', '.join(DEVICES)}")


def make_config(**options: int | str) -> AcceleratorConfig:
    """An AcceleratorConfig from its fields by name, with AcceleratorConfig.from_options.

    Raises UserError for invalid names and values.
    """
    try:
        return AcceleratorConfig.from_options(options)
    except ConfigError as error:
        raise UserError(str(error)) from None


def open_device(name: str, config: AcceleratorConfig | None = None, memory: str = DEFAULT_MEMORY) -> Device:
    """A device of hardware with this config; None: with the default, and for kv260 with the board's.

    memory: preset of rtl's memory model (sw.devices.library.MEMORIES); other devices ignore it.
    rtl builds the simulation if it is not in the cache, which takes about half a minute and shows progress on stderr.
    kv260 has the config of its manifest; another one is refused.
    Raises UserError for an unknown device, hardware that cannot be built, or a board that does not answer.
    """
    check_device(name)
    if name == "kv260":
        return KV260Device(config.to_dict() if config else None)
    config = config or AcceleratorConfig()
    return RtlDevice(config, memory=memory) if name == "rtl" else ReferenceDevice(config)
