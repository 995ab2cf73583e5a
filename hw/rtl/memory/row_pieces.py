# SPDX-License-Identifier: Apache-2.0
"""Activations of several tokens, piece by piece in the order in which the layer before writes them."""

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.memory.activation_fetch import fetch_layout
from hw.rtl.memory.row_blocks import RowBlocks, rows_layout
from hw.rtl.memory.write_manager import PIECE_BYTES
from hw.rtl.vector.layouts import MAX_PIECES
from hw.spec.config import AcceleratorConfig


def pieces_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Rows in memory, as in :func:`hw.rtl.memory.row_blocks.rows_layout`.

    by_pieces : only with ``config.reads_by_pieces``: the blocks are the first 256 columns of every row, then the next
        ones, and so on; otherwise each row is a block
    """
    more = {"by_pieces": 1} if config.reads_by_pieces else {}
    return data.StructLayout({**rows_layout(config).members, **more})


class RowPieces(Block):
    """Sends jobs as blocks, in order.

    The results of a layer leave the gatherer in pieces of 256 columns: the first piece of every row, then the second
    one of every row. If the activations of the next layer are these rows, their blocks have the same order. So a block
    can be read when as many pieces are in memory as blocks come before it, and this one.

    Members
    -------
    jobs : the rows to fetch. A job by pieces is taken when the one before has left, another one with its first block
    blocks : for :class:`hw.rtl.memory.activation_fetch.ActivationFetch`
    asking : rows of the last job are left, and the next one may be read
    follow : from the cycle after a job's transfer: its rows are being written; ``pieces`` of them are in memory
    tail : valid with ``follow``: of the rows only columns of the last piece are being written
    follow_row : the last job is not one by pieces, and ``follow``

    Latency: 0 cycles from a job to its first block, 1 by pieces. Throughput 1 block per cycle, also from one job to the
    next; by pieces there is a cycle between two of them while the rows are being written.
    """

    latency = 0
    """Cycles from a job to its first block."""
    piece_latency = 1
    """Cycles from a job by pieces to its first block."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "jobs": In(stream.Signature(pieces_layout(config))),
                "blocks": Out(stream.Signature(fetch_layout(config))),
                "asking": Out(1),
                "follow": In(1),
                **({"tail": In(1)} if config.reads_by_pieces else {}),
                "pieces": In(range(MAX_PIECES * config.max_tokens + 1)),
                "follow_row": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "piece_latency": self.piece_latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.row_blocks = rows = RowBlocks(self.config)
        if not self.config.reads_by_pieces:
            wiring.connect(m, wiring.flipped(self.jobs), rows.jobs)
            wiring.connect(m, rows.blocks, wiring.flipped(self.blocks))
            m.d.comb += [self.asking.eq(rows.asking), self.follow_row.eq(self.follow)]
            return m
        job, load, by_pieces = self.jobs.payload, Signal(), Signal()
        active, last = self._cut(m, rows, load)
        with m.If(self.jobs.valid & self.jobs.ready):
            m.d.sync += by_pieces.eq(job.by_pieces)
        left = active | rows.asking
        written = self._written(m, load)
        may = ~by_pieces | ~left | ~self.follow | Mux(self.tail, ~last, written)
        m.d.comb += [
            load.eq(self.jobs.valid & job.by_pieces & ~left & self.blocks.ready),
            self.asking.eq(left & may),
            self.follow_row.eq(self.follow & ~by_pieces),
            self.blocks.payload.eq(rows.blocks.payload),
            self.blocks.valid.eq(rows.blocks.valid & may),
            rows.blocks.ready.eq(self.blocks.ready & may),
        ]
        return m

    def _cut(self, m: Module, rows: RowBlocks, load: Signal) -> tuple[Signal, Value]:
        """Sends the pieces of a job as jobs of their own.

        Returns whether some are left, and whether the block that is offered is one of the last piece.
        """
        job, held = self.jobs.payload, Signal(rows_layout(self.config), reset_less=True)
        most = PIECE_BYTES * 8 // self.config.port_width
        active, last, last_sent = Signal(), Signal(), Signal()
        # Beats of a row after the offered piece.
        left = Signal.like(job.beats)
        offered = Signal.like(held)
        m.d.comb += [
            *(offered[name].eq(job[name]) for name, _ in offered.shape()),
            rows.jobs.payload.eq(Mux(active, held.as_value(), offered.as_value())),
            rows.jobs.valid.eq(active | (self.jobs.valid & ~job.by_pieces)),
            self.jobs.ready.eq(Mux(job.by_pieces, load, ~active & rows.jobs.ready)),
        ]
        with m.If(load):
            fits = job.beats <= most
            m.d.sync += [
                active.eq(1),
                held.eq(offered),
                held.beats.eq(Mux(fits, job.beats, most)),
                left.eq(job.beats - most),
                last.eq(fits),
            ]
        with m.Elif(active & rows.jobs.ready):
            fits = left <= most
            m.d.sync += [
                active.eq(~last),
                last_sent.eq(last),
                held.address.eq(held.address + PIECE_BYTES),
                held.beats.eq(Mux(fits, left, most)),
                left.eq(left - most),
                last.eq(fits),
            ]
        return active, Mux(rows.asking, last_sent, last)

    def _written(self, m: Module, load: Signal) -> Value:
        """Whether the next block of a job by pieces is in memory."""
        blocks, written = Signal.like(self.pieces), Signal()
        taken = Signal()
        m.d.comb += taken.eq(self.blocks.valid & self.blocks.ready)
        # As in ActivationFetch: there are never fewer pieces than blocks, so a difference means more. After the last
        # piece of the rows they count from 0 again, and all of the rows are in memory. The register stays 1 until the
        # block is taken, also if the pieces already count for other rows.
        m.d.sync += written.eq(~load & ~taken & (written | (blocks != self.pieces)))
        with m.If(load):
            m.d.sync += blocks.eq(0)
        with m.Elif(taken):
            m.d.sync += blocks.eq(blocks + 1)
        return written
