# SPDX-License-Identifier: Apache-2.0
"""The scale of RMSNorm: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.reciprocal import reciprocal_of_integer
from hw.spec.numerics.vector import norm_scale
from sim.bench.floats import EXTREMES, floats, in_range
from sim.bench.rows import check_tokens
from sim.bench.streams import rng


async def _check(dut, tokens, eps, gaps=0.0):
    """Tokens of one length."""
    expected = np.array([norm_scale(floats(token), eps) for token in tokens])
    (length,) = {len(token) for token in tokens}
    constants = {
        "inverse": int(reciprocal_of_integer(length).view(np.uint32)),
        "eps": int(np.float32(eps).view(np.uint32)),
    }
    await check_tokens(dut, tokens, expected, constants, gaps, rng(len(tokens)))


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.3])
async def test_random(dut, gaps):
    random = rng()
    await _check(dut, [in_range(random, 96, -8, 4) for _ in range(6)], 1e-5, gaps)


@cocotb.test()
@cocotb.parametrize(eps=[0.0, 1e-6])
async def test_extremes(dut, eps):
    """A token of zeros, whose scale is infinite without eps; sums that are infinite or NaN."""
    random = rng()
    tokens = [
        random.choice(some, 32).astype(np.uint32) for some in (EXTREMES[:1], EXTREMES[:12], EXTREMES[:23], EXTREMES)
    ]
    await _check(dut, tokens, eps)
