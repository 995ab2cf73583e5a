# SPDX-License-Identifier: Apache-2.0
"""Sums of chunks of values, between layers that pass: bit for bit numpy's definition, and every place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np

from hw.spec.memory.kv_cache import LONGEST_CONTEXT
from hw.spec.memory.transfers import Transfer, tile_transfers
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.float32 import add
from hw.spec.ops.epilogue import MAX_HEAD
from sim.bench.dut import begin, config, latency, payload
from sim.bench.floats import extremes, floats
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, never, randomly, rng

CONFIG = config()
TILE, LANES = CONFIG.tile, CONFIG.lanes
PER_ROW = TILE // LANES
"""Transfers of a row of a column tile."""
MOST_TILES = MAX_HEAD // TILE
MOST_CHUNKS = LONGEST_CONTEXT // CHUNK


@dataclass
class Job:
    """The core's results of a descriptor: uint32 [chunks, tokens, N]. A layer that passes has one chunk."""

    results: np.ndarray
    values: bool = True

    @property
    def payload(self) -> list[int]:
        chunks, tokens, columns = self.results.shape
        counts = {"chunks": chunks, "tiles": columns // TILE, "tokens": tokens} if self.values else {}
        return payload("job").pack(values=[int(self.values)], **{name: [value] for name, value in counts.items()})

    def given(self, random: np.random.Generator) -> list[int]:
        """The core's transfers."""
        chunks, tokens, columns = self.results.shape
        if not self.values:
            return _payloads(self.results[0], tile_transfers(TILE, LANES, tokens, columns), random)
        parts = [self.results[chunk, :, at : at + TILE] for chunk in range(chunks) for at in range(0, columns, TILE)]
        places = tile_transfers(TILE, LANES, tokens, TILE)
        return [transfer for part in parts for transfer in _payloads(part, places, random)]

    def expected(self, random: np.random.Generator) -> list[int]:
        """The transfers that leave."""
        total = floats(self.results[0])
        for chunk in self.results[1:]:
            total = add(total, floats(chunk))
        return _payloads(total.view(np.uint32), tile_transfers(TILE, LANES, *total.shape), random)


def _payloads(rows: np.ndarray, transfers: Sequence[Transfer], random: np.random.Generator) -> list[int]:
    """Lanes without a column have random values."""
    values = random.integers(0, 1 << 32, (len(transfers), LANES), dtype=np.uint32)
    for part, transfer in zip(values, transfers, strict=True):
        columns = transfer.columns
        part[: len(columns)] = rows[transfer.token, columns.start : columns.stop]
    fields = {name: [transfer.fields[name] for transfer in transfers] for name in transfers[0].fields}
    return payload("i").pack(values=values.view(np.int32).astype(np.int64), **fields)


class Bench:
    """Sends jobs and compares what leaves, transfer by transfer."""

    def __init__(self, dut: Any, jobs: list[Job], stalls: Sequence[Stall] = (never,) * 3):
        self.jobs = jobs
        job, given, out = stalls
        self.job, self.i = StreamSource(dut, "job", dut.clk, job), StreamSource(dut, "i", dut.clk, given)
        self.o = StreamSink(dut, "o", dut.clk, out)
        self.monitor = Monitor(dut, ("i", "o"))

    async def run(self, dut: Any) -> None:
        await begin(dut)
        for number, job in enumerate(self.jobs):
            self.job.send(job.payload)
            self.i.send(job.given(rng(number)))
        for number, job in enumerate(self.jobs):
            # A layer passes with the values of all lanes, which are those that were given.
            expected = job.expected(rng(number))
            seen = await self.o.take(len(expected), 1_000_000)
            wrong = [at for at, (one, other) in enumerate(zip(seen, expected, strict=True)) if one != other]
            if wrong:
                fields = [payload("o").unpack([some[wrong[0]]]) for some in (seen, expected)]
                raise AssertionError(
                    f"job {number} {job.results.shape} {'values' * job.values}: transfer {wrong[0]} is"
                    f" {fields[0]}, not {fields[1]}; {len(wrong)} are wrong"
                )
        await self.o.quiet()
        assert self.i.transfers == sum(self._count(job) for job in self.jobs)

    @staticmethod
    def _count(job: Job) -> int:
        return len(job.given(rng(0)))

    def times(self, number: int) -> tuple[list[int], list[int]]:
        """The cycles of a job's transfers: given, and left."""
        counts = [(self._count(job), len(job.expected(rng(0)))) for job in self.jobs]
        (given, left), (given_end, left_end) = np.cumsum([(0, 0), *counts], axis=0)[number : number + 2]
        return self.monitor["i"][given:given_end], self.monitor["o"][left:left_end]


def numbers(random: np.random.Generator, *shape: int, hard: bool = False) -> np.ndarray:
    """float32 whose sums round, as bits; or every pair of extreme numbers sooner or later."""
    if hard:
        return random.choice(extremes(), shape)
    return (random.standard_normal(shape) * 2.0 ** random.integers(-9, 9, shape)).astype(np.float32).view(np.uint32)


def random_job(random: np.random.Generator) -> Job:
    tokens = int(random.choice([1, 1, 2, CONFIG.max_tokens]))
    tokens = min(tokens, CONFIG.max_tokens)
    if random.random() < 0.4:
        return Job(numbers(random, 1, tokens, int(random.choice([1, TILE - 1, TILE, 5 * TILE + 2, 260]))), values=False)
    chunks, tiles = int(random.choice([1, 2, 3, 3, 4, 9])), int(random.choice([1, 2, 3, 32 // TILE, MOST_TILES]))
    return Job(numbers(random, chunks, tokens, min(tiles, MOST_TILES) * TILE, hard=bool(random.random() < 0.3)))


@cocotb.test()
@cocotb.parametrize(p=[(0, 0, 0), (0, 0, 0.5), (0, 0.7, 0), (0.9, 0.3, 0.3)])
async def test_random(dut, p):
    """Layers and values one after another, with many tokens and with one. p: of a stall of job, results, output."""
    random = rng()
    stalls = [randomly(one, rng(7, number)) if one else never for number, one in enumerate(p)]
    await Bench(dut, [random_job(random) for _ in range(30)], stalls).run(dut)


@cocotb.test()
async def test_longest_context(dut):
    """As many chunks, and as many column tiles, as there can be."""
    random = rng()
    jobs = [Job(numbers(random, MOST_CHUNKS, 1, TILE)), Job(numbers(random, 2, 1, MAX_HEAD))]
    await Bench(dut, [*jobs, Job(numbers(random, 1, 1, MAX_HEAD)), *jobs]).run(dut)


@cocotb.test()
async def test_passes_at_once(dut):
    """Layers, and values with one chunk, pass in the same cycle, one after another without a cycle between them."""
    random, most = rng(), CONFIG.max_tokens
    jobs = [
        Job(numbers(random, 1, most, 300), values=False),
        Job(numbers(random, 1, most, 2 * TILE)),
        Job(numbers(random, 1, most, TILE), values=False),
        Job(numbers(random, 1, most, 64)),
    ]
    bench = Bench(dut, jobs)
    await bench.run(dut)
    given, left = bench.monitor["i"], bench.monitor["o"]
    assert consecutive(given) and given == left
    assert latency() == 0


@cocotb.test()
@cocotb.parametrize(tokens=sorted({1, min(2, CONFIG.max_tokens), CONFIG.max_tokens}))
async def test_throughput(dut, tokens):
    """A transfer in every cycle, as far as the same sums are not needed too soon; and the sums' latency."""
    random, interval, per_tile = rng(), latency("interval"), tokens * PER_ROW
    tiles = (1, 2, 3)
    jobs = [Job(numbers(random, 5, tokens, count * TILE)) for count in tiles]
    bench = Bench(dut, [*jobs, Job(numbers(random, 1, tokens, TILE), values=False)])
    await bench.run(dut)
    for number, count in enumerate(tiles):
        given, left = bench.times(number)
        chunks = np.reshape(given, (5, count * per_tile))
        assert [int(cycle) + latency("sum_latency") for cycle in chunks[-1]] == left
        # With more than two tiles, it does not count those after the second one.
        entries = min(2, count) * per_tile
        if entries >= interval:
            assert consecutive(given), "a transfer in every cycle"
        if count <= 2:
            # From the third chunk on each transfer waits for the same one of the chunk before.
            assert (chunks[2:] - chunks[1:-1] == max(interval, entries)).all()
    assert bench.times(0)[0][-1] + 1 == bench.times(1)[0][0], "no cycle between values"
    # A layer waits until the sums have left.
    assert bench.times(3)[0][0] == bench.times(2)[1][-1] + 1
