# SPDX-License-Identifier: Apache-2.0
"""The registers of one stage of a pipeline."""

from amaranth.hdl import Module, Signal
from amaranth.lib import data


def stage(m: Module, move, name: str, **values):
    """A structure of registers that take the values if the stage moves. Each value is (shape, value).

    ``move`` is high if the stage's input is valid. The registers have no reset.
    """
    layout = data.StructLayout({key: shape for key, (shape, _) in values.items()})
    register = Signal(layout, name=name, reset_less=True)
    with m.If(move):
        m.d.sync += [getattr(register, key).eq(value) for key, (_, value) in values.items()]
    return register
