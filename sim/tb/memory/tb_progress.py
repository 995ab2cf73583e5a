# SPDX-License-Identifier: Apache-2.0
"""The progress of outputs: the pieces of each client's current output that are in memory."""

import cocotb

from sim.bench.dut import begin, latency, trace
from sim.bench.streams import rng

CLIENTS, CYCLES = 2, 2_000


@cocotb.test()
@cocotb.parametrize(rate=[0.1, 0.5, 1.0])
async def counts(dut, rate):
    """Each client's pieces come at random times; some are the last one of their output."""
    random = rng(1)
    written = random.random((CYCLES, CLIENTS)) < rate
    last = written & (random.random((CYCLES, CLIENTS)) < 0.1)
    dut.written.value = dut.complete.value = 0
    await begin(dut)
    bits = [1 << client for client in range(CLIENTS)]
    inputs = {"written": written @ bits, "complete": last @ bits}
    record = await trace(dut, inputs, [f"pieces_{client}" for client in range(CLIENTS)])
    for client in range(CLIENTS):
        count, seen = 0, record.raw(f"pieces_{client}", range(CYCLES))
        for now in range(CYCLES - latency()):
            count = 0 if last[now, client] else count + int(written[now, client])
            assert seen[now + latency()] == count, f"client {client}, cycle {now}"
