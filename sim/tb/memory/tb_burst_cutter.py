# SPDX-License-Identifier: Apache-2.0
"""The burst cutter against a model in Python, and its bursts against the rules of AXI4."""

import cocotb

from hw.spec.control.descriptor import ADDRESS_LIMIT
from hw.spec.memory.access import BURST_BOUNDARY as BOUNDARY
from hw.spec.memory.access import MAX_BURST_BEATS
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, bursty, never, randomly, rng

Stretch = tuple[int, int]
"""Address, and length in beats: a region or a burst."""


def longest(size: int) -> int:
    """The number of beats of the longest burst with beats of ``size`` bytes."""
    return min(MAX_BURST_BEATS, BOUNDARY // size)


def cut(region: Stretch, size: int) -> list[Stretch]:
    """The bursts of a region, cut where the address is a multiple of the longest burst's bytes."""
    address, beats = region
    bursts, block = [], longest(size) * size
    while beats:
        count = min(beats, (block - address % block) // size)
        bursts.append((address, count))
        address, beats = address + count * size, beats - count
    return bursts


def joined(bursts: list[Stretch], size: int) -> list[Stretch]:
    """Bursts, of which those that follow each other in one block of the longest burst's bytes are joined."""
    found: list[Stretch] = []
    for address, beats in bursts:
        if found and address % (longest(size) * size) and address == found[-1][0] + found[-1][1] * size:
            found[-1] = (found[-1][0], found[-1][1] + beats)
        else:
            found.append((address, beats))
    return found


def _check_rules(region: Stretch, bursts: list[Stretch], size: int) -> None:
    """Checks without the model: the bursts cover the region, each is legal, and at most one is unnecessary."""
    address, beats = region
    for start, count in bursts:
        assert start == address and 1 <= count <= MAX_BURST_BEATS
        assert start // BOUNDARY == (start + count * size - 1) // BOUNDARY, f"{start:#x}, {count} beats: crosses 4 KiB"
        address += count * size
    assert address == region[0] + beats * size
    assert len(bursts) <= -(-beats // longest(size)) + 1


def _regions(count: int) -> list[Stretch]:
    """Offsets and lengths around 4 KiB and the longest burst, the ends of the address space, and random regions."""
    size, random = config().port_width // 8, rng(7)
    page, most = BOUNDARY // size, longest(size)
    regions = []
    for offset in sorted({0, 1, 2, most - 1, most, page // 2 + 1, page - 2, page - 1}):
        lengths = {1, 2, most - 1, most, most + 1, 2 * most - 1, 2 * most, 2 * most + 1, page, page + 1}
        regions += [(BOUNDARY * 5 + offset % page * size, beats) for beats in sorted(lengths)]
    regions += [(0, 3 * page), (ADDRESS_LIMIT - size, 1), (ADDRESS_LIMIT - size, 4 * page)]
    for _ in range(count):
        address = int(random.integers(ADDRESS_LIMIT // size)) * size
        regions.append((address, int(random.integers(1, random.choice([3, most, 20 * most]), endpoint=True))))
    return regions


class _Bench:
    def __init__(self, dut, stall: Stall = never, sink_stall: Stall = never):
        self.regions = StreamSource(dut, "regions", dut.clk, stall)
        self.bursts = StreamSink(dut, "bursts", dut.clk, sink_stall)

    def send(self, regions: list[Stretch]) -> None:
        addresses, beats = zip(*regions, strict=True)
        self.regions.send(payload("regions").pack(address=addresses, beats=beats))

    async def check(self, regions: list[Stretch]) -> None:
        size = config().port_width // 8
        for region in regions:
            expected = cut(region, size)
            fields = payload("bursts").unpack(await self.bursts.take(len(expected), cycles=20_000))
            bursts = list(zip(fields["address"].tolist(), fields["beats"].tolist(), strict=True))
            assert bursts == expected, f"region {region}"
            _check_rules(region, bursts, size)
        await self.bursts.quiet(16)


@cocotb.test()
async def bursts(dut):
    """Without pauses, a burst in every cycle, from the first region to the last, with the latency that is stated."""
    bench, regions = _Bench(dut), _regions(60)
    await begin(dut)
    monitor = Monitor(dut, ("regions", "bursts"))
    bench.send(regions)
    await bench.check(regions)
    assert consecutive(monitor["bursts"])
    assert monitor["bursts"][0] - monitor["regions"][0] == latency()


@cocotb.test()
async def bursts_with_stalls(dut):
    """Regions and bursts with rare or long pauses."""
    bench, regions = _Bench(dut, randomly(0.4, rng(2)), bursty(rng(3))), _regions(60)
    await begin(dut)
    bench.send(regions)
    await bench.check(regions)


@cocotb.test()
async def long_region(dut):
    """More than 2 GiB: with a narrower counter, the region would seem to end one beat after the first burst."""
    size = config().port_width // 8
    bench, start, seen = _Bench(dut), ADDRESS_LIMIT - BOUNDARY, 200
    await begin(dut)
    bench.send([(start, (1 << 31) // size + longest(size) + 1)])
    fields = payload("bursts").unpack(await bench.bursts.take(seen, cycles=seen + 10))
    got = list(zip(fields["address"].tolist(), fields["beats"].tolist(), strict=True))
    assert got == cut((start, seen * longest(size)), size)
