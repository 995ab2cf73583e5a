# SPDX-License-Identifier: Apache-2.0
"""The stream FIFO: order, latency, throughput, and exactly the stated depth."""

import cocotb

from sim.bench.dut import begin, latency, ports
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, rng


def _payloads(count):
    width = ports()["i"]["width"]
    return [int.from_bytes(rng(n).bytes(-(-width // 8)), "little") % (1 << width) for n in range(count)]


async def _transfer(dut, into, out_of, count=400):
    source, sink = StreamSource(dut, "i", dut.clk, into), StreamSink(dut, "o", dut.clk, out_of)
    await begin(dut)
    monitor = Monitor(dut, ("i", "o"))
    payloads = _payloads(count)
    source.send(payloads)
    assert await sink.take(count) == payloads
    await sink.quiet()
    return source, monitor


@cocotb.test()
async def test_full_throughput(dut):
    source, monitor = await _transfer(dut, never, never)
    assert source.stalled_by_dut == 0
    assert consecutive(monitor["o"])
    assert monitor["o"][0] - monitor["i"][0] == latency()


@cocotb.test()
@cocotb.parametrize(speeds=[(0.5, 0.5), (0.1, 0.6), (0.7, 0.1)])
async def test_random_stalls(dut, speeds):
    await _transfer(dut, randomly(speeds[0], rng(1)), randomly(speeds[1], rng(2)))


@cocotb.test()
async def test_depth(dut):
    """It takes exactly ``depth`` payloads, its level shows it, and then it still gives a payload in every cycle."""
    depth, blocked = latency("depth"), [True]
    source, sink = StreamSource(dut, "i", dut.clk), StreamSink(dut, "o", dut.clk, lambda: blocked[0])
    await begin(dut)
    payloads = _payloads(3 * depth)
    source.send(payloads)
    for _ in range(2 * depth):
        await cycle(dut.clk)
        assert int(dut.level.value) in (source.transfers, source.transfers - 1)
    assert source.transfers == int(dut.level.value) == depth
    monitor = Monitor(dut, ("o",))
    blocked[0] = False
    assert await sink.take(3 * depth) == payloads
    assert consecutive(monitor["o"])
    await sink.quiet(4)
    assert int(dut.level.value) == 0
