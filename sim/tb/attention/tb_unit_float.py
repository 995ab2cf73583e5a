# SPDX-License-Identifier: Apache-2.0
"""Probabilities as float32: exactly the number."""

import cocotb
import numpy as np

from hw.spec.numerics.functions import UNIT_BITS
from hw.spec.numerics.linear import to_float32
from sim.bench.dut import check_pipeline
from sim.bench.streams import rng


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_numbers(dut, gaps):
    """Every length of a number, its neighbours, 0 and 1."""
    random = rng()
    powers = 1 << np.arange(UNIT_BITS + 1)
    several = random.integers(0, 1 << random.integers(1, UNIT_BITS + 1, 500))
    values = np.concatenate([[0], powers, powers - 1, powers[1:-1] + 1, several])
    expected = to_float32(values, np.array(-UNIT_BITS)).view(np.uint32).astype(np.int64)
    await check_pipeline(dut, {"value": values}, expected, gaps, random)
