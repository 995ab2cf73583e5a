# SPDX-License-Identifier: Apache-2.0
"""Single results become the pairs that a drain of two lanes would give."""

from dataclasses import replace

import cocotb
import numpy as np

from hw.spec.config import FLOAT_BITS
from hw.spec.memory.transfers import Transfer, result_transfers
from sim.bench.dut import begin, config, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, never, randomly, rng


def _payloads(port: str, transfers: list[Transfer], values: np.ndarray, lanes: int) -> list[int]:
    """The transfers of a layer with these results, uint32 [M, N]. Lanes without a column have 0."""
    rows = np.zeros((len(transfers), lanes), np.uint32)
    for row, transfer in zip(rows, transfers, strict=True):
        row[: len(transfer.columns)] = values[transfer.token, transfer.columns]
    fields = {name: [transfer.fields[name] for transfer in transfers] for name in transfers[0].fields}
    return payload(port).pack(values=rows, **fields)


@cocotb.test()
@cocotb.parametrize(stalls=[0.0, 0.4])
async def pairs(dut, stalls):
    """Layers of all lengths around a tile, a pair and a piece. Without stalls a result is taken in every cycle."""
    random, c = rng(1), config()
    single, double = replace(c, lanes=1), replace(c, lanes=2)
    stall = [randomly(stalls, rng(number)) if stalls else never for number in (2, 3)]
    source, sink = StreamSource(dut, "i", dut.clk, stall[0]), StreamSink(dut, "o", dut.clk, stall[1])
    await begin(dut)
    monitor = Monitor(dut, ("i",))
    expected = []
    for n in (1, 2, 3, c.tile - 1, c.tile, c.tile + 1, 255, 256, 257, 300, *random.integers(1, 600, 6).tolist()):
        tokens = int(random.integers(1, c.max_tokens + 1))
        values = random.integers(0, 1 << FLOAT_BITS, (tokens, n)).astype(np.uint32)
        source.send(_payloads("i", result_transfers(single, tokens, n), values, 1))
        transfers = result_transfers(double, tokens, n)
        expected += zip(_payloads("o", transfers, values, 2), transfers, strict=True)
    found = await sink.take(len(expected))
    await sink.quiet()
    # The value of a lane without a column is undefined.
    second = ((1 << FLOAT_BITS) - 1) << payload("o").fields["values"].offset + FLOAT_BITS
    for number, (got, (wanted, transfer)) in enumerate(zip(found, expected, strict=True)):
        undefined = 0 if len(transfer.columns) == 2 else second
        assert got & ~undefined == wanted, f"transfer {number}: {transfer}"
    if not stalls:
        assert consecutive(monitor["i"])
