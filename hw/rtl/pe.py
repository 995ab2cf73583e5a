# SPDX-License-Identifier: Apache-2.0
"""The processing element: one multiply-accumulate of the weight-stationary array."""

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..spec.config import AcceleratorConfig
from ..spec.layout import StreamLayout

WORD = 32
"""Bits of activations and psums inside the array; the widest psum (tile 32, 8-bit weights) takes 29."""


class ProcessingElement(wiring.Component):
    """Multiplies the activations that pass by with its weight and adds to the psum that comes from above.

    Parameters
    ----------
    column : which of the row's weights is its own

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

    def __init__(self, config: AcceleratorConfig, column: int = 0):
        self.config, self.column = config, column
        row = StreamLayout(config).row_bits
        super().__init__(
            {
                "activation_in": In(WORD),
                "activation_out": Out(WORD),
                "weights_in": In(row),
                "weights_out": Out(row),
                "psum_in": In(WORD),
                "psum_out": Out(WORD),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        a = Signal(WORD, reset_less=True)
        b = Signal.like(self.weights_in, reset_less=True)
        product = Signal(WORD, reset_less=True)
        p = Signal(WORD, reset_less=True)
        m.d.sync += [
            a.eq(self.activation_in),
            b.eq(self.weights_in),
            product.eq((a * b.word_select(self.column, self.config.weight_bits))[:WORD]),
            p.eq((self.psum_in + product)[:WORD]),
        ]
        m.d.comb += [self.activation_out.eq(a), self.weights_out.eq(b), self.psum_out.eq(p)]
        return m
