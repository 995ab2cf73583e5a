# SPDX-License-Identifier: Apache-2.0
"""Leading zeros: every value of small widths, and each power of two of larger ones."""

import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator

from hw.rtl.arithmetic.leading_zeros import leading_zeros


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 28, 33])
def test_leading_zeros(width: int):
    values = range(1, 1 << width) if width <= 8 else [v for k in range(width) for v in (1 << k, (2 << k) - 1)]
    value = Signal(width)
    zeros = leading_zeros(value)
    assert len(zeros) == (width - 1).bit_length()

    async def process(ctx):
        for v in values:
            ctx.set(value, v)
            assert ctx.get(zeros) == width - v.bit_length(), v

    simulator = Simulator(Module())
    simulator.add_testbench(process)
    simulator.run()
