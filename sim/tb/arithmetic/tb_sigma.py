# SPDX-License-Identifier: Apache-2.0
"""The logistic function: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.functions import sigma
from sim.bench.dut import check_pipeline
from sim.bench.floats import extremes, floats, in_range, next_to
from sim.bench.streams import rng

ROWS = np.arange(1, 513) / 32
"""Ends of the table's intervals; the last one is the end of the range."""


async def _check(dut, x, gaps=0.0):
    await check_pipeline(dut, {"x": x}, sigma(floats(x)), gaps, rng(len(x)))


@cocotb.test()
async def test_extremes(dut):
    """Extremes, and every exponent with the smallest and the largest fraction, of both signs."""
    exponents = np.arange(512) << 23
    await _check(dut, np.concatenate([extremes(), exponents, exponents | 0x7FFFFF]))


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    """Random bits, and numbers of every exponent from which the result depends on the fraction."""
    random = rng()
    await _check(dut, np.concatenate([random.integers(0, 1 << 32, 500), in_range(random, 4000, -24, 4)]), gaps)


@cocotb.test()
async def test_intervals(dut):
    """The first, the middle and the last place of every interval, of both signs."""
    ends = np.concatenate([next_to(ROWS), next_to(ROWS - 1 / 64)])
    await _check(dut, np.concatenate([ends, ends | 1 << 31]))
