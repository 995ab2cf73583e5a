# SPDX-License-Identifier: Apache-2.0
"""The order in which the bytes of a position are written."""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.geometry import CacheGeometry, log2
from hw.rtl.attention.cache.layouts import GROUP_BITS, PLANE_BITS, Part, placed_layout, region_layout, step_layout
from hw.rtl.attention.cache.store import bundle_layout
from hw.rtl.memory.write_manager import PIECE_BYTES
from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.attention import CHUNK


class CacheSteps(wiring.Component):
    """Divides a bundle of positions into beats of one port, and these into pieces.

    Keys: their row exponents; their scales, one by one; their mantissas, port by port, so that the beats of a port are
    neighbours and form pieces of up to 1 KiB. All positions of the bundle have bytes in each beat. Values: the
    mantissas of one position after the other, tile of columns by tile, plane by plane; and the exponents of all
    positions. All pieces but those of keys' mantissas are one beat.

    Members
    -------
    jobs : appends
    bundle : the oldest bundle, when all of its mantissas are there
    room : another step may be made
    valid, step : a step
    region, header_beats : where the cache is, and beats of a header; they stay for ``SETTLING`` cycles after the last
        step of a job

    Latency 1 cycle. Throughput 1 step per cycle, with two cycles between bundles.
    """

    SETTLING = 4

    def __init__(self, config: AcceleratorConfig, shape: CacheGeometry):
        self.config, self.shape = config, shape
        super().__init__(
            {
                "jobs": In(stream.Signature(placed_layout(config, shape))),
                "bundle": In(stream.Signature(bundle_layout(shape))),
                "room": In(1),
                "valid": Out(1),
                "step": Out(step_layout(shape)),
                "region": Out(region_layout()),
                "header_beats": Out(placed_layout(config, shape)["header_beats"].shape),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        self.job = Signal(placed_layout(self.config, self.shape), reset_less=True)
        # Begin a bundle; make a step; the last one of the bundle was made in the cycle before.
        self.begin, self.move, self.head_end = Signal(), Signal(), Signal()
        # The bundle has the last position of the job; its last slot.
        self.final, self.last_slot = Signal(), Signal.like(self.job.slot)
        self.part = Signal(len(Part))
        m.d.comb += [
            self.region.eq(self.job.region),
            self.header_beats.eq(self.job.header_beats),
            self.bundle.ready.eq(self.head_end),
            self.last_slot.eq(Cat(self._last_member, self.job.slot[self.shape.bundle_bits :])),
        ]
        self._walk_jobs(m)
        self._walk_head(m)
        return m

    @property
    def _last_member(self) -> Value:
        return self.shape.member(self.bundle.payload.last)

    # Jobs

    def _walk_jobs(self, m: Module) -> None:
        """Takes jobs, begins bundles, and moves from slot to slot."""
        job, active, working, settling = self.job, Signal(), Signal(), Signal(self.SETTLING)
        job_end, last_slot = Signal(), self.last_slot
        wraps, crosses, beyond = Signal(), Signal(), Signal.like(job.origin)
        # Positions of the bundle minus 1.
        more = (self._last_member - self.shape.member(job.slot))[: self.shape.bundle_bits]
        m.d.comb += [
            self.jobs.ready.eq(~active & ~settling.any()),
            self.begin.eq(active & ~working & self.bundle.valid),
            self.move.eq(working & self.room & ~self.head_end),
            job_end.eq(self.head_end & self.final),
            # The next slot is in another output tile, or in another chunk.
            crosses.eq(Mux(job.keys, last_slot[: log2(self.config.tile)].all(), last_slot[: log2(CHUNK)].all())),
        ]
        m.d.sync += [
            settling.eq(Cat(job_end, settling)),
            # Known before they are needed, because a head has three steps or more.
            wraps.eq(last_slot + 1 == job.slots),
            self.final.eq(job.last_token == more),
            beyond.eq(job.origin + job.tile_beats),
        ]
        with m.If(self.jobs.valid & self.jobs.ready):
            m.d.sync += [job.eq(self.jobs.payload), active.eq(1)]
        with m.If(self.begin):
            m.d.sync += working.eq(1)
        with m.If(self.head_end):
            m.d.sync += [
                working.eq(0),
                active.eq(~job_end),
                job.last_token.eq(job.last_token - more - 1),
                job.slot.eq(Mux(wraps, 0, last_slot + 1)),
            ]
            with m.If(wraps):
                m.d.sync += job.origin.eq(0)
            with m.Elif(crosses):
                m.d.sync += job.origin.eq(beyond)

    # A head

    def _walk_head(self, m: Module) -> None:
        """Counts through the parts of a bundle: its positions if they are values, turns of the ports, groups, tiles in
        a group, planes, and beats."""
        shape, job, part, move = self.shape, self.job, self.part, self.move
        body, values = part[Part.BODY], part[Part.VALUES]
        low = Signal(range(max(shape.group_beats, shape.parts)))
        plane, tile = Signal(PLANE_BITS), Signal(range(shape.value_tiles))
        group, turn, member = Signal(GROUP_BITS), Signal(range(shape.turns)), Signal(max(1, shape.bundle_bits))
        planes = body | values | part[Part.SCALES]
        ends = Signal(6)
        m.d.comb += ends.eq(
            Cat(
                Mux(body, low == shape.group_beats - 1, ~values | (low == shape.parts - 1)),
                ~planes | (plane == 0),
                ~values | (tile == shape.value_tiles - 1),
                part[Part.EXPONENT] | (group == job.last_group),
                ~body | (turn == shape.turns - 1),
                ~values | (member == self.bundle.payload.last) if shape.bundle > 1 else Const(1),
            )
        )
        part_end = Signal()
        last_part = part[Part.BODY] | part[Part.TABLE]
        m.d.comb += part_end.eq(move & ends.all())
        # A register, because long paths end at the FIFO of heads.
        m.d.sync += self.head_end.eq(part_end & last_part)
        counters = ((low, 0), (plane, job.top), (tile, 0), (group, 0), (turn, 0), (member, shape.member(job.slot)))
        for index, (counter, start) in enumerate(counters):
            with m.If(self.begin):
                m.d.sync += counter.eq(start)
            with m.Elif(move & ends[:index].all() if index else move):
                moved = counter - 1 if counter is plane else counter + 1
                m.d.sync += counter.eq(Mux(ends[index], start, moved))
        with m.If(self.begin):
            m.d.sync += part.eq(Mux(job.keys, 1 << Part.EXPONENT, 1 << Part.VALUES))
        with m.Elif(part_end):
            m.d.sync += part.eq(part << 1)
        self._places(m, low, plane, tile, group, turn, member, ends)

    def _places(self, m: Module, low, plane, tile, group, turn, member, ends: Signal) -> None:
        """The step of these counters, in a register."""
        shape, job, part, step = self.shape, self.job, self.part, self.step
        # A record is the scales and zero points of one group and plane.
        record = Signal(shape.inside_bits)
        body, values, table_part = part[Part.BODY], part[Part.VALUES], part[Part.TABLE]
        longest = len(shape.key_layers) * shape.group_beats
        beat, left = Signal(range(longest)), Signal(range(longest))
        origin, table = Signal(shape.origin_bits), Signal(shape.table_bits)
        most = Cat(Const(shape.group_beats - 1, log2(shape.group_beats)), job.last_record)
        turn_end, piece = ends[:4].all(), PIECE_BYTES // shape.port_bytes
        with m.If(self.begin):
            m.d.sync += [
                record.eq(self.config.tile),
                beat.eq(0),
                left.eq(most),
                origin.eq(job.origin),
                table.eq(job.slot),
            ]
        with m.Elif(self.move):
            with m.If(part[Part.SCALES]):
                m.d.sync += record.eq(record + shape.scale_stride)
            with m.If(body):
                m.d.sync += [beat.eq(Mux(turn_end, 0, beat + 1)), left.eq(Mux(turn_end, most, left - 1))]
            with m.If(values & ends[:2].all()):
                # The next position begins again.
                m.d.sync += origin.eq(Mux(ends[:4].all(), job.origin, origin + job.columns_step))
            with m.If(table_part):
                m.d.sync += table.eq(table + (job.chunks << log2(CHUNK)))
        if shape.spaced:
            first, last_beat, last_piece = Const(1), Const(0), left == 0
        else:
            first = ~body | (beat[: log2(piece)] == 0)
            long = left >= piece
            last_beat = Mux(body, Mux(long, piece - 1, left), 0)
            last_piece = ~long
        first_member, last_member = shape.member(job.slot), self._last_member
        mask = [values | ((index >= first_member) & (index <= last_member)) for index in range(shape.bundle)]
        heads = [self.bundle.payload.heads[index] for index in range(shape.bundle)]
        mantissa = Mux(body, self._of_key(low, group, turn), self._of_value(low, tile, group))
        word_bits = log2(shape.word)
        byte = mantissa[log2(shape.per_byte) : word_bits]
        m.d.sync += self.valid.eq(self.move)
        half = Signal()
        with m.If(self.head_end):
            m.d.sync += half.eq(~half)
        with m.If(self.move):
            m.d.sync += [
                step.part.eq(part),
                step.first.eq(first),
                step.last.eq(self.final & ((body & ends[4] & last_piece) | (table_part & ends.all()))),
                step.last_beat.eq(last_beat),
                step.origin.eq(origin),
                step.inside.eq(self._inside(low, plane, turn, member, beat, record)),
                step.table.eq(table),
                step.address.eq(Cat(mantissa[word_bits:], half)),
                step.byte.eq(byte),
                step.plane.eq(plane),
                step.member.eq(member),
                step.mask.eq(Cat(mask)),
                step.wide.eq(Array(head.wide for head in heads)[last_member] if shape.bundle > 1 else heads[0].wide),
                *(
                    step.exponent[index].eq(Array(head.exponents[each] for each in range(1 << GROUP_BITS))[group])
                    for index, head in enumerate(heads)
                ),
                *(step.largest[index].eq(head.largest) for index, head in enumerate(heads)),
            ]

    def _of_key(self, low, group, turn) -> Value:
        """The first mantissa of a beat of a key."""
        shape = self.shape
        inside = Const(0, log2(shape.run * shape.per_byte))
        return Cat(inside, turn[: log2(shape.turns)], low[: log2(shape.group_beats)], group)

    def _of_value(self, low, tile, group) -> Value:
        """The first mantissa of a beat of a value."""
        shape = self.shape
        inside = Const(0, log2(shape.value_bytes * shape.per_byte))
        return Cat(inside, low[: log2(shape.parts)], tile[: log2(shape.value_tiles)], group)

    def _inside(self, low, plane, turn, member, beat, record) -> Value:
        """The first byte of a beat in the header or in the body of its output tile."""
        shape, slot, part = self.shape, self.job.slot, self.part
        column = slot[: log2(self.config.tile)]
        unit = Const(0, max(0, log2(shape.port_bytes) - log2(self.config.tile)))
        of_key = Cat(column, unit, turn[: log2(shape.turns)], beat)
        position, group_bits = Cat(shape.member(member), slot[shape.bundle_bits : log2(CHUNK)]), log2(shape.value.group)
        of_value = Cat(
            Const(0, log2(shape.value_bytes)),
            low[: log2(shape.parts)],
            position[:group_bits],
            # The highest plane comes first.
            ~plane[: log2(shape.value_planes)],
            position[group_bits:],
        )
        places = {
            Part.EXPONENT: column,
            Part.SCALES: record + (column << 1),
            Part.BODY: of_key,
            Part.VALUES: of_value,
        }
        terms = [Mux(part[index], place, 0) for index, place in places.items()]
        return terms[0] | terms[1] | terms[2] | terms[3]
