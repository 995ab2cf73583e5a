# SPDX-License-Identifier: Apache-2.0
"""The activation unit: float32 from memory to the mantissas and exponents that the core takes."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory, ReadPort
from amaranth.lib.wiring import In, Out

from ..spec.config import EXPONENT_BITS, FLOAT_BITS, AcceleratorConfig
from .activations import activation_payload, bank_slices
from .delay import delay
from .fifo import Counter, StreamFifo
from .float_in import Mantissa, TokenExponent
from .walker import Walker, command_signature

_EXPONENT_CYCLES = 4
"""From a token's last beat until its exponent may be read: largest of the beat, of the token, exponent, memory."""


class ActivationUnit(wiring.Component):
    """Stores a layer's activations as they come, token by token, and sends them on slice by slice.

    While they come it finds each token's largest magnitude, and from it the exponent; then it rounds, a slice of one
    token per cycle. Commands that reuse activations pass by without any.

    Members
    -------
    command : the layers
    beats : float32 [M, K], rows one after the other, a whole number of beats each
    slices : for :class:`hw.rtl.activations.ActivationBuffer`
    non_finite, out_of_range : a token of the layer held here had such an element or exponent; the layer then stays
        here, and so does what follows it

    Throughput: 1 beat per cycle in, then 1 token slice per cycle out. Latency: ``latency`` cycles from the last beat
    to the first slice.
    """

    _FIFO_DEPTH = 16

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.floats_per_beat = config.port_width // FLOAT_BITS
        self.beats_per_slice = config.tile // self.floats_per_beat
        super().__init__(
            {
                "command": In(command_signature(config)),
                "beats": In(stream.Signature(config.port_width)),
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
    def latency(self) -> int:
        """Cycles from the last beat to the first slice: largest, exponent, its memory, start, pipeline, FIFO."""
        return _EXPONENT_CYCLES + 1 + self.pipeline + StreamFifo.latency

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.loader = loader = Walker(
            self.config,
            {
                "part": lambda command: Const(self.beats_per_slice),
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
        # One layer is in the store at a time: it is loaded, then sent.
        busy, loaded = Signal(), Signal()
        fresh = ~self.command.payload.reuse
        start = Signal()
        m.d.comb += [
            start.eq(self.command.valid & fresh & ~busy),
            self.command.ready.eq(~fresh | ~busy),
            loader.command.payload.eq(self.command.payload),
            loader.command.valid.eq(start),
            self.beats.ready.eq(loader.active),
            loader.step.eq(self.beats.valid & loader.active),
            sender.command.payload.eq(loader.current),
            # By then the last token's exponent is in its place.
            loaded.eq(delay(m, loader.step & loader.done, _EXPONENT_CYCLES, name="loaded", reset=True)),
            sender.command.valid.eq(loaded & ~self.non_finite & ~self.out_of_range),
        ]
        with m.If(start):
            m.d.sync += busy.eq(1)
        with m.Elif(sender.step & sender.done):
            m.d.sync += busy.eq(0)
        m.submodules.exponents = exponents = Memory(shape=signed(EXPONENT_BITS), depth=self.config.max_tokens, init=[])
        self._find_exponents(m, loader, exponents)
        self._send(m, sender, exponents, self._store(m, loader))
        return m

    def _find_exponents(self, m: Module, loader: Walker, exponents: Memory) -> None:
        """The largest magnitude of each token: over the floats of a beat, then over its beats."""
        magnitudes = [
            self.beats.payload.word_select(i, FLOAT_BITS)[: FLOAT_BITS - 1] for i in range(self.floats_per_beat)
        ]
        step, starts, ends = loader.step, Signal(), Signal()
        m.d.comb += [
            starts.eq(loader.first.part & loader.first.slice & loader.first.group),
            ends.eq(step & loader.last.part & loader.last.slice & loader.last.group),
        ]
        beat = magnitudes[0]
        for index, magnitude in enumerate(magnitudes[1:]):
            larger = Signal(FLOAT_BITS - 1, name=f"larger_{index}")
            m.d.comb += larger.eq(Mux(magnitude > beat, magnitude, beat))
            beat = larger
        of_beat, of_token = Signal(FLOAT_BITS - 1, reset_less=True), Signal(FLOAT_BITS - 1, reset_less=True)
        with m.If(step):
            m.d.sync += of_beat.eq(beat)
        with m.If(delay(m, step, 1, name="step", reset=True)):
            fresh = delay(m, starts, 1, name="starts")
            m.d.sync += of_token.eq(Mux(fresh | (of_beat > of_token), of_beat, of_token))
        m.submodules.token_exponent = finder = TokenExponent(self.config)
        write = exponents.write_port()
        done = delay(m, ends, 2 + finder.latency, name="ends", reset=True)
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

    def _store(self, m: Module, loader: Walker) -> ReadPort:
        """The floats, one slice of one token per row, rows slice by slice; returns where they are read."""
        config, parts = self.config, self.beats_per_slice
        m.submodules.store = store = Memory(
            shape=data.ArrayLayout(config.port_width, parts), depth=bank_slices(config), init=[]
        )
        write, read = store.write_port(granularity=1), store.read_port()
        part = Signal(range(max(2, parts)))
        address, token = Signal(range(bank_slices(config))), Signal(range(config.max_tokens))
        with m.If(loader.step):
            m.d.sync += part.eq(Mux(loader.last.part, 0, part + 1))
            with m.If(loader.last.part):
                m.d.sync += address.eq(address + loader.current.tokens)
                with m.If(loader.last.slice & loader.last.group):
                    m.d.sync += [token.eq(Mux(loader.last.token, 0, token + 1))]
                    m.d.sync += address.eq(Mux(loader.last.token, 0, token + 1))
        m.d.comb += [
            write.addr.eq(address),
            write.data.eq(Cat(self.beats.payload for _ in range(parts))),
            write.en.eq(Mux(loader.step, 1 << part, 0)),
        ]
        return read

    def _send(self, m: Module, sender: Walker, exponents: Memory, rows: ReadPort) -> None:
        """Reads rows in order while the FIFO has room, and rounds them."""
        config = self.config
        payload = activation_payload(config)
        m.submodules.fifo = fifo = StreamFifo(payload, self._FIFO_DEPTH)
        m.submodules.room = room = Counter(self._FIFO_DEPTH, init=self._FIFO_DEPTH)
        address, token = Signal.like(rows.addr), Signal(range(config.max_tokens))
        read = exponents.read_port(domain="comb")
        step = Signal()
        m.d.comb += [
            step.eq(sender.active & (room.value != 0)),
            sender.step.eq(step),
            room.take.eq(step),
            room.add.eq(fifo.o.valid & fifo.o.ready),
            rows.addr.eq(address),
            read.addr.eq(token),
        ]
        with m.If(step):
            m.d.sync += [
                address.eq(Mux(sender.done, 0, address + 1)),
                token.eq(Mux(sender.last.token, 0, token + 1)),
            ]
        exponent = delay(m, read.data, 2, name="exponent")
        # A row is read, taken out of the memory, and rounded; who has nothing to do rests.
        moves = [delay(m, step, stage, name=f"moves_{stage}", reset=True) for stage in range(self.pipeline)]
        m.d.comb += rows.en.eq(moves[0])
        row = Signal.like(rows.data.as_value(), name="row", reset_less=True)
        with m.If(moves[1]):
            m.d.sync += row.eq(rows.data)
        for index in range(config.tile):
            m.submodules[f"mantissa_{index}"] = mantissa = Mantissa(config)
            m.d.comb += [
                mantissa.moves.eq(Cat(moves[2:])),
                mantissa.value.eq(row.word_select(index, FLOAT_BITS)),
                mantissa.exponent.eq(exponent),
                fifo.i.payload.mantissas[index].eq(mantissa.mantissa),
            ]
        m.d.comb += [
            fifo.i.payload.exponent.eq(delay(m, exponent, Mantissa.latency, name="exponent_out")),
            fifo.i.valid.eq(delay(m, step, self.pipeline, name="sent", reset=True)),
        ]
        wiring.connect(m, fifo.o, wiring.flipped(self.slices))
