# SPDX-License-Identifier: Apache-2.0
"""The operations on pairs of columns: bit for bit numpy's definitions, one pair per cycle of any operation."""

import cocotb
import numpy as np

from hw.spec.numerics.vector import rotary, silu_mul
from sim.bench.dut import begin, latency, trace
from sim.bench.floats import extremes, floats, mostly_distant, near
from sim.bench.streams import rng

OPERANDS = ("low", "high", "cosine", "sine")


async def _check(dut, operands, gaps=0.0):
    """Pairs with random operations; everything else is random."""
    random, wait, count = rng(len(operands[0])), latency(), len(operands[0])
    operation = random.integers(0, 3, count)
    low, high, cosine, sine = (floats(values) for values in operands)
    turned, product = rotary(low, high, cosine, sine), silu_mul(low, high)
    expected = [
        np.where(operation == 1, turned[index], np.where(operation == 2, product, passed)).view(np.uint32)
        for index, passed in enumerate((low, high))
    ]
    # What passes keeps all bits, of NaNs and subnormal numbers, too.
    for index in range(2):
        expected[index] = np.where(operation == 0, operands[index], expected[index])
    cycles = np.arange(count) + np.cumsum(random.random(count) < gaps)
    total = cycles[-1] + 1 + wait
    driven = {"valid": np.zeros(total, int), "rotary": np.zeros(total, int), "silu": np.zeros(total, int)}
    driven["valid"][cycles] = 1
    driven["rotary"][cycles], driven["silu"][cycles] = operation == 1, operation == 2
    for name, values in zip(OPERANDS, operands, strict=True):
        driven[name] = random.integers(0, 1 << 32, total)
        driven[name][cycles] = values
    await begin(dut)
    names = ("low_result", "high_result")
    record = await trace(dut, driven, names)
    for name, wanted in zip(names, expected, strict=True):
        seen = np.array(record.raw(name, cycles + wait))
        wrong = np.flatnonzero(seen != wanted)
        assert not len(wrong), f"{name} of pair {wrong[0]}, operation {operation[wrong[0]]}: {seen[wrong[0]]:#x}"


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    random = rng()
    await _check(dut, [*mostly_distant(random, 3000), *near(random, 3000, 2)], gaps)


@cocotb.test()
async def test_extremes(dut):
    """Extremes as operands, and their combinations."""
    random = rng()
    await _check(dut, [random.choice(extremes(), 4000) for _ in OPERANDS])


@cocotb.test()
async def test_rotations(dut):
    """Cosines and sines of angles, with pairs of usual size."""
    random = rng()
    angles = random.uniform(-7, 7, 3000)
    pairs = random.standard_normal((2, 3000))
    values = [*pairs, np.cos(angles), np.sin(angles)]
    await _check(dut, [value.astype(np.float32).view(np.uint32).astype(np.int64) for value in values])
