# SPDX-License-Identifier: Apache-2.0
"""SiLU of the gate times the other projection: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.vector import silu_mul
from sim.bench.dut import check_pipeline
from sim.bench.floats import extremes, floats, in_range, mostly_distant, next_to, pairs_of_extremes
from sim.bench.streams import rng


async def _check(dut, gate, up, gaps=0.0):
    expected = silu_mul(floats(gate), floats(up)).view(np.uint32)
    await check_pipeline(dut, {"gate": gate, "up": up}, expected, gaps, rng(len(gate)))


@cocotb.test()
async def test_extremes(dut):
    """Every pair of extremes."""
    await _check(dut, *pairs_of_extremes())


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    """Random bits, and gates with which sigma is neither 0 nor 1."""
    random = rng()
    gate, up = mostly_distant(random, 1000)
    usual = in_range(random, 3000, -24, 5), in_range(random, 3000, -30, 30)
    await _check(dut, np.concatenate([gate, usual[0]]), np.concatenate([up, usual[1]]), gaps)


@cocotb.test()
async def test_small_sigma(dut):
    """Negative gates where sigma has any number of leading zeros, down to 0."""
    gates = next_to(np.linspace(0.01, 20, 700)) | 1 << 31
    await _check(dut, gates, rng().choice(extremes(), len(gates)))
