# SPDX-License-Identifier: Apache-2.0
"""The processing element: one multiply-accumulate of the weight-stationary array."""

from amaranth.hdl import Module, Signal, Value, signed
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.product import small_product
from hw.rtl.core.dsp48e2 import A_BITS, P_BITS, Dsp48e2
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout

WORD = 32
"""Bits of activations and psums inside the array; the widest psum (tile 32, 8-bit weights) takes 29."""


class ProcessingElement(Block):
    """Multiplies each activation by its weight and adds the product to the psum from above.

    Parameters
    ----------
    column : index of its weight in the row
    first : it is the top element of its column: ``psum_in`` is 0
    last : it is the bottom element of its column: ``psum_out`` leaves the array

    It has registers A (activation), B (weight), M (product) and P (psum), like a DSP48E2 slice. B also passes on the
    weights of the columns further east; synthesis removes those that are not used there. No register has a reset or an
    enable: validity is tracked outside the array, and a weight does not change while its input does not change.

    Activations come sign-extended to ``WORD`` bits, which hold every psum. Signed and unsigned arithmetic agree modulo
    ``2**WORD``, so no value inside is extended or truncated; this would take most of the time of a simulation. Only
    ``psum_bits`` of the output are used, and synthesis removes the rest: on ECP5 the cells are the same as with exact
    widths.

    Members
    -------
    activation_in, activation_out : X, sign-extended, west to east, 1 cycle
    weights_in, weights_out : the row's weights, together with their activation, west to east, 1 cycle
    psum_in, psum_out : partial sum, north to south; ``psum_in`` is needed 2 cycles after its activation

    Throughput: 1 multiply-accumulate per cycle.
    """

    latency = 3
    """Cycles from ``activation_in`` to ``psum_out``."""
    hop = 1
    """Cycles from ``psum_in`` to ``psum_out``, and from ``activation_in`` to ``activation_out``."""
    word = WORD
    """Bits of activations and psums at its ports."""

    def __init__(self, config: AcceleratorConfig, column: int = 0, *, first: bool = False, last: bool = False):
        self.config, self.column, self.first, self.last = config, column, first, last
        row = StreamLayout(config).row_bits
        super().__init__(
            {
                "activation_in": In(self.word),
                "activation_out": Out(self.word),
                "weights_in": In(row),
                "weights_out": Out(row),
                "psum_in": In(self.word),
                "psum_out": Out(self.word),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "hop": self.hop}

    def elaborate(self, platform) -> Module:
        m = Module()
        a = Signal(WORD, reset_less=True)
        b = Signal.like(self.weights_in, reset_less=True)
        product = Signal(WORD, reset_less=True)
        p = Signal(WORD, reset_less=True)
        m.d.sync += [
            a.eq(self.activation_in),
            b.eq(self.weights_in),
            product.eq(small_product(platform, a, b.word_select(self.column, self.config.weight_bits))[:WORD]),
            p.eq((self.psum_in + product)[:WORD]),
        ]
        m.d.comb += [self.activation_out.eq(a), self.weights_out.eq(b), self.psum_out.eq(p)]
        return m


class DspProcessingElement(ProcessingElement):
    """The same element in one DSP48E2 slice, which holds its multiplier, its adder and the registers A, B, M and P.

    Psums go down a column through the slices' cascade, whose wires exist only between neighbouring slices. So
    ``psum_in`` must come from ``psum_out`` of the element above, except in the ``first`` element, and ``psum_out`` must
    go only to the element below, except in the ``last`` one. A slice has no outputs for its A and B registers, so
    activations and weights that go east have second registers beside the slice.
    """

    word = P_BITS

    def elaborate(self, platform) -> Module:
        m = Module()
        bits = self.config.activation_bits
        m.submodules.dsp = dsp = Dsp48e2(cascade=not self.first)
        a = Signal(signed(bits), reset_less=True)
        b = Signal.like(self.weights_in, reset_less=True)
        m.d.sync += [a.eq(self.activation_in), b.eq(self.weights_in)]
        m.d.comb += [
            dsp.a.eq(self.activation_in[:A_BITS]),
            dsp.b.eq(self.weights_in.word_select(self.column, self.config.weight_bits)),
            dsp.pcin.eq(self.psum_in),
            Value.cast(self.activation_out).as_signed().eq(a),
            self.weights_out.eq(b),
            self.psum_out.eq(dsp.p if self.last else dsp.pcout),
        ]
        return m
