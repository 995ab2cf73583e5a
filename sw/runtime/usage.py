# SPDX-License-Identifier: Apache-2.0
"""Counts the time that a decoder spends in its parts."""

from dataclasses import dataclass, fields, replace


@dataclass
class Usage:
    """Sums over calls.

    Members
    -------
    tokens: number of computed tokens.
    cycles: cycles of the device, from the start of each batch of layers to its last result; 0 without hardware.
    beats: beats of the weight streams.
    device: wall seconds of the hardware: simulating it, or waiting for its interrupt.
    onnxruntime: wall seconds of the host in onnxruntime's sessions.
    conversion: wall seconds of the host for padding, copying, biases and type conversion.
    driver: wall seconds of the host for submitting and waiting, less those of the device.
    """

    tokens: int = 0
    cycles: int = 0
    beats: int = 0
    device: float = 0.0
    onnxruntime: float = 0.0
    conversion: float = 0.0
    driver: float = 0.0

    @property
    def host(self) -> float:
        """Wall seconds of everything but the device."""
        return self.onnxruntime + self.conversion + self.driver

    def add(self, other: "Usage") -> None:
        """Adds the sums of another Usage."""
        for item in fields(Usage):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def copy(self) -> "Usage":
        """A copy of the current sums."""
        return replace(self)

    def since(self, before: "Usage") -> "Usage":
        """The sums less those of an earlier copy."""
        names = [item.name for item in fields(Usage)]
        return Usage(**{name: getattr(self, name) - getattr(before, name) for name in names})
