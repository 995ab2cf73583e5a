# SPDX-License-Identifier: Apache-2.0
"""The gatherer: it takes output tiles and gives rows of memory."""

from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np

from hw.spec.control.descriptor import ADDRESS_LIMIT, result_pitch
from hw.spec.memory.transfers import result_transfers
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, bursty, cycle, never, randomly, rng, until

PIECE = 256
"""Floats of a piece, and columns of a chunk."""


@dataclass
class _Layer:
    """The results of one layer, raw float32 [M, N], and their addresses."""

    results: np.ndarray
    address: int
    pitch: int
    interrupt: int

    @property
    def chunks(self) -> list[np.ndarray]:
        """The chunks, [M, up to 256] each."""
        return [self.results[:, first : first + PIECE] for first in range(0, self.results.shape[1], PIECE)]

    def job(self) -> list[int]:
        fields = dict(address=self.address, pitch=self.pitch, interrupt=self.interrupt)
        return payload("job").pack(**{name: [value] for name, value in fields.items()})

    def transfers(self, random: np.random.Generator) -> list[int]:
        """The core's output. Columns that do not exist have random values."""
        transfers = result_transfers(config(), *self.results.shape)
        values = random.integers(0, 1 << 32, (len(transfers), config().lanes), np.uint32)
        for row, item in zip(values, transfers, strict=True):
            row[: len(item.columns)] = self.results[item.token, item.columns.start : item.columns.stop]
        names = transfers[0].fields.keys() & payload("results").fields  # A gatherer does not need the ends of pieces.
        fields = {name: [item.fields[name] for item in transfers] for name in names}
        return payload("results").pack(values=values.view(np.int32).astype(np.int64), **fields)

    def pieces(self) -> list[tuple[dict[str, int], np.ndarray]]:
        """The fields and floats of every piece, in order."""
        pieces = []
        for index, chunk in enumerate(self.chunks):
            for token, floats in enumerate(chunk):
                address = self.address + token * self.pitch + 4 * PIECE * index
                last = index == len(self.chunks) - 1 and token == len(chunk) - 1
                fields = dict(address=address, last_float=len(floats) - 1, last=int(last), interrupt=self.interrupt)
                pieces.append((fields, floats))
        return pieces


def _layer(random: np.random.Generator, m: int, n: int, high: bool = False) -> _Layer:
    """A layer anywhere in memory, with rows as close together as allowed or farther apart."""
    results = random.integers(0, 1 << 32, (m, n), np.uint32)
    pitch = result_pitch(n) + 64 * int(random.integers(0, 5))
    address = 64 * int(random.integers(0, ADDRESS_LIMIT // 64))
    if high:
        pitch, address = (1 << 24) - 64, ADDRESS_LIMIT - 64
    return _Layer(results, address, pitch, int(random.integers(0, 2)))


def _shapes(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """The smallest and the largest M; N around tiles and chunks; then random shapes."""
    most, tile = config().max_tokens, config().tile
    shapes = [(1, 1), (most, 1), (1, tile + 1), (most, tile - 1), (1, PIECE), (most, PIECE), (most, PIECE + 1)]
    shapes += [(1, PIECE - 1), (1, 1), (1, 1), (1, 1), (most, 2 * PIECE - tile + 1), (1, 3 * PIECE - tile)]
    return shapes + [(int(random.integers(1, most + 1)), int(random.integers(1, 3 * PIECE))) for _ in range(count)]


class _Bench:
    def __init__(self, dut: Any, layers: list[_Layer], stalls: tuple[Stall, ...] = (never,) * 4):
        job, results, pieces, beats = stalls
        self.dut, self.layers = dut, layers
        self.job = StreamSource(dut, "job", dut.clk, job)
        self.results = StreamSource(dut, "results", dut.clk, results)
        self.pieces = StreamSink(dut, "pieces", dut.clk, pieces)
        self.beats = StreamSink(dut, "beats", dut.clk, beats)

    def send(self) -> None:
        random = rng(5)
        for layer in self.layers:
            self.job.send(layer.job())
            self.results.send(layer.transfers(random))

    async def check(self, cycles: int = 2_000_000) -> None:
        """Checks every piece and all its floats, and that there is nothing more."""
        wanted = [piece for layer in self.layers for piece in layer.pieces()]
        size = config().port_width // 8
        got = payload("pieces").unpack(await self.pieces.take(len(wanted), cycles))
        for index, (fields, floats) in enumerate(wanted):
            seen = {name: int(values[index]) for name, values in got.items()}
            assert seen == fields, f"piece {index} of {len(wanted)}: {seen}, not {fields}"
            beats = await self.beats.take(-(-floats.nbytes // size), cycles)
            data = b"".join(beat.to_bytes(size, "little") for beat in beats)
            assert data[: floats.nbytes] == floats.tobytes(), f"floats of piece {index}, {fields}"
        await self.pieces.quiet(1)
        await self.beats.quiet(40)


@cocotb.test()
@cocotb.parametrize(
    speeds=[(0, 0, 0, 0), (0.9, 0, 0, 0), (0, 0.5, 0.5, 0.5), (0, 0, 0.95, 0), (0, 0, 0, 0.6), (0.5, 0.8, 0, 0)]
)
async def values(dut, speeds):
    """Many layers one after another, with or without stalls on each stream."""
    random = rng(1)
    layers = [_layer(random, *shape, high=index % 4 == 1) for index, shape in enumerate(_shapes(random, 6))]
    stalls = tuple(randomly(p, rng(2, number)) if p else never for number, p in enumerate(speeds))
    bench = _Bench(dut, layers, stalls)
    await begin(dut)
    bench.send()
    await bench.check()


@cocotb.test()
async def bursts(dut):
    """A memory that takes nothing for some time, then everything: both halves fill, and the next layer waits."""
    random = rng(1)
    stall = bursty(rng(3), 300, 1500)
    bench = _Bench(dut, [_layer(random, *shape) for shape in _shapes(random, 4)], (never, never, never, stall))
    await begin(dut)
    bench.send()
    await bench.check()
    assert bench.results.stalled_by_dut > 0


@cocotb.test()
async def full_throughput(dut):
    """Results never wait, also between tokens, tiles, chunks and layers. The beats of a chunk have no gaps."""
    random, most = rng(1), config().max_tokens
    lanes, width = config().lanes, config().port_width
    shapes = [(most, 2 * PIECE), (most, PIECE), (most, PIECE), (most, PIECE - 1), (most, 3 * PIECE)]
    bench = _Bench(dut, [_layer(random, *shape) for shape in shapes])
    monitor = Monitor(dut, ("results", "pieces", "beats"))
    await begin(dut)
    bench.job.send([word for layer in bench.layers for word in layer.job()])
    await cycle(dut.clk, 4)
    bench.results.send([word for layer in bench.layers for word in layer.transfers(random)])
    await bench.check()
    beats = most * PIECE * 32 // width
    if width > 32 * lanes:
        assert bench.results.stalled_by_dut == 0
        assert consecutive(monitor["results"])
        assert consecutive(monitor["beats"][:beats])
    else:
        # The port is not faster than the core: after the first chunk it waits at most the latency once per chunk.
        spare = monitor["beats"][-1] + 1 - monitor["beats"][0] - len(monitor["beats"])
        assert spare <= latency() * sum(len(layer.chunks) for layer in bench.layers)
    first = monitor["results"][most * PIECE // lanes - 1]
    assert monitor["beats"][0] - first == latency()
    assert monitor["pieces"][0] - first == latency("read_latency")


@cocotb.test()
async def valid_does_not_wait_for_ready(dut):
    """Pieces and beats are offered before the other side is ready, and a piece's beats before the piece is taken."""
    ready = [False, False]
    stalls = (never, never, lambda: not ready[0], lambda: not ready[1])
    bench = _Bench(dut, [_layer(rng(1), 1, 1), _layer(rng(2), 1, PIECE)], stalls)
    await begin(dut)
    bench.send()
    await until(dut.clk, lambda: dut.pieces_valid.value and dut.beats_valid.value, "a piece and a beat", cycles=100)
    await cycle(dut.clk, 600)
    assert bench.results.transfers == len(bench.layers[0].transfers(rng(0))) + PIECE // config().lanes
    ready[1] = True
    await until(dut.clk, lambda: bench.beats.transfers > 0, "a beat without its piece taken", cycles=100)
    ready[0] = True
    await bench.check()
