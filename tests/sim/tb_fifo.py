# SPDX-License-Identifier: Apache-2.0
"""Cocotb bench of the test FIFO: the stream helpers move data, measure, and detect broken handshakes."""

import cocotb
import numpy as np

from sim.bench.packing import Layout
from sim.bench.streams import ProtocolError, StreamSink, StreamSource, bursty, never, randomly, rng, start, until
from sim.harness import settings

LAYOUT = Layout({"bytes": (0, 32, True), "sum": (32, 18, True)})


async def _transfer(dut, source_stall, sink_stall, count=300):
    dut.fault.value = 0
    source = StreamSource(dut, "in", dut.clk, source_stall)
    sink = StreamSink(dut, "out", dut.clk, sink_stall)
    await start(dut)
    values = rng().integers(-128, 128, (count, 4))
    source.send(LAYOUT.pack(bytes=values, sum=values.sum(axis=1)))
    out = LAYOUT.unpack(await sink.take(count), bytes=4)
    await sink.quiet()
    assert np.array_equal(out["bytes"], values)
    assert np.array_equal(out["sum"], values.sum(axis=1))
    return source, sink


@cocotb.test()
async def test_full_throughput(dut):
    source, sink = await _transfer(dut, never, never)
    assert source.stalled_by_dut == 0
    assert source.transfers == sink.transfers == 300


@cocotb.test()
async def test_random_stalls(dut):
    source, _ = await _transfer(dut, randomly(0.3, rng(1)), randomly(0.6, rng(2)))
    assert source.stalled_by_dut > 0


@cocotb.test()
async def test_bursty_stalls(dut):
    await _transfer(dut, bursty(rng(1)), bursty(rng(2), run=5, pause=20))


async def _fails_with(dut, fault, error, text):
    """Runs with a fault; the sink's task or the wait must end with `error`."""
    dut.fault.value = fault
    source = StreamSource(dut, "in", dut.clk)
    sink = StreamSink(dut, "out", dut.clk, bursty(rng(), run=4, pause=12))
    await start(dut)
    source.send(range(50))
    try:
        await sink.take(50, cycles=2000)
    except error as caught:
        assert text in str(caught), str(caught)
    else:
        raise AssertionError(f"fault {fault} went unnoticed")


@cocotb.test(expect_error=ProtocolError)
async def test_falling_valid_is_caught(dut):
    await _fails_with(dut, 1, (), "")


@cocotb.test(expect_error=ProtocolError)
async def test_changing_payload_is_caught(dut):
    await _fails_with(dut, 2, (), "")


@cocotb.test()
async def test_a_wait_says_what_for(dut):
    await _fails_with(dut, 3, TimeoutError, "Waited 2000 cycles for out to give payload 1 of 50")


@cocotb.test(skip=not settings().get("hang"))
async def test_hang(dut):
    await start(dut)
    await until(dut.clk, lambda: False, "pigs to fly", cycles=10**12)


@cocotb.test(skip=not settings().get("fail"))
async def test_deliberately_wrong(dut):
    await start(dut)
    assert int(dut.out_valid.value) == 1, "a FIFO after reset must be full"
