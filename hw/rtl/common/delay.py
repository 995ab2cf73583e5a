# SPDX-License-Identifier: Apache-2.0
"""Fixed delays."""

from amaranth.hdl import Cat, Module, Signal, Value, ValueCastable

_WORD = 64
"""Bits that a simulator shifts at once."""


def delay(m: Module, value, cycles: int, *, name: str, reset: bool = False):
    """``value`` as it was ``cycles`` cycles ago, in registers without reset so that synthesis may use SRLs.

    With ``reset`` the registers start at 0: for bits that say whether other values mean anything. Several stages
    share a register as long as it fits a machine word: the same hardware, and fewer operations in simulation.
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
