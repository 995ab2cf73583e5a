# SPDX-License-Identifier: Apache-2.0
"""The partial sums of the squares of each token's elements."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.float_adder import FloatAdder
from hw.rtl.arithmetic.float_multiplier import FloatMultiplier
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.select import select
from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.vector import PARTIAL_SUMS


class PartialSums(Block):
    """16 sums of squares for each token: :func:`hw.spec.numerics.vector.sum_of_squares`. Element n is in number n % 16.

    Each lane has a multiplier, an adder and a memory with its partial sums. A partial sum gets its next element after
    ``16 / lanes`` transfers or more, and its adder needs 8 cycles. So ``interval`` cycles are needed from one transfer
    to the next: 1 with 2 lanes, 2 with 4, 4 with 8. More adders would not help, because the order of a partial sum's
    elements is fixed.

    Members
    -------
    valid : there are elements
    values : float32
    token, row : the token; the place of the elements among 16 neighbouring ones, in transfers
    head : these are the token's first elements of these partial sums
    read_token, low, high : for the sum of the partial sums: a token, and two partial sums
    low_sum, high_sum : float32, in the same cycle; valid ``latency`` cycles after the last elements, while none come

    A token's number of elements is a multiple of 16.
    """

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, config.vector_lanes
        self.rows = PARTIAL_SUMS // self.lanes
        self.multipliers = [FloatMultiplier() for _ in range(self.lanes)]
        self.adders = [FloatAdder() for _ in range(self.lanes)]
        super().__init__(
            {
                "valid": In(1),
                "values": In(data.ArrayLayout(FLOAT, self.lanes)),
                "token": In(range(config.max_tokens)),
                "row": In(range(self.rows)),
                "head": In(1),
                "read_token": In(range(config.max_tokens)),
                **dict.fromkeys(("low", "high"), In(range(PARTIAL_SUMS))),
                **dict.fromkeys(("low_sum", "high_sum"), Out(FLOAT)),
            }
        )

    @staticmethod
    def interval_of(config: AcceleratorConfig) -> int:
        """Cycles from one transfer to the next one."""
        return max(1, FloatAdder.cycles() * config.vector_lanes // PARTIAL_SUMS)

    @property
    def interval(self) -> int:
        """Cycles from one transfer to the next one."""
        return self.interval_of(self.config)

    @property
    def latency(self) -> int:
        """Cycles from elements until their partial sums can be read."""
        return self.multipliers[0].latency + self.adders[0].latency + 1

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "interval": self.interval, "lanes": self.lanes}

    def elaborate(self, platform) -> Module:
        m = Module()
        place = data.StructLayout({"valid": 1, "head": 1, "row": range(self.rows), "token": self.token.shape()})
        given = Signal(place)
        m.d.comb += [given[name].eq(getattr(self, name)) for name in ("valid", "head", "row", "token")]
        # The sum so far is read one cycle before it is added. It may be the sum that leaves the adder in this cycle or
        # in the next one, which is not in the memory yet.
        reading = delay(m, given, self.multipliers[0].latency - 1, name="reading", reset=True)
        squared = delay(m, reading, 1, name="squared", reset=True)
        leaving = delay(m, squared, self.adders[0].latency - 1, name="leaving", reset=True)
        added = delay(m, leaving, 1, name="added", reset=True)
        where, written = Cat(reading.row, reading.token), Cat(added.row, added.token)
        newer = added.valid & (where == written)
        newest = Signal()
        m.d.sync += newest.eq(~reading.head & leaving.valid & (where == Cat(leaving.row, leaving.token)))
        lane_bits = self.lanes.bit_length() - 1
        sums = []
        for lane, (multiplier, adder) in enumerate(zip(self.multipliers, self.adders, strict=True)):
            m.submodules[f"multiplier_{lane}"], m.submodules[f"adder_{lane}"] = multiplier, adder
            depth = self.rows << len(self.token)
            m.submodules[f"sums_{lane}"] = memory = Memory(shape=FLOAT, depth=depth, init=[])
            write = memory.write_port()
            own, low, high = (memory.read_port(domain="comb") for _ in range(3))
            so_far = Signal(FLOAT, name=f"so_far_{lane}", reset_less=True)
            m.d.sync += Cat(so_far).eq(Mux(reading.head, 0, Mux(newer, Cat(adder.result), Cat(own.data))))
            m.d.comb += [
                multiplier.valid.eq(self.valid),
                multiplier.a.eq(self.values[lane]),
                multiplier.b.eq(self.values[lane]),
                own.addr.eq(where),
                adder.valid.eq(squared.valid),
                Cat(adder.a).eq(Mux(newest, Cat(adder.result), Cat(so_far))),
                adder.b.eq(multiplier.result),
                write.addr.eq(written),
                write.data.eq(adder.result),
                write.en.eq(added.valid),
                low.addr.eq(Cat(self.low[lane_bits:], self.read_token)),
                high.addr.eq(Cat(self.high[lane_bits:], self.read_token)),
            ]
            sums.append((low.data, high.data))
        for index, (result, place) in enumerate(((self.low_sum, self.low), (self.high_sum, self.high))):
            m.d.comb += Cat(result).eq(select([Cat(pair[index]) for pair in sums], place[:lane_bits]))
        return m
