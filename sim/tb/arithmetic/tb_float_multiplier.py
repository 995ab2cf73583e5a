# SPDX-License-Identifier: Apache-2.0
"""The product of two float32: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.float32 import mul
from sim.bench.dut import check_pipeline
from sim.bench.floats import floats, mostly_distant, near, pairs_of_extremes, tie_products, tiny_products
from sim.bench.streams import rng


async def _check(dut, a, b, gaps=0.0):
    await check_pipeline(dut, {"a": a, "b": b}, mul(floats(a), floats(b)).view(np.uint32), gaps, rng(len(a)))


@cocotb.test()
async def test_extremes(dut):
    """Every pair of extremes."""
    await _check(dut, *pairs_of_extremes())


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    await _check(dut, *mostly_distant(rng(), 8000), gaps)


@cocotb.test()
@cocotb.parametrize(distance=[0, 1, 2, 27])
async def test_near_exponents(dut, distance):
    await _check(dut, *near(rng(distance), 4000, distance))


@cocotb.test()
@cocotb.parametrize(operands=[tie_products, tiny_products])
async def test_hard_operands(dut, operands):
    """Ties, and results next to the smallest normal number."""
    await _check(dut, *operands(rng(), 4000), gaps=0.2)
