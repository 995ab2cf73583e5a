# SPDX-License-Identifier: Apache-2.0
"""Heads in block floating point: bit for bit numpy's definition of cached keys and values."""

from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np

from hw.spec.numerics.attention import key_spread
from hw.spec.numerics.block_float import BLOCK, BlockFloat, quantize
from sim.bench.dut import begin, latency, payload
from sim.bench.floats import extremes, floats
from sim.bench.packing import unpack_elements
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, read, rng

WIDTHS = (8, 16)
GROUPS = 8


@dataclass
class Head:
    """uint32 [head size], and its form."""

    values: np.ndarray
    keys: bool
    wide: bool

    def expected(self) -> BlockFloat:
        bits = WIDTHS[self.wide]
        return quantize(floats(self.values), bits, spread=key_spread(bits) if self.keys else None)

    def rows(self) -> list[int]:
        rows = self.values.reshape(-1, latency("lanes")).astype(np.uint32).view(np.int32).astype(np.int64)
        last = np.arange(len(rows)) == len(rows) - 1
        return payload("rows").pack(values=rows, last=last, keys=int(self.keys), wide=int(self.wide))


async def check(dut: Any, heads: list[Head], stall: float = 0.0) -> None:
    random = rng(len(heads))
    rule = (lambda: randomly(stall, random)) if stall else (lambda: never)
    source = StreamSource(dut, "rows", dut.clk, rule())
    sinks = [StreamSink(dut, name, dut.clk, rule()) for name in ("heads", "mantissas")]
    await begin(dut)
    for head in heads:
        source.send(head.rows())
    lanes = latency("lanes")
    for index, head in enumerate(heads):
        expected, about = head.expected(), payload("heads").unpack(await sinks[0].take(1), exponents=GROUPS)
        groups = len(expected.exponents)
        assert (about["keys"][0], about["wide"][0]) == (head.keys, head.wide)
        assert about["last_group"][0] == groups - 1
        what = f"head {index} of {len(head.values)}, keys {head.keys}, wide {head.wide}"
        exponents = about["exponents"][0][:groups]
        assert np.array_equal(exponents, expected.exponents), f"{what}: {exponents}, not {expected.exponents}"
        assert about["largest"][0] == expected.exponents.max()
        seen = unpack_elements(await sinks[1].take(len(head.values) // lanes), max(WIDTHS), lanes, True).reshape(-1)
        wrong = np.flatnonzero(seen != expected.mantissas)
        assert not len(wrong), f"{what}: mantissa {wrong[0]} is {seen[wrong[0]]}, not {expected.mantissas[wrong[0]]}"
    assert read(dut.non_finite) == 0


def numbers(random: np.random.Generator, size: int, spread: int) -> np.ndarray:
    """Groups whose largest exponents differ, and numbers of which many are ties."""
    tops = np.repeat(random.integers(max(1, 200 - spread), 200, size // BLOCK), BLOCK)
    exponents = np.maximum(tops - random.integers(0, 20, size), 0)
    bits = random.integers(0, 1 << 23, size) & np.where(random.random(size) < 0.5, 0x7F0000, 0x7FFFFF)
    return (bits | exponents << 23 | random.integers(0, 2, size) << 31).astype(np.uint32)


def forms(random: np.random.Generator, values: np.ndarray) -> Head:
    return Head(values, bool(random.integers(0, 2)), bool(random.integers(0, 2)))


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def test_random(dut, stall):
    random = rng()
    sizes = random.choice([32, 64, 96, 128, 256], 40)
    await check(dut, [forms(random, numbers(random, size, int(random.choice([1, 8, 199])))) for size in sizes], stall)


@cocotb.test()
async def test_carries_and_extremes(dut):
    """Largest numbers that carry into the next exponent, or just not; zeros, subnormal and the largest numbers."""
    random, heads = rng(), []
    tops = (0x7F0000, 0x7EFFFF, 0x7FFF00, 0x7FFEFF, 0x7FFFFF, 0)
    for top in tops:
        values = numbers(random, 64, 1)
        values[[5, 40]] = top | random.integers(200, 250) << 23
        heads += [Head(values, keys, wide) for keys in (False, True) for wide in (False, True)]
    finite = [value for value in extremes() if (int(value) >> 23 & 0xFF) != 0xFF]
    heads += [forms(random, random.choice(finite, 64).astype(np.uint32)) for _ in range(20)]
    heads += [Head(np.zeros(96, np.uint32), True, wide) for wide in (False, True)]
    await check(dut, heads)


@cocotb.test()
@cocotb.parametrize(value=[0x7F800000, 0xFF800000, 0x7FC00000])
async def test_non_finite(dut, value):
    source = StreamSource(dut, "rows", dut.clk, never)
    for name in ("heads", "mantissas"):
        StreamSink(dut, name, dut.clk, never)
    await begin(dut)
    values = numbers(rng(), 64, 1)
    source.send(Head(values, True, False).rows())
    await cycle(dut.clk, 100)
    assert read(dut.non_finite) == 0
    values[37] = value
    source.send(Head(values, True, False).rows())
    await cycle(dut.clk, 100)
    assert read(dut.non_finite) == 1


@cocotb.test()
async def test_throughput(dut):
    """While one head leaves, the next one is stored: a row in each cycle."""
    random, lanes = rng(), latency("lanes")
    source = StreamSource(dut, "rows", dut.clk, never)
    sinks = [StreamSink(dut, name, dut.clk, never) for name in ("heads", "mantissas")]
    await begin(dut)
    for _ in range(8):
        source.send(Head(numbers(random, 256, 8), True, False).rows())
    rows = 8 * 256 // lanes
    cycles = await source.drained()
    # Each head waits for its exponents, and is shown, before its rows leave.
    assert cycles <= rows + 8 * (latency("exponent_latency") + 4)
    await sinks[1].take(rows)
