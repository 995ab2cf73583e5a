# SPDX-License-Identifier: Apache-2.0
"""The AXI4 read manager with cocotbext-axi's memory, and with clients that ask for no more than their FIFOs hold."""

import logging
from collections import deque
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiRamRead, AxiReadBus

from hw.spec.memory.access import OUTSTANDING, WEIGHT_BURSTS_AHEAD
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, read, rng, until
from sim.tb.memory.tb_burst_cutter import BOUNDARY, Stretch, cut, longest

BEAT = config().port_width // 8
"""Bytes of a beat."""
ACTIVATIONS, WEIGHTS = range(2)
"""The clients, by priority."""
DEPTHS = (0, WEIGHT_BURSTS_AHEAD * longest(BEAT))
"""Depth of each client's FIFO in beats; 0: the client takes every beat at once."""
MEMORY = 1 << 20


class _Client:
    """Cuts regions into bursts, asks for them when its FIFO has space, and takes the beats."""

    def __init__(self, dut: Any, client: int, stall: Stall):
        self.depth = DEPTHS[client]
        self.bursts = StreamSource(dut, f"bursts_{client}", dut.clk)
        self.beats = StreamSink(dut, f"beats_{client}", dut.clk, stall if self.depth else never)
        self.wanted: deque[Stretch] = deque()
        self._fields, self._asked = payload(f"bursts_{client}"), 0
        cocotb.start_soon(self._ask(dut))

    async def _ask(self, dut: Any) -> None:
        edge = RisingEdge(dut.clk)
        while True:
            await edge
            while self.wanted:
                address, beats = self.wanted[0]
                if self.depth and self._asked - self.beats.transfers + beats > self.depth:
                    break
                self.wanted.popleft()
                self._asked += beats
                self.bursts.send(self._fields.pack(address=[address], beats=[beats]))


class _Bench:
    """A memory full of noise, the clients, and all ARs so far."""

    def __init__(self, dut: Any, stall: Stall = never, sink_stall: Stall = never):
        self.dut = dut
        self.clients = [_Client(dut, client, sink_stall) for client in (ACTIVATIONS, WEIGHTS)]
        self.memory = AxiRamRead(AxiReadBus.from_prefix(dut, "m_axi_axi"), dut.clk, dut.rst, size=MEMORY)
        self.memory.log.setLevel(logging.WARNING)
        # By default the memory takes no third address before it has answered the first.
        self.memory.ar_channel.queue_occupancy_limit = 32
        self.memory.write(0, rng(99).bytes(MEMORY))
        for channel in (self.memory.ar_channel, self.memory.r_channel):
            channel.set_pause_generator(iter(stall, None))
        dut.halt.value = 0
        self.bursts: list[Stretch] = []
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        """Checks that AR is stable until it is taken, that every burst follows the rules, and that no beat waits."""
        dut, waiting, answered = self.dut, None, 0
        while True:
            await RisingEdge(dut.clk)
            if dut.rst.value:
                continue
            assert dut.m_axi_axi_rready.value, "a beat has to wait"
            # An offered burst counts too.
            under_way = len(self.bursts) - answered + read(dut.m_axi_axi_arvalid)
            assert read(dut.under_way) == under_way <= OUTSTANDING
            answered += read(dut.m_axi_axi_rvalid) and read(dut.m_axi_axi_rlast)
            if not dut.m_axi_axi_arvalid.value:
                assert waiting is None, "ARVALID was withdrawn"
                continue
            now = int(dut.m_axi_axi_araddr.value), int(dut.m_axi_axi_arlen.value) + 1
            assert waiting in (None, now), f"AR changed from {waiting} to {now} before it was taken"
            waiting = None if dut.m_axi_axi_arready.value else now
            if waiting is None:
                address, beats = now
                assert address % BEAT == 0
                assert address // BOUNDARY == (address + beats * BEAT - 1) // BOUNDARY, "crosses 4 KiB"
                assert int(dut.m_axi_axi_arsize.value) == (BEAT - 1).bit_length()
                assert int(dut.m_axi_axi_arburst.value) == 1
                self.bursts.append(now)

    def send(self, address: int, beats: int, client: int = WEIGHTS) -> None:
        self.clients[client].wanted.extend(cut((address, beats), BEAT))

    async def check(self, address: int, beats: int, client: int = WEIGHTS) -> None:
        got = await self.clients[client].beats.take(beats, cycles=100_000)
        data = b"".join(beat.to_bytes(BEAT, "little") for beat in got)
        assert data == self.memory.read(address, beats * BEAT)


async def _run(dut: Any, jobs: list[Stretch], stall: Stall = never, sink_stall: Stall = never) -> _Bench:
    bench = _Bench(dut, stall, sink_stall)
    await begin(dut)
    for job in jobs:
        bench.send(*job)
    for job in jobs:
        await bench.check(*job)
    await bench.clients[WEIGHTS].beats.quiet(64)
    assert int(dut.under_way.value) == 0
    assert bench.bursts == [burst for job in jobs for burst in cut(job, BEAT)]
    return bench


def _jobs(count: int) -> list[Stretch]:
    """Lengths and offsets around 4 KiB boundaries, and random ones."""
    random, page = rng(7), BOUNDARY // BEAT
    jobs = [
        (BOUNDARY * base + BEAT * offset, beats)
        for base, offset, beats in (
            (1, 0, 1), (1, 0, page - 1), (1, 0, page), (1, 0, page + 1), (1, page - 1, 1), (1, page - 1, 2),
            (2, page - 1, page + 2), (3, 1, page - 1), (3, 1, page), (4, page // 2, 3 * page),
        )
    ]  # fmt: skip
    for _ in range(count):
        beats = int(random.integers(1, 3 * page))
        jobs.append((int(random.integers(0, MEMORY // BEAT - beats)) * BEAT, beats))
    return jobs


@cocotb.test()
async def boundaries(dut):
    """Every length and offset that could go wrong, with random pauses of memory and user."""
    await _run(dut, _jobs(8), randomly(0.3, rng(2)), randomly(0.3, rng(3)))


@cocotb.test()
async def slow_user(dut):
    """A user that takes data very slowly: bursts wait, but data never wait."""
    await _run(dut, _jobs(2)[-4:], never, randomly(0.9, rng(3)))


@cocotb.test()
async def full_fifo(dut):
    """A FIFO that holds all beats that its client may ask for, and gives them one by one."""
    bench, blocked, depth = _Bench(dut), [True], DEPTHS[WEIGHTS]
    client = bench.clients[WEIGHTS]
    client.beats.stall = lambda: blocked[0]
    await begin(dut)
    bench.send(0, 2 * depth)
    await until(dut.clk, lambda: len(bench.bursts) == WEIGHT_BURSTS_AHEAD, "as many bursts as fit", cycles=2 * depth)
    await until(dut.clk, lambda: int(dut.under_way.value) == 0, "their data", cycles=2 * depth)
    blocked[0] = False
    await bench.check(0, 2 * depth)


class _ImmediateMemory:
    """Answers every burst after a few cycles, without pauses between beats. The data are the numbers of the beats."""

    def __init__(self, dut: Any, delay: int = 20):
        self.dut, self.delay = dut, delay
        self.bursts: list[Stretch] = []
        dut.halt.value = dut.m_axi_axi_rvalid.value = dut.m_axi_axi_rresp.value = 0
        dut.m_axi_axi_arready.value = 1
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        dut, edge, now, beats = self.dut, RisingEdge(self.dut.clk), 0, deque()
        while True:
            await edge
            now += 1
            if not dut.rst.value and dut.m_axi_axi_arvalid.value:
                address, count = int(dut.m_axi_axi_araddr.value), int(dut.m_axi_axi_arlen.value) + 1
                self.bursts.append((address, count))
                beats.extend((now + self.delay, address // BEAT + beat, beat == count - 1) for beat in range(count))
            due = bool(beats) and beats[0][0] <= now
            dut.m_axi_axi_rvalid.value = int(due)
            if due:
                _, number, last = beats.popleft()
                dut.m_axi_axi_rdata.value, dut.m_axi_axi_rlast.value = number, int(last)


@cocotb.test()
async def full_speed(dut):
    """Without pauses: all requested bursts come, with a beat in every cycle from the first to the last."""
    most = longest(BEAT)
    jobs = [(BOUNDARY * 2, 16 * most), (BOUNDARY * 400, 3), (BOUNDARY * 40 + BEAT, 8 * most)]
    client = _Client(dut, WEIGHTS, never)
    dut.bursts_0_valid.value = dut.beats_0_ready.value = 0
    memory, monitor = _ImmediateMemory(dut), Monitor(dut, ("bursts_1", "beats_1"))
    starts = Monitor(dut, (), ("m_axi_axi_arvalid", "m_axi_axi_rvalid"))
    await begin(dut)
    expected = [burst for job in jobs for burst in cut(job, BEAT)]
    client.wanted.extend(expected)
    got = await client.beats.take(sum(beats for _, beats in expected), cycles=40 * most)
    assert got == [address // BEAT + beat for address, beats in expected for beat in range(beats)]
    assert memory.bursts == expected
    assert consecutive(monitor["beats_1"])
    assert starts["m_axi_axi_arvalid"][0] - monitor["bursts_1"][0] == latency()
    assert monitor["beats_1"][0] - starts["m_axi_axi_rvalid"][0] == latency("beat_latency")


@cocotb.test()
async def a_burst_a_cycle(dut):
    """Short bursts of both clients: one in every cycle, until the maximum is outstanding."""
    clients = [_Client(dut, client, never) for client in (ACTIVATIONS, WEIGHTS)]
    memory, monitor = _ImmediateMemory(dut, delay=50), Monitor(dut, (), ("m_axi_axi_arvalid",))
    await begin(dut)
    for index, client in enumerate(clients):
        client.wanted.extend((BOUNDARY * index + BEAT * burst, 1) for burst in range(6))
    await until(dut.clk, lambda: len(memory.bursts) == 12, "all bursts", cycles=200)
    assert consecutive(monitor["m_axi_axi_arvalid"][:OUTSTANDING])
    assert len(monitor["m_axi_axi_arvalid"]) == 12


@cocotb.test()
async def outstanding(dut):
    """A memory that does not answer gets at most eight bursts, however short they are; the oldest one is reported."""
    bench = _Bench(dut)
    answering = [False]
    bench.memory.r_channel.set_pause_generator(iter(lambda: not answering[0], None))
    await begin(dut)
    jobs = [(BOUNDARY * (5 + index), 2) for index in range(3 * OUTSTANDING)]
    for job in jobs:
        bench.send(*job)
    await cycle(dut.clk, 400)
    assert len(bench.bursts) == int(dut.under_way.value) == OUTSTANDING == 8
    assert int(dut.oldest.value) == bench.bursts[0][0] == 5 * BOUNDARY
    answering[0] = True
    for job in jobs:
        await bench.check(*job)
    assert int(dut.under_way.value) == 0


@cocotb.test()
async def two_clients(dut):
    """Each client gets its own data, in any order of bursts and with any of the clients slow."""
    bench = _Bench(dut, randomly(0.2, rng(2)), randomly(0.3, rng(3)))
    await begin(dut)
    jobs = {WEIGHTS: _jobs(6), ACTIVATIONS: [(address, min(beats, 64)) for address, beats in _jobs(12)[10:]]}
    for client, regions in jobs.items():
        for region in regions:
            bench.send(*region, client)
    checks = [cocotb.start_soon(_check_all(bench, client, regions)) for client, regions in jobs.items()]
    for check in checks:
        await check


async def _check_all(bench: _Bench, client: int, regions: list[Stretch]) -> None:
    for region in regions:
        await bench.check(*region, client)


@cocotb.test()
async def precedence(dut):
    """Activations do not wait for weights that are not taken, and go before weights that wait for AR."""
    bench, paused = _Bench(dut), [False]
    bench.clients[WEIGHTS].beats.stall = lambda: True
    bench.memory.ar_channel.set_pause_generator(iter(lambda: paused[0], None))
    await begin(dut)
    bench.send(0, 2 * DEPTHS[WEIGHTS])
    await until(dut.clk, lambda: len(bench.bursts) == WEIGHT_BURSTS_AHEAD, "a full FIFO", cycles=10_000)
    bench.send(BOUNDARY * 100, 8, ACTIVATIONS)
    await bench.check(BOUNDARY * 100, 8, ACTIVATIONS)
    assert bench.bursts[WEIGHT_BURSTS_AHEAD:] == [(BOUNDARY * 100, 8)]
    # Both clients wait for AR, which still shows an earlier burst.
    bench.clients[WEIGHTS].beats.stall = never
    await until(dut.clk, lambda: bench.clients[WEIGHTS].beats.transfers > longest(BEAT), "some room", cycles=10_000)
    await bench.check(0, 2 * DEPTHS[WEIGHTS])
    paused[0] = True
    await cycle(dut.clk, 4)
    before = len(bench.bursts)
    for index in range(3):
        bench.send(BOUNDARY * (10 + index), 2)
    await cycle(dut.clk, 4)
    for index in range(3):
        bench.send(BOUNDARY * (20 + index), 2, ACTIVATIONS)
    await cycle(dut.clk, 4)
    paused[0] = False
    await until(dut.clk, lambda: len(bench.bursts) == before + 6, "all bursts", cycles=500)
    assert [address // BOUNDARY for address, _ in bench.bursts[before:]] == [10, 20, 21, 22, 11, 12]


@cocotb.test()
@cocotb.parametrize(response=[1, 2, 3])
async def errors(dut, response):
    """SLVERR and DECERR are reported with the burst's address; EXOKAY is no error. The burst is read to its end."""
    bursts, beats = StreamSource(dut, "bursts_1", dut.clk), StreamSink(dut, "beats_1", dut.clk)
    dut.bursts_0_valid.value = dut.beats_0_ready.value = 0
    dut.halt.value = dut.m_axi_axi_rvalid.value = dut.m_axi_axi_rresp.value = 0
    dut.m_axi_axi_arready.value = 1
    await begin(dut)
    seen = []
    bursts.send(payload("bursts_1").pack(address=[BOUNDARY - 2 * BEAT, BOUNDARY], beats=[2, 2]))
    await until(dut.clk, lambda: int(dut.under_way.value) == 2, "two bursts", cycles=50)
    for index in range(7):
        dut.m_axi_axi_rvalid.value = index < 4
        dut.m_axi_axi_rlast.value = index % 2
        dut.m_axi_axi_rresp.value = response if index == 2 else 0
        await RisingEdge(dut.clk)
        seen.append(int(dut.error_address.value) if dut.error.value else None)
    assert [address for address in seen if address is not None] == ([BOUNDARY] if response > 1 else [])
    await beats.take(4, cycles=50)
    assert int(dut.under_way.value) == 0


@cocotb.test()
async def halt(dut):
    """After a halt in the middle, no more bursts are requested, and the outstanding bursts still come."""
    bench = _Bench(dut, randomly(0.2, rng(2)))
    await begin(dut)
    bench.send(0, 5000)
    await until(dut.clk, lambda: len(bench.bursts) >= 3, "three bursts", cycles=5000)
    dut.halt.value = 1
    await cycle(dut.clk, 2)
    assert int(dut.under_way.value)
    offered = len(bench.bursts) + int(dut.m_axi_axi_arvalid.value)
    await until(dut.clk, lambda: int(dut.under_way.value) == 0 and not dut.m_axi_axi_arvalid.value, "quiet", 20_000)
    await cycle(dut.clk, 100)
    total = sum(beats for _, beats in bench.bursts)
    assert total < 5000 and int(dut.under_way.value) == 0 and len(bench.bursts) == offered
    data = await bench.clients[WEIGHTS].beats.take(total, cycles=20_000)
    assert b"".join(beat.to_bytes(BEAT, "little") for beat in data) == bench.memory.read(0, total * BEAT)
