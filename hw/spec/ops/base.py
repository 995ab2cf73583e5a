# SPDX-License-Identifier: Apache-2.0
"""The interface of an opcode's object."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar, Protocol

import numpy as np

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.operands import FLOAT_BYTES, WEIGHT_ALIGNMENT
from hw.spec.memory.packing import unpack, unstripe
from hw.spec.numerics.linear import Activations, Weights

DESCRIPTOR_WORDS = 16
"""32-bit words of a descriptor."""


class Opcode(enum.IntEnum):
    """The operation of a descriptor."""

    LINEAR = 1
    VECTOR = 2
    APPEND = 3
    SCORES = 4
    VALUES = 5


class Wait(enum.IntEnum):
    """Which reads of a descriptor start only when all results of earlier descriptors are in memory."""

    NOTHING = 0
    ACTIVATIONS = 1
    """All reads but those of weights."""
    WEIGHTS = 2
    """All reads. Weights are read in the order of the descriptors, so those of later descriptors wait as well."""


@dataclass(frozen=True)
class DescriptorField:
    """Bits ``low`` to ``low + width - 1`` of the descriptor; bit 0 is the lowest of word 0.

    Attributes
    ----------
    unit : the field holds ``value / unit``. Addresses and pitches are values in bytes; because of the unit no address
        in a descriptor can be misaligned, and each of them fits into one word
    """

    name: str
    low: int
    width: int
    text: str
    unit: int = 1

    @property
    def limit(self) -> int:
        """All values are below it."""
        return self.unit << self.width

    def get(self, whole: int) -> int:
        """The field's value in a descriptor, given as one number."""
        return (whole >> self.low & ((1 << self.width) - 1)) * self.unit

    def put(self, value: int) -> int:
        """A descriptor, as one number, in which only this field is set.

        Raises
        ------
        ConfigError : the value does not fit the field, or is not a multiple of its unit
        """
        if value % self.unit:
            raise ConfigError(f"descriptor field {self.name} is a multiple of {self.unit}, not {value}")
        if not 0 <= value < self.limit:
            raise ConfigError(f"descriptor field {self.name} is at least 0 and less than {self.limit}, not {value}")
        return value // self.unit << self.low


def units(count: int, what: str, more: str = "") -> str:
    """The text for a field with a unit."""
    return f"{what}, in units of {count:,} bytes" + (f"; {more}" if more else "")


OPCODE_BITS = 8
COMMON_FIELDS: tuple[DescriptorField, ...] = (
    DescriptorField("interrupt", 9, 1, "completion sets interrupt_pending.done"),
    DescriptorField(
        "wait", 10, 2, "0: start at once; 1: read only weights until all earlier results are in memory; 2: read nothing"
    ),
    DescriptorField("tokens", 24, 8, "M"),
    DescriptorField("out_features", 64, 19, "N"),
)
"""Fields of every descriptor, after the opcode."""


STREAM_FIELDS: tuple[DescriptorField, ...] = (
    DescriptorField("groups", 32, 16, "groups along K"),
    DescriptorField("group_slices", 48, 16, "group size / tile"),
    DescriptorField("header_beats", 96, 16, "beats of an output tile's header"),
    DescriptorField("body_words", 112, 16, "words of an output tile's body"),
)
"""The shape of a weight stream."""
WEIGHT_FIELDS: tuple[DescriptorField, ...] = (
    DescriptorField("weights", 192, 27, units(WEIGHT_ALIGNMENT, "address of port 0's region"), WEIGHT_ALIGNMENT),
    DescriptorField(
        "weights_stride", 224, 20, units(WEIGHT_ALIGNMENT, "from one port's region to the next"), WEIGHT_ALIGNMENT
    ),
)
"""The place of a weight stream."""


def opcode_field(opcode: Opcode, title: str) -> DescriptorField:
    """The lowest bits of every descriptor."""
    return DescriptorField("opcode", 0, OPCODE_BITS, f"{opcode}: {title}")


def in_order(*groups: Iterable[DescriptorField]) -> tuple[DescriptorField, ...]:
    """Fields in the order of their bits."""
    return tuple(sorted(chain(*groups), key=lambda field: field.low))


class DescriptorWords:
    """A descriptor of one opcode: a dataclass whose attributes are those of ``op_fields``."""

    op_fields: ClassVar[tuple[DescriptorField, ...]]

    def to_words(self) -> list[int]:
        """The descriptor as DESCRIPTOR_WORDS 32-bit words.

        Raises
        ------
        ConfigError : a value does not fit its field, or is not a multiple of the field's unit
        """
        whole = sum(field.put(getattr(self, field.name)) for field in self.op_fields)
        return [whole >> 32 * index & 0xFFFF_FFFF for index in range(DESCRIPTOR_WORDS)]


class Memory(Protocol):
    """The memory of an accelerator, by addresses in bytes."""

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes themselves: uint8 [size]. Writing to them writes to the memory."""
        ...


@dataclass
class State:
    """The values that an accelerator keeps from one descriptor to the next."""

    activations: Activations | None = None
    """Those of the last linear layer, for ``reuse``."""
    r: np.ndarray | None = None
    """float32 [tokens], for ``scale``: each token's value is that of the last descriptor with ``squares`` and with this
    token.
    """
    scores: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [rows, positions] of each bank: those of the last descriptor with scores for it."""


class Op(ABC):
    """One opcode: its descriptor, the rules for refusing it, its results, and its cycles.

    Attributes
    ----------
    opcode : its number
    title : its name in the documentation
    fields : the fields of its descriptor, in the order of their bits; all other bits are 0
    """

    opcode: ClassVar[Opcode]
    title: ClassVar[str]
    fields: ClassVar[tuple[DescriptorField, ...]]

    def exists(self, config: AcceleratorConfig) -> bool:
        """Whether hardware of this config has the operation."""
        return True

    def fields_of(self, config: AcceleratorConfig) -> tuple[DescriptorField, ...]:
        """The fields that hardware of this config has; all other bits are 0."""
        return self.fields

    @abstractmethod
    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """Least and greatest value of each count and choice in the descriptor, for any values of the other fields."""

    @abstractmethod
    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """Whether the descriptor is impossible or contradicts itself. before: the fields of the last accepted one with
        activations on chip, if there is one.
        """

    @abstractmethod
    def execute(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory, state: State) -> None:
        """Reads the operands of an accepted descriptor, computes, and writes all outputs, bit for bit.

        Raises
        ------
        NumericsError : activations that are not finite, or out of range
        """

    def outside_bounds(self, config: AcceleratorConfig, fields: Mapping[str, int]) -> bool:
        """Whether a count is not within its bounds."""
        return any(not low <= fields[name] <= high for name, (low, high) in self.bounds(config).items())


Banks = dict[int, tuple[int, int]]
"""Rows and positions of the scores in each bank that holds some."""


class AttentionOp(Op):
    """One of the operations of attention."""

    def exists(self, config: AcceleratorConfig) -> bool:
        """See :class:`Op`."""
        return config.has_attention

    def bank_is_wrong(self, fields: Mapping[str, int], banks: Banks) -> bool:
        """Whether the bank of scores is not in the state that the descriptor needs."""
        return False

    def use_bank(self, fields: Mapping[str, int], banks: Banks) -> None:
        """Changes the banks as an accepted descriptor does."""


def float_rows(memory: Memory, address: int, pitch: int, rows: int, columns: int) -> np.ndarray:
    """Rows of float32 numbers in memory, ``pitch`` bytes apart: float32 [rows, columns], the memory itself."""
    size = pitch * (rows - 1) + FLOAT_BYTES * columns
    whole = memory.view(address, size).view(np.float32)
    return np.lib.stride_tricks.as_strided(whole, (rows, columns), (pitch, FLOAT_BYTES))


def read_stream(memory: Memory, layer: LayerLayout, address: int, stride: int, paired: bool = False) -> Weights:
    """The weights of a stream in memory: port p's region begins at ``address + p * stride``."""
    config = layer.config
    size = layer.beats * config.port_width // 8
    regions = [memory.view(address + port * stride, size) for port in range(config.ports)]
    return unpack(layer, unstripe(config, np.stack(regions)), paired)
