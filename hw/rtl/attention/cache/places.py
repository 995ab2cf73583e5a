# SPDX-License-Identifier: Apache-2.0
"""The addresses of pieces, and the check that they are in the KV cache."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.geometry import PAGE_SHIFT, TABLE_SHIFT, CacheGeometry, log2
from hw.rtl.attention.cache.layouts import Part, region_layout, step_layout
from hw.rtl.common.delay import delay
from hw.rtl.memory.axi import ADDRESS_BITS

PAGE_BITS = 32
"""Bits of the registers that bound the cache, in units of 4,096 bytes."""


def place_layout(shape: CacheGeometry) -> data.StructLayout:
    """A piece: its address, its beats minus 1, and whether it is the last one of its job."""
    last_beat = step_layout(shape)["last_beat"].shape
    return data.StructLayout({"address": unsigned(ADDRESS_BITS), "last_beat": last_beat, "last": 1})


class CachePlaces(wiring.Component):
    """Adds up addresses, and stops everything at the first piece outside of the cache.

    Members
    -------
    valid, step : a step
    region : where its cache is; the same for the two cycles that follow
    header_beats : beats of the header of an output tile, also the same
    first, end : the pages of the cache: ``first`` and those after it, without ``end``
    stop : write no further piece; a piece that was written before gets its data
    piece, write_piece : a piece
    write_beat : its beat, and each further one, ``latency`` cycles after its step
    outside, outside_address : a piece was not in the cache; until the next reset nothing is written

    No step waits.
    """

    latency = 5

    def __init__(self, shape: CacheGeometry):
        self.shape = shape
        step = step_layout(shape)
        super().__init__(
            {
                "valid": In(1),
                "step": In(step),
                "region": In(region_layout()),
                "header_beats": In(range(max(*shape.key_header_beats, shape.value_header_beats) + 1)),
                "first": In(PAGE_BITS),
                "end": In(PAGE_BITS),
                "stop": In(1),
                "piece": Out(place_layout(shape)),
                "write_piece": Out(1),
                "write_beat": Out(1),
                "outside": Out(1),
                "outside_address": Out(ADDRESS_BITS),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        address = self._address(m)
        shape, step = self.shape, self.step
        # The page of the last byte, and whether it and the first byte are in the cache.
        port_shift = log2(shape.port_bytes)
        about = Signal(data.StructLayout({"first": 1, "last": 1, "last_beat": step.last_beat.shape()}), name="about")
        m.d.comb += [getattr(about, name).eq(getattr(step, name)) for name in ("first", "last", "last_beat")]
        at_address = delay(m, about, 3, name="at_address")
        valid = delay(m, self.valid, self.latency, name="valid", reset=True)
        after, above, below = Signal(ADDRESS_BITS), Signal(), Signal()
        m.d.sync += [
            after.eq(address + (at_address.last_beat << port_shift)),
            above.eq((address >> PAGE_SHIFT) >= self.first),
        ]
        inside = Signal()
        m.d.comb += below.eq((after >> PAGE_SHIFT) < self.end)
        m.d.sync += inside.eq(above & below)
        last = delay(m, at_address, 2, name="at_check")
        writing, stopped, allowed = Signal(), Signal(), Signal()
        m.d.comb += [
            stopped.eq(self.stop | self.outside),
            allowed.eq(Mux(last.first, inside & ~stopped, writing)),
            self.piece.address.eq(delay(m, address, 2, name="address")),
            self.piece.last_beat.eq(last.last_beat),
            self.piece.last.eq(last.last),
            self.write_piece.eq(valid & last.first & allowed),
            self.write_beat.eq(valid & allowed),
        ]
        with m.If(valid):
            m.d.sync += writing.eq(allowed)
        with m.If(valid & last.first & ~inside & ~stopped):
            m.d.sync += [self.outside.eq(1), self.outside_address.eq(self.piece.address)]
        return m

    def _address(self, m: Module) -> Signal:
        """The address of a step, three cycles later."""
        shape, step, region = self.shape, self.step, self.region
        beat_shift, port_shift = log2(shape.beat_bytes), log2(shape.port_bytes)
        port = step.inside[port_shift:beat_shift]
        in_body = step.part[Part.BODY] | step.part[Part.VALUES]
        page_bits = len(region.page)
        beat, origin = Signal(shape.origin_bits), Signal(shape.origin_bits)
        page, twice = Signal(page_bits), Signal()
        table, is_table = Signal(shape.table_bits), Signal()
        m.d.sync += [
            beat.eq((step.inside >> beat_shift) + Mux(in_body, self.header_beats, 0)),
            origin.eq(step.origin),
            page.eq(region.page + Mux(port[0], region.stride, 0) if len(port) else region.page),
            twice.eq(port[1] if len(port) > 1 else 0),
            table.eq(step.table),
            is_table.eq(step.part[Part.TABLE]),
        ]
        # In units of 128 bytes, and in beats.
        base, offset = Signal(ADDRESS_BITS - TABLE_SHIFT), Signal(max(shape.origin_bits, shape.table_bits))
        moved = page + Mux(twice, region.stride << 1, 0)
        m.d.sync += [
            base.eq(Mux(is_table, region.table, Cat(Const(0, PAGE_SHIFT - TABLE_SHIFT), moved[:page_bits]))),
            offset.eq(Mux(is_table, table >> port_shift, origin + beat)),
        ]
        address = Signal(ADDRESS_BITS, name="address")
        m.d.sync += address.eq((base << TABLE_SHIFT) + (offset << port_shift))
        return address
