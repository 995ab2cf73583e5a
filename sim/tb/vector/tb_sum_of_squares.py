# SPDX-License-Identifier: Apache-2.0
"""The sum of squares: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.vector import sum_of_squares
from sim.bench.dut import latency
from sim.bench.floats import EXTREMES, extremes, floats, in_range
from sim.bench.rows import check_tokens, lanes
from sim.bench.streams import rng

FINITE_SQUARE = [bits for bits in EXTREMES if bits < 0x5F800000]


async def _check(dut, tokens, gaps=0.0):
    expected = np.array([sum_of_squares(floats(token)) for token in tokens])
    await check_tokens(dut, tokens, expected, {}, gaps, rng(len(tokens)))


@cocotb.test()
async def test_throughput(dut):
    """A row per cycle with 1 and 2 lanes; the adder's latency limits 4 and 8."""
    assert (lanes(), latency("interval")) in [(1, 1), (2, 1), (4, 2), (8, 4)]
    assert latency() == 51 + {1: 15, 2: 8, 4: 5, 8: 4}[lanes()]
    await _check(dut, [in_range(rng(), 64, -2, 2)])


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.1, 0.7])
async def test_random(dut, gaps):
    """Tokens of several lengths, one after the other, whose sums need every rounding."""
    random = rng()
    await _check(dut, [in_range(random, 16 * n, -4, 4) for n in (1, 2, 3, 9, 1, 6)], gaps)


@cocotb.test()
async def test_extremes(dut):
    """Zeros, numbers whose squares are tiny, infinite or NaN, and squares of very different size."""
    random = rng()
    tokens = [random.choice(some, 48) for some in (FINITE_SQUARE, FINITE_SQUARE, FINITE_SQUARE[:10], extremes())]
    await _check(dut, [np.asarray(token, np.uint32) for token in tokens] + [np.zeros(32, np.uint32)], 0.2)
