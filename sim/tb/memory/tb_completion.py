# SPDX-License-Identifier: Apache-2.0
"""The completion of descriptors with one or two outputs, in their order."""

import cocotb
from cocotb.triggers import RisingEdge

from sim.bench.dut import begin, latency, payload
from sim.bench.streams import StreamSource, never, randomly, read, rng

CLIENTS = 2


async def _run(dut, stall, rate):
    """Random descriptors; each client writes its outputs in order, at random times after they are expected."""
    random = rng(1)
    outputs = [int(value) for value in random.integers(1, 1 << CLIENTS, 400)]
    interrupts = [int(value) for value in random.integers(0, 2, len(outputs))]
    source = StreamSource(dut, "expected", dut.clk, stall)
    dut.written.value = 0
    await begin(dut)
    source.send(payload("expected").pack(outputs=outputs, interrupt=interrupts))
    queues = [[index for index, mask in enumerate(outputs) if mask >> client & 1] for client in range(CLIENTS)]
    written, now, seen, edge = [0] * CLIENTS, 0, [], RisingEdge(dut.clk)
    done = 0
    ready_at = [0] * len(outputs)
    while len(seen) < len(outputs):
        assert now < 20_000, f"{len(seen)} of {len(outputs)} descriptors are complete"
        word = 0
        for client, queue in enumerate(queues):
            # An output is written only after its descriptor is expected.
            if written[client] < len(queue) and queue[written[client]] < source.transfers and random.random() < rate:
                word |= 1 << client
                ready_at[queue[written[client]]] = now
                written[client] += 1
        dut.written.value = word
        await edge
        now += 1
        # Outputs that are written before their descriptor is complete.
        whole = [bool(read(dut.whole) >> client & 1) for client in range(CLIENTS)]
        for client, queue in enumerate(queues):
            begun = [index for index in queue[: written[client]] if index >= done]
            assert not whole[client] or begun, f"client {client} has no output of descriptor {done} or later"
        if read(dut.complete):
            done += 1
            seen.append((now, read(dut.complete_interrupt)))
    assert [interrupt for _, interrupt in seen] == interrupts
    earliest = 0
    for (cycle, _), ready in zip(seen, ready_at, strict=True):
        # Not before all outputs are there, and at most one per cycle; then at once.
        earliest = max(earliest + 1, ready + 1 + latency())
        assert cycle == earliest, f"complete in cycle {cycle}, not {earliest}"


@cocotb.test()
@cocotb.parametrize(rate=[0.1, 0.5, 1.0])
async def in_order(dut, rate):
    """A descriptor is complete ``latency`` cycles after its last output, if the ones before it are."""
    await _run(dut, never, rate)


@cocotb.test()
async def with_stalls(dut):
    """The same, with pauses between the descriptors."""
    await _run(dut, randomly(0.6, rng(2)), 0.9)
