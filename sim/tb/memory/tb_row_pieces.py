# SPDX-License-Identifier: Apache-2.0
"""The blocks of jobs by pieces: their order, and that none is read before it is written."""

from typing import Any, NamedTuple

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from hw.spec.control.descriptor import ADDRESS_LIMIT, DATA_ALIGNMENT
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.operands import FLOAT_BYTES
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, read, rng, until

BEAT = config().port_width // 8
PIECE = PIECE_FLOATS * FLOAT_BYTES
ROW_BEATS = config().tile * FLOAT_BYTES // BEAT
_FIELDS = ("address", "pitch", "rows", "beats", "exponents", "by_pieces")


class _Job(NamedTuple):
    """Rows in memory, in bytes; ``beats`` of each."""

    address: int
    pitch: int
    rows: int
    beats: int
    exponents: int = 0
    by_pieces: int = 1

    def blocks(self) -> list[tuple[int, int, int]]:
        """(address, beats, exponents) of each block."""
        step = PIECE // BEAT if self.by_pieces else self.beats
        return [
            (self.address + row * self.pitch + first * BEAT, min(step, self.beats - first), self.exponents)
            for first in range(0, self.beats, step)
            for row in range(self.rows)
        ]


def _rows(random: np.random.Generator, by_pieces: bool = True) -> _Job:
    """A layer's activations: of several tokens, or a single row."""
    c = config()
    most = c.max_k // c.tile
    slices = int(random.choice([1, most, int(random.integers(1, most + 1)), min(most, PIECE_FLOATS // c.tile)]))
    rows = int(random.choice([2, c.max_tokens, int(random.integers(2, c.max_tokens + 1))])) if by_pieces else 1
    address = DATA_ALIGNMENT * int(random.integers(0, ADDRESS_LIMIT // DATA_ALIGNMENT))
    return _Job(address, slices * c.tile * FLOAT_BYTES, rows, slices * ROW_BEATS, 0, int(by_pieces))


class _Bench:
    def __init__(self, dut: Any, stalls: tuple[float, float]):
        rules = [randomly(stall, rng(2, index)) if stall else never for index, stall in enumerate(stalls)]
        self.dut = dut
        self.source = StreamSource(dut, "jobs", dut.clk, rules[0])
        self.sink = StreamSink(dut, "blocks", dut.clk, rules[1])
        dut.follow.value = dut.tail.value = dut.pieces.value = 0

    def send(self, jobs: list[_Job]) -> None:
        fields = {name: [getattr(job, name) for job in jobs] for name in _FIELDS}
        self.source.send(payload("jobs").pack(**fields, chunks=[1] * len(jobs)))

    async def check(self, jobs: list[_Job], cycles: int = 100_000) -> None:
        expected = [block for job in jobs for block in job.blocks()]
        got = payload("blocks").unpack(await self.sink.take(len(expected), cycles))
        seen = list(zip(*(got[name].tolist() for name in ("address", "beats", "exponents")), strict=True))
        assert seen == expected
        await self.sink.quiet(16)
        assert not read(self.dut.asking)


@cocotb.test()
@cocotb.parametrize(stalls=[(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.4, 0.6)])
async def random_jobs(dut, stalls):
    """Rows by pieces, single rows and rows of queries in turn."""
    random, bench = rng(1), _Bench(dut, stalls)
    await begin(dut)
    monitor = Monitor(dut, ("jobs", "blocks"), ("asking",))
    jobs = []
    for _ in range(60):
        kind = int(random.integers(3))
        job = _rows(random, kind > 0)
        jobs.append(job._replace(by_pieces=0, pitch=job.pitch + 128) if kind == 2 else job)
    bench.send(jobs)
    await bench.check(jobs)
    firsts = np.cumsum([0, *(len(job.blocks()) for job in jobs)])
    for index, job in enumerate(jobs):
        first, last, taken = monitor["blocks"][firsts[index]], monitor["blocks"][firsts[index + 1] - 1], 0
        taken = monitor["jobs"][index]
        if stalls == (0.0, 0.0):
            assert first - taken == latency("piece_latency" if job.by_pieces else "latency")
            assert last - first == firsts[index + 1] - firsts[index] - 1
        # Until the last block is taken, the fetch is not done with the job.
        assert set(range(taken + 1, last + 1)) <= set(monitor["asking"])


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5], ends=["complete", "early", "between"])
async def follows_rows(dut, stall, ends):
    """A block is offered only when its piece is in memory, and as soon as it is.

    ends : the count begins again when all pieces are in memory, and ``follow`` ends some cycles later; or ``follow``
    ends when not all blocks are requested; or the count is that of other rows at the end
    """
    random, bench = rng(1), _Bench(dut, (0.0, stall))
    await begin(dut)
    monitor = Monitor(dut, ("blocks",))
    for _ in range(12):
        job = _rows(random)
        blocks, before = len(job.blocks()), len(monitor["blocks"])
        dut.follow.value, dut.pieces.value = 1, 0
        count = bench.source.transfers
        bench.send([job])
        await until(dut.clk, lambda count=count: bench.source.transfers > count, "the job", cycles=200)
        assert not read(dut.follow_row)
        total = blocks if ends != "early" else int(random.integers(1, blocks + 1))
        written = 0
        while written < total:
            step = min(int(random.integers(1, 5)), total - written)
            written += step
            dut.pieces.value = written % blocks
            # In this cycle the count is new, so no more blocks than were written before can be taken in it.
            await RisingEdge(dut.clk)
            assert len(monitor["blocks"]) - before <= written
            await cycle(dut.clk, int(random.choice([1, 3, 40])))
            if random.random() < 0.3 and not stall and written < blocks:
                await cycle(dut.clk, 4 * blocks)
                assert len(monitor["blocks"]) - before == written, "a block in memory is not requested"
                assert not read(dut.asking)
        if ends == "between":
            await cycle(dut.clk, 3)
            dut.pieces.value = int(random.integers(0, 3))
        await cycle(dut.clk, int(random.integers(0, 4)))
        dut.follow.value = 0
        await bench.check([job])
        dut.pieces.value = 0


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def follows_the_last_piece(dut, stall):
    """If only columns of the last piece are being written, all other blocks are offered at once."""
    random, bench = rng(1), _Bench(dut, (0.0, stall))
    await begin(dut)
    monitor = Monitor(dut, ("blocks",))
    dut.tail.value = 1
    for _ in range(8):
        job, before = _rows(random), len(monitor["blocks"])
        dut.follow.value, dut.pieces.value = 1, int(random.integers(0, 3))
        bench.send([job])
        await cycle(dut.clk, 60 + 8 * len(job.blocks()))
        assert len(monitor["blocks"]) - before == len(job.blocks()) - job.rows
        assert not read(dut.asking)
        dut.follow.value = 0
        await bench.check([job])


@cocotb.test()
async def follows_a_single_row(dut):
    """A single row is followed by the fetch itself: its block passes at once."""
    random, bench = rng(1), _Bench(dut, (0.0, 0.0))
    await begin(dut)
    dut.follow.value = 1
    for _ in range(5):
        job = _rows(random, by_pieces=False)
        bench.send([job])
        await bench.check([job], 20)
        assert read(dut.follow_row)
