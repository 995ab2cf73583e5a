# SPDX-License-Identifier: Apache-2.0
"""The command fork: every user gets every command, and a slow one holds up the others only when its FIFO is full."""

import cocotb

from sim.bench.dut import begin, latency, ports
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, rng

USERS = ("copies_0", "copies_1", "copies_2")


def _commands(count):
    width = ports()["command"]["width"]
    return [int.from_bytes(rng(n).bytes(16), "little") % (1 << width) for n in range(count)]


async def _distribute(dut, source_stall, sink_stalls, count=200):
    source = StreamSource(dut, "command", dut.clk, source_stall)
    sinks = [StreamSink(dut, user, dut.clk, stall) for user, stall in zip(USERS, sink_stalls)]
    await begin(dut)
    monitor = Monitor(dut, ("command", *USERS))
    commands = _commands(count)
    source.send(commands)
    for sink in sinks:
        assert await sink.take(count) == commands
        await sink.quiet(8)
    return source, monitor


@cocotb.test()
async def test_full_throughput(dut):
    source, monitor = await _distribute(dut, never, [never] * 3)
    assert source.stalled_by_dut == 0
    for user in USERS:
        assert consecutive(monitor[user])
        assert monitor[user][0] - monitor["command"][0] == latency()


@cocotb.test()
async def test_random_stalls(dut):
    await _distribute(dut, randomly(0.2, rng(9)), [randomly(p, rng(n)) for n, p in enumerate((0.1, 0.5, 0.7))])


@cocotb.test()
async def test_one_user_blocked(dut):
    """The others get as many commands as the blocked one's FIFO holds, and the rest when it goes on."""
    depth, blocked = latency("depth"), [True]
    source = StreamSource(dut, "command", dut.clk)
    sinks = [StreamSink(dut, user, dut.clk, (lambda: blocked[0]) if user == USERS[1] else never) for user in USERS]
    await begin(dut)
    commands = _commands(3 * depth)
    source.send(commands)
    await cycle(dut.clk, 4 * depth)
    assert [len(sink.received) for sink in sinks] == [depth, 0, depth]
    blocked[0] = False
    for sink in sinks:
        assert await sink.take(len(commands)) == commands
