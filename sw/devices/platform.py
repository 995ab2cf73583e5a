# SPDX-License-Identifier: Apache-2.0
"""The interface between a driver and the machine of its accelerator: the same on a board and in simulation."""

from collections.abc import Mapping
from functools import cache
from typing import Protocol

from hw.spec.control.registers import BY_NAME, offset
from sw.devices.arena import Arena


class Platform(Protocol):
    """An accelerator's registers, its interrupt, and the memory that it shares with this process.

    Members
    -------
    memory: the memory that the accelerator reads and writes.
    seconds: wall time of the hardware so far: see sw.devices.base.Device.
    """

    memory: Arena
    seconds: float

    def read_register(self, offset: int) -> int:
        """The 32-bit register at a byte offset. Raises DeviceError if the accelerator does not answer or refuses."""
        ...

    def write_register(self, offset: int, value: int) -> None:
        """Writes the 32-bit register at a byte offset. Raises DeviceError like `read_register`."""
        ...

    def write_registers(self, offsets_and_values: Mapping[int, int]) -> None:
        """Writes several registers in order."""
        ...

    def wait_interrupt(self) -> bool:
        """Waits a fraction of a second for the interrupt line; returns whether it is high."""
        ...

    def clock(self) -> float:
        """Seconds, for differences: wall time on a board, processor time of a simulation."""
        ...

    def close(self) -> None:
        """Frees all resources."""
        ...


class Registers:
    """The registers of hw.spec.control.registers by name."""

    def __init__(self, platform: Platform):
        self._platform = platform

    def read(self, name: str, word: int = 0) -> int:
        """A register's value, all 64 bits of a wide one."""
        low, high = _places(name, word)
        value = self._platform.read_register(low)
        return value if high is None else value | self._platform.read_register(high) << 32

    def fields(self, name: str) -> dict[str, int]:
        """A register's fields."""
        value = self.read(name)
        return {field.name: field.get(value) for field in BY_NAME[name].fields}

    def write(self, name: str, value: int, word: int = 0) -> None:
        """Writes a register."""
        self._platform.write_register(offset(name, word), value)

    def set(self, name: str, *fields: str) -> None:
        """Writes a register with all bits of these fields set and the others 0."""
        self.write(name, mask(name, *fields))


@cache
def mask(register: str, *fields: str) -> int:
    """A register's value with all bits of these fields set and the others 0."""
    return sum(BY_NAME[register].field(field).mask for field in fields)


@cache
def _places(name: str, word: int) -> tuple[int, int | None]:
    """Offset of a register's word, and offset of its high word if it is wide."""
    return offset(name, word), offset(name, 1) if BY_NAME[name].wide else None
