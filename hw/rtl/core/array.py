# SPDX-License-Identifier: Apache-2.0
"""The systolic array: ``tile x tile`` processing elements with wavefront weight loading."""

from amaranth.hdl import Const, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.core.dsp48e2 import has_dsp48e2
from hw.rtl.core.pe import DspProcessingElement, ProcessingElement
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout


class SystolicArray(Block):
    """Multiplies slices: ``psums[c] = sum_r activations[r] * weights[r, c]``, one token per cycle.

    Activations move one column per cycle, psums one row per cycle, and the weights of a slice move along the same
    diagonal: row r of a slice is delayed until its activation arrives and then held at the west edge until the next
    slice; column c follows c cycles later. All delays are fixed, so a new slice may start every cycle, and no net spans
    more than one element.

    Parameters
    ----------
    element : class of the elements; if not given, it is chosen for the part

    Members
    -------
    activations : signed mantissas of one token's K-slice, all rows in the same cycle
    load : this token is the first of a slice
    words : the weights: if the first token of a slice enters in cycle t, its word w must enter in cycle t + w
    psums : signed; column c of a token comes ``latency + c`` cycles after its activations

    Throughput: 1 token per cycle; a slice takes ``max(tokens, words_per_slice)`` cycles.
    """

    def __init__(self, config: AcceleratorConfig, element: type[ProcessingElement] | None = None):
        self.config, self.element = config, element
        self.stream = StreamLayout(config)
        super().__init__(
            {
                "activations": In(data.ArrayLayout(signed(config.activation_bits), config.tile)),
                "load": In(1),
                "words": In(self.stream.rows_per_word // self.stream.slices_per_word * self.stream.row_bits),
                "psums": Out(data.ArrayLayout(signed(config.psum_bits), config.tile)),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from ``activations`` to ``psums[0]``."""
        return ProcessingElement.latency + (self.config.tile - 1) * ProcessingElement.hop

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        tile = self.config.tile
        element = self.element or (DspProcessingElement if has_dsp48e2(platform) else ProcessingElement)
        psums = [Const(0, element.word)] * tile
        for row in range(tile):
            extended = Signal(signed(element.word), name=f"extended_r{row}")
            m.d.comb += extended.eq(delay(m, self.activations[row], row, name=f"activation_r{row}"))
            activation = extended.as_unsigned()
            weights = self._row_weights(m, row)
            for column in range(tile):
                m.submodules[f"pe_{row}_{column}"] = pe = element(
                    self.config, column, first=row == 0, last=row == tile - 1
                )
                m.d.comb += [
                    pe.activation_in.eq(activation),
                    pe.weights_in.eq(weights),
                    pe.psum_in.eq(psums[column]),
                ]
                activation, weights, psums[column] = pe.activation_out, pe.weights_out, pe.psum_out
        m.d.comb += [self.psums[column].eq(psums[column][: self.config.psum_bits]) for column in range(tile)]
        return m

    def _row_weights(self, m: Module, row: int) -> Signal:
        """The weights of one row at the west edge, from a slice's first token until that of the next slice."""
        bits = self.stream.row_bits
        offset = row % self.stream.rows_per_word * bits
        arriving = delay(m, self.words[offset : offset + bits], self.stream.row_delay(row), name=f"arriving_r{row}")
        load = delay(m, self.load, row, name=f"load_r{row}")
        held = Signal(bits, name=f"held_r{row}", reset_less=True)
        weights = Signal(bits, name=f"weights_r{row}")
        with m.If(load):
            m.d.sync += held.eq(arriving)
        m.d.comb += weights.eq(Mux(load, arriving, held))
        return weights
