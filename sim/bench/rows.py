# SPDX-License-Identifier: Apache-2.0
"""Blocks that take the rows of a token and give one float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sim.bench.dut import begin, latency, ports, trace
from sim.bench.packing import pack_elements


def lanes(port: str = "values") -> int:
    """Elements of the port, from the manifest."""
    return ports()[port]["fields"]["element"][3]


async def check_tokens(
    dut: Any, tokens: Sequence[np.ndarray], expected: np.ndarray, constants: Mapping[str, int], gaps: float, random
) -> None:
    """Offers the rows of tokens, uint32 [K] each, and compares the results, and the cycles of ``ready`` and ``done``.

    A row is offered in the cycle after the one before it was taken, or with gaps later. It waits until it is taken.
    Without a valid row the ports have random values.
    """
    count, between, wait = lanes(), latency("interval"), latency("token_interval")
    offered, taken, free, ends, rows, last = [], [], [], [], [], []
    ready_again = 0
    for token in tokens:
        parts = token.reshape(-1, count)
        for index, row in enumerate(parts):
            start = (taken[-1] + 1 if taken else 0) + (int(random.integers(1, 12)) if random.random() < gaps else 0)
            offered.append(start)
            taken.append(max(start, ready_again))
            free.append(ready_again)
            last.append(index == len(parts) - 1)
            ready_again = taken[-1] + (wait if last[-1] else between)
            rows.append(row)
        ends.append(taken[-1])
    total = ends[-1] + latency() + 2
    packed = pack_elements(np.array(rows), 32)
    driven: dict[str, list[int]] = {
        "valid": [0] * total,
        "values": pack_elements(random.integers(0, 1 << 32, (total, count)), 32),
        "last": random.integers(0, 2, total).tolist(),
        **{name: [value] * total for name, value in constants.items()},
    }
    ready = [1] * total
    for index, (start, end) in enumerate(zip(offered, taken)):
        for cycle in range(start, end + 1):
            driven["valid"][cycle], driven["values"][cycle], driven["last"][cycle] = 1, packed[index], int(last[index])
        for cycle in range(end + 1, min(total, end + (wait if last[index] else between))):
            ready[cycle] = 0
    await begin(dut)
    record = await trace(dut, driven, ["ready", "done", "result"])
    assert record.raw("ready", range(total)) == ready
    done = np.array(ends) + latency()
    assert np.flatnonzero(record.raw("done", range(total))).tolist() == done.tolist()
    seen, wanted = record.raw("result", done), expected.view(np.uint32).tolist()
    wrong = [index for index, (a, b) in enumerate(zip(seen, wanted)) if a != b]
    assert not wrong, f"token {wrong[0]} gave {seen[wrong[0]]:#x}, not {wanted[wrong[0]]:#x}; {len(wrong)} are wrong"
