# SPDX-License-Identifier: Apache-2.0
"""Records the cycles of transfers on streams and of pulses on ports."""

from collections.abc import Sequence
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge

__all__ = ["Monitor", "consecutive"]


def consecutive(cycles: Sequence[int]) -> bool:
    """Whether the list has every cycle from the first to the last."""
    return not cycles or list(cycles) == list(range(cycles[0], cycles[0] + len(cycles)))


class Monitor:
    """Records, from its creation, the cycles of all transfers of some streams and of all high cycles of some ports."""

    def __init__(self, dut: Any, streams: Sequence[str] = (), pulses: Sequence[str] = ()):
        self.now = 0
        self.times: dict[str, list[int]] = {name: [] for name in (*streams, *pulses)}
        self._watched = [
            (self.times[name], (getattr(dut, f"{name}_valid"), getattr(dut, f"{name}_ready"))) for name in streams
        ] + [(self.times[name], (getattr(dut, name),)) for name in pulses]
        self._edge = RisingEdge(dut.clk)
        cocotb.start_soon(self._run())

    def __getitem__(self, name: str) -> list[int]:
        return self.times[name]

    async def _run(self) -> None:
        while True:
            await self._edge
            for times, handles in self._watched:
                if all("1" in str(handle.value) for handle in handles):
                    times.append(self.now)
            self.now += 1
