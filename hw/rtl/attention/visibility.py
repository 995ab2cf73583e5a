# SPDX-License-Identifier: Apache-2.0
"""Which scores a row does not see."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.layouts import COUNT_BITS, scores_layout
from hw.rtl.common.block import Block
from hw.rtl.common.stage import stage
from hw.spec.config import AcceleratorConfig


class Visibility(Block):
    """The mask of attention, as :func:`hw.spec.ops.scores.visible` defines it. Throughput 1 transfer per cycle.

    Members
    -------
    job : the scores that are masked; the same from a transfer to its result
    valid : there is a transfer
    slot : the slot of its first lane, a multiple of the number of lanes
    token : its row
    hidden : by lane: the row does not see the slot, or there is no such slot; ``latency`` cycles later
    """

    latency = 2

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, config.vector_lanes
        super().__init__(
            {
                "job": In(scores_layout(config)),
                "valid": In(1),
                "slot": In(COUNT_BITS),
                "token": In(range(config.max_tokens)),
                "hidden": Out(self.lanes),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        job, moves = self.job, Signal()
        m.d.sync += moves.eq(self.valid)
        slots = [self.slot | lane for lane in range(self.lanes)]
        # From the row to the last one.
        before = Mux(job.causal, job.tokens - 1 - self.token, 0)[: len(job.tokens)]
        found = stage(
            m,
            self.valid,
            "found",
            # The place of lane 0, counted as if the slots before ``turn`` followed those from it on.
            place=(COUNT_BITS + 1, self.slot + before),
            older=(self.lanes, Cat(slot >= job.turn for slot in slots)),
            absent=(self.lanes, Cat(slot >= job.positions for slot in slots)),
        )
        ends = Signal(COUNT_BITS + 1)
        # A register: a job is there before its first transfer.
        m.d.sync += ends.eq(job.turn + job.slots)
        hidden = []
        for lane in range(self.lanes):
            place, end = found.place + lane, Mux(found.older[lane], ends, job.turn)
            late = (job.window != 0) & (place + job.window < end)
            hidden.append(found.absent[lane] | (place >= end) | late)
        with m.If(moves):
            m.d.sync += self.hidden.eq(Cat(hidden))
        return m
