# SPDX-License-Identifier: Apache-2.0
"""The generated Verilog as a device: the board's driver on the simulated accelerator and its simulated memory."""

from pathlib import Path

from hw.spec.config import AcceleratorConfig
from sw.devices.driver import AcceleratorDevice
from sw.devices.library import SimulatedPlatform, build_library, check_preset

DEFAULT_MEMORY = "kv260-2400"


class RtlDevice(AcceleratorDevice):
    """The simulated accelerator.

    Parameters
    ----------
    config: the hardware's config; it is built on first use, which needs a compiler and about half a minute.
    memory: preset of the memory model: one of sw.devices.library.MEMORIES.
    files: (library, manifest) if they exist already.
    seed: seed of the memory's random delays, if it has any.

    Raises UserError if the hardware cannot be built, DeviceError if it does not match `config`.
    """

    name = "rtl"
    platform: SimulatedPlatform

    def __init__(
        self,
        config: AcceleratorConfig,
        *,
        memory: str = DEFAULT_MEMORY,
        files: tuple[Path, Path] | None = None,
        seed: int = 1,
    ):
        check_preset(memory)
        super().__init__(config, SimulatedPlatform(*(files or build_library(config)), config, memory, seed))
