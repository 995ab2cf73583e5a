# SPDX-License-Identifier: Apache-2.0
"""The drain: collects finished sums from the columns and converts them to a stream of float32."""

from amaranth.hdl import Array, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo, Credits
from hw.rtl.common.walker import Walker, command_signature
from hw.rtl.core.activation_buffer import BANKS
from hw.rtl.core.column import drain_slot, ring_depth
from hw.rtl.core.float_out import FloatOut
from hw.spec.config import EXPONENT_BITS, FLOAT_BITS, SCALE_BITS, AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout


def result_payload(config: AcceleratorConfig) -> data.StructLayout:
    """One transfer of results: float32 bits of neighbouring columns, which of them are valid, and the layer's end."""
    lanes = config.lanes
    return data.StructLayout({"values": data.ArrayLayout(FLOAT_BITS, lanes), "keep": lanes, "last": 1})


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
                "results": Out(stream.Signature(result_payload(config))),
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
        m.submodules.walker = walker = Walker(
            config,
            {
                "columns": lambda command: Const(config.tile // self.lanes),
                "token": lambda command: command.tokens,
                "tile": lambda command: command.out_tiles,
            },
        )
        wiring.connect(m, wiring.flipped(self.command), walker.command)
        m.submodules.tiles = tiles = Credits(ring_depth(config))
        m.submodules.fifo = fifo = CreditFifo(result_payload(config), self.fifo_depth)
        columns, keep = self._columns(m, walker)
        step = Signal()
        tile_ends = step & walker.tile_end
        m.d.comb += [
            step.eq(walker.active & tiles.enough & fifo.room),
            walker.step.eq(step),
            tiles.add.eq(self.tile_done),
            tiles.take.eq(tile_ends),
            # Its first column exists if any does.
            fifo.claim.eq(step & keep[0]),
            self.exponents.ready.eq(tile_ends),
            self.ring_release.eq(step & walker.last.columns),
            # The first release comes with the first command: it marks the second bank of the buffer as free, too.
            self.bank_release.eq(walker.command.valid & walker.command.ready & ~walker.command.payload.reuse),
        ]
        self._send(m, walker, step, columns)
        exponents = self._exponents(m, walker, step, columns)
        last_columns = ((walker.current.last_columns - 1) >> (self.lanes.bit_length() - 1)) == columns
        last = walker.last.tile & walker.last.token & last_columns
        self._convert(m, fifo, Mux(step, keep, 0), last, exponents)
        return m

    def _columns(self, m: Module, walker: Walker) -> tuple[Signal, Signal]:
        """The columns that the slot collects, and which of them exist."""
        columns = Signal(self.slot.columns.shape())
        with m.If(walker.step):
            m.d.sync += columns.eq(Mux(walker.last.columns, 0, columns + 1))
        keep = Signal(self.lanes)
        for lane in range(self.lanes):
            exists = columns * self.lanes + lane < walker.current.last_columns
            m.d.comb += keep[lane].eq(~walker.last.tile | exists)
        return columns, keep

    def _send(self, m: Module, walker: Walker, step: Signal, columns: Signal) -> None:
        address = Signal(range(ring_depth(self.config)))
        with m.If(step & walker.last.columns):
            m.d.sync += address.eq(address + 1)
        m.d.sync += [self.slot.columns.eq(columns), self.slot.address.eq(address)]

    def _exponents(self, m: Module, walker: Walker, step: Signal, columns: Signal) -> list[Signal]:
        """``E[n] - 15 + e[m] - f`` of each lane, in the cycle in which the slot comes back."""
        config = self.config
        token = Signal(range(config.max_tokens))
        with m.If(step & walker.last.columns):
            m.d.sync += token.eq(Mux(walker.last.token, 0, token + 1))
        m.d.comb += self.token_exponent_address.eq(token + Mux(walker.bank, config.max_tokens, 0))
        rows = data.View(data.ArrayLayout(signed(EXPONENT_BITS), config.tile), self.exponents.payload)
        offset = SCALE_BITS - 1 + config.fraction_bits
        token_exponent = delay(m, self.token_exponent, 1, name="token_exponent")
        exponents = []
        for lane in range(self.lanes):
            row = Array(rows[index] for index in range(lane, config.tile, self.lanes))[columns]
            chosen = Signal(signed(EXPONENT_BITS), name=f"row_exponent_{lane}", reset_less=True)
            total = Signal(signed(config.exponent_sum_bits), name=f"exponent_{lane}", reset_less=True)
            m.d.sync += [chosen.eq(row), total.eq(chosen + token_exponent - offset)]
            # The selection takes one of the chain's cycles.
            exponents.append(delay(m, total, self.chain_latency - 1, name=f"exponent_{lane}"))
        return exponents

    def _convert(self, m: Module, fifo: CreditFifo, keep: Value, last: Value, exponents: list[Signal]) -> None:
        back = delay(m, keep, 1 + self.chain_latency, name="keep", reset=True)
        for lane, (exponent, float_out) in enumerate(zip(exponents, self.converters, strict=True)):
            m.submodules[f"float_out_{lane}"] = float_out
            m.d.comb += [
                float_out.valid.eq(back[lane]),
                float_out.value.eq(self.drained.values[lane]),
                float_out.exponent.eq(exponent),
                fifo.i.payload.values[lane].eq(float_out.result),
            ]
        kept = delay(m, back, self.converters[0].latency, name="kept", reset=True)
        m.d.comb += [
            fifo.i.payload.keep.eq(kept),
            fifo.i.payload.last.eq(delay(m, last, self.latency, name="last")),
            fifo.i.valid.eq(kept.any()),
        ]
        wiring.connect(m, fifo.o, wiring.flipped(self.results))
