# SPDX-License-Identifier: Apache-2.0
"""The processing element: one multiply-accumulate of the weight-stationary array."""

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..spec.config import AcceleratorConfig
from ..spec.layout import StreamLayout


class ProcessingElement(wiring.Component):
    """Multiplies the activations that pass by with its weight and adds to the psum that comes from above.

    Parameters
    ----------
    column : which of the row's weights is its own

    Registers A (activation), B (weight), M (product) and P (psum), as in a DSP48E2 slice. B passes on the weights of
    the columns further east, too; synthesis drops the ones that nobody there uses. Nothing is reset and nothing is
    enabled: validity is known outside the array, and a weight stays because what feeds it does not change.

    Activations come sign-extended to the width of a psum. Modulo ``2**psum_bits`` signed and unsigned arithmetic
    agree and every psum fits, so nothing inside is ever extended again: that simulates twice as fast.

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
        word, row = config.psum_bits, StreamLayout(config).row_bits
        super().__init__(
            {
                "activation_in": In(word),
                "activation_out": Out(word),
                "weights_in": In(row),
                "weights_out": Out(row),
                "psum_in": In(word),
                "psum_out": Out(word),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        bits = self.config.psum_bits
        a = Signal(bits, reset_less=True)
        b = Signal.like(self.weights_in, reset_less=True)
        product = Signal(bits, reset_less=True)
        p = Signal(bits, reset_less=True)
        m.d.sync += [
            a.eq(self.activation_in),
            b.eq(self.weights_in),
            product.eq((a * b.word_select(self.column, self.config.weight_bits))[:bits]),
            p.eq((self.psum_in + product)[:bits]),
        ]
        m.d.comb += [self.activation_out.eq(a), self.weights_out.eq(b), self.psum_out.eq(p)]
        return m
