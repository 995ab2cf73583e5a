# SPDX-License-Identifier: Apache-2.0
"""The interface of an opcode's object."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hw.spec.config import AcceleratorConfig, ConfigError

DESCRIPTOR_WORDS = 16
"""32-bit words of a descriptor."""


class Opcode(enum.IntEnum):
    """The operation of a descriptor. There is room for further operations."""

    LINEAR = 1


class Wait(enum.IntEnum):
    """Which reads of a descriptor start only when all results of earlier descriptors are in memory."""

    NOTHING = 0
    ACTIVATIONS = 1
    """All reads but those of weights."""
    WEIGHTS = 2
    """All reads. Weights are read in the order of the descriptors, so those of later descriptors wait as well."""


@dataclass(frozen=True)
class DescriptorField:
    """Bits ``low`` to ``low + width - 1`` of the descriptor; bit 0 is the lowest of word 0."""

    name: str
    low: int
    width: int
    text: str


OPCODE_BITS = 8


def opcode_field(opcode: Opcode, title: str) -> DescriptorField:
    """The lowest bits of every descriptor."""
    return DescriptorField("opcode", 0, OPCODE_BITS, f"{opcode}: {title}")


class DescriptorWords:
    """A descriptor of one opcode: a dataclass whose attributes are those of ``op_fields``."""

    op_fields: ClassVar[tuple[DescriptorField, ...]]

    def to_words(self) -> list[int]:
        """The descriptor as DESCRIPTOR_WORDS 32-bit words.

        Raises
        ------
        ConfigError : a value does not fit its field
        """
        whole = 0
        for field in self.op_fields:
            value = getattr(self, field.name)
            if not 0 <= value < 1 << field.width:
                raise ConfigError(f"descriptor field {field.name} holds {field.width} bits, not {value}")
            whole |= value << field.low
        return [whole >> 32 * index & 0xFFFF_FFFF for index in range(DESCRIPTOR_WORDS)]


class Op(ABC):
    """One opcode: its descriptor, the rules for refusing it, its results, and its cycles.

    Attributes
    ----------
    opcode : its number
    title : its name in the documentation
    fields : the fields of its descriptor, in the order of their bits; all other bits are 0
    addresses : fields that are addresses; all of them are below ADDRESS_LIMIT
    alignments : alignment in bytes of addresses and pitches, by field
    """

    opcode: ClassVar[Opcode]
    title: ClassVar[str]
    fields: ClassVar[tuple[DescriptorField, ...]]
    addresses: ClassVar[tuple[str, ...]]
    alignments: ClassVar[Mapping[str, int]]

    @abstractmethod
    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """Least and greatest value of each count and choice in the descriptor, for any values of the other fields."""

    @abstractmethod
    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """Whether the descriptor is impossible or contradicts itself. before: the fields of the last accepted one."""

    @abstractmethod
    def from_layer(self, layer: Any, tokens: int, **places: Any) -> DescriptorWords:
        """The descriptor of a layer with operands at these places. Raises ConfigError for impossible layers."""

    @abstractmethod
    def compute(self, config: AcceleratorConfig, weights: Any, activations: Any) -> np.ndarray:
        """The results, bit for bit: float32 [M, N]."""

    @abstractmethod
    def cycles(self, layer: Any, tokens: int) -> int:
        """Predicted cycles from the push to the completion, on an idle accelerator with ideal memory."""
