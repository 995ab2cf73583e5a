# SPDX-License-Identifier: Apache-2.0
"""Maximum and argmax of pieces, of several tokens in turn: bit for bit numpy's definition."""

import cocotb
import numpy as np

from hw.spec.numerics.vector import PIECE, piece_maxima
from sim.bench.dut import begin, config, latency, trace
from sim.bench.floats import extremes, floats
from sim.bench.packing import pack_elements
from sim.bench.streams import rng

LANES = config().vector_lanes
TOKENS = config().max_tokens


async def _check(dut, chunks, gaps=0.0):
    """Chunks, each with the pieces of some tokens, all of one length; their transfers are mixed at random.

    Lanes without a number, and transfers that are not valid, have random values.
    """
    random, wait = rng(len(chunks)), latency()
    values, fields, ends, expected = [], [], [], []
    for chunk in chunks:
        transfers = -(-len(chunk[0]) // LANES)
        left = dict.fromkeys(range(len(chunk)), 0)
        while left:
            token = int(random.choice(list(left)))
            part = chunk[token][left[token] * LANES :][:LANES]
            values.append(np.concatenate([part, random.integers(0, 1 << 32, LANES - len(part))]))
            fields.append(((1 << len(part)) - 1, token, left[token]))
            left[token] += 1
            if left[token] == transfers:
                del left[token]
                ends.append(len(values) - 1)
                maximum, place = (found[0] for found in piece_maxima(floats(chunk[token])))
                expected.append((int(maximum.view(np.uint32)), int(place)))
    count = len(values)
    cycles = np.arange(count) + np.cumsum(random.random(count) < gaps)
    total = cycles[-1] + 2 + wait
    shown = random.integers(0, 1 << 32, (total, LANES))
    shown[cycles] = np.array(values)
    driven = {"valid": np.zeros(total, int), "values": pack_elements(shown, 32)}
    driven["valid"][cycles] = 1
    for index, (name, limit) in enumerate((("keep", 1 << LANES), ("token", TOKENS), ("column", PIECE // LANES))):
        driven[name] = random.integers(0, limit, total)
        driven[name][cycles] = [field[index] for field in fields]
    await begin(dut)
    record = await trace(dut, driven, ["maximum", "index"])
    at = cycles[ends] + wait
    assert list(zip(record.raw("maximum", at), record.raw("index", at), strict=True)) == expected


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def test_random(dut, gaps):
    """Pieces of all lengths, many of them short, of any number of tokens."""
    random = rng()
    lengths = [1, PIECE, 1, 1, *random.integers(1, 20, 40), *random.integers(1, PIECE + 1, 4)]
    tokens = random.integers(1, TOKENS, len(lengths), endpoint=True)
    pairs = zip(lengths, tokens, strict=True)
    await _check(dut, [random.integers(0, 1 << 32, (m, n)).astype(np.uint32) for n, m in pairs], gaps)


@cocotb.test()
async def test_extremes(dut):
    """Few different values: equal numbers, zeros of both signs, subnormal numbers, infinities, several NaNs."""
    random = rng()
    sets = [random.choice(extremes(), size) for size in [2] * 60 + [3] * 40 + [8] * 20]
    await _check(dut, [random.choice(some, (TOKENS, int(random.integers(2, 30)))) for some in sets])


@cocotb.test()
async def test_every_place(dut):
    """The largest at each place, and ascending and descending numbers."""
    small = np.full(PIECE, 0xC0000000, np.uint32)
    places = [0, 1, 7, 8, 100, PIECE - 2, PIECE - 1]
    pieces = [np.where(np.arange(PIECE) >= place, np.uint32(0xBF800000), small) for place in places]
    order = np.arange(PIECE, dtype=np.float32) - 100
    await _check(dut, [piece[None] for piece in (*pieces, order.view(np.uint32), order[::-1].copy().view(np.uint32))])
