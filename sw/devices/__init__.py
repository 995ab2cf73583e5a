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
    """An AcceleratorConfig from its fields by name. Raises UserError for invalid names and values."""
    try:
        return AcceleratorConfig.from_dict({**AcceleratorConfig().to_dict(), **options})
    except ConfigError as error:
        raise UserError(str(error)) from None


def open_device(name: str, memory: str = DEFAULT_MEMORY, **options: int | str) -> Device:
    """A device with these parameters (the fields of hw.spec.config.AcceleratorConfig).

    memory: preset of rtl's memory model (sw.devices.library.MEMORIES); other devices ignore it.
    rtl builds the simulation if it is not in the cache, which takes about half a minute and shows progress on stderr.
    kv260 has the parameters of its manifest; the options must have the same values.
    Raises UserError for an unknown device, an invalid config, hardware that cannot be built, or a board that does not
    answer.
    """
    check_device(name)
    if name == "kv260":
        return KV260Device(options)
    config = make_config(**options)
    return RtlDevice(config, memory=memory) if name == "rtl" else ReferenceDevice(config)
