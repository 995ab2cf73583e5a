# SPDX-License-Identifier: Apache-2.0
"""Drives the core's four streams and checks the results."""

from collections.abc import Sequence
from typing import Any

from cocotb.triggers import RisingEdge

from sim.bench.dut import begin, payload
from sim.bench.layers import Job, activation_payloads, beats, result_count, results
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never

__all__ = ["CoreDriver"]


class CoreDriver:
    """A core after reset, with a source or sink on every stream."""

    def __init__(self, dut: Any, stalls: dict[str, Stall]):
        self.dut, self.stalls = dut, stalls
        self._attach()

    def _attach(self) -> None:
        self.sources = {
            name: StreamSource(self.dut, name, self.dut.clk, self.stalls.get(name, never))
            for name in ("command", "weights", "activations")
        }
        self.results = StreamSink(self.dut, "results", self.dut.clk, self.stalls.get("results", never))
        self._streams = (*self.sources.values(), self.results)

    @classmethod
    async def create(cls, dut: Any, **stalls: Stall) -> "CoreDriver":
        """Start the clock and reset the core."""
        core = cls(dut, stalls)
        await begin(dut)
        return core

    async def restart(self) -> None:
        """Reset the core for a single cycle, in any state, and discard everything that was queued."""
        for stream in self._streams:
            stream._task.cancel()
        self.dut.rst.value = 1
        for name in self.sources:
            getattr(self.dut, f"{name}_valid").value = 0
        await cycle(self.dut.clk)
        self._attach()
        self.dut.rst.value = 0
        await cycle(self.dut.clk)

    def send(self, jobs: Sequence[Job]) -> None:
        """Queue the streams of several layers."""
        for item in jobs:
            self.sources["command"].send(item.command)
            self.sources["weights"].send(beats(item))
            if not item.reuse:
                self.sources["activations"].send(activation_payloads(item, payload("activations")))

    async def check(self, jobs: Sequence[Job], patience: int = 5_000) -> int:
        """Send layers and compare every transfer of results; returns the cycles until the last one.

        It sets ``idle_beats``: the cycles between the first and the last beat in which the core took no beat.
        """
        self.send(jobs)
        weights, edge, count = self.sources["weights"], RisingEdge(self.dut.clk), result_count(jobs)
        cycles = quiet = stalled_at_first = 0
        started, moved = False, None
        before = weights.transfers
        while len(self.results.received) < count:
            await edge
            cycles += 1
            if not started and weights.transfers > before:
                started, stalled_at_first = True, weights.stalled_by_dut
            state = tuple(stream.transfers for stream in self._streams)
            moved, quiet = state, quiet + 1 if state == moved else 0
            if quiet > patience:
                names = (*self.sources, "results")
                raise TimeoutError(f"Nothing moved for {patience} cycles: transfers {dict(zip(names, state))}")
        self.idle_beats = weights.stalled_by_dut - stalled_at_first
        await cycle(self.dut.clk, 8)
        self._compare(jobs)
        assert not int(self.dut.underrun.value), "underrun: scales came too late"
        return cycles

    def _compare(self, jobs: Sequence[Job]) -> None:
        assert len(self.results.received) == result_count(jobs), "more results than were asked for"
        got = payload("results").unpack(self.results.received)
        self.results.received.clear()
        values = [int(v) for v in got["values"]]
        position = 0
        for number, item in enumerate(jobs):
            for expected, transfer in results(item):
                where = f"layer {number} (M {item.tokens}, K {item.layer.k}, N {item.layer.n}), transfer {position}"
                seen = [values[position] >> (32 * lane) & 0xFFFFFFFF for lane in range(len(expected))]
                assert seen == expected, f"{where}: {list(map(hex, seen))}, not {list(map(hex, expected))}"
                fields = {name: int(got[name][position]) for name in transfer.fields}
                assert fields == transfer.fields, f"{where}: {fields}, not {transfer.fields}"
                position += 1
