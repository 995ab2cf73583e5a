# SPDX-License-Identifier: Apache-2.0
"""From scores to the activations of values and 1/S: bit for bit numpy's definition, with both banks in use."""

from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np

from hw.spec.config import SCORE_UNIT
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.functions import UNIT_BITS
from hw.spec.numerics.reciprocal import reciprocal_of_integer
from sim.bench.dut import begin, config, latency, payload
from sim.bench.floats import extremes
from sim.bench.monitor import Monitor, consecutive
from sim.bench.packing import pack_elements
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, read, rng, until
from sim.tb.attention.tb_score_banks import Job as Scores
from sim.tb.attention.tb_score_banks import random_job, scores
from sim.tb.attention.tb_value_rows import Job as Values

CONFIG = config()


@dataclass
class Head:
    """The scores of one descriptor, and the values that follow them."""

    scores: Scores
    values: Values

    @classmethod
    def of(cls, random: np.random.Generator, some: Scores, tiles: int) -> "Head":
        chunks = -(-some.scores.shape[1] // CHUNK)
        exponents = random.integers(-128, 122, (tiles, chunks * CHUNK)).astype(np.int8)
        return cls(some, Values(some.expected().p, exponents, some.bank))

    @property
    def inverses(self) -> np.ndarray:
        return reciprocal_of_integer(self.scores.expected().total, -UNIT_BITS).view(np.uint32)


class Bench:
    """Sends all jobs at once. The rows are compared, then 1/S is read and the bank released, as the epilogue does."""

    def __init__(self, dut: Any, heads: list[Head], stall: float = 0.0):
        self.dut, self.heads, self.random = dut, heads, rng(len(heads))
        self.pause = 30 if stall else 0
        rule = (lambda: randomly(stall, self.random)) if stall else (lambda: never)
        names = ("scores_job", "scores", "values_job", "exponents")
        self.sources = [StreamSource(dut, name, dut.clk, rule()) for name in names]
        self.rows = StreamSink(dut, "rows", dut.clk, rule())
        self.monitor = Monitor(dut, ("scores", "rows"), ("stored",))
        dut.release.value, dut.row.value = 0, 0

    async def run(self) -> None:
        dut = self.dut
        await begin(dut)
        for head in self.heads:
            parts = (
                head.scores.command("scores_job"),
                head.scores.transfers(self.random, "scores"),
                head.values.command("values_job"),
                head.values.exponent_rows,
            )
            for source, part in zip(self.sources, parts, strict=True):
                source.send(part)
        for number, head in enumerate(self.heads):
            await self._check_rows(number, head)
            await self._release(number, head)
        await self.rows.quiet()
        stored, given = self.monitor["stored"], self.monitor["scores"]
        ends = np.cumsum([len(head.scores.transfers(rng(0), "scores")) for head in self.heads]) - 1
        assert stored == [given[end] + latency("write_latency") for end in ends]

    async def _check_rows(self, number: int, head: Head) -> None:
        expected = pack_elements(np.array(head.values.expected()), 32)
        seen = await self.rows.take(len(expected), 200_000)
        wrong = [at for at, (one, other) in enumerate(zip(seen, expected, strict=True)) if one != other]
        assert not wrong, (
            f"job {number}, {head.scores.fields}, bank {head.scores.bank}: row {wrong[0]} is {seen[wrong[0]]:x},"
            f" not {expected[wrong[0]]:x}; {len(wrong)} are wrong"
        )

    async def _release(self, number: int, head: Head) -> None:
        dut, bank = self.dut, head.scores.bank
        await until(dut.clk, lambda: read(dut.inverted) >> bank & 1 == 1, f"1/S of bank {bank}")
        for row in self.random.permutation(len(head.inverses)):
            dut.row.value = payload("row").pack(bank=[bank], token=[row])[0]
            await cycle(dut.clk)
            assert read(dut.inverse) == head.inverses[row], f"job {number}, row {row}"
        await cycle(dut.clk, int(self.random.integers(0, self.pause + 1)))
        assert read(dut.inverted) >> bank & 1
        dut.release.value = 1 << bank
        await cycle(dut.clk)
        dut.release.value = 0
        await cycle(dut.clk)
        assert not read(dut.inverted) >> bank & 1, f"bank {bank} is free"


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5], turns=[True, False])
async def test_random(dut, stall, turns):
    """Any masks; the banks take turns, or one of them is used several times in a row."""
    random, heads = rng(), []
    for index in range(8):
        some = random_job(random, 90 if index else 400)
        some.bank = index % 2 if turns else int(random.integers(2))
        heads.append(Head.of(random, some, int(random.integers(1, 4))))
    await Bench(dut, heads, stall).run()


@cocotb.test()
async def test_extremes(dut):
    """Infinities, NaNs, and rows that see nothing: their probabilities are 0, and so is S."""
    random, heads = rng(), []
    for index, size in enumerate((2, 3, 30)):
        some = Scores(random.choice(random.choice(extremes(), size), (CONFIG.max_tokens, 40)), 40, 40)
        some.bank = index % 2
        heads.append(Head.of(random, some, 1))
    heads.append(Head.of(random, Scores(scores(random, CONFIG.max_tokens, 3), 1, 900, 1, 1), 1))
    heads[-1].scores.bank = heads[-1].values.bank = 1
    await Bench(dut, heads).run()


@cocotb.test()
async def test_throughput(dut):
    """Scores never wait for the bank that is read, and only the rows of the last chunk are given after the softmax."""
    random, tokens, heads = rng(), CONFIG.max_tokens, []
    # The softmax reads one word in so many cycles; the tiles' rows fit into the others.
    parts = CONFIG.tile // CONFIG.vector_lanes
    tiles = max(1, min(4, parts - 1))
    positions = CONFIG.score_words // tokens // SCORE_UNIT * SCORE_UNIT
    positions = positions // CHUNK * CHUNK or positions
    for bank in range(2):
        some = Scores(scores(random, tokens, positions), positions, positions)
        some.bank = bank
        heads.append(Head.of(random, some, tiles))
    bench = Bench(dut, heads)
    await bench.run()
    count, given = tokens * positions // CONFIG.vector_lanes, bench.monitor["scores"]
    assert consecutive(given[:count]) and consecutive(given[count:])
    assert given[count] - given[count - 1] <= latency("write_latency") + 2
    per_head, last_chunk = (tiles * tokens * some // CONFIG.tile for some in (positions, (positions - 1) % CHUNK + 1))
    rows = bench.monitor["rows"]
    assert len(rows) == 2 * per_head
    softmax_end = given[count - 1] + latency("write_latency")
    for head in range(2):
        of_head = rows[head * per_head : (head + 1) * per_head]
        # With one part the softmax reads in every cycle.
        last_chunk = last_chunk if parts > 1 else per_head
        assert consecutive(of_head[-last_chunk:])
        softmax_end = max(softmax_end, given[(head + 1) * count - 1] + latency("write_latency")) + count
        assert of_head[-last_chunk] <= softmax_end + latency("softmax_latency") + latency("row_latency") + 4 * (
            head + 1
        )
