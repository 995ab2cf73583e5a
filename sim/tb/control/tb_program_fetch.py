# SPDX-License-Identifier: Apache-2.0
"""The program fetch: all descriptors of a program come in order, and never more than the queue has room for."""

from collections import deque
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.control.descriptor import ADDRESS_LIMIT, DESCRIPTOR_WORDS
from hw.spec.control.program import PROGRAM_ALIGNMENT
from hw.spec.control.registers import QUEUE_DEPTH
from hw.spec.memory.access import BURST_BOUNDARY
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor
from sim.bench.streams import Stall, StreamSink, cycle, never, randomly, read, rng

BYTES = 4 * DESCRIPTOR_WORDS
BEAT = config().port_width // 8
BEATS = BYTES // BEAT


class _Bench:
    """A memory that answers in order, the queue, and the rule that the queue never holds too much."""

    def __init__(self, dut: Any, slow: Stall = never, full: Stall = never):
        """slow: cycles without a beat from memory. full: cycles in which no descriptor leaves the queue."""
        self.dut, self.slow, self.full = dut, slow, full
        self.bursts = StreamSink(dut, "bursts", dut.clk, slow)
        self.image: dict[int, bytes] = {}
        """Descriptors in memory by their addresses."""
        self.asked: list[int] = []
        """Addresses of all bursts."""
        self.got: list[tuple[bytes, int]] = []
        """Descriptors and their ``first``."""
        self.beats: deque[int] = deque()
        """Beats that memory owes."""
        self.level = 0
        self.claims = 0
        """Descriptors of another source to put into the queue."""
        for name in ("start", "address", "length", "halt", "claim", "release", "beats_valid", "beats_payload"):
            getattr(dut, name).value = 0
        dut.descriptors_ready.value = 1
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        dut, edge, fields = self.dut, RisingEdge(self.dut.clk), payload("descriptors")
        beats = self.beats
        requests = payload("bursts")
        while True:
            await edge
            if dut.rst.value:
                continue
            if read(dut.descriptors_valid):
                found = fields.unpack([read(dut.descriptors_payload)])
                self.got.append((int(found["descriptor"][0]).to_bytes(BYTES, "little"), int(found["first"][0])))
                self.level += 1
            for raw in self.bursts.received:
                burst = {name: int(values[0]) for name, values in requests.unpack([raw]).items()}
                address = burst["address"]
                assert burst["beats"] == BEATS
                assert address // BURST_BOUNDARY == (address + BYTES - 1) // BURST_BOUNDARY
                self.asked.append(address)
                data = self.image.get(address, bytes(BYTES))
                beats += [int.from_bytes(data[at : at + BEAT], "little") for at in range(0, BYTES, BEAT)]
            self.bursts.received.clear()
            level = self.level + len(self.asked) - len(self.got)
            assert level <= QUEUE_DEPTH, f"{level} descriptors are in the queue or requested"
            comes = bool(beats) and not self.slow()
            dut.beats_valid.value = int(comes)
            if comes:
                dut.beats_payload.value = beats.popleft()
            leaves = self.level > 0 and not self.full()
            claims = self.claims > 0 and level < QUEUE_DEPTH and not read(dut.active)
            dut.release.value, dut.claim.value = int(leaves), int(claims)
            self.claims -= claims
            self.level += claims - leaves

    def program(self, address: int, count: int, salt: int = 1) -> list[bytes]:
        """Puts random descriptors into memory."""
        random = rng(salt, address % (1 << 20), count)
        descriptors = [random.bytes(BYTES) for _ in range(count)]
        self.image |= {address + BYTES * index: item for index, item in enumerate(descriptors)}
        return descriptors

    async def start(self, address: int, length: int) -> None:
        """One cycle of ``start``. Afterwards address and length change, which has no effect."""
        dut = self.dut
        dut.address.value, dut.length.value, dut.start.value = address, length, 1
        await cycle(dut.clk)
        dut.start.value, dut.address.value, dut.length.value = 0, 1, 5
        await cycle(dut.clk)

    async def idle(self, cycles: int = 100_000) -> None:
        for _ in range(cycles):
            if not read(self.dut.active):
                return
            await cycle(self.dut.clk)
        raise TimeoutError("the program fetch is still active")

    async def run(self, address: int, count: int) -> None:
        """Fetches a program and checks it."""
        descriptors = self.program(address, count)
        asked, got = len(self.asked), len(self.got)
        await self.start(address, count)
        assert read(self.dut.active)
        await self.idle()
        await cycle(self.dut.clk, 4)
        assert self.got[got:] == [(item, int(index == 0)) for index, item in enumerate(descriptors)]
        assert self.asked[asked:] == [address + BYTES * index for index in range(count)]


@cocotb.test()
@cocotb.parametrize(slow=[0.0, 0.5], full=[0.0, 0.9])
async def programs(dut, slow, full):
    """Programs of all lengths, at the ends of the address space and over 4 KiB boundaries."""
    bench = _Bench(dut, randomly(slow, rng(1)), randomly(full, rng(2)))
    await begin(dut)
    for address, count in (
        (0, 1),
        (PROGRAM_ALIGNMENT, 2),
        (BURST_BOUNDARY - PROGRAM_ALIGNMENT, QUEUE_DEPTH),
        (ADDRESS_LIMIT - PROGRAM_ALIGNMENT, QUEUE_DEPTH + 1),
        (5 * BURST_BOUNDARY, 3 * QUEUE_DEPTH),
    ):
        await bench.run(address, count)


@cocotb.test()
async def time(dut):
    """The latencies are those that the block states, and without pauses a beat comes in every cycle."""
    bench = _Bench(dut)
    await begin(dut)
    bench.program(0, 40)
    monitor = Monitor(dut, ("bursts", "beats", "descriptors"), ("start",))
    await bench.start(0, 40)
    await bench.idle()
    assert monitor["bursts"][0] - monitor["start"][0] == latency()
    last = monitor["beats"][BEATS - 1 :: BEATS]
    assert [time - latency("descriptor_latency") for time in monitor["descriptors"]] == last
    assert monitor["beats"] == list(range(monitor["beats"][0], monitor["beats"][0] + 40 * BEATS))


@cocotb.test()
async def no_room(dut):
    """As many descriptors as the queue has room for are requested, and one more for each that leaves."""
    held = [True]
    bench = _Bench(dut, full=lambda: held[0])
    await begin(dut)
    bench.claims = 3
    await cycle(dut.clk, 10)
    assert bench.level == 3
    bench.program(0, 40)
    await bench.start(0, 40)
    await cycle(dut.clk, 40 * BEATS)
    assert len(bench.asked) == len(bench.got) == latency("room") - 3
    for index in range(5):
        held[0] = False
        await cycle(dut.clk)
        held[0] = True
        await cycle(dut.clk, 8 * BEATS)
        assert len(bench.asked) == len(bench.got) == latency("room") - 2 + index
    held[0] = False
    await bench.idle()
    assert len(bench.got) == 40


@cocotb.test()
async def without_effect(dut):
    """A start while a program is fetched, and one of no descriptors, do nothing."""
    bench = _Bench(dut, randomly(0.5, rng(1)), randomly(0.5, rng(2)))
    await begin(dut)
    first = bench.program(0, 30)
    bench.program(1 << 20, 30)
    await bench.start(0, 30)
    while read(dut.active):
        await bench.start(1 << 20, 3)
        if len(bench.got) > 25:
            break
    await bench.idle()
    await bench.start(1 << 20, 0)
    await cycle(dut.clk, 100)
    assert not read(dut.active) and not read(dut.refused)
    assert [item for item, _ in bench.got] == first


@cocotb.test()
@cocotb.parametrize(address=[64, 1, ADDRESS_LIMIT, 1 << 40, 1 << 63])
async def wrong_address(dut, address):
    """A program that is not aligned, or too high, is refused, and nothing is read, also of later ones."""
    bench = _Bench(dut)
    await begin(dut)
    await bench.start(address, 0)
    assert not read(dut.refused)
    for place in (address, 0):
        await bench.start(place, 4)
        await cycle(dut.clk, 50)
        assert read(dut.refused) and not read(dut.active) and not bench.asked


@cocotb.test()
async def halted(dut):
    """After a fault no descriptor is passed on. The reset ends the program."""
    bench = _Bench(dut)
    await begin(dut)
    bench.program(0, 40)
    await bench.start(0, 40)
    while len(bench.got) < 5:
        await cycle(dut.clk)
    dut.halt.value = 1
    await cycle(dut.clk)
    got = len(bench.got)
    await cycle(dut.clk, 100)
    assert len(bench.got) <= got + 1 and read(dut.active)
    # The accelerator is reset when memory has answered all requests.
    while bench.beats:
        await cycle(dut.clk, 10)
    dut.rst.value = 1
    await cycle(dut.clk, 2)
    dut.rst.value = dut.halt.value = 0
    bench.level, bench.asked, bench.got = 0, [], []
    await cycle(dut.clk, 2)
    assert not read(dut.active)
    await bench.run(1 << 13, 20)
