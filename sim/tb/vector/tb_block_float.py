# SPDX-License-Identifier: Apache-2.0
"""Block floating point: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.block_float import BLOCK, quantize
from sim.bench.dut import begin, latency, ports, trace
from sim.bench.floats import extremes, floats, in_range
from sim.bench.packing import pack_elements
from sim.bench.rows import lanes
from sim.bench.streams import rng


async def _check(dut, groups, gaps=0.0):
    """uint32 [G, 32]. One row per cycle, or with gaps; the mantissas come without gaps."""
    random, count, wait = rng(len(groups)), lanes(), latency()
    bits, per_group = ports()["mantissas"]["width"] // count, latency("rows")
    assert per_group * count == BLOCK
    rows = np.asarray(groups).reshape(-1, count)
    cycles = np.arange(len(rows)) + np.cumsum(random.random(len(rows)) < gaps)
    total = cycles[-1] + 1 + wait + per_group
    shown = random.integers(0, 1 << 32, (total, count))
    shown[cycles] = rows
    driven = {"valid": np.zeros(total, int), "values": pack_elements(shown, 32)}
    driven["valid"][cycles] = 1
    await begin(dut)
    record = await trace(dut, driven, ["given", "mantissas", "exponent", "non_finite"])
    starts = cycles[per_group - 1 :: per_group] + wait
    given = (starts[:, None] + np.arange(per_group)).ravel()
    assert np.flatnonzero(record.raw("given", range(total))).tolist() == given.tolist()
    finite = np.array([np.isfinite(floats(group)).all() for group in groups])
    flags = np.array(record.raw("non_finite", given)).reshape(-1, per_group)
    assert (flags == ~finite[:, None]).all()
    expected = quantize(floats(groups)[finite], bits)
    mantissas = record.elements("mantissas", given).reshape(-1, BLOCK)[finite]
    exponents = record.fields("exponent", given)["value"].reshape(-1, per_group)[finite]
    wrong = np.flatnonzero(
        (exponents != expected.exponents).any(axis=1) | (mantissas != expected.mantissas).any(axis=1)
    )
    if len(wrong):
        i = wrong[0]
        raise AssertionError(
            f"group {i} gave {exponents[i]} {mantissas[i]}, not {expected.exponents[i]} {expected.mantissas[i]};"
            f" {len(wrong)} of {len(groups)} are wrong"
        )


def _random(random, count, spread):
    """Groups whose exponents differ by at most ``spread``."""
    tops = random.integers(spread, 255, (count, 1))
    exponents = tops - random.integers(0, spread + 1, (count, BLOCK))
    signs = random.integers(0, 2, (count, BLOCK)) << 31
    return (random.integers(0, 1 << 23, (count, BLOCK)) | exponents << 23 | signs).astype(np.uint32)


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5], spread=[3, 26])
async def test_random(dut, gaps, spread):
    await _check(dut, _random(rng(spread), 60, spread), gaps)


@cocotb.test()
async def test_every_exponent(dut):
    """The largest number has each exponent, with a fraction that carries, or just not; the others are ties and more."""
    random = rng()
    groups = _random(random, 256 * 3, 0) & 0x807FFFFF
    exponents = np.repeat(np.arange(255), 3)
    groups = groups[: len(exponents)]
    groups |= (np.maximum(exponents[:, None] - random.integers(0, 20, groups.shape), 0) << 23).astype(np.uint32)
    # Half of the numbers have few bits, so that many are ties.
    groups &= np.where(random.random(groups.shape) < 0.5, np.uint32(0xFFF00000), np.uint32(0xFFFFFFFF))
    tops = random.choice([0x7F0000, 0x7EFFFF, 0x7FFF00, 0x7FFEFF, 0x7FFFFF, 0], len(groups))
    groups[np.arange(len(groups)), random.integers(0, BLOCK, len(groups))] = tops | exponents << 23
    await _check(dut, groups)


@cocotb.test()
async def test_extremes(dut):
    """Zeros, subnormal numbers, and groups with an infinity or a NaN."""
    random = rng()
    groups = random.choice(extremes(), (40, BLOCK))
    groups[:20] &= np.uint32(0x80FFFFFF)
    groups[20:30] = in_range(random, 10 * BLOCK, -3, 3).reshape(10, BLOCK)
    groups[20, 3], groups[25, 31], groups[0] = 0x7F800000, 0xFFC00000, 0
    await _check(dut, groups, 0.1)
