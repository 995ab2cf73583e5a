# SPDX-License-Identifier: Apache-2.0
"""The AXI4 read manager against cocotbext-axi's memory, and its bursts against the rules."""

import logging
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiRamRead, AxiReadBus

from sim.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, rng, until
from sim.tb.common import begin, config, payload

CLIENTS = ("activations", "weights")
"""By precedence."""
BOUNDARY = 4096
MEMORY = 1 << 20


class _Bench:
    """A memory full of noise, jobs, and every AR that was seen."""

    def __init__(self, dut: Any, stall: Stall = never, sink_stall: Stall = never):
        self.dut, self.bytes = dut, config().port_width // 8
        self.regions = {name: StreamSource(dut, f"{name}_regions", dut.clk) for name in CLIENTS}
        self.beats = {name: StreamSink(dut, f"{name}_beats", dut.clk, sink_stall) for name in CLIENTS}
        self.memory = AxiRamRead(AxiReadBus.from_prefix(dut, "m_axi_axi"), dut.clk, dut.rst, size=MEMORY)
        self.memory.log.setLevel(logging.WARNING)
        # By itself it takes no third address before it has answered the first.
        self.memory.ar_channel.queue_occupancy_limit = 32
        self.memory.write(0, rng(99).bytes(MEMORY))
        for channel in (self.memory.ar_channel, self.memory.r_channel):
            channel.set_pause_generator(iter(stall, None))
        dut.halt.value = 0
        self.bursts: list[tuple[int, int]] = []
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        """AR stays as it is until it is taken, and every burst keeps to the rules."""
        dut, waiting = self.dut, None
        while True:
            await RisingEdge(dut.clk)
            if dut.rst.value or not dut.m_axi_axi_arvalid.value:
                assert waiting is None or dut.rst.value, "ARVALID was withdrawn"
                continue
            now = int(dut.m_axi_axi_araddr.value), int(dut.m_axi_axi_arlen.value) + 1
            assert waiting in (None, now), f"AR changed from {waiting} to {now} before it was taken"
            waiting = None if dut.m_axi_axi_arready.value else now
            if waiting is None:
                address, beats = now
                assert address % self.bytes == 0
                assert address // BOUNDARY == (address + beats * self.bytes - 1) // BOUNDARY, "crosses 4 KiB"
                assert int(dut.m_axi_axi_arsize.value) == (self.bytes - 1).bit_length()
                assert int(dut.m_axi_axi_arburst.value) == 1
                self.bursts.append(now)

    def send(self, address: int, beats: int, client: str = "weights") -> None:
        self.regions[client].send(payload(f"{client}_regions").pack(address=[address], beats=[beats]))

    async def check(self, address: int, beats: int, client: str = "weights") -> None:
        got = await self.beats[client].take(beats, cycles=100_000)
        data = b"".join(beat.to_bytes(self.bytes, "little") for beat in got)
        assert data == self.memory.read(address, beats * self.bytes)


async def _run(dut: Any, jobs: list[tuple[int, int]], stall: Stall = never, sink_stall: Stall = never) -> _Bench:
    bench = _Bench(dut, stall, sink_stall)
    await begin(dut)
    for job in jobs:
        bench.send(*job)
    for job in jobs:
        await bench.check(*job)
    await bench.beats["weights"].quiet(64)
    assert int(dut.under_way.value) == 0
    assert sum(beats for _, beats in bench.bursts) == sum(beats for _, beats in jobs)
    return bench


def _jobs(count: int) -> list[tuple[int, int]]:
    """Lengths and offsets around 4 KiB boundaries, and random ones."""
    size, random = config().port_width // 8, rng(7)
    page = BOUNDARY // size
    jobs = [
        (BOUNDARY * base + size * offset, beats)
        for base, offset, beats in (
            (1, 0, 1), (1, 0, page - 1), (1, 0, page), (1, 0, page + 1), (1, page - 1, 1), (1, page - 1, 2),
            (2, page - 1, page + 2), (3, 1, page - 1), (3, 1, page), (4, page // 2, 3 * page),
        )
    ]  # fmt: skip
    for _ in range(count):
        beats = int(random.integers(1, 3 * page))
        jobs.append((int(random.integers(0, MEMORY // size - beats)) * size, beats))
    return jobs


@cocotb.test()
async def boundaries(dut):
    """Every length and offset that could go wrong, memory and user pausing at random."""
    await _run(dut, _jobs(8), randomly(0.3, rng(2)), randomly(0.3, rng(3)))


@cocotb.test()
async def slow_user(dut):
    """A user that hardly takes anything: bursts wait, data never do."""
    await _run(dut, _jobs(2)[-4:], never, randomly(0.9, rng(3)))


@cocotb.test()
async def full_speed(dut):
    """Without pauses: maximal bursts, and a beat in every cycle from the first to the last, over several jobs."""
    size = config().port_width // 8
    page = min(256, BOUNDARY // size)
    jobs = [(BOUNDARY * 2, 8 * page), (BOUNDARY * 40, 8 * page)]
    bench = _Bench(dut)
    await begin(dut)
    for job in jobs:
        bench.send(*job)
    await until(dut.clk, lambda: bench.beats["weights"].transfers > 0, "the first beat", cycles=200)
    before = bench.beats["weights"].transfers
    await cycle(dut.clk, 12 * page)
    # The memory model itself pauses for a cycle between two bursts, and nothing else does.
    assert bench.beats["weights"].transfers - before >= 12 * page - 13
    for job in jobs:
        await bench.check(*job)
    assert {beats for _, beats in bench.bursts} == {page}


@cocotb.test()
async def outstanding(dut):
    """A memory that does not answer is asked for eight bursts, and no more; the oldest is named."""
    bench = _Bench(dut)
    answering = [False]
    bench.memory.r_channel.set_pause_generator(iter(lambda: not answering[0], None))
    await begin(dut)
    bench.send(0, 20 * 256)
    await cycle(dut.clk, 400)
    asked = len(bench.bursts)
    await cycle(dut.clk, 400)
    assert len(bench.bursts) == asked == int(dut.under_way.value) == 8
    assert int(dut.oldest.value) == bench.bursts[0][0] == 0
    answering[0] = True
    await bench.check(0, 20 * 256)


@cocotb.test()
async def two_clients(dut):
    """Each client's data are its own, however their bursts mix and whoever is slow."""
    bench = _Bench(dut, randomly(0.2, rng(2)), randomly(0.3, rng(3)))
    await begin(dut)
    jobs = {"weights": _jobs(6), "activations": [(address, min(beats, 64)) for address, beats in _jobs(12)[10:]]}
    for client, regions in jobs.items():
        for region in regions:
            bench.send(*region, client)
    checks = [cocotb.start_soon(_check_all(bench, client, regions)) for client, regions in jobs.items()]
    for check in checks:
        await check


async def _check_all(bench: _Bench, client: str, regions: list[tuple[int, int]]) -> None:
    for region in regions:
        await bench.check(*region, client)


@cocotb.test()
async def precedence(dut):
    """Activations do not wait behind weights that nobody takes, and are asked for before weights that are next."""
    bench = _Bench(dut, never, never)
    bench.beats["weights"].stall = lambda: True
    await begin(dut)
    bench.send(0, 20 * 256)
    await until(dut.clk, lambda: len(bench.bursts) >= 2, "two bursts", cycles=200)
    bench.send(BOUNDARY * 100, 8, "activations")
    await until(dut.clk, lambda: (BOUNDARY * 100, 8) in bench.bursts, "the other client's burst", cycles=100)
    assert len(bench.bursts) <= 8 + 1
    await bench.check(BOUNDARY * 100, 8, "activations")


@cocotb.test()
@cocotb.parametrize(response=[2, 3])
async def errors(dut, response):
    """SLVERR and DECERR are reported with the address of their burst, and the region is read to its end."""
    regions, beats = StreamSource(dut, "weights_regions", dut.clk), StreamSink(dut, "weights_beats", dut.clk)
    dut.activations_regions_valid.value = dut.activations_beats_ready.value = 0
    dut.halt.value = dut.m_axi_axi_rvalid.value = dut.m_axi_axi_rresp.value = 0
    dut.m_axi_axi_arready.value = 1
    await begin(dut)
    size, seen = config().port_width // 8, []
    regions.send(payload("weights_regions").pack(address=[BOUNDARY - 2 * size], beats=[4]))
    await until(dut.clk, lambda: int(dut.under_way.value) == 2, "two bursts", cycles=50)
    for index in range(7):
        dut.m_axi_axi_rvalid.value = index < 4
        dut.m_axi_axi_rlast.value = index % 2
        dut.m_axi_axi_rresp.value = response if index == 2 else 0
        await RisingEdge(dut.clk)
        seen.append(int(dut.error_address.value) if dut.error.value else None)
    assert [address for address in seen if address is not None] == [BOUNDARY]
    await beats.take(4, cycles=50)
    assert int(dut.under_way.value) == 0


@cocotb.test()
async def halt(dut):
    """Halted in the middle: nothing more is asked for, what is under way still comes."""
    bench = _Bench(dut, randomly(0.2, rng(2)))
    await begin(dut)
    bench.send(0, 5000)
    await until(dut.clk, lambda: len(bench.bursts) >= 3, "three bursts", cycles=5000)
    dut.halt.value = 1
    await cycle(dut.clk, 2)
    asked = int(dut.under_way.value)
    assert asked
    await until(dut.clk, lambda: int(dut.under_way.value) == 0 and not dut.m_axi_axi_arvalid.value, "quiet", 20_000)
    await cycle(dut.clk, 100)
    total = sum(beats for _, beats in bench.bursts)
    assert total < 5000 and int(dut.under_way.value) == 0
    data = await bench.beats["weights"].take(total, cycles=20_000)
    assert b"".join(beat.to_bytes(bench.bytes, "little") for beat in data) == bench.memory.read(0, total * bench.bytes)
