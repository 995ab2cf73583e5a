# SPDX-License-Identifier: Apache-2.0
"""The place of an append's first position."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.geometry import PAGE_SHIFT, SLOT_BITS, TABLE_SHIFT, CacheGeometry, log2
from hw.rtl.attention.cache.layouts import CHUNK_BITS, GROUP_BITS, job_layout, placed_layout
from hw.rtl.common.select import select
from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.attention import CHUNK
from hw.spec.numerics.block_float import BLOCK


class CacheJobs(wiring.Component):
    """Multiplies tile numbers by an output tile's beats, one bit per cycle.

    Members
    -------
    job : the append
    placed : the same with its place

    Latency ``latency`` cycles, one job at a time.
    """

    def __init__(self, config: AcceleratorConfig, shape: CacheGeometry):
        self.config, self.shape = config, shape
        self.bits = max(SLOT_BITS - log2(config.tile), CHUNK_BITS)
        super().__init__(
            {
                "job": In(stream.Signature(job_layout(config))),
                "placed": Out(stream.Signature(placed_layout(config, shape))),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from a job to its place: the beats of a tile, and a cycle for each bit of a tile's number."""
        return self.bits + 2

    def elaborate(self, platform) -> Module:
        m = Module()
        shape, job, placed = self.shape, self.job.payload, self.placed.payload
        # A one that moves: the beats of a tile are looked up, then there is a cycle for each bit.
        turns = Signal(self.bits + 1)
        take, idle = self.job.valid & self.job.ready, ~turns.any() & ~self.placed.valid
        # The number of the tile with the first slot, and of the chunks, highest bit first.
        tile, chunks = Signal(self.bits, reset_less=True), Signal(self.bits, reset_less=True)
        last_group = (job.columns >> log2(BLOCK)) - 1
        top = job.planes - 1
        records = Mux(
            top[1],
            Cat(Const(3, 2), last_group[:GROUP_BITS]),
            Mux(top[0], Cat(Const(1, 1), last_group[:GROUP_BITS]), last_group[:GROUP_BITS]),
        )
        count = (job.slots + CHUNK - 1) >> log2(CHUNK)
        m.d.comb += self.job.ready.eq(idle)
        m.d.sync += turns.eq(Cat(take, turns))
        with m.If(take):
            m.d.sync += [
                placed.keys.eq(job.keys),
                placed.slot.eq(job.slot),
                placed.slots.eq(job.slots),
                placed.top.eq(top),
                placed.last_group.eq(last_group),
                placed.last_record.eq(records),
                placed.last_token.eq(job.tokens - 1),
                placed.region.page.eq(job.address >> PAGE_SHIFT),
                placed.region.stride.eq(job.stride >> PAGE_SHIFT),
                placed.region.table.eq(job.exponents >> TABLE_SHIFT),
                placed.chunks.eq(count),
                tile.eq(Mux(job.keys, job.slot >> log2(self.config.tile), job.slot >> log2(CHUNK))),
                chunks.eq(count),
            ]
        with m.If(turns[0]):
            m.d.sync += [
                placed.tile_beats.eq(self._of_kind(shape.key_tile_beats, shape.value_beats)),
                placed.header_beats.eq(self._of_kind(shape.key_header_beats, shape.value_header_beats)),
                placed.origin.eq(0),
                placed.columns_step.eq(0),
            ]
        with m.Elif(turns.any()):
            m.d.sync += [tile.eq(tile << 1), chunks.eq(chunks << 1)]
            for number, product in ((tile, placed.origin), (chunks, placed.columns_step)):
                m.d.sync += product.eq((product << 1) + Mux(number[-1], placed.tile_beats, 0))
        with m.If(turns[-1]):
            m.d.sync += self.placed.valid.eq(1)
        with m.Elif(self.placed.ready):
            m.d.sync += self.placed.valid.eq(0)
        return m

    def _of_kind(self, of_keys: list[int], of_values: int):
        """A number of the current job's stream, from the table for keys."""
        bits = max(*of_keys, of_values).bit_length()
        index = self.placed.payload.last_record
        # The table is as long as its index allows.
        values = [Const(number, bits) for number in of_keys]
        assert len(values) == 1 << len(index)
        return Mux(self.placed.payload.keys, select(values, index), of_values)
