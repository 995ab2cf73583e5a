# SPDX-License-Identifier: Apache-2.0
"""Where a decoder's time goes."""

from dataclasses import dataclass, fields, replace


@dataclass
class Usage:
    """Sums over calls.

    Members
    -------
    tokens: computed.
    cycles: of the device, from the start of each batch of layers to its last result; 0 without hardware.
    beats: of weight streams.
    device: wall seconds that were the hardware's own: simulating it, or waiting for its interrupt.
    onnxruntime, conversion, driver: wall seconds of the host: in its sessions; padding, copying, biases and other
        types; submitting and waiting, less the device's own.
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
        """Seconds of all but the device."""
        return self.onnxruntime + self.conversion + self.driver

    def add(self, other: "Usage") -> None:
        """Adds another's sums."""
        for item in fields(Usage):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def copy(self) -> "Usage":
        """The sums of now."""
        return replace(self)

    def since(self, before: "Usage") -> "Usage":
        """What was added since a copy was made."""
        names = [item.name for item in fields(Usage)]
        return Usage(**{name: getattr(self, name) - getattr(before, name) for name in names})
