# SPDX-License-Identifier: Apache-2.0
"""The weight fetch with a memory and a FIFO at every port: ports in step, FIFOs not overrun, beats joined."""

from collections import deque
from typing import Any, NamedTuple

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.control.descriptor import ADDRESS_LIMIT, BANK_SPAN, WEIGHT_ALIGNMENT
from hw.spec.memory.access import EARLY_BURST_BEATS
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, bursty, cycle, never, randomly, rng, until
from sim.tb.memory.tb_burst_cutter import cut, joined, longest

PORTS, WIDTH = config().ports, config().port_width
BEAT = WIDTH // 8
"""Bytes of a beat of one port."""
STRIDE = BANK_SPAN // PORTS
"""The distance between the regions of short layers."""


class _Layer(NamedTuple):
    address: int
    stride: int
    beats: int

    def region(self, port: int) -> tuple[int, int]:
        return self.address + port * self.stride, self.beats


def _word(address: int) -> int:
    """The memory's content at the address of a beat: another address gives another number."""
    return (address // BEAT * 0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835 + 1) >> 3 & (1 << WIDTH) - 1


class _Port:
    """One port: takes bursts and returns their beats some cycles later. They wait in a FIFO until they are needed."""

    def __init__(self, dut: Any, port: int, asked: Stall, slow: Stall, delay: int):
        self.bursts = StreamSink(dut, f"bursts_{port}", dut.clk, asked)
        self.beats = StreamSource(dut, f"port_beats_{port}", dut.clk, slow)
        self.delay = delay
        self.asked: list[tuple[int, int]] = []
        """All bursts so far."""
        self.answering = True
        self._owed: deque[tuple[int, tuple[int, int]]] = deque()

    @property
    def held(self) -> int:
        """Beats that are requested and not yet handed over: the FIFO must have space for them."""
        return sum(beats for _, beats in self.asked) - self.beats.transfers

    def step(self, now: int) -> None:
        """One cycle."""
        if self.bursts.received:
            fields = payload("bursts_0").unpack(self.bursts.received)
            self.bursts.received.clear()
            for burst in zip(fields["address"].tolist(), fields["beats"].tolist(), strict=True):
                self.asked.append(burst)
                self._owed.append((now + self.delay, burst))
        while self.answering and self._owed and self._owed[0][0] <= now:
            _, (address, beats) = self._owed.popleft()
            self.beats.send(_word(address + index * BEAT) for index in range(beats))


class _Bench:
    def __init__(self, dut: Any, user: Stall = never, asked: float = 0, slow: float = 0, delays: range = range(4, 5)):
        self.dut = dut
        self.regions = StreamSource(dut, "regions", dut.clk, user)
        self.beats = StreamSink(dut, "beats", dut.clk, user)
        random = rng(5)
        self.ports = [
            _Port(dut, port, *(randomly(p, rng(port, salt)) if p else never for salt, p in enumerate((asked, slow))),
                  delay=int(random.choice(delays)))
            for port in range(PORTS)
        ]  # fmt: skip
        dut.halt.value = dut.hold.value = dut.split.value = 0
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        """Runs the ports, and checks what must hold in every cycle."""
        edge, now, depth = RisingEdge(self.dut.clk), 0, latency("depth")
        while True:
            await edge
            now += 1
            for number, port in enumerate(self.ports):
                port.step(now)
                assert port.held <= depth, f"port {number} asked for {port.held} beats, its FIFO holds {depth}"
            counts = [len(port.asked) for port in self.ports]
            assert max(counts) - min(counts) <= 1, f"the ports have asked for {counts} bursts: not in step"

    def send(self, layers: list[_Layer]) -> None:
        addresses, strides, beats = zip(*layers, strict=True)
        self.regions.send(payload("regions").pack(address=addresses, stride=strides, beats=beats))

    async def check(self, layers: list[_Layer], cycles: int = 400_000, whole: bool = True) -> None:
        """Checks the layers' beats, and that every port reads exactly its own regions; whole: in the longest bursts."""
        for layer in layers:
            got = await self.beats.take(layer.beats, cycles)
            starts = [layer.region(port)[0] for port in range(PORTS)]
            expected = [
                sum(_word(start + beat * BEAT) << WIDTH * port for port, start in enumerate(starts))
                for beat in range(layer.beats)
            ]
            assert got == expected, layer
        await self.beats.quiet(64)
        for number, port in enumerate(self.ports):
            asked = port.asked if whole else joined(port.asked, BEAT)
            assert asked == [burst for layer in layers for burst in cut(layer.region(number), BEAT)]
            assert port.held == 0


def _layers(count: int) -> list[_Layer]:
    """Lengths around one burst, a layer that fills all FIFOs, the end of the address space, and random layers."""
    random, most, page = rng(7), longest(BEAT), WEIGHT_ALIGNMENT
    layers = [_Layer(page * (3 + beats), STRIDE, beats) for beats in (1, 2, most - 1, most, most + 1, 3 * most)]
    layers.append(_Layer(ADDRESS_LIMIT - page, (1 << 32) - page, latency("depth") + most + 7))
    for _ in range(count):
        pages, strides = int(random.integers(ADDRESS_LIMIT // page)), int(random.integers(1, (1 << 32) // page))
        layers.append(_Layer(pages * page, strides * page, int(random.integers(1, 4 * most))))
    return layers


@cocotb.test()
async def fast_memory(dut):
    """Without pauses: a beat in every cycle from the first to the last, across layers, with the stated latency."""
    most = longest(BEAT)
    layers = [_Layer(WEIGHT_ALIGNMENT * index, STRIDE, beats) for index, beats in enumerate((9 * most, 5, most, 99))]
    bench = _Bench(dut)
    await begin(dut)
    monitor = Monitor(dut, ("regions", "beats"), ("bursts_0_valid",))
    bench.send(layers)
    await bench.check(layers)
    assert consecutive(monitor["beats"])
    assert monitor["bursts_0_valid"][0] - monitor["regions"][0] == latency()


@cocotb.test()
async def slow_memory(dut):
    """A memory with a long latency: if the outstanding bursts cover it, it costs nothing."""
    most = longest(BEAT)
    layer = _Layer(0, STRIDE, 4 * latency("depth"))
    bench = _Bench(dut, delays=range(latency("depth") - 2 * most, latency("depth") - 2 * most + 1))
    await begin(dut)
    monitor = Monitor(dut, ("beats",))
    bench.send([layer])
    await bench.check([layer])
    assert consecutive(monitor["beats"])


@cocotb.test()
@cocotb.parametrize(asked=[0, 0.9], slow=[0, 0.4])
async def stalls(dut, asked, slow):
    """Ports with different speeds and latencies, and a user that pauses."""
    layers = _layers(8)
    bench = _Bench(dut, randomly(0.3, rng(2)), asked, slow, range(1, 300))
    await begin(dut)
    bench.send(layers)
    await bench.check(layers)


@cocotb.test()
async def room(dut):
    """The user takes nothing: every port asks for exactly what its FIFO holds, and then continues beat by beat."""
    most, blocked = longest(BEAT), [True]
    layer = _Layer(0, STRIDE, 3 * latency("depth") + 1)
    bench = _Bench(dut)
    bench.beats.stall = lambda: blocked[0]
    await begin(dut)
    bench.send([layer])
    await until(dut.clk, lambda: all(port.held == latency("depth") for port in bench.ports), "full FIFOs", cycles=2000)
    await cycle(dut.clk, 2 * most)
    assert {port.held for port in bench.ports} == {latency("depth")} and not bench.beats.received
    # The next burst needs exactly as many free beats as it is long.
    blocked[0] = False
    await until(
        dut.clk, lambda: len(bench.ports[0].asked) > latency("depth") // most, "the next burst", cycles=4 * most
    )
    assert most <= bench.beats.transfers <= most + 4
    await bench.check([layer])


@cocotb.test()
async def one_silent_port(dut):
    """While one port gives nothing, nothing comes, and no beat of the others is lost; then the fetch continues."""
    layers = _layers(3)
    bench = _Bench(dut, bursty(rng(2)), 0.3, 0.3, range(1, 50))
    silent = bench.ports[-1]
    await begin(dut)
    bench.send(layers)
    await until(dut.clk, lambda: bench.beats.transfers > longest(BEAT), "some beats", cycles=20_000)
    silent.answering = False
    # The beats that it has given before leave first; the stalls say how long this takes.
    stopped = -1
    for _ in range(latency("depth")):
        if bench.beats.transfers == stopped:
            break
        stopped = bench.beats.transfers
        await cycle(dut.clk, 500)
    assert bench.beats.transfers == stopped
    assert {port.beats.transfers for port in bench.ports} == {stopped}
    silent.answering = True
    await bench.check(layers)


@cocotb.test()
async def hold(dut):
    """While it is held, the ports end the burst that is offered, and no other begins. All data come in the end."""
    layers, random = _layers(4), rng(8)
    bench = _Bench(dut, randomly(0.3, rng(2)), 0.5, 0.3, range(1, 50))
    await begin(dut)
    bench.send(layers)
    for _ in range(40):
        dut.hold.value = 1
        before = max(len(port.asked) for port in bench.ports)
        await cycle(dut.clk, 60)
        counts = {len(port.asked) for port in bench.ports}
        assert len(counts) == 1 and counts <= {before, before + 1}
        await cycle(dut.clk, 60)
        assert {len(port.asked) for port in bench.ports} == counts
        dut.hold.value = 0
        await cycle(dut.clk, int(random.integers(1, 300)))
    await bench.check(layers)


@cocotb.test()
async def halt(dut):
    """In the cycle of the halt and later, nothing is handed over, and the data stay in the ports."""
    layer = _Layer(0, STRIDE, 3 * latency("depth"))
    bench = _Bench(dut, slow=0.3)
    await begin(dut)
    monitor = Monitor(dut, ("beats",), ("halt",))
    bench.send([layer])
    await until(dut.clk, lambda: bench.beats.transfers > 100, "some beats", cycles=2000)
    # A halt may come together with an offer. The sink would report an offer that is withdrawn.
    bench.beats._task.cancel()
    dut.halt.value = 1
    await cycle(dut.clk, 1000)
    assert monitor["beats"][-1] < monitor["halt"][0]
    assert {port.beats.transfers for port in bench.ports} == {len(monitor["beats"])}


@cocotb.test()
async def split(dut):
    """Short bursts for a while, also during ``hold``: the data are the same, and the ports stay in step."""
    layers, random = _layers(6), rng(9)
    bench = _Bench(dut, randomly(0.3, rng(2)), 0.3, 0.2, range(1, 50))
    await begin(dut)
    bench.send(layers)

    async def toggle() -> None:
        while True:
            dut.split.value, dut.hold.value = int(random.integers(2)), int(random.random() < 0.2)
            await cycle(dut.clk, int(random.integers(1, 100)))

    toggling = cocotb.start_soon(toggle())
    await bench.check(layers, whole=False)
    toggling.cancel()
    lengths = [beats for _, beats in bench.ports[0].asked]
    assert EARLY_BURST_BEATS in lengths and longest(BEAT) in lengths


@cocotb.test()
async def only_short(dut):
    """With ``split`` no burst is longer than a piece, and a fast memory still gives a beat in every cycle."""
    layer = _Layer(0, STRIDE, 4 * latency("depth") + 3)
    bench = _Bench(dut)
    dut.split.value = 1
    await begin(dut)
    monitor = Monitor(dut, ("beats",))
    bench.send([layer])
    await bench.check([layer], whole=False)
    assert max(beats for _, beats in bench.ports[0].asked) == EARLY_BURST_BEATS
    assert consecutive(monitor["beats"])
