# SPDX-License-Identifier: Apache-2.0
"""r of each token, the scale of RMSNorm, from the results of a layer."""

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import data
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.vector.float_adder import FloatAdder
from hw.rtl.vector.float_multiplier import FloatMultiplier
from hw.rtl.vector.layouts import COLUMN_BITS, lane_place, vector_lanes
from hw.rtl.vector.partial_sums import PartialSums
from hw.rtl.vector.reciprocal import Inverse, Reciprocal
from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.functions import UNIT_BITS
from hw.spec.numerics.vector import PARTIAL_SUMS


class TokenScales(Block):
    """``r = 1 / sqrt(Q / K + eps)`` of each token, bit for bit :func:`hw.spec.numerics.vector.norm_scale`.

    While results pass, their squares are added to the partial sums. After the last one the tokens' partial sums are
    added by one adder, which then adds eps; :attr:`token_latency` cycles for each token.

    Members
    -------
    begin, end : the first and the last transfer of a layer with ``squares`` is taken; ``begin`` may stay high
    eps, columns : of this layer, with ``begin``
    valid, values, place, head : the results, in order
    pending : from ``end`` until r of the last token is there
    done : r of ``token`` is there; one cycle
    token, r : valid with ``done``
    """

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, vector_lanes(config)
        self.sums = PartialSums(config)
        self.adder, self.multiplier, self.inverse = FloatAdder(), FloatMultiplier(), Reciprocal()
        super().__init__(
            {
                **dict.fromkeys(("begin", "end", "valid", "head"), In(1)),
                "eps": In(FLOAT),
                "columns": In(COLUMN_BITS),
                "values": In(data.ArrayLayout(FLOAT, self.lanes)),
                "place": In(lane_place(config, self.lanes)),
                **dict.fromkeys(("pending", "done"), Out(1)),
                "token": Out(range(config.max_tokens)),
                "r": Out(FLOAT),
            }
        )

    @property
    def interval(self) -> int:
        """Cycles from one transfer to the next one."""
        return self.sums.interval

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """(cycle, low, high) of each addition of the binary tree: ``low`` and ``high`` are added, and replace ``low``.

        A sum can be read one cycle after it leaves the adder.
        """
        found, start, half = [], 0, PARTIAL_SUMS // 2
        while half:
            found += [(start + index, index, index + half) for index in range(half)]
            # The first addition of the next level needs number ``half / 2`` of this one.
            start, half = start + half // 2 + self.adder.latency + 1, half // 2
        return found

    @property
    def sum_latency(self) -> int:
        """Cycles from the first addition to Q."""
        return self.levels[-1][0] + self.adder.latency

    @property
    def eps_step(self) -> int:
        """Cycle in which eps is added."""
        return self.sum_latency + self.multiplier.latency

    @property
    def root_step(self) -> int:
        """Cycle in which the root begins."""
        return self.eps_step + self.adder.latency

    @property
    def token_latency(self) -> int:
        """Cycles for each token after the last transfer: binary tree, product, sum, root."""
        return self.root_step + self.inverse.latency

    @property
    def latency(self) -> int:
        """Cycles from the last transfer to r of the first token."""
        return self.sums.latency + self.token_latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "token_latency": self.token_latency, "interval": self.interval}

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.sums = sums = self.sums
        m.submodules.adder, m.submodules.multiplier, m.submodules.inverse = self.adder, self.multiplier, self.inverse
        m.d.comb += [
            sums.valid.eq(self.valid),
            sums.values.eq(self.values),
            sums.token.eq(self.place.token),
            sums.row.eq(self.place.column),
            sums.head.eq(self.head),
            sums.read_token.eq(self.token),
        ]
        step, active = Signal(range(self.token_latency + 1)), Signal()
        self._walk(m, step, active)
        self._add(m, step, active, *self._constants(m))
        return m

    def _walk(self, m: Module, step: Signal, active: Signal) -> None:
        """One token after another."""
        start = delay(m, self.valid & self.place.last, self.sums.latency - 1, name="start", reset=True)
        last_token, ends = Signal.like(self.token), Signal()
        m.d.comb += [self.done.eq(active & (step == self.token_latency)), ends.eq(self.token == last_token)]
        with m.If(self.valid & self.place.last):
            m.d.sync += last_token.eq(self.place.token)
        with m.If(start):
            m.d.sync += [active.eq(1), step.eq(0), self.token.eq(0)]
        with m.Elif(active):
            m.d.sync += step.eq(step + 1)
        with m.If(self.done):
            m.d.sync += [step.eq(0), self.token.eq(self.token + 1), active.eq(~ends)]
        with m.If(self.end):
            m.d.sync += self.pending.eq(1)
        with m.Elif(self.done & ends):
            m.d.sync += self.pending.eq(0)

    def _constants(self, m: Module) -> tuple[Signal, Signal]:
        """eps and 1/K of the layer; 1/K is computed while the results pass."""
        eps, part, known = Signal(FLOAT), Signal(FLOAT), Signal()
        inverse = self.inverse
        with m.If(self.begin & ~known):
            m.d.sync += eps.eq(self.eps)
        with m.If(self.begin):
            m.d.sync += known.eq(~self.end)
        m.d.comb += inverse.integer.eq(self.columns << UNIT_BITS)
        with m.If(self.begin & ~known):
            m.d.comb += [inverse.valid.eq(1), inverse.function.eq(Inverse.INTEGER)]
        computing = Signal()
        with m.If(self.begin & ~known):
            m.d.sync += computing.eq(1)
        with m.If(inverse.done & computing):
            m.d.sync += [part.eq(inverse.result), computing.eq(0)]
        return eps, part

    def _add(self, m: Module, step: Signal, active: Signal, eps: Signal, part: Signal) -> None:
        """The additions of the tree, the product with 1/K, the sum with eps, the root: each in its cycle."""
        adder, multiplier, inverse, sums = self.adder, self.multiplier, self.inverse, self.sums
        m.submodules.tree = tree = Memory(shape=FLOAT, depth=PARTIAL_SUMS // 2, init=[])
        write, low, high = tree.write_port(), tree.read_port(domain="comb"), tree.read_port(domain="comb")
        m.d.comb += [
            write.data.eq(adder.result),
            multiplier.a.eq(adder.result),
            multiplier.b.eq(part),
            adder.a.eq(low.data),
            adder.b.eq(high.data),
        ]
        with m.If(active):
            with m.Switch(step):
                for cycle, first, second in self.levels:
                    with m.Case(cycle):
                        m.d.comb += [adder.valid.eq(1), low.addr.eq(first), high.addr.eq(second)]
                        if second - first == PARTIAL_SUMS // 2:
                            m.d.comb += [
                                sums.low.eq(first),
                                sums.high.eq(second),
                                adder.a.eq(sums.low_sum),
                                adder.b.eq(sums.high_sum),
                            ]
                with m.Case(self.sum_latency):
                    m.d.comb += multiplier.valid.eq(1)
                with m.Case(self.eps_step):
                    m.d.comb += [adder.valid.eq(1), adder.a.eq(multiplier.result), adder.b.eq(eps)]
                with m.Case(self.root_step):
                    m.d.comb += [inverse.valid.eq(1), inverse.function.eq(Inverse.RSQRT)]
        m.d.comb += [inverse.x.eq(adder.result), self.r.eq(inverse.result)]
        ends = Signal(), Signal(range(PARTIAL_SUMS // 2))
        with m.Switch(step):
            for cycle, first, _ in self.levels:
                with m.Case(cycle + adder.latency):
                    m.d.comb += [ends[0].eq(active), ends[1].eq(first)]
        m.d.comb += [write.en.eq(ends[0]), write.addr.eq(ends[1])]
