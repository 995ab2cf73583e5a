# SPDX-License-Identifier: Apache-2.0
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
"""Small products are right, whether they are made of adders or of a multiplier."""

import pytest
from amaranth.hdl import Module, signed, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from hw.flows.lower import to_rtlil
from hw.rtl.common.product import small_product
from hw.spec.parts import TARGETS


class _Product(wiring.Component):
    def __init__(self, a, b, target: str):
        self.target = TARGETS[target]
        super().__init__({"a": In(a), "b": In(b), "product": Out(signed(12))})

    def elaborate(self, platform) -> Module:
        m = Module()
        m.d.comb += self.product.eq(small_product(self.target, self.a, self.b))
        return m


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("b", [unsigned(1), unsigned(4), signed(3)], ids=str)
@pytest.mark.parametrize("a", [signed(6), unsigned(6)], ids=str)
def test_all_products(a, b, target: str):
    dut = _Product(a, b, target)

    def values(shape):
        return range(-(1 << shape.width - 1), 1 << shape.width - 1) if shape.signed else range(1 << shape.width)

    async def process(ctx):
        for x in values(a):
            for y in values(b):
                ctx.set(dut.a, x)
                ctx.set(dut.b, y)
                assert ctx.get(dut.product) == x * y, (x, y)

    simulator = Simulator(dut)
    simulator.add_testbench(process)
    simulator.run()


@pytest.mark.parametrize("target,multipliers", [("generic", 1), ("ultrascaleplus", 1), ("ecp5", 0)])
def test_only_ecp5_has_adders(target: str, multipliers: int):
    assert to_rtlil(_Product(signed(6), unsigned(4), target), "product").count("cell $mul ") == multipliers
