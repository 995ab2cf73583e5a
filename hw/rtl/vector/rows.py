# SPDX-License-Identifier: Apache-2.0
"""The places of rows from memory, in the form in which the array's results have them."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.vector.layouts import COLUMN_BITS, lane_place, rows_layout
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS


class RowWalker(Block):
    """Walks rows piece by piece, in a piece token by token, in a row column by column.

    Members
    -------
    job : rows to walk
    places : for each transfer its place, and which of its lanes have a column

    Latency 2 cycles, because a job first enters a FIFO of two entries, which are registers: many additions start at it.
    Throughput 1 transfer per cycle.
    """

    latency = StreamFifo.latency + 1

    def __init__(self, config: AcceleratorConfig, lanes: int):
        self.config, self.lanes = config, lanes
        super().__init__(
            {
                "job": In(stream.Signature(rows_layout(config))),
                "places": Out(stream.Signature(lane_place(config, lanes))),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.jobs = jobs = StreamFifo(self.job.payload.shape(), 2)
        wiring.connect(m, wiring.flipped(self.job), jobs.i)
        lane_bits, piece_bits = self.lanes.bit_length() - 1, PIECE_FLOATS.bit_length() - 1
        job, place = jobs.o.payload, self.places.payload
        step = Signal()
        # Whether a row has one transfer in its last piece, the one before its last one, and the lanes of the latter.
        single, before, final_keep = Signal(), Signal.like(place.column), Signal(self.lanes)
        last_token, full = Signal.like(place.token), Const(PIECE_FLOATS // self.lanes - 2, len(place.column))
        pieces_left, last_piece, next_last = Signal(COLUMN_BITS - piece_bits), Signal(), Signal()
        # Where the place ends something. These are registers, because the end of a job is known from them. So are what
        # they are made of: the transfer before the end of the row, and whether the piece before the last one is walked.
        row_end, token_end, target, one_left = Signal(), Signal(), Signal.like(before), Signal()
        end, job_before = (job.columns - 1)[:COLUMN_BITS], Signal.like(before)
        pieces, one = end >> piece_bits, ~end[lane_bits:piece_bits].any()
        m.d.comb += [
            step.eq(self.places.valid & self.places.ready),
            jobs.o.ready.eq(~self.places.valid | (step & place.last)),
            place.piece_end.eq(row_end),
            place.chunk_end.eq(row_end & token_end),
            place.last.eq(row_end & token_end & last_piece),
            place.keep.eq(Mux(row_end & last_piece, final_keep, ~0)),
            job_before.eq((job.columns - 1 - self.lanes)[lane_bits:piece_bits]),
            next_last.eq(Mux(token_end, one_left, last_piece)),
        ]
        with m.If(step):
            # A piece that is not the last one has several transfers.
            m.d.sync += [
                place.column.eq(Mux(row_end, 0, place.column + 1)),
                row_end.eq(Mux(row_end, next_last & single, place.column == target)),
            ]
            with m.If(row_end):
                m.d.sync += [
                    place.token.eq(Mux(token_end, 0, place.token + 1)),
                    token_end.eq(Mux(token_end, last_token == 0, place.token + 1 == last_token)),
                    last_piece.eq(next_last),
                    target.eq(Mux(next_last, before, full)),
                ]
            with m.If(place.chunk_end):
                m.d.sync += [pieces_left.eq(pieces_left - 1), one_left.eq(pieces_left == 2)]
        # Without a job these registers may have any value, so no path to them starts at the job's valid.
        with m.If(jobs.o.ready):
            m.d.sync += [
                self.places.valid.eq(jobs.o.valid),
                last_token.eq(job.tokens - 1),
                token_end.eq(job.tokens == 1),
                single.eq(one),
                before.eq(job_before),
                target.eq(Mux(pieces == 0, job_before, full)),
                final_keep.eq(Cat(lane <= end[:lane_bits] for lane in range(self.lanes))),
                pieces_left.eq(pieces),
                one_left.eq(pieces == 1),
                last_piece.eq(pieces == 0),
                row_end.eq((pieces == 0) & one),
            ]
        return m
