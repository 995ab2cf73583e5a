# SPDX-License-Identifier: Apache-2.0
"""Sums to float32: every alignment and every exponent, ties, overflow and underflow."""

import cocotb
import numpy as np

from hw.spec.numerics.linear import to_float32
from sim.bench.dut import begin, config, latency, payload, trace
from sim.bench.streams import rng


async def _convert(dut, values, exponents, gaps=0.0):
    """One conversion per cycle, or with gaps. The results must equal the reference, bit for bit."""
    values, exponents = np.asarray(values, np.int64), np.asarray(exponents, np.int64)
    wait, random = latency(), rng(len(values))
    cycles = np.arange(len(values)) + np.cumsum(random.random(len(values)) < gaps)
    total = cycles[-1] + 1 + wait
    shown = random.integers(-_bound(), _bound(), total), random.integers(*_exponent_range(), total)
    valid = np.zeros(total, int)
    shown[0][cycles], shown[1][cycles], valid[cycles] = values, exponents, 1
    inputs = {
        "value": payload("value").pack(value=shown[0]),
        "exponent": payload("exponent").pack(value=shown[1]),
        "valid": valid,
    }
    await begin(dut)
    record = await trace(dut, inputs, ["result"])
    seen = np.array(record.raw("result", cycles + wait), np.uint32)
    expected = to_float32(values, exponents).view(np.uint32)
    wrong = np.flatnonzero(seen != expected)
    if len(wrong):
        i = wrong[0]
        raise AssertionError(f"{values[i]} * 2**{exponents[i]} gave {seen[i]:#010x}, not {expected[i]:#010x}")


def _bound() -> int:
    c = config()
    return c.max_k * c.centred_max * c.activation_max * c.scale_max


def _exponent_range() -> tuple[int, int]:
    """The smallest and largest sum of a row's exponent and a token's exponent."""
    offset = 15 + config().fraction_bits
    return -256 - offset, 254 - offset


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    """Magnitudes of every length, so that every shift of the normaliser occurs."""
    random, count = rng(), 4000
    lengths = random.integers(1, _bound().bit_length(), count, endpoint=True)
    values = np.array([int(random.integers(1 << 62)) >> (62 - int(n)) for n in lengths])
    values = np.minimum(values, _bound()) * random.choice([-1, 1], count)
    await _convert(dut, values, random.integers(*_exponent_range(), count, endpoint=True), gaps)


@cocotb.test()
async def test_every_exponent(dut):
    """Every exponent with the smallest, the largest and medium values: overflow and underflow at each end."""
    low, high = _exponent_range()
    exponents = np.arange(low, high + 1)
    for value in (0, 1, -1, _bound(), -_bound(), 0xFFFFFF, -0x1FFFFFF if _bound() > 0x1FFFFFF else -3):
        await _convert(dut, np.full(len(exponents), value), exponents)


@cocotb.test()
async def test_halves(dut):
    """Ties, and their neighbours, at every alignment; a carry into the next power of two; and zero."""
    values = [0, 0]
    for length in range(25, _bound().bit_length()):
        unit = 1 << (length - 24)
        for significand in (0x800000, 0x800001, 0xFFFFFE, 0xFFFFFF, 0xABCDEF, 0xABCDEE):
            middle = significand * unit + unit // 2
            values += [middle, -middle, middle + 1, -middle - 1, middle - 1]
    values = np.array([v for v in values if abs(v) <= _bound()])
    await _convert(dut, values, np.full(len(values), -20))
    await _convert(dut, values, np.full(len(values), -126 - 30))
    await _convert(dut, values, np.full(len(values), 128 - 30))
