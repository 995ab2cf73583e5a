# SPDX-License-Identifier: Apache-2.0
"""The operand fetch against numpy arrays of its rows, with memories of any speed and a reader like the vector unit."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge

from hw.spec.config import FLOAT_BITS, MAX_N
from hw.spec.control.descriptor import ADDRESS_LIMIT, DATA_ALIGNMENT, result_pitch
from hw.spec.memory.access import BURST_BOUNDARY, PIECE_FLOATS
from sim.bench.dut import begin, config, latency, payload, ports
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, bursty, cycle, never, randomly, read, rng, until

LANES, WIDTH, MOST = latency("lanes"), config().port_width, config().max_tokens
ROWS, READ_LATENCY = latency("rows"), latency("read_latency")
PERIODIC = "column" not in ports()
BEAT = WIDTH // 8
"""Bytes of a beat."""
TILE = max(config().tile, LANES)
PITCH_LIMIT = 1 << 25
MEMORY = 1 << 18
"""Bytes. Every address is taken modulo this number."""
HEADS = (64, 80, 96, 128, 256, 16, 48, 240)

Burst = tuple[int, int]
"""Address, and length in beats."""
Read = tuple[int, int]
"""Token, and column in the layer in units of ``LANES`` floats."""


@dataclass
class _Layer:
    """One job, and the results that pass: ``n`` columns in tiles of ``tile``.

    Of a ``sparse`` layer only the last read before each release is made; not of a periodic one, whose reads count.
    """

    address: int
    pitch: int
    tokens: int
    columns: int
    n: int
    tile: int = TILE
    sparse: bool = False

    def job(self) -> list[int]:
        fields = dict(address=self.address, pitch=self.pitch, tokens=self.tokens, columns=self.columns)
        return payload("jobs").pack(**{name: [value] for name, value in fields.items()})

    @property
    def rows(self) -> int:
        return self.tokens if self.pitch else 1

    def chunk(self, index: int) -> list[Burst]:
        """Address and number of floats of each row of a chunk."""
        first = PIECE_FLOATS * index
        floats = min(PIECE_FLOATS, self.columns - first)
        return [(self.address + m * self.pitch + 4 * first, floats) for m in range(self.rows)]

    @property
    def chunks(self) -> list[list[Burst]]:
        return [self.chunk(index) for index in range(-(-self.columns // PIECE_FLOATS))]

    def bursts(self) -> list[list[Burst]]:
        """Each row in one burst, or in two where the length of a burst or a page ends."""
        longest, rows = min(BURST_BOUNDARY, 256 * BEAT), []
        for address, floats in (row for chunk in self.chunks for row in chunk):
            end = address + -(-4 * floats // BEAT) * BEAT
            starts = [address, *range((address // longest + 1) * longest, end, longest)]
            rows.append([(start, (after - start) // BEAT) for start, after in pairwise([*starts, end])])
        return rows

    def reads(self) -> list[list[Read]]:
        """For each release the reads before it, in the order of the results."""
        reads: list[list[Read]] = []
        for first in range(0, self.n, self.tile):
            if first % PIECE_FLOATS == 0 and (not PERIODIC or not reads):
                reads.append([])
            columns = range(first // LANES, -(-min(first + self.tile, self.n) // LANES))
            reads[-1] += [(token, column) for token in range(self.tokens) for column in columns]
        return [part[-1:] for part in reads] if self.sparse else reads

    def floats(self, memory: bytes, token: int, column: int) -> bytes:
        """The floats of a read that exist."""
        column *= LANES
        if PERIODIC:
            column %= self.columns
        start = (self.address + token * self.pitch + 4 * column) % MEMORY
        return memory[start : start + 4 * min(LANES, self.columns - column)]


def _layer(random: np.random.Generator, tokens: int, columns: int, kind: str = "", tile: int = TILE) -> _Layer:
    """A layer anywhere in memory.

    Kinds: rows close together, ``apart``, ``one`` row for all tokens, ``far`` apart at the end of memory, ``cut`` by a
    page in the first chunk.
    """
    pitch = result_pitch(columns)
    if kind == "apart":
        pitch += DATA_ALIGNMENT * int(random.integers(0, 40))
    address = DATA_ALIGNMENT * int(random.integers(0, ADDRESS_LIMIT // DATA_ALIGNMENT))
    if kind == "one":
        pitch = 0
    if kind == "far":
        pitch, address = PITCH_LIMIT - DATA_ALIGNMENT, ADDRESS_LIMIT - DATA_ALIGNMENT
    if kind == "cut":
        back = int(random.integers(1, 1 + max(1, (4 * min(columns, PIECE_FLOATS) - 1) // DATA_ALIGNMENT)))
        address = address // BURST_BOUNDARY * BURST_BOUNDARY + BURST_BOUNDARY - back * DATA_ALIGNMENT
    n = int(random.integers(1, 4 * columns)) if PERIODIC else columns
    return _Layer(address, pitch, tokens, columns, n, tile)


KINDS = ("", "apart", "one", "far", "cut")


def _layers(random: np.random.Generator, count: int) -> list[_Layer]:
    """Every kind, the smallest and the largest M, N around lanes and chunks or every head; then random layers."""
    if PERIODIC:
        sizes: list[int] = list(HEADS)
    else:
        sizes = [1, 2, LANES + 1, TILE, PIECE_FLOATS - 1, PIECE_FLOATS, PIECE_FLOATS + 1, 2 * PIECE_FLOATS + LANES - 1]
    shapes = [(MOST if index % 2 else 1, size) for index, size in enumerate(sizes)]
    for _ in range(count):
        size = 16 * int(random.integers(1, 17)) if PERIODIC else int(random.integers(1, 3 * PIECE_FLOATS))
        shapes.append((int(random.integers(1, MOST + 1)), size))
    order = random.permutation(len(shapes))
    tiles = (TILE, TILE, 32, PIECE_FLOATS)
    return [
        _layer(random, m, n, KINDS[number % len(KINDS)], tiles[number % len(tiles)])
        for number, (m, n) in enumerate(shapes[index] for index in order)
    ]


class _Bench:
    """A memory at the port, and a reader."""

    def __init__(
        self, dut: Any, layers: list[_Layer], stalls: tuple[Stall, ...] = (never,) * 4, delays: tuple[int, ...] = (3,)
    ):
        jobs, asked, slow, self.pause = stalls
        self.dut, self.layers = dut, layers
        self.memory = rng(99).bytes(MEMORY) * 2
        self.jobs = StreamSource(dut, "jobs", dut.clk, jobs)
        self.bursts = StreamSink(dut, "bursts", dut.clk, asked)
        self.beats = StreamSource(dut, "beats", dut.clk, slow)
        self.delays = rng(98).choice(delays, 4096).tolist()
        self.seen: list[Burst] = []
        rows = [row for layer in layers for row in layer.bursts()]
        self.wanted = list(chain(*rows))
        self.rows = list(accumulate(int(index == 0) for row in rows for index in range(len(row))))
        """For each burst how many rows are requested with it."""
        self.released = 0
        """Rows that are released."""
        self.read_at: list[int] = []
        """The cycle of each read."""
        self.left = sum(len(reads) for layer in layers for reads in layer.reads())
        """Reads whose data is not checked."""
        for name in ("read", "token", "release", *([] if PERIODIC else ["column"])):
            getattr(dut, name).value = 0
        cocotb.start_soon(self._answer())

    def send(self) -> None:
        for layer in self.layers:
            self.jobs.send(layer.job())
        cocotb.start_soon(self._run(self._steps()))

    async def _answer(self) -> None:
        """Answers every burst after some cycles, in order."""
        edge, now, layout = RisingEdge(self.dut.clk), 0, payload("bursts")
        owed: deque[tuple[int, Burst]] = deque()
        while True:
            await edge
            now += 1
            if self.bursts.received:
                fields = layout.unpack(self.bursts.received)
                self.bursts.received.clear()
                for burst in zip(fields["address"].tolist(), fields["beats"].tolist(), strict=True):
                    self.seen.append(burst)
                    owed.append((now + self.delays[len(self.seen) % len(self.delays)], burst))
            assert self.beats.stalled_by_dut == 0, "beats had to wait"
            if self.seen:
                held = self.rows[len(self.seen) - 1] - self.released
                assert held <= ROWS, f"{held} rows are requested and not released"
            while owed and owed[0][0] <= now:
                _, (address, beats) = owed.popleft()
                data = self.memory[address % MEMORY : address % MEMORY + beats * BEAT]
                self.beats.send(int.from_bytes(data[i : i + BEAT], "little") for i in range(0, len(data), BEAT))

    def _steps(self) -> Iterator[tuple[_Layer, Read, bool]]:
        """Each read of each layer, and whether it is the last one before a release."""
        for layer in self.layers:
            for reads in layer.reads():
                yield from ((layer, step, False) for step in reads[:-1])
                yield layer, reads[-1], True

    async def _run(self, steps: Iterator[tuple[_Layer, Read, bool]]) -> None:
        """Reads like the vector unit: at the falling edge it looks at ``available``, and it reads in the same cycle.

        If it pauses at the end of a chunk, it releases the chunk after its last read.
        """
        dut, edge, now = self.dut, FallingEdge(self.dut.clk), 0
        due: deque[tuple[int, _Layer, Read]] = deque()
        step, release, held = next(steps, None), False, 0
        while step or due or release:
            await edge
            now += 1
            if due and due[0][0] == now:
                self._check(*due.popleft()[1:])
            reads = late = False
            if not release and step and not self.pause() and read(dut.available):
                layer, (token, column), last = step
                reads, late = True, last and self.pause()
                release = last and not late
                held = layer.rows
                dut.token.value = token
                if not PERIODIC:
                    dut.column.value = column % (PIECE_FLOATS // LANES)
                due.append((now + READ_LATENCY, layer, (token, column)))
                self.read_at.append(now)
                step = next(steps, None)
            dut.read.value = int(reads)
            dut.release.value = int(release)
            self.released += held if release else 0
            release = late

    def _check(self, layer: _Layer, step: Read) -> None:
        wanted = layer.floats(self.memory, *step)
        got = read(self.dut.data).to_bytes(4 * LANES, "little")[: len(wanted)]
        assert got == wanted, f"token {step[0]}, column {step[1] * LANES}: {got.hex()}, not {wanted.hex()}, of {layer}"
        self.left -= 1

    async def check(self) -> None:
        """Waits until all reads are checked, and checks the bursts."""
        # The slowest reader makes a read in 5 cycles.
        cycles = 100_000 + 10 * self.left
        await until(self.dut.clk, lambda: not self.left, lambda: f"{self.left} reads", cycles)
        await cycle(self.dut.clk, 8)
        assert (read(self.dut.asking), read(self.dut.available)) == (0, 0)
        await self.bursts.quiet(16)
        assert self.seen == self.wanted


@cocotb.test()
@cocotb.parametrize(run=range(6))
async def values(dut, run):
    """Layers of all shapes one after another, with light and heavy random stalls on every side."""
    random = rng(run)
    stalls = tuple(
        bursty(rng(run, index), run=100, pause=60)
        if random.random() < 0.3
        else randomly(float(random.choice([0.0, 0.1, 0.7])), rng(run, index))
        for index in range(4)
    )
    delays = [(1,), (1, 2, 5), (100,), (1, 3, 40, 300)][run % 4]
    bench = _Bench(dut, _layers(random, 4), stalls if run else (never,) * 4, delays)
    await begin(dut)
    bench.send()
    await bench.check()


@cocotb.test()
async def slow_reader(dut):
    """Memory is much faster than the reader: the ring is full for most of the time."""
    random = rng(1)
    layers = [_layer(random, MOST, HEADS[index] if PERIODIC else 500, kind) for index, kind in enumerate(KINDS)]
    if PERIODIC:
        for layer in layers:
            layer.n = layer.columns
    bench = _Bench(dut, layers, (never, never, never, randomly(0.8, rng(2))), (1,))
    await begin(dut)
    bench.send()
    await bench.check()


@cocotb.test()
async def full_ring(dut):
    """The reader waits for a full ring before each read, so that it is full with its oldest row in every place."""
    count, width = 2 * ROWS + 3, 16 if PERIODIC else PIECE_FLOATS
    if PERIODIC:
        layers = [_Layer(1 << 20, 1024, 1, width, width) for _ in range(count)]
    else:
        layers = [_Layer(1 << 20, 0, MOST, count * width, count * width, sparse=True)]
    bench = _Bench(dut, layers, delays=(1,))
    waiting, full = True, 0

    def pause() -> bool:
        """Some cycles more than a further burst would take to appear."""
        nonlocal full
        full = full + 1 if len(bench.seen) >= min(count, ROWS + bench.released) else 0
        return waiting or full < 6

    bench.pause = pause
    await begin(dut)
    bench.send()
    await cycle(dut.clk, 100 + ROWS * (8 + width * FLOAT_BITS // WIDTH))
    assert len(bench.seen) == ROWS and read(dut.asking) == 1 and read(dut.available) == 1
    waiting = False
    await bench.check()


def _fast(random: np.random.Generator) -> list[_Layer]:
    """Layers with long chunks, or of a few tokens with several chunks."""
    if PERIODIC:
        heads = max(3, 2 * LANES * FLOAT_BITS // WIDTH)
        return [_Layer(1 << 20, 1024, MOST, head, heads * head) for head in (256, 128, 80, 64)]
    few = min(2, MOST)
    return [_layer(random, m, n) for m, n in ((MOST, 1024), (few, 2048), (1, 2048), (MOST, 512))]


def _beats(layer: _Layer, chunk: int = 0) -> int:
    """Beats of a chunk."""
    return sum(-(-4 * floats // BEAT) for _, floats in layer.chunk(chunk))


@cocotb.test()
async def full_throughput(dut):
    """A read in every cycle, also between chunks and layers, if the port is fast enough; otherwise a beat."""
    delay = 20
    bench = _Bench(dut, _fast(rng(1)), delays=(delay,))
    await begin(dut)
    monitor = Monitor(dut, ("jobs", "beats"), ("bursts_valid", "available"))
    bench.send()
    await bench.check()
    assert monitor["bursts_valid"][0] - monitor["jobs"][0] == latency()
    # The first chunk is available when all of its beats are there, and not before.
    assert monitor["available"][0] - monitor["beats"][_beats(bench.layers[0]) - 1] == latency("fill_latency")
    idle = bench.read_at[-1] + 1 - bench.read_at[0] - len(bench.read_at)
    spare = monitor["beats"][-1] + 1 - monitor["beats"][0] - len(monitor["beats"])
    faster = WIDTH > LANES * FLOAT_BITS or (WIDTH == LANES * FLOAT_BITS and ROWS > 2 * MOST)
    dut._log.info(f"{idle} cycles without a read, {spare} without a beat")
    if ROWS < 2 * MOST:
        # A chunk that has no room beside the one before is fetched when that one is released.
        chunks = [(layer.rows, _beats(layer, index)) for layer in bench.layers for index in range(len(layer.chunks))]
        slow = not (faster or PERIODIC)
        waits = [beats for (before, _), (rows, beats) in pairwise(chunks) if slow or before + rows > ROWS]
        assert idle <= sum(delay + 10 + beats for beats in waits)
    elif faster or PERIODIC:
        assert consecutive(bench.read_at), f"{idle} cycles without a read"
    elif WIDTH == LANES * FLOAT_BITS:
        assert idle <= (delay + 10) * sum(len(layer.chunks) for layer in bench.layers)
    else:
        assert spare <= delay + 10, f"{spare} cycles without a beat"


@cocotb.test(skip=PERIODIC or LANES < 8 or WIDTH < 128)
async def longest_row(dut):
    """As many columns as possible, where this takes the fewest cycles."""
    layer = _layer(rng(1), 1, MAX_N)
    bench = _Bench(dut, [layer, _layer(rng(2), 1, 1)], delays=(1,))
    await begin(dut)
    bench.send()
    await bench.check()
