# SPDX-License-Identifier: Apache-2.0
"""Jobs of the activation fetch whose rows are apart in memory, as one block for each row."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.memory.activation_fetch import fetch_layout
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import PITCH_BITS
from hw.spec.memory.kv_cache import chunk_bits
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops.epilogue import MAX_HEAD


def rows_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Rows in memory: row m starts at ``address + m * pitch``, in bytes.

    rows : 1 or more. The activations of a linear layer are one row
    beats : of one row, in beats of one port, at least 1
    exponents : a row is the exponents of a chunk of values, for an output tile. Output tiles of the same ``BLOCK``
        columns have the same row, and ``rows`` counts it for each of them
    chunks : of exponents; the rows of a chunk start ``CHUNK`` bytes after those of the chunk before. Otherwise 1
    """
    most = max(config.max_tokens, MAX_HEAD // config.tile)
    return data.StructLayout(
        {
            "address": unsigned(ADDRESS_BITS),
            "pitch": unsigned(PITCH_BITS),
            "rows": range(most + 1),
            "beats": fetch_layout(config)["beats"].shape,
            "exponents": 1,
            "chunks": unsigned(chunk_bits()),
        }
    )


class RowBlocks(Block):
    """Sends the rows of a job as blocks, in order: all of a chunk, then those of the next one.

    The first block passes in the cycle in which the job comes.

    Members
    -------
    jobs : the rows to fetch; a job is taken with its first block
    blocks : for :class:`hw.rtl.memory.activation_fetch.ActivationFetch`
    asking : rows of the last job are left

    Latency 0 cycles, throughput 1 block per cycle, also from one job to the next.
    """

    latency = 0
    """Cycles from a job to its first block."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "jobs": In(stream.Signature(rows_layout(config))),
                "blocks": Out(stream.Signature(fetch_layout(config))),
                "asking": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        # The row that is offered: that of the job at the input, or the next one of the job that was taken.
        job, held = self.jobs.payload, Signal(rows_layout(self.config), reset_less=True)
        row, rows = Signal.like(held), Signal.like(job.rows)
        active, last_row, last, taken, moves = Signal(), Signal(), Signal(), Signal(), Signal()
        # The next row's address as a sum, so that no choice comes before the adder. The first row of the chunk.
        origin, step, first = Signal.like(job.address), Signal.like(job.pitch), Signal.like(job.address)
        start, begins = Signal.like(job.address), Signal()
        tiles = BLOCK // self.config.tile
        turn = Signal(range(max(2, tiles)))
        m.d.comb += [
            self.asking.eq(active),
            row.eq(Mux(active, held.as_value(), job.as_value())),
            # This cannot wrap: a descriptor's addresses are below 2^40 - 2^34.
            row.address.eq(Mux(active, origin + step, job.address)),
            *(self.blocks.payload[name].eq(row[name]) for name, _ in fetch_layout(self.config)),
            self.blocks.valid.eq(active | self.jobs.valid),
            self.jobs.ready.eq(~active & self.blocks.ready),
            taken.eq(self.blocks.valid & self.blocks.ready),
            last_row.eq(row.rows == 1),
            last.eq(last_row & (row.chunks == 1)),
            moves.eq(~row.exponents | (turn == tiles - 1)),
            start.eq(Mux(active & ~begins, first, row.address)),
        ]
        with m.If(taken):
            m.d.sync += [
                active.eq(~last),
                held.eq(row),
                held.rows.eq(Mux(last_row, Mux(active, rows, job.rows), row.rows - 1)),
                held.chunks.eq(row.chunks - last_row),
                origin.eq(Mux(last_row, start, row.address)),
                step.eq(Mux(last_row, CHUNK, Mux(moves, row.pitch, 0))),
                first.eq(start),
                begins.eq(last_row),
                turn.eq(Mux(last_row | moves, 0, turn + 1)),
            ]
            with m.If(~active):
                m.d.sync += rows.eq(job.rows)
        return m
