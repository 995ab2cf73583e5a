# SPDX-License-Identifier: Apache-2.0
"""The drain: collects finished sums from the columns and converts them to a stream of float32."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo, Credits
from hw.rtl.common.results import place_layout, result_payload
from hw.rtl.common.walker import Walker, command_signature
from hw.rtl.core.activation_buffer import BANKS
from hw.rtl.core.column import drain_slot, ring_depth
from hw.rtl.core.float_out import FloatOut
from hw.spec.config import EXPONENT_BITS, SCALE_BITS, AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.geometry import StreamLayout


class Drain(Block):
    """Sends slots along the drain chain and converts the collected sums.

    For each output tile and each token it collects the columns in ascending order, ``lanes`` at a time. Columns
    beyond N are omitted. A slot is only sent when the output FIFO has room for it.

    Members
    -------
    command : the layers
    tile_done : an output tile may be drained
    exponents : row exponents, one transfer per output tile
    token_exponent_address, token_exponent : from the activation buffer, in the same cycle
    slot, drained : the two ends of the chain, ``chain_latency`` cycles apart
    ring_release : an entry of the ring of sums is free again
    bank_release : the activations of an earlier command are no longer needed
    results : float32, token by token within each output tile

    Throughput ``lanes`` results per cycle.
    """

    def __init__(self, config: AcceleratorConfig, chain_latency: int):
        self.config, self.chain_latency = config, chain_latency
        self.lanes = config.lanes
        self.converters = [FloatOut(config) for _ in range(self.lanes)]
        self.walker = Walker(
            config,
            {
                "columns": lambda command: Const(config.tile // self.lanes),
                "token": lambda command: command.tokens,
                "tile": lambda command: command.out_tiles,
            },
        )
        super().__init__(
            {
                "command": In(command_signature(config)),
                "tile_done": In(1),
                "exponents": In(stream.Signature(StreamLayout(config).exponents_bits)),
                "token_exponent_address": Out(range(BANKS * config.max_tokens)),
                "token_exponent": In(signed(EXPONENT_BITS)),
                "slot": Out(drain_slot(config)),
                "drained": In(drain_slot(config)),
                "ring_release": Out(1),
                "bank_release": Out(1),
                "results": Out(stream.Signature(result_payload(config, config.lanes))),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from the decision to drain a slot to its results at the FIFO's input."""
        return 1 + self.chain_latency + self.converters[0].latency

    @property
    def fifo_depth(self) -> int:
        """Depth of the output FIFO: the results of a full pipeline, and as many that wait to leave."""
        return 1 << (2 * (self.latency + 2) - 1).bit_length()

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "latency": self.latency,
            "chain_latency": self.chain_latency,
            "lanes": self.lanes,
            "fifo_depth": self.fifo_depth,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        m.submodules.walker = walker = self.walker
        wiring.connect(m, wiring.flipped(self.command), walker.command)
        m.submodules.tiles = tiles = Credits(ring_depth(config))
        m.submodules.fifo = fifo = CreditFifo(result_payload(config, config.lanes), self.fifo_depth)
        at, step = self._count(m, walker), Signal()
        exists, ends = self._exists(m, walker, at)
        m.d.comb += [
            step.eq(walker.active & tiles.enough & fifo.room),
            walker.step.eq(step),
            tiles.add.eq(self.tile_done),
            tiles.take.eq(step & walker.tile_end),
            fifo.claim.eq(step & exists),
            self.exponents.ready.eq(step & walker.tile_end),
            self.ring_release.eq(step & walker.last.columns),
            # The first release comes with the first command: it marks the second bank of the buffer as free, too.
            self.bank_release.eq(walker.command.valid & walker.command.ready & ~walker.command.payload.reuse),
        ]
        self._send(m, walker, at)
        keep, place = self._place(m, walker, at, step & exists, ends)
        self._convert(m, fifo, keep, place, self._exponents(m, walker, at))
        return m

    def _count(self, m: Module, walker: Walker) -> data.View:
        """The next slot: its columns, its token, and its output tile, counted from the beginning of a piece."""
        config = self.config
        layout = {
            "columns": self.slot.columns.shape(),
            "token": range(config.max_tokens),
            "tile": range(PIECE_FLOATS // config.tile),
        }
        at = Signal(data.StructLayout(layout), name="at")
        with m.If(walker.step):
            m.d.sync += at.columns.eq(Mux(walker.last.columns, 0, at.columns + 1))
        with m.If(walker.step & walker.last.columns):
            m.d.sync += at.token.eq(Mux(walker.last.token, 0, at.token + 1))
        with m.If(walker.step & walker.tile_end):
            m.d.sync += at.tile.eq(Mux(walker.last.tile, 0, at.tile + 1))
        return at

    def _exists(self, m: Module, walker: Walker, at: data.View) -> tuple[Signal, data.View]:
        """Whether the next slot has columns of the layer, which is a register; and how the last of these slots ends.

        ``row``: it is the last one of its token in the last output tile, and its last column is in ``lane``.
        """
        lane_bits = self.lanes.bit_length() - 1
        final, exists = Signal(range(self.config.tile)), Signal(init=1)
        ends = Signal(data.StructLayout({"row": 1, "lane": lane_bits}), name="ends")
        with m.If(walker.command.valid & walker.command.ready):
            m.d.sync += final.eq(walker.command.payload.last_columns - 1)
        m.d.comb += [
            ends.row.eq(walker.last.tile & (at.columns == final[lane_bits:])),
            ends.lane.eq(final[:lane_bits]),
        ]
        with m.If(walker.step):
            m.d.sync += exists.eq(walker.last.columns | (exists & ~ends.row))
        return exists, ends

    def _send(self, m: Module, walker: Walker, at: data.View) -> None:
        address = Signal(range(ring_depth(self.config)))
        with m.If(walker.step & walker.last.columns):
            m.d.sync += address.eq(address + 1)
        m.d.sync += [self.slot.columns.eq(at.columns), self.slot.address.eq(address)]

    def _place(
        self, m: Module, walker: Walker, at: data.View, sent: Value, ends: data.View
    ) -> tuple[Signal, data.View]:
        """Which lanes have a column, and the place of the transfer; both one cycle late, so that paths are short."""
        valid, keep = Signal(), Signal(self.lanes)
        slot, last_token, piece_end = Signal.like(at, name="sent_at"), Signal(), Signal()
        row = Signal.like(ends, name="sent_ends")
        m.d.sync += [
            valid.eq(sent),
            slot.eq(at),
            row.eq(ends),
            last_token.eq(walker.last.token),
            piece_end.eq(ends.row | (walker.last.columns & at.tile.all())),
        ]
        place = Signal(place_layout(self.config, self.lanes), name="place")
        columns_bits = (self.config.tile // self.lanes).bit_length() - 1
        m.d.comb += [
            *(keep[lane].eq(valid & (~row.row | (lane <= row.lane))) for lane in range(self.lanes)),
            place.token.eq(slot.token),
            place.column.eq(Cat(slot.columns[:columns_bits], slot.tile)),
            place.piece_end.eq(piece_end),
            place.chunk_end.eq(last_token & piece_end),
            place.last.eq(last_token & row.row),
        ]
        return keep, place

    def _exponents(self, m: Module, walker: Walker, at: data.View) -> list[Signal]:
        """``E[n] - 15 + e[m] - f`` of each lane, in the cycle in which the slot comes back."""
        config = self.config
        m.d.comb += self.token_exponent_address.eq(at.token + Mux(walker.bank, config.max_tokens, 0))
        rows = data.View(data.ArrayLayout(signed(EXPONENT_BITS), config.tile), self.exponents.payload)
        offset = SCALE_BITS - 1 + config.fraction_bits
        token_exponent = delay(m, self.token_exponent, 1, name="token_exponent")
        exponents = []
        for lane in range(self.lanes):
            row = Array(rows[index] for index in range(lane, config.tile, self.lanes))[at.columns]
            chosen = Signal(signed(EXPONENT_BITS), name=f"row_exponent_{lane}", reset_less=True)
            total = Signal(signed(config.exponent_sum_bits), name=f"exponent_{lane}", reset_less=True)
            m.d.sync += [chosen.eq(row), total.eq(chosen + token_exponent - offset)]
            # The selection takes one of the chain's cycles.
            exponents.append(delay(m, total, self.chain_latency - 1, name=f"exponent_{lane}"))
        return exponents

    def _convert(self, m: Module, fifo: CreditFifo, keep: Value, place: data.View, exponents: list[Signal]) -> None:
        """Converts the collected sums; ``keep`` and ``place`` are as old as the slot at the chain's input."""
        back = delay(m, keep, self.chain_latency, name="keep", reset=True)
        for lane, (exponent, float_out) in enumerate(zip(exponents, self.converters, strict=True)):
            m.submodules[f"float_out_{lane}"] = float_out
            m.d.comb += [
                float_out.valid.eq(back[lane]),
                float_out.value.eq(self.drained.values[lane]),
                float_out.exponent.eq(exponent),
                fifo.i.payload.values[lane].eq(float_out.result),
            ]
        kept = delay(m, back, self.converters[0].latency, name="kept", reset=True)
        ends = delay(m, place, self.latency - 1, name="place")
        m.d.comb += [
            fifo.i.payload.keep.eq(kept),
            *(fifo.i.payload[name].eq(ends[name]) for name, _ in place.shape()),
            # Its first column exists if any does.
            fifo.i.valid.eq(kept[0]),
        ]
        wiring.connect(m, fifo.o, wiring.flipped(self.results))
