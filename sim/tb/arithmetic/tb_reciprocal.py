# SPDX-License-Identifier: Apache-2.0
"""1/x, 1/sqrt(x) and 1/S: bit for bit numpy's definitions."""

import cocotb
import numpy as np

from hw.spec.numerics.functions import UNIT_BITS
from hw.spec.numerics.reciprocal import INTEGER_BITS, reciprocal, reciprocal_of_integer, rsqrt
from sim.bench.dut import begin, latency, trace
from sim.bench.floats import extremes, floats, ties_of_rsqrt
from sim.bench.streams import rng

RECIPROCAL, RSQRT, INTEGER = range(3)


async def _check(dut, function, operands, gaps=0.0):
    """The next operand in the cycle of the result, or later. Everything else is random and must have no effect."""
    random, count = rng(len(operands)), len(operands)
    operands = np.asarray(operands, np.int64)
    expected = {
        RECIPROCAL: lambda: reciprocal(floats(operands)),
        RSQRT: lambda: rsqrt(floats(operands)),
        INTEGER: lambda: reciprocal_of_integer(operands, -UNIT_BITS),
    }[function]()
    wait = latency()
    cycles = np.arange(count) * wait + np.cumsum((random.random(count) < gaps) * random.integers(1, 9, count))
    total = cycles[-1] + 1 + wait
    driven = {
        "valid": np.zeros(total, int),
        "function": random.integers(0, 3, total),
        "x": random.integers(0, 1 << 32, total),
        "integer": random.integers(0, 1 << INTEGER_BITS, total),
    }
    # While it is not ready, an operand waits and is not taken.
    driven["valid"] = (random.random(total) < 0.5).astype(int)
    driven["valid"][: cycles[0]] = 0
    for begin_, end in zip(cycles, [*cycles[1:], total]):
        driven["valid"][begin_ + wait : end] = 0
    driven["valid"][cycles] = 1
    driven["valid"][-1] = 0
    driven["function"][cycles] = function
    driven["integer" if function == INTEGER else "x"][cycles] = operands
    await begin(dut)
    record = await trace(dut, driven, ["ready", "done", "result"])
    free = np.ones(total, int)
    for start in cycles:
        free[start + 1 : start + wait] = 0
    assert record.raw("ready", range(total)) == free.tolist()
    assert np.flatnonzero(record.raw("done", range(total))).tolist() == (cycles + wait).tolist()
    seen, expected = np.array(record.raw("result", cycles + wait)), expected.view(np.uint32)
    wrong = np.flatnonzero(seen != expected)
    if len(wrong):
        first = wrong[0]
        raise AssertionError(
            f"{operands[first]:#x} gave {seen[first]:#x}, not {expected[first]:#x}; {len(wrong)} of {count} are wrong"
        )


@cocotb.test()
async def test_latency(dut):
    """The time counts between two layers."""
    assert latency() == 31
    await _check(dut, RSQRT, extremes()[:4])


@cocotb.test()
@cocotb.parametrize(function=[RECIPROCAL, RSQRT])
async def test_extremes(dut, function):
    await _check(dut, function, extremes())


@cocotb.test()
@cocotb.parametrize(function=[RECIPROCAL, RSQRT])
async def test_every_exponent(dut, function):
    """Powers of two, whose results are exact, and their neighbours, of both signs."""
    exponents = np.arange(256) << 23
    await _check(dut, function, np.concatenate([exponents, exponents | 1, exponents | 0x7FFFFF, exponents | 1 << 31]))


@cocotb.test()
@cocotb.parametrize(function=[RECIPROCAL, RSQRT], gaps=[0.0, 0.5])
async def test_random(dut, function, gaps):
    await _check(dut, function, rng().integers(0, 1 << 31 if function == RSQRT else 1 << 32, 400), gaps)


@cocotb.test()
async def test_hard_roots(dut):
    """Results next to the middle between two float32."""
    await _check(dut, RSQRT, ties_of_rsqrt(rng(), 300))


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_integers(dut, gaps):
    """Every length, powers of two and their neighbours, results next to the middle, and 0."""
    random = rng()
    powers = 1 << np.arange(INTEGER_BITS)
    # 1/S is next to the middle between two float32 if S is a power of two divided by an odd number.
    middles = (1 << 62) // (2 * random.integers(1 << 23, 1 << 24, 100) + 1)
    some = random.integers(0, 1 << INTEGER_BITS, 200) >> random.integers(0, INTEGER_BITS, 200)
    await _check(
        dut, INTEGER, np.concatenate([[0], powers, powers - 1, powers[1:] + 1, middles, middles + 1, some]), gaps
    )
