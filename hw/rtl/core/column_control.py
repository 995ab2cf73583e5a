# SPDX-License-Identifier: Apache-2.0
"""Control of the columns: a second walker that follows the tokens when they leave the array."""

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.walker import TOKEN_LOOPS, Walker, command_signature
from hw.rtl.core.activation_buffer import BANKS, ActivationBuffer, bank_slices, bank_start
from hw.rtl.core.column import Column, group_control, ring_control, ring_depth, zero_point_shape
from hw.spec.config import SCALE_BITS, AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout


class ColumnControl(Block):
    """Walks tokens, slices, groups and output tiles again, one step per token, and makes the control of column 0.

    Members
    -------
    command : the layers
    token : a token's psum arrives at column 0 in ``lead`` cycles
    records : scale mantissas and zero points, one transfer per group
    sum_address, sum_data : group sums, from the activation buffer
    group, ring, zero_points, scales : for :class:`hw.rtl.core.column.Columns`
    tile_done : the sums of an output tile's first token are complete in column 0 (column c: c cycles later)
    underrun : a record came too late; it stays set. With a valid layout this cannot happen

    Throughput 1 token per cycle.
    """

    lead = ActivationBuffer.read_latency
    """Cycles from ``token`` to the psum and to ``group``."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "command": In(command_signature(config)),
                "token": In(1),
                "records": In(stream.Signature(StreamLayout(config).record_bits)),
                "sum_address": Out(range(BANKS * bank_slices(config))),
                "sum_data": In(signed(config.activation_sum_bits)),
                "group": Out(group_control(config)),
                "ring": Out(ring_control(config)),
                "zero_points": Out(data.ArrayLayout(zero_point_shape(config), config.tile)),
                "scales": Out(data.ArrayLayout(signed(SCALE_BITS), config.tile)),
                "tile_done": Out(1),
                "underrun": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"lead": self.lead, "ring_delay": Column.ring_delay}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.walker = walker = Walker(self.config, TOKEN_LOOPS)
        wiring.connect(m, wiring.flipped(self.command), walker.command)
        m.d.comb += walker.step.eq(self.token)
        group_ends = Signal()
        m.d.comb += group_ends.eq(self.token & walker.last.slice)
        self._group_control(m, walker, group_ends)
        self._ring_control(m, walker, group_ends)
        self._records(m, walker, group_ends)
        self._sum_address(m, walker, group_ends)
        return m

    def _group_control(self, m: Module, walker: Walker, group_ends: Signal) -> None:
        token = Signal(range(self.config.max_tokens))
        with m.If(self.token):
            m.d.sync += token.eq(Mux(walker.last.token, 0, token + 1))
        m.d.comb += [
            self.group.valid.eq(delay(m, self.token, self.lead, name="valid", reset=True)),
            self.group.first_slice.eq(delay(m, walker.first.slice, self.lead, name="first_slice")),
            self.group.ends.eq(delay(m, group_ends, self.lead, name="ends", reset=True)),
            self.group.token.eq(delay(m, token, self.lead, name="token")),
            self.group.sum.eq(self.sum_data),
        ]

    def _ring_control(self, m: Module, walker: Walker, group_ends: Signal) -> None:
        """Allocates entries of the ring in order, one per token, for one output tile after another."""
        address, base = Signal(range(ring_depth(self.config))), Signal(range(ring_depth(self.config)))
        next_base = Signal.like(base)
        m.d.comb += next_base.eq(base + walker.current.tokens)
        with m.If(self.token):
            m.d.sync += address.eq(address + 1)
            with m.If(walker.last.token):
                m.d.sync += address.eq(base)
            with m.If(walker.tile_end):
                m.d.sync += [address.eq(next_base), base.eq(next_base)]
        cycles = self.lead + Column.ring_delay
        tile_done = group_ends & walker.first.token & walker.last.group
        m.d.comb += [
            self.ring.write.eq(delay(m, group_ends, cycles, name="ring_write", reset=True)),
            self.ring.first_group.eq(delay(m, walker.first.group, cycles, name="ring_first_group")),
            self.ring.address.eq(delay(m, address, cycles, name="ring_address")),
            self.tile_done.eq(delay(m, tile_done, cycles + 1, name="tile_done", reset=True)),
        ]

    def _records(self, m: Module, walker: Walker, group_ends: Signal) -> None:
        scale_bits = self.config.tile * SCALE_BITS
        used = delay(m, group_ends, self.lead, name="record_used", reset=True)
        finished = delay(m, group_ends & walker.last.token, self.lead, name="record_finished", reset=True)
        m.d.comb += [
            self.scales.eq(self.records.payload[:scale_bits]),
            self.zero_points.eq(self.records.payload[scale_bits:]),
            self.records.ready.eq(finished),
        ]
        with m.If(used & ~self.records.valid):
            m.d.sync += self.underrun.eq(1)

    def _sum_address(self, m: Module, walker: Walker, group_ends: Signal) -> None:
        with m.If(group_ends):
            m.d.sync += self.sum_address.eq(self.sum_address + 1)
        with m.If(self.token & walker.tile_end):
            m.d.sync += self.sum_address.eq(bank_start(self.config, walker.bank))
        with m.If(walker.command.valid & walker.command.ready):
            m.d.sync += self.sum_address.eq(bank_start(self.config, walker.next_bank))
