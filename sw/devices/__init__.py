# SPDX-License-Identifier: Apache-2.0
"""Devices by name: "reference" computes in numpy, "rtl" simulates the generated Verilog."""

from hw.spec.config import AcceleratorConfig, ConfigError
from sw.devices.base import Device
from sw.devices.reference import ReferenceDevice
from sw.devices.rtl import DEFAULT_MEMORY, RtlDevice
from sw.errors import UserError

DEVICES = ("reference", "rtl")


def check_device(name: str) -> None:
    """Raises UserError if there is no such device."""
    if name not in DEVICES:
        later = " (the board's driver is not written yet)" if name == "kv260" else ""
        raise UserError(f"no device is named {name}{later}; there are {', '.join(DEVICES)}")


def make_config(**options: int | str) -> AcceleratorConfig:
    """An AcceleratorConfig from its fields by name. Raises UserError for values and names that it refuses."""
    try:
        return AcceleratorConfig.from_dict({**AcceleratorConfig().to_dict(), **options})
    except ConfigError as error:
        raise UserError(str(error)) from None


def open_device(name: str, memory: str = DEFAULT_MEMORY, **options: int | str) -> Device:
    """A device of hardware with these parameters (the fields of hw.spec.config.AcceleratorConfig).

    memory: preset of rtl's memory model (sw.devices.library.MEMORIES); the others have none.
    rtl builds the simulation if it is not in the cache, which takes about half a minute and shows progress on stderr.
    Raises UserError for an unknown device, a config that does not exist, or hardware that cannot be built.
    """
    check_device(name)
    config = make_config(**options)
    return RtlDevice(config, memory=memory) if name == "rtl" else ReferenceDevice(config)
