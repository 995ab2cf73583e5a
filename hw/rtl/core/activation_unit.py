# SPDX-License-Identifier: Apache-2.0
"""The activation unit: converts float32 from memory to the mantissas and exponents of the core."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory, ReadPort
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo
from hw.rtl.common.mantissa import Mantissa
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.common.walker import Walker, command_signature
from hw.rtl.core.activation_buffer import activation_payload, bank_slices
from hw.rtl.core.float_in import TokenExponent
from hw.spec.config import EXPONENT_BITS, FLOAT_BITS, AcceleratorConfig

_FAN_IN = 4
"""Number of values that are compared with each other between two registers."""


def row_layout(config: AcceleratorConfig) -> data.ArrayLayout:
    """One token's K-slice in the layout of memory: float32 bits."""
    return data.ArrayLayout(FLOAT_BITS, config.tile)


class ActivationUnit(Block):
    """Stores a layer's activations in the order of memory, token by token, and sends them slice by slice.

    While it stores them, it finds each token's largest magnitude, which gives the token's exponent. Then it rounds, a
    slice of one token per cycle. Commands that reuse activations are skipped.

    Members
    -------
    command : the layers
    rows : float32 [M, K], one token after the other, slice by slice
    slices : for :class:`hw.rtl.core.activation_buffer.ActivationBuffer`
    non_finite, out_of_range : a token of the current layer has such an element or exponent; then this layer and the
        following ones are not sent

    Throughput: 1 token slice per cycle in, then 1 per cycle out. Latency: ``latency`` cycles from the last one in to
    the first one out.
    """

    _FIFO_DEPTH = 16

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        super().__init__(
            {
                "command": In(command_signature(config)),
                "rows": In(stream.Signature(row_layout(config))),
                "slices": Out(stream.Signature(activation_payload(config))),
                "non_finite": Out(1),
                "out_of_range": Out(1),
            }
        )

    @property
    def pipeline(self) -> int:
        """Cycles from a row's address to its mantissas: memory, output register, rounding."""
        return 2 + Mantissa.latency

    @property
    def exponent_cycles(self) -> int:
        """Cycles from a token's last row until its exponent can be read: maximum of the row, of the token, exponent."""
        levels = (self.config.tile.bit_length() - 1 + 1) // 2
        return levels + 1 + TokenExponent.latency + 1

    @property
    def latency(self) -> int:
        """Cycles from the last row in to the first slice out: exponent, start, pipeline, FIFO."""
        return self.exponent_cycles + 1 + self.pipeline + CreditFifo.latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.loader = loader = Walker(
            self.config,
            {
                "slice": lambda command: command.group_slices,
                "group": lambda command: command.groups,
                "token": lambda command: command.tokens,
            },
        )
        m.submodules.sender = sender = Walker(
            self.config,
            {
                "token": lambda command: command.tokens,
                "slice": lambda command: command.group_slices,
                "group": lambda command: command.groups,
            },
        )
        # The store holds one layer at a time: it is loaded, then sent.
        busy, loaded = Signal(), Signal()
        fresh = ~self.command.payload.reuse
        start = Signal()
        m.d.comb += [
            start.eq(self.command.valid & fresh & ~busy),
            self.command.ready.eq(~fresh | ~busy),
            loader.command.payload.eq(self.command.payload),
            loader.command.valid.eq(start),
            self.rows.ready.eq(loader.active),
            loader.step.eq(self.rows.valid & loader.active),
            sender.command.payload.eq(loader.current),
            # At this time the last token's exponent is stored.
            loaded.eq(delay(m, loader.step & loader.done, self.exponent_cycles, name="loaded", reset=True)),
            sender.command.valid.eq(loaded & ~self.non_finite & ~self.out_of_range),
        ]
        with m.If(start):
            m.d.sync += busy.eq(1)
        with m.Elif(sender.step & sender.done):
            m.d.sync += busy.eq(0)
        m.submodules.exponents = exponents = Memory(shape=signed(EXPONENT_BITS), depth=self.config.max_tokens, init=[])
        self._find_exponents(m, loader, exponents)
        self._send(m, sender, exponents, self._store(m, loader, platform))
        return m

    def _find_exponents(self, m: Module, loader: Walker, exponents: Memory) -> None:
        """The largest magnitude of each token: first of the floats of a row, then of its rows."""
        step, starts, ends = loader.step, Signal(), Signal()
        m.d.comb += [
            starts.eq(loader.first.slice & loader.first.group),
            ends.eq(step & loader.last.slice & loader.last.group),
        ]
        magnitudes = [self.rows.payload[index][: FLOAT_BITS - 1] for index in range(self.config.tile)]
        level, of_token = 0, Signal(FLOAT_BITS - 1, reset_less=True)
        while len(magnitudes) > 1:
            working = delay(m, step, level, name=f"step_{level}", reset=True)
            parts = []
            for first in range(0, len(magnitudes), _FAN_IN):
                largest = Signal(FLOAT_BITS - 1, name=f"largest_{level}_{first}", reset_less=True)
                with m.If(working):
                    m.d.sync += largest.eq(self._largest(m, magnitudes[first : first + _FAN_IN]))
                parts.append(largest)
            magnitudes, level = parts, level + 1
        of_row = magnitudes[0]
        # The delay is outside of the condition, because inside it would move only when the condition is true.
        fresh = delay(m, starts, level, name="starts")
        with m.If(delay(m, step, level, name="step_row", reset=True)):
            m.d.sync += of_token.eq(Mux(fresh | (of_row > of_token), of_row, of_token))
        m.submodules.token_exponent = finder = TokenExponent(self.config)
        write = exponents.write_port()
        done = delay(m, ends, level + 1 + finder.latency, name="ends", reset=True)
        m.d.comb += [
            finder.largest.eq(of_token),
            write.data.eq(finder.exponent),
            write.en.eq(done),
        ]
        with m.If(done):
            m.d.sync += [
                write.addr.eq(write.addr + 1),
                self.non_finite.eq(self.non_finite | finder.non_finite),
                self.out_of_range.eq(self.out_of_range | (finder.out_of_range & ~finder.non_finite)),
            ]
        with m.If(self.command.valid & self.command.ready & ~self.command.payload.reuse):
            m.d.sync += write.addr.eq(0)

    @staticmethod
    def _largest(m: Module, magnitudes: list):
        while len(magnitudes) > 1:
            pairs = zip(magnitudes[::2], magnitudes[1::2], strict=True)
            magnitudes = [Mux(other > one, other, one) for one, other in pairs]
        return magnitudes[0]

    def _store(self, m: Module, loader: Walker, platform) -> ReadPort:
        """Stores the floats: one slice of one token per row, rows slice by slice. Returns the read port."""
        config = self.config
        depth = bank_slices(config)
        attributes = buffer_attributes(platform, depth, row_layout(config).size)
        m.submodules.store = store = Memory(shape=row_layout(config), depth=depth, init=[], attrs=attributes)
        write, read = store.write_port(), store.read_port()
        address, token = Signal(range(bank_slices(config))), Signal(range(config.max_tokens))
        with m.If(loader.step):
            m.d.sync += address.eq(address + loader.current.tokens)
            with m.If(loader.last.slice & loader.last.group):
                m.d.sync += [token.eq(Mux(loader.last.token, 0, token + 1))]
                m.d.sync += address.eq(Mux(loader.last.token, 0, token + 1))
        m.d.comb += [
            write.addr.eq(address),
            write.data.eq(self.rows.payload),
            write.en.eq(loader.step),
        ]
        return read

    def _send(self, m: Module, sender: Walker, exponents: Memory, rows: ReadPort) -> None:
        """Reads rows in order while the FIFO has room, and rounds them."""
        config = self.config
        payload = activation_payload(config)
        m.submodules.fifo = fifo = CreditFifo(payload, self._FIFO_DEPTH)
        address, token = Signal.like(rows.addr), Signal(range(config.max_tokens))
        read = exponents.read_port(domain="comb")
        step = Signal()
        m.d.comb += [
            step.eq(sender.active & fifo.room),
            sender.step.eq(step),
            fifo.claim.eq(step),
            rows.addr.eq(address),
            read.addr.eq(token),
        ]
        with m.If(step):
            m.d.sync += [
                address.eq(Mux(sender.done, 0, address + 1)),
                token.eq(Mux(sender.last.token, 0, token + 1)),
            ]
        exponent = delay(m, read.data, 2, name="exponent")
        # A row is read, leaves the memory's register, and is rounded. A stage without valid data keeps its registers.
        moves = [delay(m, step, stage, name=f"moves_{stage}", reset=True) for stage in range(self.pipeline)]
        m.d.comb += rows.en.eq(moves[0])
        row = Signal(row_layout(config), reset_less=True)
        with m.If(moves[1]):
            m.d.sync += row.eq(rows.data)
        for index in range(config.tile):
            m.submodules[f"mantissa_{index}"] = mantissa = Mantissa(config.activation_bits)
            m.d.comb += [
                mantissa.moves.eq(Cat(moves[2:])),
                mantissa.value.eq(row[index]),
                mantissa.exponent.eq(exponent),
                fifo.i.payload.mantissas[index].eq(mantissa.mantissa),
            ]
        m.d.comb += [
            fifo.i.payload.exponent.eq(delay(m, exponent, Mantissa.latency, name="exponent_out")),
            fifo.i.valid.eq(delay(m, step, self.pipeline, name="sent", reset=True)),
        ]
        wiring.connect(m, fifo.o, wiring.flipped(self.slices))
