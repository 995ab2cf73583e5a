# SPDX-License-Identifier: Apache-2.0
"""The blocks of jobs with several rows, in order, without a cycle between two of them."""

from typing import NamedTuple

import cocotb
import numpy as np

from hw.spec.control.descriptor import ADDRESS_LIMIT, DATA_ALIGNMENT, PITCH_BITS
from hw.spec.memory.kv_cache import LONGEST_CONTEXT, ValueCache
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops.epilogue import MAX_HEAD
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, never, randomly, rng

TILE = config().tile


class _Job(NamedTuple):
    """Rows in memory, in bytes; ``beats`` of each."""

    address: int
    pitch: int
    rows: int
    beats: int
    exponents: int
    chunks: int = 1

    def blocks(self) -> list[tuple[int, int, int]]:
        """(address, beats, exponents) of each block."""
        steps = np.arange(self.rows) * TILE // BLOCK if self.exponents else np.arange(self.rows)
        starts = [self.address + chunk * CHUNK for chunk in range(self.chunks)]
        return [(start + int(step) * self.pitch, self.beats, self.exponents) for start in starts for step in steps]


def _jobs(random: np.random.Generator, count: int) -> list[_Job]:
    """Linear layers, rows of queries, and the exponents of values, among them the longest of each."""
    most = (1 << payload("jobs").fields["beats"].width) - 1
    jobs = []
    for _ in range(count):
        kind = random.integers(4)
        pitch = DATA_ALIGNMENT * int(random.integers(1, (1 << PITCH_BITS) // DATA_ALIGNMENT))
        rows, exponents, beats = 1, 0, int(random.choice([1, int(random.integers(1, most + 1)), most]))
        chunks = 1 if kind < 2 else int(random.choice([1, 2, 5]))
        if kind == 1:
            rows = int(random.choice([1, 2, int(random.integers(1, config().max_tokens + 1)), config().max_tokens]))
        elif kind == 2:
            head = BLOCK * int(random.integers(1, MAX_HEAD // BLOCK + 1))
            chunks = LONGEST_CONTEXT // CHUNK if head == BLOCK else chunks
            rows, exponents, pitch = head // TILE, 1, ValueCache(config(), head, chunks * CHUNK).exponent_pitch
        elif kind == 3:
            rows, exponents, pitch = MAX_HEAD // TILE, 1, (1 << PITCH_BITS) - DATA_ALIGNMENT
        span = rows * pitch + LONGEST_CONTEXT
        address = DATA_ALIGNMENT * int(random.integers(0, (ADDRESS_LIMIT - span) // DATA_ALIGNMENT))
        jobs.append(_Job(address, pitch, rows, beats, exponents, chunks))
    return jobs


@cocotb.test()
@cocotb.parametrize(stalls=[(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.4, 0.6)])
async def random_jobs(dut, stalls):
    """All blocks in order; ``asking`` is high from the cycle after a job's first block to its last block."""
    random = rng(1)
    rules = [randomly(stall, rng(2, index)) if stall else never for index, stall in enumerate(stalls)]
    source = StreamSource(dut, "jobs", dut.clk, rules[0])
    sink = StreamSink(dut, "blocks", dut.clk, rules[1])
    await begin(dut)
    monitor = Monitor(dut, ("jobs", "blocks"), ("asking",))
    jobs = _jobs(random, 100)
    source.send(payload("jobs").pack(**{name: [getattr(job, name) for job in jobs] for name in _Job._fields}))
    expected = [block for job in jobs for block in job.blocks()]
    got = payload("blocks").unpack(await sink.take(len(expected)))
    seen = list(zip(*(got[name].tolist() for name in ("address", "beats", "exponents")), strict=True))
    assert seen == expected
    await sink.quiet(16)
    firsts = np.cumsum([0, *(len(job.blocks()) for job in jobs[:-1])])
    blocks = monitor["blocks"]
    assert [time - latency() for time in (blocks[first] for first in firsts)] == monitor["jobs"]
    asking = [
        time
        for first, job in zip(firsts, jobs, strict=True)
        for time in range(blocks[first] + 1, blocks[first + len(job.blocks()) - 1] + 1)
    ]
    assert monitor["asking"] == asking
    if stalls == (0.0, 0.0):
        assert consecutive(blocks)
