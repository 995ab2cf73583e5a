# SPDX-License-Identifier: Apache-2.0
"""Maximum and argmax of pieces: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.vector import PIECE, piece_maxima
from sim.bench.dut import begin, latency, trace
from sim.bench.floats import extremes, floats
from sim.bench.packing import pack_elements
from sim.bench.rows import lanes
from sim.bench.streams import rng


async def _check(dut, pieces, gaps=0.0):
    """One row per cycle, or with gaps. Lanes without a number, and rows that are not valid, have random values."""
    random, count, wait = rng(len(pieces)), lanes(), latency()
    values, keep, last = [], [], []
    for piece in pieces:
        rows = -(-len(piece) // count)
        padded = random.integers(0, 1 << 32, rows * count)
        padded[: len(piece)] = piece
        values.append(padded.reshape(rows, count))
        keep += [(1 << min(count, len(piece) - row * count)) - 1 for row in range(rows)]
        last += [0] * (rows - 1) + [1]
    cycles = np.arange(len(keep)) + np.cumsum(random.random(len(keep)) < gaps)
    total = cycles[-1] + 2 + wait
    shown = random.integers(0, 1 << 32, (total, count))
    shown[cycles] = np.concatenate(values)
    driven = {"valid": np.zeros(total, int), "values": pack_elements(shown, 32)}
    driven["valid"][cycles] = 1
    for name, given, end in (("keep", keep, 1 << count), ("last", last, 2)):
        driven[name] = random.integers(0, end, total)
        driven[name][cycles] = given
    await begin(dut)
    record = await trace(dut, driven, ["done", "maximum", "index"])
    ends = cycles[np.flatnonzero(last)] + wait
    assert np.flatnonzero(record.raw("done", range(total))).tolist() == ends.tolist()
    expected = [tuple(part[0] for part in piece_maxima(floats(piece))) for piece in pieces]
    assert record.raw("index", ends) == [int(index) for _, index in expected]
    assert record.raw("maximum", ends) == [int(value.view(np.uint32)) for value, _ in expected]


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    """Pieces of all lengths, many of them short, one after the other."""
    random = rng()
    lengths = [1, PIECE, 1, 1, *random.integers(1, 20, 60), *random.integers(1, PIECE + 1, 8)]
    await _check(dut, [random.integers(0, 1 << 32, n, dtype=np.uint32) for n in lengths], gaps)


@cocotb.test()
async def test_extremes(dut):
    """Few different values: equal numbers, zeros of both signs, subnormal numbers, infinities, several NaNs."""
    random = rng()
    sets = [random.choice(extremes(), size) for size in [2] * 60 + [3] * 40 + [8] * 20]
    await _check(dut, [random.choice(some, random.integers(2, 30)) for some in sets])


@cocotb.test()
async def test_every_place(dut):
    """The largest at each place, and ascending and descending numbers."""
    small = np.full(PIECE, 0xC0000000, np.uint32)
    places = [0, 1, 7, 8, 100, PIECE - 2, PIECE - 1]
    pieces = [np.where(np.arange(PIECE) >= place, np.uint32(0xBF800000), small) for place in places]
    order = np.arange(PIECE, dtype=np.float32) - 100
    await _check(dut, [*pieces, order.view(np.uint32), order[::-1].copy().view(np.uint32)])
