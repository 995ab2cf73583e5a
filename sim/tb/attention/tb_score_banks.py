# SPDX-License-Identifier: Apache-2.0
"""Scores on chip and their softmax: bit for bit numpy's definition, with both banks in use."""

from dataclasses import dataclass, field
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge

from hw.spec.config import SCORE_UNIT
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.transfers import Transfer, tile_transfers
from hw.spec.numerics.attention import CHUNK, Probabilities, probabilities
from hw.spec.numerics.functions import UNIT_BITS
from hw.spec.numerics.linear import to_float32
from hw.spec.numerics.reciprocal import reciprocal_of_integer
from hw.spec.ops.scores import visible
from sim.bench.dut import begin, config, latency, payload
from sim.bench.floats import extremes, floats
from sim.bench.packing import unpack_elements
from sim.bench.streams import StreamSource, cycle, never, randomly, read, rng, until

CONFIG = config()
LANES, TILE = CONFIG.vector_lanes, CONFIG.tile


@dataclass
class Job:
    """The scores of a descriptor before the mask: uint32 [rows, positions]."""

    scores: np.ndarray
    turn: int
    slots: int
    window: int = 0
    causal: int = 0
    bank: int = field(default=0, init=False)

    @property
    def fields(self) -> dict[str, int]:
        rows, positions = self.scores.shape
        return {
            "tokens": rows,
            "positions": positions,
            "turn": self.turn,
            "slots": self.slots,
            "window": self.window,
            "causal": self.causal,
        }

    def command(self, port: str = "job") -> list[int]:
        """The job."""
        return payload(port).pack(bank=[self.bank], **{name: [value] for name, value in self.fields.items()})

    def expected(self) -> Probabilities:
        seen = visible({**self.fields, "out_features": self.scores.shape[1]})
        return probabilities(np.where(seen, floats(self.scores), np.float32(-np.inf)))

    def transfers(self, random: np.random.Generator, port: str = "results") -> list[int]:
        """The vector unit's results. Lanes without a column have random values."""
        found: dict[str, list[Any]] = {"values": []}
        for transfer in tile_transfers(TILE, LANES, *self.scores.shape):
            part = random.integers(0, 1 << 32, LANES)
            columns = transfer.columns
            part[: len(columns)] = self.scores[transfer.token, columns.start : columns.stop]
            found["values"].append(part)
            for name, value in _fields(transfer).items():
                found.setdefault(name, []).append(value)
        values = np.array(found.pop("values")).astype(np.uint32).view(np.int32).astype(np.int64)
        return payload(port).pack(values=values, **{name: np.array(given) for name, given in found.items()})


def _fields(transfer: Transfer) -> dict[str, int]:
    """The place counts half transfers."""
    fields = {name: value for name, value in transfer.fields.items() if name != "piece_end"}
    return {**fields, "column": 2 * transfer.column}


class Reader:
    """Reads a bank's probabilities and inverses, compares them, and releases the bank."""

    def __init__(self, dut: Any):
        self.dut = dut
        for name in ("release", "finished", "read", "bank", "address", "row"):
            getattr(dut, name).value = 0

    async def check(self, job: Job, pause: int) -> None:
        dut, bank = self.dut, job.bank
        expected = job.expected()
        rows, positions = job.scores.shape
        words = -(-positions // SCORE_UNIT) * SCORE_UNIT // TILE
        places = np.arange(rows * words).reshape(rows, words)
        seen: dict[int, int] = {}
        for start in range(0, words, CHUNK // TILE):
            # A chunk is read while the softmax computes the next ones.
            await until(dut.clk, lambda: read(dut.ready) >> bank & 1 == 1, f"a chunk of bank {bank}", 200_000)
            await cycle(dut.clk, pause)
            for address in places[:, start : start + CHUNK // TILE].ravel().tolist():
                seen[address] = await self._read(bank, address)
            dut.finished.value = 1 << bank
            await cycle(dut.clk)
            dut.finished.value = 0
            await cycle(dut.clk)
        assert not read(dut.ready) >> bank & 1, f"all chunks of bank {bank} are read"
        found = unpack_elements([seen[place] for place in sorted(seen)], 32, TILE, False).reshape(rows, -1)
        wanted = np.zeros(found.shape, np.int64)
        wanted[:, :positions] = to_float32(expected.p, np.array(-UNIT_BITS)).view(np.uint32)
        wrong = np.argwhere(found != wanted)
        if len(wrong):
            row, slot = wrong[0]
            raise AssertionError(
                f"row {row}, slot {slot}: p is {found[row, slot]:#x}, not {wanted[row, slot]:#x};"
                f" {len(wrong)} are wrong, {job.fields}"
            )
        await until(dut.clk, lambda: read(dut.inverted) >> bank & 1 == 1, f"1/S of bank {bank}")
        inverses = reciprocal_of_integer(expected.total, -UNIT_BITS).view(np.uint32)
        for row, inverse in enumerate(inverses):
            dut.row.value = payload("row").pack(bank=[bank], token=[row])[0]
            await cycle(dut.clk)
            assert read(dut.inverse) == inverse, f"row {row}"
        dut.release.value = 1 << bank
        await cycle(dut.clk)
        dut.release.value = 0
        await cycle(dut.clk)

    async def _read(self, bank: int, address: int) -> int:
        """A word, as soon as the softmax does not read the bank. In the cycle after it the other bank is chosen."""
        dut = self.dut
        await RisingEdge(dut.clk)
        while True:
            dut.read.value, dut.bank.value, dut.address.value = 1, bank, address
            await FallingEdge(dut.clk)
            free = not read(dut.busy) >> bank & 1
            dut.read.value = int(free)
            await RisingEdge(dut.clk)
            dut.read.value, dut.bank.value = 0, int(not bank)
            if free:
                break
        await RisingEdge(dut.clk)
        dut.bank.value = bank
        return int(str(dut.word.value), 2)


async def check(dut: Any, jobs: list[Job], stall: float = 0.0) -> None:
    """Sends all jobs, whose banks take turns, while the banks are read."""
    random = rng(len(jobs))
    stalls = [randomly(stall, random) if stall else never for _ in range(2)]
    sources = [StreamSource(dut, name, dut.clk, rule) for name, rule in zip(("job", "results"), stalls, strict=True)]
    reader = Reader(dut)
    await begin(dut)
    for index, job in enumerate(jobs):
        job.bank = index % 2
        sources[0].send(job.command())
        sources[1].send(job.transfers(random))
    for job in jobs:
        await reader.check(job, int(random.integers(0, 30)) if stall else 0)


def scores(random: np.random.Generator, rows: int, positions: int) -> np.ndarray:
    """Numbers of which exp differs, with a few that are far below the largest."""
    values = random.standard_normal((rows, positions)) * random.choice([1, 5, 30], (rows, 1))
    return values.astype(np.float32).view(np.uint32)


def random_job(random: np.random.Generator, most: int) -> Job:
    """Any mask, which leaves each row a slot or none."""
    rows = int(random.integers(1, CONFIG.max_tokens + 1))
    limit = min(most, CONFIG.score_words // rows // SCORE_UNIT * SCORE_UNIT)
    positions = int(random.integers(1, limit + 1))
    slots = positions + int(random.integers(0, 3)) * int(random.integers(0, 90))
    window = int(random.choice([0, 0, int(random.integers(1, positions + 1))]))
    turn = positions if not window else int(random.integers(1, positions + 1))
    return Job(scores(random, rows, positions), turn, slots, window, int(random.integers(0, 2)))


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def test_random(dut, stall):
    random = rng()
    await check(dut, [random_job(random, 90) for _ in range(10)] + [random_job(random, 400)], stall)


@cocotb.test()
async def test_extremes(dut):
    """Equal scores, zeros of both signs, subnormal numbers, infinities, NaNs, and rows that see nothing."""
    random, jobs = rng(), []
    for size in (2, 3, 8, 30):
        some = random.choice(extremes(), (CONFIG.max_tokens, size))
        jobs.append(Job(np.array([random.choice(row, 40) for row in some]), 40, 40))
    jobs.append(Job(np.full((1, PIECE_FLOATS + 3), 0xFF7FFFFF), PIECE_FLOATS + 3, PIECE_FLOATS + 3))
    # The first rows see only slots that are not there.
    jobs.append(Job(scores(random, CONFIG.max_tokens, 3), 1, 900, 1, 1))
    await check(dut, jobs)


@cocotb.test()
async def test_throughput(dut):
    """The array's results never wait while a bank is free, and the softmax takes a part in each cycle."""
    random = rng()
    rows = CONFIG.max_tokens
    positions = CONFIG.score_words // rows // SCORE_UNIT * SCORE_UNIT
    jobs = [Job(scores(random, rows, positions), positions, positions) for _ in range(2)]
    for index, job in enumerate(jobs):
        job.bank = index
    sources = [StreamSource(dut, name, dut.clk, never) for name in ("job", "results")]
    Reader(dut)
    await begin(dut)
    for job in jobs:
        sources[0].send(job.command())
        sources[1].send(job.transfers(random))
    count = rows * positions // LANES
    ready, now = [], 0
    for bank in range(2):
        for _ in range(0, positions, CHUNK):
            now += await until(dut.clk, lambda at=bank: read(dut.ready) >> at & 1 == 1, f"bank {bank}")
            last = now
            dut.finished.value = 1 << bank
            await cycle(dut.clk)
            dut.finished.value = 0
            await cycle(dut.clk)
            now += 2
        ready.append(last)
    # Rows without a last part, and the cycles of pipelines and jobs.
    fill = latency("write_latency") + latency("softmax_latency") + 8
    assert 2 * count <= ready[0] <= 2 * count + fill
    assert count <= ready[1] - ready[0] <= count + fill
