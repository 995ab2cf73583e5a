# SPDX-License-Identifier: Apache-2.0
"""Fixed delays."""

from amaranth.hdl import Module, Signal, Value, ValueCastable


def delay(m: Module, value, cycles: int, *, name: str, reset: bool = False):
    """``value`` as it was ``cycles`` cycles ago, in registers without reset so that synthesis may use SRLs.

    With ``reset`` the registers start at 0: for bits that say whether other values mean anything.
    """
    shape = value.shape() if isinstance(value, (Value, ValueCastable)) else None
    if shape is None:
        raise TypeError(f"a delay takes a value, not {value!r}")
    for stage in range(cycles):
        register = Signal(shape, name=f"{name}_{stage + 1}", reset_less=not reset)
        m.d.sync += register.eq(value)
        value = register
    return value
