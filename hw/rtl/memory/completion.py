# SPDX-License-Identifier: Apache-2.0
"""The completion of descriptors with several outputs."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import Counter, StreamFifo
from hw.rtl.memory.write_manager import write_clients
from hw.spec.config import AcceleratorConfig


def expected_outputs(config: AcceleratorConfig) -> int:
    """Outputs that complete a descriptor: one for each client of the write manager, then scores that stay on chip."""
    return write_clients(config) + config.has_attention


def expected_layout(clients: int) -> data.StructLayout:
    """A descriptor: which clients write an output of it, at least one; and whether it requests an interrupt."""
    return data.StructLayout({"outputs": clients, "interrupt": 1})


class Completion(Block):
    """Counts a descriptor as complete when all of its outputs are, in the order of the descriptors.

    Parameters
    ----------
    clients : clients of the write manager
    depth : maximum number of descriptors that are expected, a power of two

    Members
    -------
    expected : the descriptors
    written : by client: an output is in memory; one cycle
    whole : by client: the output of the oldest descriptor that is not complete is in memory, if it has one
    complete : a descriptor is complete; one cycle
    complete_interrupt : valid with ``complete``: it requests an interrupt

    Latency 2 cycles from the last output of a descriptor to ``complete``; throughput 1 descriptor per cycle.
    """

    latency = 2

    def __init__(self, clients: int, depth: int):
        self.clients, self.depth = clients, depth
        super().__init__(
            {
                "expected": In(stream.Signature(expected_layout(clients))),
                "written": In(clients),
                "whole": Out(clients),
                "complete": Out(1),
                "complete_interrupt": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "depth": self.depth}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.fifo = fifo = StreamFifo(expected_layout(self.clients), self.depth)
        head, done, there = fifo.o.payload, Signal(), []
        m.d.comb += [
            fifo.i.valid.eq(self.expected.valid),
            fifo.i.payload.eq(self.expected.payload),
            self.expected.ready.eq(fifo.i.ready),
            fifo.o.ready.eq(done),
        ]
        for client in range(self.clients):
            # No output of a later descriptor is written more often than it is expected.
            m.submodules[f"outputs_{client}"] = outputs = Counter(self.depth)
            m.d.comb += [outputs.add.eq(self.written[client]), outputs.take.eq(done & head.outputs[client])]
            m.d.comb += self.whole[client].eq(outputs.value != 0)
            there.append(~head.outputs[client] | self.whole[client])
        m.d.comb += done.eq(fifo.o.valid & Cat(there).all())
        m.d.sync += [self.complete.eq(done), self.complete_interrupt.eq(head.interrupt)]
        return m
