# SPDX-License-Identifier: Apache-2.0
"""Probabilities times powers of two, in the order in which the array takes them: bit for bit numpy's definition."""

from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from hw.spec.config import SCORE_UNIT
from hw.spec.memory.kv_cache import value_group
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.functions import ONE, UNIT_BITS
from hw.spec.numerics.linear import to_float32
from sim.bench.dut import begin, config, payload
from sim.bench.packing import pack_elements
from sim.bench.streams import StreamSink, StreamSource, never, randomly, rng

CONFIG = config()
TILE = CONFIG.tile


@dataclass
class Job:
    """A descriptor's probabilities, int64 [rows, positions], and int8 [output tiles, whole chunks] of exponents."""

    p: np.ndarray
    exponents: np.ndarray
    bank: int

    @property
    def words(self) -> np.ndarray:
        """The bank: uint32 [words, tile], with 0 behind the positions."""
        rows, positions = self.p.shape
        padded = np.zeros((rows, -(-positions // SCORE_UNIT) * SCORE_UNIT), np.float32)
        padded[:, :positions] = to_float32(self.p, np.array(-UNIT_BITS))
        return padded.view(np.uint32).reshape(-1, TILE)

    def command(self, port: str = "job") -> list[int]:
        """The job."""
        (rows, positions), tiles = self.p.shape, len(self.exponents)
        return payload(port).pack(bank=[self.bank], tokens=[rows], positions=[positions], tiles=[tiles])

    @property
    def exponent_rows(self) -> list[int]:
        """The exponents as they come from memory: a row of floats holds ``4 * tile`` of them."""
        by_chunk = self.exponents.reshape(len(self.exponents), -1, CHUNK).transpose(1, 0, 2)
        return pack_elements(by_chunk.astype(np.int64).reshape(-1, 4 * TILE) & 0xFF, 8)

    def expected(self) -> list[np.ndarray]:
        """The rows in order: uint32 [tile] each."""
        found, group = [], value_group(CONFIG)
        for start in range(0, self.p.shape[1], CHUNK):
            for exponents in self.exponents:
                part = self.p[:, start : start + CHUNK]
                count = -(-part.shape[1] // group) * group
                products = np.zeros((len(part), count), np.float32)
                powers = exponents[start : start + part.shape[1]].astype(np.int64)
                products[:, : part.shape[1]] = to_float32(part, powers - UNIT_BITS)
                found += list(products.view(np.uint32).reshape(-1, TILE))
        return found


class Banks:
    """Both banks: gives the word that was read in the cycle before.

    Chunks become ready at random times, and banks are busy in random cycles. pause : probability of either
    """

    def __init__(self, dut: Any, jobs: list[Job], pause: float):
        self.dut, self.jobs, self.pause, self.random = dut, jobs, pause, rng(3)
        self.left = [0, 0]
        for job in jobs:
            self.left[job.bank] = -(-job.p.shape[1] // CHUNK)
        dut.ready.value, dut.busy.value = 0, 0

    async def run(self) -> None:
        dut, edge = self.dut, RisingEdge(self.dut.clk)
        banks: list[np.ndarray | None] = [None, None]
        for job in reversed(self.jobs):
            banks[job.bank] = job.words
        packed = [None if bank is None else pack_elements(bank, 32) for bank in banks]
        ready, busy = [False, False], [False, False]
        while True:
            await edge
            # What the block saw in the cycle that ends here.
            if dut.read.value == 1:
                bank = int(dut.bank.value)
                words = packed[bank]
                assert words is not None and ready[bank] and not busy[bank]
                dut.word.value = words[int(dut.address.value)]
                if dut.finished.value == 1:
                    self.left[bank] -= 1
                    ready[bank] = False
            else:
                assert dut.finished.value == 0
            for bank in range(2):
                ready[bank] |= self.left[bank] > 0 and self.random.random() >= 0.9 * bool(self.pause)
                busy[bank] = bool(self.random.random() < self.pause)
            dut.ready.value = ready[0] | ready[1] << 1
            dut.busy.value = busy[0] | busy[1] << 1


async def check(dut: Any, jobs: list[Job], stall: float = 0.0) -> None:
    """At most one job for each bank."""
    random = rng(len(jobs))
    rule = (lambda: randomly(stall, random)) if stall else (lambda: never)
    source = StreamSource(dut, "job", dut.clk, rule())
    exponents = StreamSource(dut, "exponents", dut.clk, rule())
    sink = StreamSink(dut, "rows", dut.clk, rule())
    banks = Banks(dut, jobs, stall)
    dut.word.value = 0
    await begin(dut)
    cocotb.start_soon(banks.run())
    for job in jobs:
        source.send(job.command())
        exponents.send(job.exponent_rows)
    expected = [row for job in jobs for row in job.expected()]
    seen = await sink.take(len(expected))
    wanted = pack_elements(np.array(expected), 32)
    wrong = [index for index, (one, other) in enumerate(zip(seen, wanted, strict=True)) if one != other]
    assert not wrong, f"row {wrong[0]} is {seen[wrong[0]]:x}, not {wanted[wrong[0]]:x}; {len(wrong)} are wrong"
    await sink.quiet()
    assert banks.left == [0, 0]


def job(random: np.random.Generator, rows: int, positions: int, tiles: int, bank: int) -> Job:
    p = random.integers(0, ONE + 1, (rows, positions)) >> random.integers(0, UNIT_BITS + 1, (rows, positions))
    p[:, ::7] = 0
    chunks = -(-positions // CHUNK)
    exponents = random.integers(-128, 122, (tiles, chunks * CHUNK)).astype(np.int8)
    return Job(p, exponents, bank)


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5], positions=[1, 64, 65, 256, 300])
async def test_random(dut, stall, positions):
    random = rng(positions)
    rows = max(1, min(CONFIG.max_tokens, CONFIG.score_words // (-(-positions // SCORE_UNIT) * SCORE_UNIT)))
    jobs = [job(random, rows, positions, 3, 1), job(random, 1, max(1, positions // 2), 1, 0)]
    await check(dut, jobs, stall)
