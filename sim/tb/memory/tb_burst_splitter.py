# SPDX-License-Identifier: Apache-2.0
"""The burst splitter against a model in Python: whole bursts, pieces, and a change in the middle of a burst."""

import cocotb
from cocotb.triggers import RisingEdge

from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, bursty, cycle, never, randomly, read, rng
from sim.tb.memory.tb_burst_cutter import Stretch, cut, longest

BEAT = config().port_width // 8
"""Bytes of a beat."""


def split(burst: Stretch) -> list[Stretch]:
    """A burst's pieces."""
    address, beats, most = *burst, latency("beats")
    return [(address + first * BEAT, min(most, beats - first)) for first in range(0, beats, most)]


def _bursts(count: int) -> list[Stretch]:
    """Lengths around one piece and several, and bursts anywhere in a block of 4 KiB."""
    random, piece, most = rng(7), latency("beats"), longest(BEAT)
    bursts = [(4096 * beats, beats) for beats in (1, piece - 1, piece, piece + 1, 2 * piece, most - 1, most)]
    for _ in range(count):
        bursts += cut((int(random.integers(1 << 30)) * BEAT, int(random.integers(1, 2 * most))), BEAT)
    return bursts


class _Bench:
    def __init__(self, dut, stall: Stall = never, sink_stall: Stall = never):
        self.whole = StreamSource(dut, "whole", dut.clk, stall)
        self.bursts = StreamSink(dut, "bursts", dut.clk, sink_stall)

    def send(self, bursts: list[Stretch]) -> None:
        addresses, beats = zip(*bursts, strict=True)
        self.whole.send(payload("whole").pack(address=addresses, beats=beats))

    async def take(self, count: int) -> list[Stretch]:
        fields = payload("bursts").unpack(await self.bursts.take(count, cycles=20_000))
        return list(zip(fields["address"].tolist(), fields["beats"].tolist(), strict=True))


@cocotb.test()
@cocotb.parametrize(divided=[False, True])
async def pieces(dut, divided):
    """Without pauses: a burst or a piece in every cycle, with the stated latency."""
    bench, bursts = _Bench(dut), _bursts(20)
    dut.split.value = divided
    await begin(dut)
    monitor = Monitor(dut, ("whole", "bursts"))
    bench.send(bursts)
    expected = [piece for burst in bursts for piece in (split(burst) if divided else [burst])]
    assert await bench.take(len(expected)) == expected
    await bench.bursts.quiet(16)
    assert consecutive(monitor["bursts"])
    # A whole burst is taken in when its last piece is.
    first = len(split(bursts[0])) - 1 if divided else 0
    assert monitor["bursts"][0] - monitor["whole"][0] == latency() - first


@cocotb.test()
async def pieces_with_stalls(dut):
    """Every burst is divided, with pauses on both sides."""
    bench, bursts = _Bench(dut, randomly(0.4, rng(2)), bursty(rng(3))), _bursts(20)
    dut.split.value = 1
    await begin(dut)
    bench.send(bursts)
    expected = [piece for burst in bursts for piece in split(burst)]
    assert await bench.take(len(expected)) == expected


@cocotb.test()
async def change(dut):
    """``split`` changes in any cycle: the pieces are in order and without a gap, none is longer than the rest of its
    burst, and a piece that is taken in while ``split`` is 1 is short."""
    bench, bursts = _Bench(dut, randomly(0.3, rng(2)), randomly(0.3, rng(4))), _bursts(40)
    random, edge = rng(5), RisingEdge(dut.clk)
    dut.split.value = 0
    await begin(dut)

    async def toggle() -> None:
        while True:
            await cycle(dut.clk, int(random.integers(1, 6)))
            dut.split.value = 1 - int(dut.split.value)

    limits: list[int] = []
    """For each burst that was taken in, the longest that it may be."""

    async def watch() -> None:
        while True:
            await edge
            free = not read(dut.bursts_valid) or read(dut.bursts_ready)
            if free and read(dut.whole_valid):
                limits.append(latency("beats") if read(dut.split) else longest(BEAT))

    cocotb.start_soon(toggle())
    cocotb.start_soon(watch())
    bench.send(bursts)
    short = whole = 0
    for address, beats in bursts:
        while beats:
            ((start, count),) = await bench.take(1)
            limit = limits.pop(0)
            assert start == address and count == min(beats, limit)
            short += count < beats
            whole += count > latency("beats")
            address, beats = address + count * BEAT, beats - count
    await bench.bursts.quiet(16)
    assert short > 10 < whole
