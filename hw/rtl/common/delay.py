# SPDX-License-Identifier: Apache-2.0
"""Fixed delays."""

from amaranth.hdl import Cat, Module, Signal, Value, ValueCastable

_WORD = 64
"""Number of bits that a simulator shifts in one operation."""


def delay(m: Module, value, cycles: int, *, name: str, reset: bool = False):
    """``value`` delayed by ``cycles`` cycles, in registers without reset so that synthesis may use SRLs.

    With ``reset`` the registers start at 0; this is for bits that mark other values as valid. Several stages share a
    register if it fits a machine word: the hardware is the same, and simulation needs fewer operations.
    """
    if not isinstance(value, (Value, ValueCastable)):
        raise TypeError(f"a delay takes a value, not {value!r}")
    shape = value.shape()
    bits = Value.cast(value)
    stages = max(1, _WORD // max(1, len(bits)))
    done = 0
    while done < cycles:
        count = min(stages, cycles - done)
        register = Signal(count * len(bits), name=f"{name}_{done + 1}", reset_less=not reset)
        m.d.sync += register.eq(Cat(bits, register)[: len(register)])
        bits = register[-len(bits) :] if len(bits) else bits
        done += count
    if cycles == 0:
        return value
    delayed = Signal(shape, name=f"{name}_delayed")
    m.d.comb += Value.cast(delayed).eq(bits)
    return delayed
