# SPDX-License-Identifier: Apache-2.0
"""Takes scores from the vector unit, masks them, and stores them with the largest one of each row."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.layouts import (
    COUNT_BITS,
    bank_layout,
    maximum_layout,
    place_layout,
    row_words,
    scores_layout,
    word_floats,
    write_layout,
)
from hw.rtl.attention.visibility import Visibility
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.results import output_payload
from hw.rtl.common.stage import stage
from hw.rtl.vector.layouts import result_unit
from hw.rtl.vector.piece_maximum import PieceMaximum
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.numerics.float32 import EXPONENT_SPECIAL, FRACTION_BITS

_LOWEST = 1 << 31 | EXPONENT_SPECIAL << FRACTION_BITS
"""-infinity."""


class ScoreWriter(Block):
    """Masks the scores of one descriptor after another. Never waits; throughput 1 transfer per cycle.

    Members
    -------
    job : the scores of a descriptor
    results : their values, as the vector unit gives them
    write : a part of a word
    maximum : the largest score of a row so far, not later than the write after it
    done : the rows of a descriptor are stored, and their largest scores are known; one cycle, ``latency`` cycles after
        the last transfer
    rows : valid with ``done``
    """

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, config.vector_lanes
        self.maximum_of = PieceMaximum(config)
        super().__init__(
            {
                "job": In(stream.Signature(scores_layout(config))),
                "results": In(stream.Signature(output_payload(config, self.lanes, result_unit(config)))),
                "write": Out(write_layout(config)),
                "maximum": Out(maximum_layout(config)),
                "done": Out(1),
                "rows": Out(bank_layout(config)),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from the last transfer to ``done``: registers, mask, maximum."""
        return 1 + Visibility.latency + self.maximum_of.latency + 1

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.visibility = visibility = Visibility(self.config)
        job, active, draining = Signal(scores_layout(self.config)), Signal(), Signal()
        results, step = self.results.payload, Signal()
        last = step & results.last
        pipeline = delay(m, last, self.latency, name="last", reset=True)
        m.d.comb += [
            # The next job comes when nothing of this one is in the pipeline.
            self.job.ready.eq(~active & ~draining),
            self.results.ready.eq(active),
            step.eq(self.results.valid & active),
            visibility.job.eq(job),
            self.done.eq(pipeline),
            *(self.rows[name].eq(job[name]) for name, _ in self.rows.shape()),
        ]
        with m.If(self.job.valid & self.job.ready):
            m.d.sync += [job.eq(self.job.payload), active.eq(1)]
        with m.Elif(last):
            m.d.sync += [active.eq(0), draining.eq(1)]
        with m.Elif(self.done):
            m.d.sync += draining.eq(0)
        self._place(m, visibility, job, step)
        return m

    def _place(self, m: Module, visibility: Visibility, job, step) -> None:
        """The place of each transfer, and its values behind the mask."""
        config, results, lane_bits = self.config, self.results.payload, self.lanes.bit_length() - 1
        parts = word_floats(config) // self.lanes
        part_bits = (parts - 1).bit_length()
        piece = Signal(range((1 << COUNT_BITS) // PIECE_FLOATS))
        with m.If(step & results.last):
            m.d.sync += piece.eq(0)
        with m.Elif(step & results.chunk_end):
            m.d.sync += piece.eq(piece + 1)
        # The place counts half transfers, and here all transfers are whole.
        half_bits = (self.lanes // result_unit(config)).bit_length() - 1
        column = Cat(results.column[half_bits:], piece)
        taken = stage(
            m,
            step,
            "taken",
            values=(self.write.values.shape(), Cat(results.values)),
            token=(results.token.shape(), results.token),
            column=(len(column), column),
            row=(self.write.place.address.shape(), results.token * row_words(config, job.positions)),
        )
        valid = Signal()
        m.d.sync += valid.eq(step)
        m.d.comb += [
            visibility.valid.eq(valid),
            visibility.slot.eq(Cat(Const(0, lane_bits), taken.column)),
            visibility.token.eq(taken.token),
        ]
        wait, write = Visibility.latency, self.write
        place = Signal(place_layout(config))
        m.d.comb += [
            place.bank.eq(job.bank),
            place.address.eq(taken.row + (taken.column >> part_bits)),
            place.part.eq(taken.column[:part_bits] if part_bits else 0),
        ]
        values = delay(m, taken.values.as_value(), wait, name="values")
        lowest = Const(_LOWEST, FLOAT.size)
        m.d.comb += [
            write.valid.eq(delay(m, valid, wait, name="valid", reset=True)),
            write.place.eq(delay(m, place, wait, name="place")),
            *(
                Cat(write.values[lane]).eq(Mux(visibility.hidden[lane], lowest, values.word_select(lane, FLOAT.size)))
                for lane in range(self.lanes)
            ),
        ]
        self._maximum(m, delay(m, taken.token, wait, name="token"), delay(m, taken.column.any(), wait, name="later"))

    def _maximum(self, m: Module, token, later) -> None:
        """A row is one piece: its first transfer has column 0, and all later ones have another."""
        m.submodules.maximum_of = found = self.maximum_of
        m.d.comb += [
            found.valid.eq(self.write.valid),
            Cat(found.values).eq(Cat(self.write.values)),
            found.keep.eq(~0),
            found.token.eq(token),
            found.column.eq(later),
            self.maximum.valid.eq(delay(m, self.write.valid, found.latency, name="maximum_valid", reset=True)),
            self.maximum.row.bank.eq(delay(m, self.write.place.bank, found.latency, name="maximum_bank")),
            self.maximum.row.token.eq(delay(m, token, found.latency, name="maximum_token")),
            Cat(self.maximum.number).eq(Cat(found.maximum)),
        ]
