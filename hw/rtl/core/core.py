# SPDX-License-Identifier: Apache-2.0
"""The core: everything between the streams of commands, weights and activations and the stream of results."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import SETTLING, gate
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.results import result_payload
from hw.rtl.common.walker import CommandFork, command_signature
from hw.rtl.core.activation_buffer import ActivationBuffer, activation_payload
from hw.rtl.core.array import SystolicArray
from hw.rtl.core.column import Column, Columns
from hw.rtl.core.column_control import ColumnControl
from hw.rtl.core.drain import Drain
from hw.rtl.core.header import HeaderReader
from hw.rtl.core.sequencer import Sequencer
from hw.rtl.core.weights import WeightSplitter, WordAssembler
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout


def separate_rows(config: AcceleratorConfig, words: Value) -> Value:
    """Rows of weights whose successive rows are in pairs: element c of both rows, then element c + 1 of both, ..."""
    bits, tile = config.weight_bits, config.tile
    row_bits = tile * bits
    ordered = []
    for first in range(0, len(words) // row_bits, 2):
        pair = words[first * row_bits : (first + 2) * row_bits]
        ordered += [Cat(pair.word_select(2 * column + row, bits) for column in range(tile)) for row in range(2)]
    return Cat(ordered)


class Core(Block):
    """Computes one linear layer per command: ``y[m, n] = sum_k x[m, k] * w[n, k]``.

    Members
    -------
    command : layers (:class:`hw.spec.ops.command.LayerCommand`); several may be in flight
    weights : the weight stream, beat by beat (:mod:`hw.spec.memory.geometry`)
    activations : mantissas and token exponents, slice by slice, all tokens of a slice in a row
    results : float32, output tile by output tile, token by token, columns ascending
    underrun : scales came too late, which is an error of the design. It is never set; simulation checks this
    works, waits_activations, waits_output : the sequencer's state in this cycle

    Throughput: 1 beat per cycle and 1 token slice per cycle, so a layer takes
    ``max(beats, tokens * slices, results / lanes)`` cycles, without a gap between layers.
    """

    container = True

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.stream = StreamLayout(config)
        super().__init__(
            {
                "command": In(command_signature(config)),
                "weights": In(stream.Signature(config.beat_bits)),
                "activations": In(stream.Signature(activation_payload(config))),
                "results": Out(stream.Signature(result_payload(config, config.lanes))),
                "underrun": Out(1),
                "works": Out(1),
                "waits_activations": Out(1),
                "waits_output": Out(1),
            }
        )
        self.array = SystolicArray(config)
        self.columns = Columns(config)
        self.drain = Drain(config, self.columns.drain_latency)
        self.sequencer = Sequencer(config, self.word_fifo_depth)

    @property
    def word_fifo_depth(self) -> int:
        """Depth in words of the FIFO before the array."""
        return self.stream.word_fifo_depth

    @property
    def latency(self) -> int:
        """Cycles from the sequencer's decision on an output tile's last slice to its first result."""
        to_psum = self.sequencer.latency + ActivationBuffer.read_latency + self.array.latency
        to_drain = Column.ring_delay + 2
        return to_psum + to_drain + self.drain.latency + StreamFifo.latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "word_fifo_depth": self.word_fifo_depth}

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        m.submodules.splitter = splitter = WeightSplitter(config)
        m.submodules.assembler = assembler = WordAssembler(config)
        m.submodules.header = header = HeaderReader(config)
        m.submodules.buffer = buffer = ActivationBuffer(config)
        m.submodules.sequencer = sequencer = self.sequencer
        m.submodules.array = array = self.array
        m.submodules.control = control = ColumnControl(config)
        m.submodules.columns = columns = self.columns
        drain = self.drain
        (m.submodules.drain,) = gate(
            m,
            platform,
            drain,
            name="drain",
            cycles=SETTLING,
            events=[drain.tile_done],
            pipeline=(drain.walker.step, drain.latency + SETTLING),
        )
        users = (splitter, header, buffer, sequencer, control, drain)
        m.submodules.fork = fork = CommandFork(config, len(users))

        wiring.connect(m, wiring.flipped(self.command), fork.command)
        for copy, user in zip(fork.copies, users, strict=True):
            wiring.connect(m, copy, user.command)
        wiring.connect(m, wiring.flipped(self.weights), splitter.beats)
        wiring.connect(m, splitter.header, header.beats)
        wiring.connect(m, splitter.body, assembler.beats)
        wiring.connect(m, wiring.flipped(self.activations), buffer.slices)
        wiring.connect(m, header.records, control.records)
        wiring.connect(m, header.exponents, drain.exponents)
        wiring.connect(m, drain.results, wiring.flipped(self.results))

        self._feed_array(m, assembler.words, buffer, sequencer, array)
        m.d.comb += [
            sequencer.tile_ready.eq(header.tile_ready),
            sequencer.slice_ready.eq(buffer.slice_ready),
            sequencer.ring_release.eq(drain.ring_release),
            buffer.release.eq(drain.bank_release),
            control.token.eq(
                delay(
                    m,
                    sequencer.token,
                    buffer.read_latency + array.latency - control.lead,
                    name="token",
                    reset=True,
                )
            ),
            buffer.sum_address.eq(control.sum_address),
            control.sum_data.eq(buffer.sum_data),
            columns.psums.eq(array.psums),
            columns.group.eq(control.group),
            columns.ring.eq(control.ring),
            columns.zero_points.eq(control.zero_points),
            columns.scales.eq(control.scales),
            columns.drain.eq(drain.slot),
            drain.drained.eq(columns.drained),
            drain.tile_done.eq(control.tile_done),
            buffer.exponent_address.eq(drain.token_exponent_address),
            drain.token_exponent.eq(buffer.exponent_data),
            self.underrun.eq(control.underrun),
            self.works.eq(sequencer.works),
            self.waits_activations.eq(sequencer.waits_activations),
            self.waits_output.eq(sequencer.waits_output),
        ]
        return m

    def _feed_array(self, m: Module, words, buffer, sequencer, array) -> None:
        """Sends activations and weights of a token to the array in the same cycle."""
        m.submodules.word_fifo = fifo = StreamFifo(self.stream.word_bits, self.word_fifo_depth)
        wiring.connect(m, words, fifo.i)
        register = Signal(len(array.words), reset_less=True)
        wait = buffer.read_latency - 1
        place = delay(m, sequencer.place, wait, name="place")
        m.d.comb += fifo.o.ready.eq(delay(m, sequencer.pop, wait, name="pop", reset=True))
        rows = fifo.o.payload[: len(register)]
        if self.stream.slices_per_word > 1:
            rows = fifo.o.payload.word_select(place, len(register))
        if self.config.has_attention:
            paired = delay(m, sequencer.paired, wait, name="paired")
            rows = Mux(paired, separate_rows(self.config, rows), rows)
        m.d.sync += register.eq(rows)
        m.d.comb += [
            sequencer.word_pushed.eq(fifo.i.valid & fifo.i.ready),
            buffer.read_address.eq(sequencer.address),
            array.activations.eq(buffer.read_data),
            array.load.eq(delay(m, sequencer.load, buffer.read_latency, name="load", reset=True)),
            array.words.eq(register),
        ]
