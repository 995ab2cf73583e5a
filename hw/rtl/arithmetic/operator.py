# SPDX-License-Identifier: Apache-2.0
"""The base of the operators with two float32 operands."""

from typing import ClassVar

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.float32 import FLOAT, FloatRound
from hw.spec.numerics.float32 import EXPONENT_FIELD_BITS


class FloatOperator(Block):
    """A pipeline whose last two stages round. Registers move only for valid operands. Throughput 1 per cycle.

    Members
    -------
    valid : there are operands
    a, b : float32
    result : float32, ``latency`` cycles later
    """

    stages: ClassVar[int]
    """Stages before the rounding."""

    def __init__(self):
        # Two more bits than a field: see the operators for what an exponent needs before it is rounded.
        self.round = FloatRound(EXPONENT_FIELD_BITS + 2)
        super().__init__({"valid": In(1), "a": In(FLOAT), "b": In(FLOAT), "result": Out(FLOAT)})

    @classmethod
    def cycles(cls) -> int:
        """Cycles from the operands to ``result``, of every instance."""
        return cls.stages + FloatRound.latency

    @property
    def latency(self) -> int:
        """Cycles from the operands to ``result``."""
        return self.cycles()

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.round = self.round
        # One bit per stage: the stage's input is valid.
        moves = Cat(self.valid, moving := Signal(self.latency - 1))
        m.d.sync += moving.eq(moves)
        self._compute(m, moves)
        m.d.comb += [self.round.moves.eq(moves[self.stages :]), self.result.eq(self.round.result)]
        return m

    def _compute(self, m: Module, moves) -> None:
        """The stages before the rounding. They drive the inputs of :attr:`round` but ``moves``."""
        raise NotImplementedError

    def _give(self, m: Module, about, fraction, half, rest) -> None:
        """Connect the last of these stages with the rounding."""
        m.d.comb += [
            self.round.about.eq(about),
            self.round.fraction.eq(fraction),
            self.round.half.eq(half),
            self.round.rest.eq(rest),
        ]
