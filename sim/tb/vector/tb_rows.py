# SPDX-License-Identifier: Apache-2.0
"""The walk over rows from memory gives the places of hw.spec.memory.transfers, in order."""

import cocotb
import numpy as np

from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.transfers import row_transfers
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, never, randomly, rng

TOKENS = config().max_tokens
LANES = latency("lanes")


def _jobs(random: np.random.Generator) -> list[tuple[int, int]]:
    """(tokens, columns): lengths around one transfer, around one piece and two, and random ones."""
    lengths = [1, 2, LANES - 1, LANES, LANES + 1, 2 * LANES, 3 * LANES]
    lengths += [pieces * PIECE_FLOATS + more for pieces in (1, 2) for more in (-LANES, -1, 0, 1, LANES, LANES + 1)]
    lengths += random.integers(1, 4 * PIECE_FLOATS, 8).tolist()
    return [(int(random.choice([1, 1, TOKENS, int(random.integers(1, TOKENS + 1))])), n) for n in lengths if n > 0]


@cocotb.test()
@cocotb.parametrize(stalls=[0.0, 0.4])
async def places(dut, stalls):
    """Every place of every job; without stalls one in each cycle, across jobs."""
    random = rng(1)
    jobs = _jobs(random)
    random.shuffle(jobs)
    stall = [randomly(stalls, rng(number)) if stalls else never for number in (2, 3)]
    source, sink = StreamSource(dut, "job", dut.clk, stall[0]), StreamSink(dut, "places", dut.clk, stall[1])
    await begin(dut)
    monitor = Monitor(dut, ("job", "places"))
    tokens, columns = zip(*jobs, strict=True)
    source.send(payload("job").pack(tokens=list(tokens), columns=list(columns)))
    wanted = [transfer.fields for job in jobs for transfer in row_transfers(LANES, *job)]
    found = payload("places").unpack(await sink.take(len(wanted)))
    await sink.quiet()
    for name in wanted[0]:
        assert found[name].tolist() == [fields[name] for fields in wanted], name
    if not stalls:
        assert monitor["places"][0] == monitor["job"][0] + latency()
        assert consecutive(monitor["places"])
