# SPDX-License-Identifier: Apache-2.0
"""What the rules of descriptors are made of: derived values, comparisons, and arithmetic in units.

Functions get all values by name: the fields of the descriptor, addresses and pitches in bytes, and the derived values.
A field that the hardware does not have is 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from amaranth.hdl import Value

from hw.spec.control.descriptor import DATA_ALIGNMENT, FLOAT_BYTES

Comparison = Callable[[Mapping[str, Value]], Value]
"""The function from all values to whether the descriptor is wrong."""


@dataclass(frozen=True)
class Derived:
    """A value that is computed from a descriptor's fields and from earlier derived values; it gets a register."""

    name: str
    width: int
    of: Callable[[Mapping[str, Value]], Value]


# Pitches are multiples of a unit, so comparisons in units have fewer bits, which makes them faster.


def units(value: Value, unit: int = DATA_ALIGNMENT) -> Value:
    """A number of bytes in units, which it is a multiple of."""
    return value[unit.bit_length() - 1 :]


def ceil_div(value: Value, divisor: int) -> Value:
    """The quotient by a power of two, rounded up."""
    return (value + (divisor - 1)) >> divisor.bit_length() - 1


def row_units(columns: Value) -> Value:
    """A row of this number of columns, in units of pitches, rounded up."""
    return ceil_div(columns, DATA_ALIGNMENT // FLOAT_BYTES)


def more_than(value: Value, limit: Value, factor: int) -> Value:
    """Whether a value is more than ``limit * factor``; the factor is a power of two."""
    return value > limit << factor.bit_length() - 1


def pitch_wrong(pitch: Value, row_units: Value) -> Value:
    """Whether rows overlap, and the pitch does not mean that there is only one."""
    return (pitch != 0) & (row_units > units(pitch))
