# SPDX-License-Identifier: Apache-2.0
"""The activation unit: converts float32 from memory to the mantissas and exponents of the core."""

from typing import NamedTuple

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory, ReadPort
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo, StreamFifo
from hw.rtl.common.mantissa import Mantissa
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.common.walker import Walker, command_layout
from hw.rtl.core.activation_buffer import activation_payload, bank_slices
from hw.rtl.core.float_in import TokenExponent
from hw.rtl.core.token_runs import Run, find_runs
from hw.spec.config import EXPONENT_BITS, FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.kv_cache import PLANE_COUNTS
from hw.spec.numerics.linear import EXPONENT_MIN

_FAN_IN = 4
"""Number of values that are compared with each other between two registers."""
_LAYERS = 2
"""Short layers that the unit holds at most: one is loaded while the other is sent."""


def row_layout(config: AcceleratorConfig) -> data.ArrayLayout:
    """One token's K-slice in the layout of memory: float32 bits."""
    return data.ArrayLayout(FLOAT_BITS, config.tile)


def slice_bits(config: AcceleratorConfig) -> int:
    """Bits of the number of a K-slice."""
    return max(1, (config.max_k // config.tile - 1).bit_length())


def unit_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The unit's command: that of the core, and with attention three fields more.

    planes : how often each group is sent, 1, 2 or 4; ``groups`` counts a group once, unlike in the core's command
    values : the rows come from the second input
    short : :func:`hw.spec.ops.command.is_short` with the K-slices of these groups

    and with ``config.reads_by_pieces``

    by_pieces : the rows come piece by piece: the first 256 columns of each token, then the next ones of each token
    last_slice : the number of K-slices minus 1
    """
    more = {"planes": max(PLANE_COUNTS).bit_length(), "values": 1, "short": 1} if config.has_attention else {}
    if config.reads_by_pieces:
        more |= {"by_pieces": 1, "last_slice": slice_bits(config)}
    return data.StructLayout({**{name: field.shape for name, field in command_layout(config)}, **more})


class _Intake(NamedTuple):
    """What the unit stores in a cycle."""

    row: data.View
    step: Value
    """There is a row."""
    starts: Value
    """It is the first one of a run."""
    ends: Value
    """It is the last one of a token."""
    final: Value
    """It is the last one of a layer."""
    values: Value
    """The layer's rows come from the second input."""
    run: Run
    """The run of the row, at the time of the row."""


class ActivationUnit(Block):
    """Stores a layer's activations in the order of memory, token by token, and sends them slice by slice.

    While it stores them, it finds each token's largest magnitude, which gives the token's exponent. Then it rounds, a
    slice of one token per cycle. Commands that reuse activations are skipped.

    With attention, each group of K is sent ``planes`` times: group by group, plane by plane, slice by slice, all tokens
    of a slice. A short layer takes one half of the store, the next one the other half, and one is loaded while the
    other is sent. A layer that is not short takes the whole store, alone. The rows of values have zeros and small
    numbers: a token's exponent is then at least the lowest one, as in :func:`hw.spec.numerics.block_float.quantize`,
    and an exponent below it is no error. Such rows have no subnormal numbers.

    Members
    -------
    command : the layers, :func:`unit_command_layout`
    rows : float32 [M, K], one token after the other, slice by slice; or with ``by_pieces`` piece by piece, and within a
        piece in this order
    slices : for :class:`hw.rtl.core.activation_buffer.ActivationBuffer`
    non_finite, out_of_range : a token of the current layer has such an element or exponent; then this layer and the
        following ones are not sent

    and with attention

    values : the rows of layers with ``values``, in the same order
    earlier : with an error: it is in the layer before the last one whose command was taken; else it is in the last one

    Throughput: 1 token slice per cycle in, then 1 per cycle out. Latency: ``latency`` cycles from the last one in to
    the first one out. A sequence of short layers with L slices in and S out, which is ``planes`` times L, takes
    max(L, S) cycles for each, if the larger of the two is larger by ``turnaround`` cycles or more; otherwise half of
    L + S + ``turnaround``.
    """

    _FIFO_DEPTH = 16

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        attention = {"values": In(stream.Signature(row_layout(config))), "earlier": Out(1)}
        super().__init__(
            {
                "command": In(stream.Signature(unit_command_layout(config))),
                "rows": In(stream.Signature(row_layout(config))),
                "slices": Out(stream.Signature(activation_payload(config))),
                "non_finite": Out(1),
                "out_of_range": Out(1),
                **(attention if config.has_attention else {}),
            }
        )

    @property
    def pipeline(self) -> int:
        """Cycles from a row's address to its mantissas: memory, output register, rounding."""
        return 2 + Mantissa.latency

    @property
    def intake_cycles(self) -> int:
        """Cycles from a row's transfer until it is stored: with attention the choice of the input ends in registers."""
        return int(self.config.has_attention)

    @property
    def exponent_cycles(self) -> int:
        """Cycles from a token's last row until its exponent can be read: maximum of the row, of the run, of the token
        if it can have several runs, exponent."""
        levels = (self.config.tile.bit_length() - 1 + 1) // 2
        return self.intake_cycles + levels + 1 + self.config.reads_by_pieces + TokenExponent.latency + 1

    @property
    def turnaround(self) -> int:
        """Cycles in which a half of the store that is in use is neither loaded nor sent, for each layer.

        The exponent, between the last row in and the first one sent; a register, between the last one sent and the
        first row in.
        """
        return self.exponent_cycles + 1

    @property
    def latency(self) -> int:
        """Cycles from the last row in to the first slice out: exponent, start, pipeline, FIFO."""
        return self.exponent_cycles + 1 + self.pipeline + CreditFifo.latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, **({"turnaround": self.turnaround} if self.config.has_attention else {})}

    def elaborate(self, platform) -> Module:
        m = Module()
        layout, attention = unit_command_layout(self.config), self.config.has_attention
        m.submodules.loader = loader = Walker(
            self.config,
            {
                "slice": lambda command: command.group_slices,
                "group": lambda command: command.groups,
                "token": lambda command: command.tokens,
            },
            layout,
        )
        m.submodules.sender = sender = Walker(
            self.config,
            {
                "token": lambda command: command.tokens,
                "slice": lambda command: command.group_slices,
                **({"plane": lambda command: command.planes} if attention else {}),
                "group": lambda command: command.groups,
            },
            layout,
        )
        if attention:
            self._overlap(m, loader, sender)
        else:
            self._alternate(m, loader, sender)
        depth = self.config.max_tokens * (_LAYERS if attention else 1)
        m.submodules.exponents = exponents = Memory(shape=signed(EXPONENT_BITS), depth=depth, init=[])
        run = find_runs(m, self.config, loader)
        intake = self._intake(m, loader, run)
        self._find_exponents(m, loader, intake, exponents)
        self._send(m, sender, exponents, self._store(m, loader, intake, run, platform))
        return m

    def _alternate(self, m: Module, loader: Walker, sender: Walker) -> None:
        """A layer is loaded, then sent."""
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

    def _overlap(self, m: Module, loader: Walker, sender: Walker) -> None:
        """A short layer is loaded while another one is sent.

        Layers are sent in their order, and a third one is loaded only after the first one is sent. So a layer that is
        loaded begins to be sent before the next one can have an error.
        """
        command = self.command.payload
        # The layers from the start of their load to the start of their way out.
        m.submodules.layers = layers = StreamFifo(unit_command_layout(self.config), _LAYERS)
        free, stopped = Signal(range(_LAYERS + 1), init=_LAYERS), Signal()
        fresh, may, start, sent = ~command.reuse, Signal(), Signal(), Signal()
        loaded, waits = Signal(), Signal()
        m.d.comb += [
            stopped.eq(self.non_finite | self.out_of_range),
            may.eq(Mux(command.short, free != 0, free == _LAYERS) & ~stopped),
            loader.command.payload.eq(command),
            loader.command.valid.eq(self.command.valid & fresh & may),
            self.command.ready.eq(~fresh | (may & loader.command.ready)),
            start.eq(loader.command.valid & loader.command.ready),
            layers.i.payload.eq(command),
            layers.i.valid.eq(start),
            self.rows.ready.eq(loader.active & ~loader.current.values),
            self.values.ready.eq(loader.active & loader.current.values),
            loader.step.eq(loader.active & Mux(loader.current.values, self.values.valid, self.rows.valid)),
            # At this time the last token's exponent is stored.
            loaded.eq(delay(m, loader.step & loader.done, self.exponent_cycles, name="loaded", reset=True)),
            sender.command.payload.eq(layers.o.payload),
            sender.command.valid.eq((loaded | waits) & ~stopped),
            layers.o.ready.eq(sender.command.valid & sender.command.ready),
            sent.eq(sender.step & sender.done),
        ]
        m.d.sync += waits.eq((loaded | waits) & ~layers.o.ready)
        claimed, released = (Mux(short, 1, _LAYERS) for short in (command.short, sender.current.short))
        with m.If(start | sent):
            m.d.sync += free.eq(free - Mux(start, claimed, 0) + Mux(sent, released, 0))

    def _first_row(self, walker: Walker) -> Value:
        """Address of the first row of the walker's next layer; layers that are short use the halves in turn."""
        half = bank_slices(self.config) // _LAYERS
        return Mux(walker.command.payload.short & walker.next_bank, half, 0)

    def _intake(self, m: Module, loader: Walker, run: Run) -> _Intake:
        """The rows in the order of the loader."""
        starts, ends = Signal(), Signal()
        by_pieces, last = self.config.reads_by_pieces, loader.last
        m.d.comb += [
            starts.eq(run.starts),
            ends.eq(loader.step & run.ends & run.complete if by_pieces else loader.step & last.slice & last.group),
        ]
        now = _Intake(self.rows.payload, loader.step, starts, ends, loader.done, Const(0), run)
        if not self.config.has_attention:
            return now
        row, values = Signal(row_layout(self.config), reset_less=True), loader.current.values
        with m.If(loader.step):
            m.d.sync += row.eq(Mux(values, self.values.payload.as_value(), self.rows.payload.as_value()))
        cycles = self.intake_cycles
        return _Intake(
            row,
            delay(m, now.step, cycles, name="taken", reset=True),
            delay(m, now.starts, cycles, name="taken_starts"),
            delay(m, now.ends, cycles, name="taken_ends", reset=True),
            delay(m, now.final, cycles, name="taken_final"),
            delay(m, values, cycles, name="taken_values"),
            run,
        )

    def _find_exponents(self, m: Module, loader: Walker, intake: _Intake, exponents: Memory) -> None:
        """The largest magnitude of each token: first of the floats of a row, then of its rows."""
        step = intake.step
        magnitudes = [intake.row[index][: FLOAT_BITS - 1] for index in range(self.config.tile)]
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
        fresh = delay(m, intake.starts, level, name="starts")
        with m.If(delay(m, step, level, name="step_row", reset=True)):
            m.d.sync += of_token.eq(Mux(fresh | (of_row > of_token), of_row, of_token))
        m.submodules.token_exponent = finder = TokenExponent(self.config)
        write = exponents.write_port()
        cycles = level + 1
        if self.config.reads_by_pieces:
            of_token, cycles = self._largest_of_runs(m, loader, intake, of_token, cycles), cycles + 1
        cycles += finder.latency
        done = delay(m, intake.ends, cycles, name="ends", reset=True)
        exponent, outside = finder.exponent, finder.out_of_range
        if self.config.has_attention:
            clamps, zero = delay(m, intake.values, cycles, name="clamps"), Signal()
            m.d.sync += zero.eq(~of_token.any())
            # No exponent is above the highest one: a finite number's is far below it.
            exponent = Mux(clamps & (zero | finder.out_of_range), EXPONENT_MIN, finder.exponent)
            outside = finder.out_of_range & ~clamps
        m.d.comb += [
            finder.largest.eq(of_token),
            write.data.eq(exponent),
            write.en.eq(done),
        ]
        with m.If(done):
            m.d.sync += [
                write.addr.eq(write.addr + 1),
                self.non_finite.eq(self.non_finite | finder.non_finite),
                self.out_of_range.eq(self.out_of_range | (outside & ~finder.non_finite)),
            ]
        start = self.command.valid & self.command.ready & ~self.command.payload.reuse
        if not self.config.has_attention:
            with m.If(start):
                m.d.sync += write.addr.eq(0)
            return
        # The next layer may already be taken in, so this address has a bank of its own.
        bank = Signal(name="exponent_bank")
        with m.If(done & delay(m, intake.final, cycles, name="final")):
            m.d.sync += [bank.eq(~bank), write.addr.eq(self._first_exponent(~bank))]
        with m.If(done & ~self.non_finite & ~self.out_of_range):
            m.d.sync += self.earlier.eq(start | (bank != loader.bank))

    def _largest_of_runs(self, m: Module, loader: Walker, intake: _Intake, of_run: Signal, cycles: int) -> Signal:
        """The largest magnitude of a token so far, a cycle after that of a run, which comes ``cycles`` after its row.

        The numbers of the runs before are stored. Between two runs of a token there are those of other tokens, and the
        first of these has all rows of a piece, so a number is stored before it is read.
        """
        m.submodules.runs = runs = Memory(shape=FLOAT_BITS - 1, depth=self.config.max_tokens, init=[])
        read, write = runs.read_port(domain="comb"), runs.write_port()
        run, whole = intake.run, self.intake_cycles + cycles
        before, largest = Signal.like(of_run), Signal.like(of_run)
        resumes = delay(m, run.resumes, whole, name="resumes")
        token = delay(m, run.token, whole - 1, name="token_before")
        at_write = delay(m, token, 2, name="token")
        m.d.sync += [
            before.eq(read.data),
            largest.eq(Mux(resumes & (before > of_run), before, of_run)),
        ]
        m.d.comb += [
            read.addr.eq(token),
            write.addr.eq(at_write),
            write.data.eq(largest),
            write.en.eq(delay(m, loader.step & run.ends & ~run.complete, whole + 1, name="run_ends", reset=True)),
        ]
        return largest

    def _first_exponent(self, bank: Value) -> Value:
        """Address of the exponent of a layer's first token."""
        return Mux(bank, self.config.max_tokens, 0)

    @staticmethod
    def _largest(m: Module, magnitudes: list):
        while len(magnitudes) > 1:
            pairs = zip(magnitudes[::2], magnitudes[1::2], strict=True)
            magnitudes = [Mux(other > one, other, one) for one, other in pairs]
        return magnitudes[0]

    def _store(self, m: Module, loader: Walker, intake: _Intake, run: Run, platform) -> ReadPort:
        """Stores the floats: one slice of one token per row, rows slice by slice. Returns the read port."""
        config = self.config
        depth = bank_slices(config)
        attributes = buffer_attributes(platform, depth, row_layout(config).size)
        m.submodules.store = store = Memory(shape=row_layout(config), depth=depth, init=[], attrs=attributes)
        write, read = store.write_port(), store.read_port()
        # ``token`` is the address of the first row of the token's run.
        tokens = depth if config.has_attention else config.max_tokens
        address, token = Signal(range(bank_slices(config))), Signal(range(tokens))
        if config.has_attention:
            with m.If(loader.step):
                m.d.sync += address.eq(address + loader.current.tokens)
                with m.If(run.ends):
                    # Behind the last token's run of a piece is the first row of the next piece.
                    before = Mux(run.turns, address, token) if config.reads_by_pieces else token
                    m.d.sync += [token.eq(before + 1), address.eq(before + 1)]
            with m.If(loader.command.valid & loader.command.ready):
                m.d.sync += [token.eq(self._first_row(loader)), address.eq(self._first_row(loader))]
        else:
            with m.If(loader.step):
                m.d.sync += address.eq(address + loader.current.tokens)
                with m.If(loader.last.slice & loader.last.group):
                    m.d.sync += [token.eq(Mux(loader.last.token, 0, token + 1))]
                    m.d.sync += address.eq(Mux(loader.last.token, 0, token + 1))
        m.d.comb += [
            write.addr.eq(delay(m, address, self.intake_cycles, name="place")),
            write.data.eq(intake.row),
            write.en.eq(intake.step),
        ]
        return read

    def _send(self, m: Module, sender: Walker, exponents: Memory, rows: ReadPort) -> None:
        """Reads rows in order while the FIFO has room, and rounds them."""
        config = self.config
        payload = activation_payload(config)
        m.submodules.fifo = fifo = CreditFifo(payload, self._FIFO_DEPTH)
        address, token = Signal.like(rows.addr), Signal(range(exponents.depth))
        read = exponents.read_port(domain="comb")
        step = Signal()
        m.d.comb += [
            step.eq(sender.active & fifo.room),
            sender.step.eq(step),
            fifo.claim.eq(step),
            rows.addr.eq(address),
            read.addr.eq(token),
        ]
        if config.has_attention:
            # The first row of a group, to which the next plane goes back.
            group, again = Signal.like(address), Signal()
            m.d.comb += again.eq(sender.last.token & sender.last.slice & ~sender.tile_end)
            with m.If(step):
                m.d.sync += [
                    address.eq(Mux(again, group, address + 1)),
                    token.eq(Mux(sender.last.token, self._first_exponent(sender.bank), token + 1)),
                ]
                with m.If(sender.tile_end):
                    m.d.sync += group.eq(address + 1)
            with m.If(sender.command.valid & sender.command.ready):
                m.d.sync += [
                    address.eq(self._first_row(sender)),
                    group.eq(self._first_row(sender)),
                    token.eq(self._first_exponent(sender.next_bank)),
                ]
        else:
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
