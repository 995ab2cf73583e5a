# SPDX-License-Identifier: Apache-2.0
"""Makes pairs of single results, for the vector unit behind a drain of one lane."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.results import result_payload
from hw.spec.config import AcceleratorConfig


class MergePairs(Block):
    """Two transfers of one column each become one transfer of two; the last column of a row may stay alone.

    Members
    -------
    i : results of one lane
    o : results of two lanes

    Latency 0 cycles from a pair's second column; throughput 1 column per cycle.
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "i": In(stream.Signature(result_payload(config, lanes=1))),
                "o": Out(stream.Signature(result_payload(config, lanes=2))),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        before, one, two = Signal.like(self.i.payload.values[0]), self.i.payload, self.o.payload
        second, emits = one.column[0], Signal()
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += before.eq(one.values[0])
        m.d.comb += [
            emits.eq(second | one.piece_end),
            self.o.valid.eq(self.i.valid & emits),
            self.i.ready.eq(self.o.ready | ~emits),
            two.values[0].eq(Mux(second, before, one.values[0])),
            two.values[1].eq(one.values[0]),
            two.keep.eq(Cat(1, second)),
            two.column.eq(one.column[1:]),
            *(two[name].eq(one[name]) for name in ("token", "piece_end", "chunk_end", "last")),
        ]
        return m
