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
    """Multiplies the activations that pass by with its weight and adds to the psum that comes from above.

    Parameters
    ----------
    column : which of the row's weights is its own
    first : nothing is above it: ``psum_in`` is 0
    last : nothing is below it: ``psum_out`` leaves the array

    Registers A (activation), B (weight), M (product) and P (psum), as in a DSP48E2 slice. B passes on the weights of
    the columns further east, too; synthesis drops the ones that nobody there uses. Nothing is reset and nothing is
    enabled: validity is known outside the array, and a weight stays because what feeds it does not change.

    Activations come sign-extended to ``WORD`` bits, which hold every psum. Modulo ``2**WORD`` signed and unsigned
    arithmetic agree, so nothing inside is ever extended or cut, which is what most of a simulation would be spent on.
    Only ``psum_bits`` of what comes out are used, and synthesis drops the rest: the same cells on ECP5 as with exact
    widths.

    Members
    -------
    activation_in, activation_out : X, sign-extended, west to east, 1 cycle
    weights_in, weights_out : the row's weights, with the activation they are for, west to east, 1 cycle
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

    Psums go down a column over the slices' own cascade, whose wires exist between neighbouring slices only: ``psum_in``
    comes from ``psum_out`` of the element above, unless this is the ``first``, and ``psum_out`` goes nowhere else,
    unless this is the ``last``. What goes east cannot leave a slice again, so activations and weights have a second
    register beside it.
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
