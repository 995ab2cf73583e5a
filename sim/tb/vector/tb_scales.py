# SPDX-License-Identifier: Apache-2.0
"""r of every token of a layer, bit for bit numpy's definition, in the stated cycles."""

from typing import Any

import cocotb
import numpy as np

from hw.spec.memory.transfers import row_transfers
from hw.spec.numerics.vector import PARTIAL_SUMS, norm_scale
from hw.spec.ops.epilogue import float_bits
from sim.bench.dut import begin, config, latency, payload, ports, trace
from sim.bench.epilogues import numbers
from sim.bench.packing import pack_elements
from sim.bench.streams import rng

TOKENS = config().max_tokens
LANES = ports()["values"]["fields"]["element"][3]
AHEAD = 40
"""Cycles from the decision to take a transfer to its values, about as many as in the epilogue."""
WIDTH = 32


class _Script:
    """The values of all inputs, cycle by cycle. Values without a meaning are random."""

    def __init__(self) -> None:
        self.cycles: dict[str, dict[int, int]] = {}
        self.now = 0

    def put(self, cycle: int, **values: int) -> None:
        for name, value in values.items():
            self.cycles.setdefault(name, {})[cycle] = value

    def inputs(self, random: np.random.Generator, total: int) -> dict[str, list[int]]:
        driven = {}
        for name, values in self.cycles.items():
            width = ports()[name]["width"]
            idle = [0] * total
            if name not in ("begin", "end", "valid"):
                idle = pack_elements(random.integers(0, 1 << 8, (total, -(-width // 8))), 8)
            driven[name] = [values.get(cycle, other & (1 << width) - 1) for cycle, other in enumerate(idle)]
        return driven


def _layer(script: _Script, random: np.random.Generator, x: np.ndarray, eps: float, gaps: float) -> list[int]:
    """A layer with these results, float32 [M, K], when the one before is done. Returns the cycles in which r is done.

    The next layer begins in the cycle after the last one.
    """
    tokens, k = x.shape
    transfers, start = row_transfers(LANES, tokens, k), script.now
    spacing = latency("interval") + (random.random(len(transfers)) < gaps)
    taken = start + np.concatenate([[0], np.cumsum(spacing)[:-1]])
    for cycle, transfer in zip(taken.tolist(), transfers, strict=True):
        script.put(cycle, begin=1, eps=float_bits(eps), columns=k, end=transfer.last)
        bits = x[transfer.token, transfer.columns].view(np.uint32)
        (place,) = payload("place").pack(**transfer.fields)
        (values,) = pack_elements(bits[None], WIDTH)
        script.put(cycle + AHEAD, valid=1, values=values, place=place, head=int(transfer.columns.start < PARTIAL_SUMS))
    first = int(taken[-1]) + AHEAD + latency()
    step = latency("token_latency") + 1
    script.now = first + (tokens - 1) * step + 1
    return [first + token * step for token in range(tokens)]


async def _check(dut: Any, layers: list[tuple[np.ndarray, float]], gaps: float) -> None:
    random, script = rng(1), _Script()
    done, wanted = [], []
    for x, eps in layers:
        done += _layer(script, random, x, eps, gaps)
        wanted += [(token, int(r)) for token, r in enumerate(norm_scale(x, eps).view(np.uint32).tolist())]
    total = script.now + 4
    await begin(dut)
    record = await trace(dut, script.inputs(random, total), ["done", "token", "r", "pending"])
    assert np.flatnonzero(record.raw("done", range(total))).tolist() == done
    assert list(zip(record.raw("token", done), record.raw("r", done), strict=True)) == wanted
    # Nothing is pending after the last r.
    assert record.raw("pending", [done[-1], done[-1] + 1]) == [1, 0]


@cocotb.test()
@cocotb.parametrize(gaps=[0.0, 0.5])
async def layers(dut, gaps):
    """One token and several, the shortest row and rows of several pieces, also infinities, zeros and subnormals."""
    random = rng(2)
    shapes = [(1, 16), (TOKENS, 16), (1, 1024), (int(random.integers(1, TOKENS + 1)), 32), (2, 272), (TOKENS, 576)]
    hard = [numbers(random, m, k, hard=True) for m, k in shapes[1:4]]
    plain = [numbers(random, m, k) for m, k in shapes]
    zeros = [np.zeros((1, 32), np.float32), np.full((2, 16), 1e-40, np.float32), np.full((1, 16), 1e30, np.float32)]
    everything = [*plain, *hard, *zeros]
    eps = random.choice([1e-5, 1e-6, 0.0], len(everything))
    await _check(dut, list(zip(everything, map(float, eps), strict=True)), gaps)
