# SPDX-License-Identifier: Apache-2.0
"""r of each token, the scale of RMSNorm, from the results of a layer."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.float_adder import FloatAdder
from hw.rtl.arithmetic.float_multiplier import FloatMultiplier
from hw.rtl.arithmetic.reciprocal import Inverse, Reciprocal
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.vector.layouts import COLUMN_BITS, lane_place
from hw.rtl.vector.partial_sums import PartialSums
from hw.rtl.vector.sum_schedule import SumSchedule
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
        self.config, self.lanes = config, config.vector_lanes
        self.sums = PartialSums(config)
        self.adder, self.multiplier, self.inverse = FloatAdder(), FloatMultiplier(), Reciprocal()
        # The adder's operands have a register, because the memories are read in the same cycle.
        self.schedule = SumSchedule(1 + self.adder.latency)
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
    def eps_step(self) -> int:
        """Cycle in which eps is added."""
        return self.schedule.latency + self.multiplier.latency

    @property
    def root_step(self) -> int:
        """Cycle in which the root begins."""
        return self.eps_step + 1 + self.adder.latency

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
        m.submodules.schedule = schedule = self.schedule
        m.submodules.tree = tree = Memory(shape=FLOAT, depth=PARTIAL_SUMS // 2, init=[])
        write, low, high = tree.write_port(), tree.read_port(domain="comb"), tree.read_port(domain="comb")
        starts = {cycle: active & (step == cycle) for cycle in (schedule.latency, self.eps_step, self.root_step)}
        with_eps, adding = starts[self.eps_step], Signal()
        m.d.comb += [
            schedule.valid.eq(active),
            schedule.step.eq(step),
            *(port.eq(place) for port, place in ((sums.low, schedule.low), (sums.high, schedule.high))),
            *(port.addr.eq(place) for port, place in ((low, schedule.low), (high, schedule.high))),
            write.en.eq(schedule.write),
            write.addr.eq(schedule.place),
            write.data.eq(adder.result),
            multiplier.valid.eq(starts[schedule.latency]),
            multiplier.a.eq(adder.result),
            multiplier.b.eq(part),
            inverse.x.eq(adder.result),
            self.r.eq(inverse.result),
        ]
        first, second = (Signal(FLOAT, name=name, reset_less=True) for name in ("first", "second"))
        m.d.sync += [
            adding.eq(schedule.add | with_eps),
            Cat(first).eq(
                Mux(with_eps, Cat(multiplier.result), Mux(schedule.partial, Cat(sums.low_sum), Cat(low.data)))
            ),
            Cat(second).eq(Mux(with_eps, Cat(eps), Mux(schedule.partial, Cat(sums.high_sum), Cat(high.data)))),
        ]
        m.d.comb += [adder.valid.eq(adding), adder.a.eq(first), adder.b.eq(second)]
        with m.If(starts[self.root_step]):
            m.d.comb += [inverse.valid.eq(1), inverse.function.eq(Inverse.RSQRT)]
