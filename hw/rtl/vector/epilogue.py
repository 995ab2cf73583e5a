# SPDX-License-Identifier: Apache-2.0
"""The epilogue: the operations on results on their way from the array to memory (:mod:`hw.spec.ops.epilogue`)."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.float_adder import FloatAdder
from hw.rtl.arithmetic.float_multiplier import FloatMultiplier
from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import SETTLING, gate
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.results import output_payload, result_payload
from hw.rtl.vector.layouts import (
    OPERAND_LATENCY,
    SECOND_UNIT,
    Operand,
    Target,
    epilogue_layout,
    operand_members,
    result_unit,
    row_layout,
)
from hw.rtl.vector.merge import MergePairs
from hw.rtl.vector.pair import PairUnit
from hw.rtl.vector.piece_maximum import PieceMaximum
from hw.rtl.vector.scales import TokenScales
from hw.rtl.vector.take import TakeTransfers
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.ops.scores import BANKS


class Epilogue(Block):
    """Sends transfers of results through the parts that the current job has.

    A transfer is taken if its operands are on chip and both outputs have room. From then on it never waits, so all
    parts are pipelines of fixed latency, and a part that the job does not have is a delay.

    Members
    -------
    job : the epilogues, one for each descriptor
    results : from the array
    available, read, release, token, column, data : the operands; see :func:`hw.rtl.vector.layouts.operand_members`
    first, second : the results; and the second output: products with a row, or maximum and argmax of each piece

    and with attention

    first, scores, cached : the results, by :class:`hw.rtl.vector.layouts.Target`. They leave in the order of the jobs,
        so one that is not taken blocks the others
    row, inverse : a row of a bank of scores, and its 1/S in the same cycle
    inverted : by bank: 1/S of all of its rows is known. Transfers of a job with ``inverse`` wait for it
    released : by bank: all rows of a job with ``inverse`` are scaled; one cycle, in which the bank is ``inverted``

    Throughput 1 transfer per cycle; with ``squares`` 1 in ``interval`` cycles.
    """

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, config.vector_lanes
        self.scalers = [FloatMultiplier() for _ in range(self.lanes)]
        self.adders = [FloatAdder() for _ in range(self.lanes)]
        self.pairs = [PairUnit() for _ in range(self.lanes // 2)]
        self.factors = [FloatMultiplier() for _ in range(self.lanes)]
        self.scales = TokenScales(config)
        self.maximum = PieceMaximum(config)
        self.take = TakeTransfers(config, self.scales.interval)
        output = stream.Signature(output_payload(config, self.lanes, result_unit(config)))
        attention = {}
        if config.has_attention:
            attention = {
                "scores": Out(output),
                "cached": Out(output),
                "row": Out(row_layout(config)),
                "inverse": In(FLOAT),
                "inverted": In(BANKS),
                "released": Out(BANKS),
            }
        super().__init__(
            {
                "job": In(stream.Signature(epilogue_layout(config))),
                "results": In(stream.Signature(result_payload(config, config.lanes))),
                **operand_members(config),
                "first": Out(output),
                "second": Out(stream.Signature(output_payload(config, self.lanes, SECOND_UNIT))),
                **attention,
            }
        )

    @property
    def value_latency(self) -> int:
        """Cycles from the decision to take a transfer to its results: operands, product, sum, operations on pairs."""
        return OPERAND_LATENCY + self._sum_latency + self.pairs[0].latency

    @property
    def _sum_latency(self) -> int:
        """Cycles from the operands to the sums: product, sum, and the register after the selection of sum or value."""
        return self.scalers[0].latency + self.adders[0].latency + 1

    @property
    def second_latency(self) -> int:
        """Cycles from the results to the second output."""
        return max(self.factors[0].latency, self.maximum.latency)

    @property
    def latency(self) -> int:
        """Cycles from a transfer to the results at the output."""
        return TakeTransfers.latency + self.value_latency + CreditFifo.latency

    @property
    def fifo_depth(self) -> int:
        """Entries of each output's FIFO: all transfers in the pipeline, and the cycles until an entry is free again."""
        return 1 << (self.value_latency + self.second_latency + 3).bit_length()

    @property
    def works(self) -> Value:
        """A transfer is taken, or r of a token is computed: for :func:`hw.rtl.common.clock_gate.gate`."""
        return self.take.taken.valid | self.scales.pending

    @property
    def settling(self) -> int:
        """Cycles from ``works`` until the state stays as it is, if nothing comes in."""
        after = max(self.second_latency, self.scales.sums.latency)
        return max(self.value_latency + after, self.scales.inverse.latency) + SETTLING

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "latency": self.latency,
            "second_latency": self.latency + self.second_latency,
            "fifo_depth": self.fifo_depth,
            "interval": self.scales.interval,
            "lanes": self.lanes,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.take = take = self.take
        shape = self.first.payload.shape()
        if self.config.has_attention:
            shape = data.StructLayout({**shape.members, "target": Target})
        m.submodules.first_fifo = first = CreditFifo(shape, self.fifo_depth)
        m.submodules.second_fifo = second = CreditFifo(self.second.payload.shape(), self.fifo_depth)
        wiring.connect(m, wiring.flipped(self.job), take.job)
        m.d.comb += [take.available.eq(self.available), *(a.eq(b) for a, b in zip(take.data, self.data, strict=True))]
        m.d.comb += [getattr(self, name).eq(getattr(take, name)) for name in ("read", "release", "token", "column")]
        if self.config.has_attention:
            self._split(m, first)
        else:
            wiring.connect(m, first.o, wiring.flipped(self.first))
        wiring.connect(m, second.o, wiring.flipped(self.second))
        self._widen(m, take)
        flags = take.taken.flags
        m.d.comb += [
            take.room.eq(first.room & second.room),
            first.claim.eq(take.taken.valid & ~flags.quiet),
            second.claim.eq(take.taken.valid & (flags.second | (flags.pieces & take.taken.place.piece_end))),
        ]
        about, values = self._scale(m, platform, take)
        about, values = self._add(m, platform, about, values, self.data[Operand.ADDEND])
        about, values = self._operate(m, about, values, self.data[Operand.TABLE])
        self._put_first(m, first, about, values)
        self._put_second(m, platform, second, about, values, self.data[Operand.FACTOR])
        return m

    def _split(self, m: Module, fifo: CreditFifo) -> None:
        """Each of the results goes to its target."""
        target, given = fifo.o.payload.target, fifo.o.payload
        for value, output in zip(Target, (self.first, self.scores, self.cached), strict=True):
            chosen = target == value
            m.d.comb += [
                output.valid.eq(fifo.o.valid & chosen),
                *(output.payload[name].eq(given[name]) for name, _ in output.payload.shape()),
            ]
            with m.If(chosen):
                m.d.comb += fifo.o.ready.eq(output.ready)

    def _widen(self, m: Module, take: TakeTransfers) -> None:
        """Connects the array's results with the lanes of the vector unit."""
        if self.config.lanes == self.lanes:
            wiring.connect(m, wiring.flipped(self.results), take.results)
        else:
            m.submodules.merge = merge = MergePairs(self.config)
            wiring.connect(m, wiring.flipped(self.results), merge.i)
            wiring.connect(m, merge.o, take.results)

    def _scale(self, m: Module, platform, take: TakeTransfers) -> tuple[data.View, list[Signal]]:
        """The values times r of their token, or with attention another factor."""
        scales = self.scales
        (m.submodules.scales,) = gate(
            m,
            platform,
            scales,
            name="scales",
            cycles=scales.sums.latency + 1,
            events=[scales.valid],
            pipeline=(scales.begin | scales.pending, scales.inverse.latency + 1),
        )
        m.submodules.r = memory = Memory(shape=FLOAT, depth=max(2, self.config.max_tokens), init=[])
        write, read, taken = memory.write_port(), memory.read_port(), take.taken
        about = delay(m, taken, OPERAND_LATENCY, name="with_operands", reset=True)
        m.d.comb += [
            read.addr.eq(taken.place.token),
            read.en.eq(taken.valid & taken.flags.scale),
            write.addr.eq(scales.token),
            write.data.eq(scales.r),
            write.en.eq(scales.done),
            take.pending.eq(scales.pending),
            scales.begin.eq(taken.valid & taken.flags.squares),
            scales.end.eq(taken.valid & taken.flags.squares & taken.place.last),
            scales.eps.eq(take.current.eps),
            scales.columns.eq(take.current.columns),
        ]
        factor = self._factor(m, take, read.data) if self.config.has_attention else read.data
        r = delay(m, factor, OPERAND_LATENCY - 1, name="r")
        return self._each(m, platform, "scale", self.scalers, about, about.flags.scale, take.values, [r] * self.lanes)

    def _factor(self, m: Module, take: TakeTransfers, r) -> Value:
        """The factor of the transfer that was taken one cycle ago: r of its token, the scores' constant, or 1/S."""
        job, taken = take.current, take.taken
        last = taken.valid & taken.place.last & job.inverse
        m.d.comb += [
            take.inverted.eq(self.inverted),
            self.row.bank.eq(job.bank),
            self.row.token.eq(taken.place.token),
            *(self.released[bank].eq(last & (job.bank == bank)) for bank in range(BANKS)),
        ]
        other = delay(m, Mux(job.inverse, Cat(self.inverse), Cat(job.factor)), 1, name="other_factor")
        chosen = delay(m, job.inverse | (job.target == Target.SCORES), 1, name="other_chosen")
        return Mux(chosen, other, Cat(r))

    def _add(self, m: Module, platform, about, values, addend) -> tuple[data.View, list[Signal]]:
        """The values plus the addend."""
        late = delay(m, addend, self.scalers[0].latency, name="addend")
        about, sums = self._each(m, platform, "add", self.adders, about, about.flags.add, values, late)
        return delay(m, about, 1, name="added", reset=True), [delay(m, value, 1, name="sum") for value in sums]

    def _each(
        self, m: Module, platform, name: str, operators, about, flag, values, others
    ) -> tuple[data.View, list[Signal]]:
        """One operator per lane; without the flag the values pass."""
        latency = operators[0].latency
        after, results = delay(m, about, latency, name=f"after_{name}", reset=True), []
        used = delay(m, flag, latency, name=f"{name}_used")
        parts = gate(m, platform, *operators, name=name, pipeline=(about.valid & flag, latency))
        for lane, (part, operator, value, other) in enumerate(zip(parts, operators, values, others, strict=True)):
            m.submodules[f"{name}_{lane}"] = part
            m.d.comb += [
                operator.valid.eq(about.valid & flag),
                Cat(operator.a).eq(value),
                Cat(operator.b).eq(other),
            ]
            result = Signal(FLOAT, name=f"{name}_result_{lane}")
            m.d.comb += Cat(result).eq(Mux(used, operator.result, delay(m, value, latency, name=f"{name}_pass_{lane}")))
            results.append(result)
        return after, results

    def _operate(self, m: Module, about, values, table) -> tuple[data.View, list[Signal]]:
        """The operations on pairs of columns."""
        latency, results = self.pairs[0].latency, []
        late = delay(m, table, self._sum_latency, name="table")
        for index, pair in enumerate(self.pairs):
            m.submodules[f"pair_{index}"] = pair
            low, high = 2 * index, 2 * index + 1
            m.d.comb += [
                pair.valid.eq(about.valid),
                pair.rotary.eq(about.rotate),
                pair.silu.eq(about.flags.silu),
                pair.low.eq(values[low]),
                pair.high.eq(values[high]),
                Cat(pair.cosine).eq(late[low]),
                Cat(pair.sine).eq(late[high]),
            ]
            results += [pair.low_result, pair.high_result]
        return delay(m, about, latency, name="after_pairs", reset=True), results

    def _put_first(self, m: Module, fifo: CreditFifo, about, values) -> None:
        """The results. After SiLU a transfer has half as many columns, which are in both halves of the payload."""
        place, half, silu, out = about.place, self.lanes // 2, about.flags.silu, fifo.i.payload
        if self.config.has_attention:
            m.d.comb += out.target.eq(about.target)
        for lane in range(self.lanes):
            m.d.comb += out.values[lane].eq(Mux(silu, values[2 * (lane % half)], values[lane]))
        kept = Cat(place.keep[2 * lane] for lane in range(half))
        m.d.comb += [
            fifo.i.valid.eq(about.valid & ~about.flags.quiet),
            out.keep.eq(Mux(silu, kept, place.keep)),
            out.token.eq(place.token),
            out.column.eq(Mux(silu, Cat(place.column, about.piece[0]), place.column << 1)),
            out.chunk_end.eq(place.chunk_end & (~silu | about.piece[0] | place.last)),
            out.last.eq(place.last),
        ]

    def _put_second(self, m: Module, platform, fifo: CreditFifo, about, values, factor) -> None:
        """The second output, and the sums of squares."""
        m.submodules.maximum = maximum = self.maximum
        before = self.value_latency - OPERAND_LATENCY
        late = delay(m, factor, before, name="factor")
        product_latency, latency = self.factors[0].latency, self.second_latency
        _, products = self._each(m, platform, "factor", self.factors, about, about.flags.second, values, late)
        m.d.comb += [
            maximum.valid.eq(about.valid & about.flags.pieces),
            Cat(maximum.values).eq(Cat(values)),
            *(getattr(maximum, name).eq(about.place[name]) for name in ("keep", "token", "column")),
            self.scales.valid.eq(about.valid & about.flags.squares),
            Cat(self.scales.values).eq(Cat(values)),
            self.scales.place.eq(about.place),
            self.scales.head.eq(about.head),
        ]
        after, out = delay(m, about, latency, name="after_second", reset=True), fifo.i.payload
        products = [delay(m, value, latency - product_latency, name=f"product_{i}") for i, value in enumerate(products)]
        extremes = delay(m, Cat(maximum.maximum, maximum.index), latency - maximum.latency, name="extremes")
        place, pieces, per_chunk = after.place, after.flags.pieces, PIECE_FLOATS // SECOND_UNIT
        for lane in range(self.lanes):
            extreme = extremes[FLOAT_BITS:] if lane % 2 else extremes[:FLOAT_BITS]
            m.d.comb += out.values[lane].eq(Mux(pieces, extreme, Cat(products[lane])))
        full = (after.piece & (per_chunk - 1)) == per_chunk - 1
        m.d.comb += [
            fifo.i.valid.eq(after.valid & (after.flags.second | (pieces & place.piece_end))),
            out.keep.eq(Mux(pieces, Const(3, self.lanes), place.keep)),
            out.token.eq(place.token),
            out.column.eq(Mux(pieces, after.piece[: len(out.column)], place.column * (self.lanes // SECOND_UNIT))),
            out.chunk_end.eq(place.chunk_end & (~pieces | full | place.last)),
            out.last.eq(place.last),
        ]
