# SPDX-License-Identifier: Apache-2.0
"""The exponential function: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.functions import exp
from sim.bench.dut import check_pipeline
from sim.bench.floats import extremes, floats, in_range, next_to
from sim.bench.streams import rng

SIGN = 1 << 31


async def _check(dut, x, gaps=0.0):
    """Of positive numbers only zeros, subnormal numbers and NaNs occur."""
    x = np.asarray(x, np.int64)
    x = np.where((x > 0x007FFFFF) & (x <= 0x7F800000), x | SIGN, x)
    await check_pipeline(dut, {"x": x}, exp(floats(x)), gaps, rng(len(x)))


@cocotb.test()
async def test_extremes(dut):
    """Extremes, and every exponent with the smallest and the largest fraction."""
    exponents = np.arange(256) << 23
    await _check(dut, np.concatenate([extremes(), exponents, exponents | 0x7FFFFF]))


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    """Random bits, and numbers of every exponent from which the result depends on the fraction."""
    random = rng()
    await _check(dut, np.concatenate([random.integers(0, SIGN, 500), in_range(random, 4000, -26, 5)]), gaps)


@cocotb.test()
async def test_intervals(dut):
    """The first, the middle and the last place of every interval, for results down to 0."""
    ends = np.log(2) * np.arange(1, 26 * 128) / 128
    await _check(dut, next_to(ends))
