# SPDX-License-Identifier: Apache-2.0
"""The column post-processor: psums of slices become the exact sums ``Y`` of one output row."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.product import small_product
from hw.spec.config import SCALE_BITS, AcceleratorConfig


def ring_depth(config: AcceleratorConfig) -> int:
    """Entries of the ring of sums: two output tiles of ``max_tokens`` tokens, rounded up to a power of two."""
    return 1 << (2 * config.max_tokens - 1).bit_length()


def group_control(config: AcceleratorConfig) -> data.StructLayout:
    """A column's control for a psum; ``ends``: the psum is valid and the last of its group."""
    return data.StructLayout(
        {
            "valid": 1,
            "first_slice": 1,
            "ends": 1,
            "token": range(config.max_tokens),
            "sum": signed(config.activation_sum_bits),
        }
    )


def ring_control(config: AcceleratorConfig) -> data.StructLayout:
    """A column's control for a group's scaled sum at the ring."""
    return data.StructLayout({"write": 1, "first_group": 1, "address": range(ring_depth(config))})


def drain_slot(config: AcceleratorConfig) -> data.StructLayout:
    """One slot on the drain chain: the columns to collect, their address in the ring, and the collected values."""
    lanes = config.lanes
    return data.StructLayout(
        {
            "columns": range(max(2, config.tile // lanes)),
            "address": range(ring_depth(config)),
            "values": data.ArrayLayout(signed(config.sum_bits), lanes),
        }
    )


def zero_point_shape(config: AcceleratorConfig):
    """Shape of one zero point."""
    return signed(config.zero_point_bits) if config.zero_point_signed else unsigned(config.zero_point_bits)


class Column(wiring.Component):
    """Accumulates one column of the array over slices, corrects the zero point, scales, accumulates over groups.

    ``P`` per token in the group accumulator, ``V = P * 2^f - z * A``, ``Y += sm * V`` in the ring. The first-flags
    start a new sum, so no write is needed to clear entries. Both memories are read asynchronously, and read, addition
    and write take one cycle: the same address may be used in the next cycle without a hazard. All control comes from
    the west and leaves to the east one cycle later, together with the psums. Throughput 1 psum per cycle.

    Members
    -------
    index : the column's own number, a constant
    psum : sum from the array, in the cycle of ``group_in``
    group_in, group_out : control of the group accumulator
    zero_point : z of this group, in the cycle of ``group_in``
    scale : sm of this group, ``scale_delay`` cycles after ``group_in``
    ring_in, ring_out : control of the ring, ``ring_delay`` cycles after ``group_in``
    drain_in, drain_out : the drain chain; a slot with this column's number collects its sum
    """

    scale_delay = 3
    """Cycles from a psum to the multiplication by its scale: the stage of ``scaled``."""
    ring_delay = 5
    """Cycles from a psum to its group's addition to the ring, after all stages; it can be read one cycle later."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        group, ring, drain = group_control(config), ring_control(config), drain_slot(config)
        super().__init__(
            {
                "index": In(range(config.tile)),
                "psum": In(signed(config.psum_bits)),
                "group_in": In(group),
                "group_out": Out(group),
                "zero_point": In(zero_point_shape(config)),
                "scale": In(signed(SCALE_BITS)),
                "ring_in": In(ring),
                "ring_out": Out(ring),
                "drain_in": In(drain),
                "drain_out": Out(drain),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        group, ring = Signal.like(self.group_in, name="group_hop"), Signal.like(self.ring_in, name="ring_hop")
        m.d.sync += [group.eq(self.group_in), ring.eq(self.ring_in)]
        m.d.comb += [self.group_out.eq(group), self.ring_out.eq(ring)]
        product = self._centre_and_scale(m, platform, self._accumulate_slices(m))
        self._accumulate_groups(m, product)
        return m

    def _accumulate_slices(self, m: Module) -> Signal:
        """``P``, one cycle after the psum."""
        config = self.config
        shape = signed(config.group_bits)
        m.submodules.group_memory = memory = Memory(shape=shape, depth=config.max_tokens, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        total = Signal(shape)
        group_sum = Signal(shape, reset_less=True)
        m.d.comb += [
            read.addr.eq(self.group_in.token),
            total.eq(self.psum + Mux(self.group_in.first_slice, 0, read.data)),
            write.addr.eq(self.group_in.token),
            write.data.eq(total),
            write.en.eq(self.group_in.valid),
        ]
        m.d.sync += group_sum.eq(total)
        return group_sum

    def _centre_and_scale(self, m: Module, platform, group_sum: Signal) -> Signal:
        """``sm * V``, ``ring_delay`` cycles after the psum; the registers are those of a DSP slice.

        They move only for psums that end a group, which saves power, and time in simulation.
        """
        config = self.config
        shapes = {
            "zero_point": zero_point_shape(config),
            "activation_sum": signed(config.activation_sum_bits),
            "correction": signed(config.zero_point_bits + 1 + config.activation_sum_bits),
            "group_total": signed(config.group_bits),
            "centred": signed(config.centred_bits),
            "scaled": signed(config.centred_bits + SCALE_BITS),
            "product": signed(config.centred_bits + SCALE_BITS),
        }
        r = {name: Signal(shape, name=name, reset_less=True) for name, shape in shapes.items()}
        correction = small_product(platform, r["activation_sum"], r["zero_point"])
        stages = (
            {"zero_point": self.zero_point, "activation_sum": self.group_in.sum},
            {"correction": correction, "group_total": group_sum},
            {"centred": (r["group_total"] << config.fraction_bits) - r["correction"]},
            {"scaled": self.scale * r["centred"]},
            {"product": r["scaled"]},
        )
        moving = Signal(len(stages) - 1)
        m.d.sync += moving.eq(Cat(self.group_in.ends, moving))
        for stage, enable in zip(stages, Cat(self.group_in.ends, moving), strict=True):
            with m.If(enable):
                m.d.sync += [r[name].eq(value) for name, value in stage.items()]
        return r["product"]

    def _accumulate_groups(self, m: Module, product: Signal) -> None:
        """The ring of ``Y``, and the drain chain that reads it."""
        config = self.config
        shape = signed(config.sum_bits)
        m.submodules.ring = memory = Memory(shape=shape, depth=ring_depth(config), init=[])
        write, read, drain = memory.write_port(), memory.read_port(domain="comb"), memory.read_port(domain="comb")
        m.d.comb += [
            read.addr.eq(self.ring_in.address),
            write.addr.eq(self.ring_in.address),
            write.data.eq(product + Mux(self.ring_in.first_group, 0, read.data)),
            write.en.eq(self.ring_in.write),
            drain.addr.eq(self.drain_in.address),
        ]
        lanes = config.lanes
        slot = Signal.like(self.drain_in, name="drain_hop", reset_less=True)
        m.d.sync += slot.eq(self.drain_in)
        lane_bits = lanes.bit_length() - 1
        for lane in range(lanes):
            with m.If((self.drain_in.columns == self.index[lane_bits:]) & (self.index[:lane_bits] == lane)):
                m.d.sync += slot.values[lane].eq(drain.data)
        m.d.comb += self.drain_out.eq(slot)


class Columns(Block):
    """One :class:`Column` below each column of the array; scales and zero points move east with the control.

    Members
    -------
    psums : sums from the array, column c one cycle after column c - 1
    group, ring : control for column 0, as in :class:`Column`
    zero_points : zero points of all columns, in the cycle of ``group``
    scales : scales of all columns, in the cycle of ``group``
    drain, drained : the drain chain's two ends, ``drain_latency`` cycles apart
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        tile = config.tile
        super().__init__(
            {
                "psums": In(data.ArrayLayout(signed(config.psum_bits), tile)),
                "group": In(group_control(config)),
                "ring": In(ring_control(config)),
                "zero_points": In(data.ArrayLayout(zero_point_shape(config), tile)),
                "scales": In(data.ArrayLayout(signed(SCALE_BITS), tile)),
                "drain": In(drain_slot(config)),
                "drained": Out(drain_slot(config)),
            }
        )

    @property
    def drain_latency(self) -> int:
        """Cycles from ``drain`` to ``drained``."""
        return self.config.tile

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"drain_latency": self.drain_latency, "scale_delay": Column.scale_delay, "ring_delay": Column.ring_delay}

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        group, ring, drain = self.group, self.ring, self.drain
        zeros = self.zero_points.as_value()
        scales = delay(m, self.scales.as_value(), Column.scale_delay, name="scales")
        for index in range(config.tile):
            m.submodules[f"column_{index}"] = column = Column(config)
            m.d.comb += [
                column.index.eq(index),
                column.psum.eq(self.psums[index]),
                column.group_in.eq(group),
                column.ring_in.eq(ring),
                column.drain_in.eq(drain),
                column.zero_point.eq(zeros.word_select(index, config.zero_point_bits)),
                column.scale.eq(scales.word_select(index, SCALE_BITS)),
            ]
            group, ring, drain = column.group_out, column.ring_out, column.drain_out
            # The parts that no column further east uses are dropped by synthesis.
            zeros = delay(m, zeros, 1, name=f"zero_points_c{index + 1}")
            scales = delay(m, scales, 1, name=f"scales_c{index + 1}")
        m.d.comb += self.drained.eq(drain)
        return m
