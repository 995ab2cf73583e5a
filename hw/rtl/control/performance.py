# SPDX-License-Identifier: Apache-2.0
"""Performance counters, and the cycle in which each descriptor was complete."""

from amaranth.hdl import Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.spec.control.registers import COMPLETIONS, EVENTS


def event_layout() -> data.StructLayout:
    """A flag per event; each cycle with the flag set is one event."""
    return data.StructLayout(dict.fromkeys(EVENTS, 1))


def count_layout() -> data.StructLayout:
    """A counter per event."""
    return data.StructLayout(dict.fromkeys(EVENTS, 64))


class PerformanceCounters(wiring.Component):
    """Counts events, and stores the cycles in which the last descriptors completed. 64 bits wrap after 2,000 years.

    Members
    -------
    clear : set the counters of events to 0
    events : the events of this cycle
    counts, cycles : the counters
    started : low word of ``cycles`` when ``events.busy`` last rose
    complete : a descriptor is complete
    restart : the next descriptor is number 0
    completed : number of complete descriptors since ``restart``
    index, completion : the cycle in which the descriptor of this number, modulo COMPLETIONS, completed; read in the
        same cycle
    """

    def __init__(self):
        super().__init__(
            {
                "clear": In(1),
                "cycles": Out(64),
                "events": In(event_layout()),
                "counts": Out(count_layout()),
                "started": Out(32),
                "complete": In(1),
                "restart": In(1),
                "completed": Out(32),
                "index": In(range(COMPLETIONS)),
                "completion": Out(32),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        m.d.sync += self.cycles.eq(self.cycles + 1)
        for event in EVENTS:
            count = self.counts[event]
            with m.If(self.clear):
                m.d.sync += count.eq(0)
            with m.Elif(self.events[event]):
                m.d.sync += count.eq(count + 1)
        was_busy = Signal()
        m.d.sync += was_busy.eq(self.events.busy)
        with m.If(self.events.busy & ~was_busy):
            m.d.sync += self.started.eq(self.cycles)
        m.submodules.completions = completions = Memory(shape=32, depth=COMPLETIONS, init=[])
        write, read = completions.write_port(), completions.read_port(domain="comb")
        m.d.comb += [
            write.addr.eq(self.completed[: len(write.addr)]),
            write.data.eq(self.cycles[:32]),
            write.en.eq(self.complete),
            read.addr.eq(self.index),
            self.completion.eq(read.data),
        ]
        with m.If(self.restart):
            m.d.sync += self.completed.eq(0)
        with m.Elif(self.complete):
            m.d.sync += self.completed.eq(self.completed + 1)
        return m
