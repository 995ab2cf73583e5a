# SPDX-License-Identifier: Apache-2.0
"""The header ring: row exponents, scales and zero points, prefetched and read strictly in order."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.ram import buffer_attributes
from hw.rtl.common.walker import Walker, command_signature
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout, ceil_div
from hw.spec.ops.command import max_header_beats


def ring_depth(config: AcceleratorConfig) -> int:
    """Beats of the header ring: room for the longest header, and for half of another one that is being read."""
    return 1 << (max_header_beats(config) * 3 // 2).bit_length()


class HeaderBuffer(wiring.Component):
    """A ring of beats, read in runs of units that start at any unit. It has one bank of memory per unit of a beat.

    A run is at most a beat long and may include units of two beats: banks below its first unit read the next beat.

    Members
    -------
    beats : header beats, 1 per cycle
    available : units that are written and not yet read
    move : advance the current position in this cycle
    skip : number of units to advance
    align : advance further to the start of the next beat
    run : the units that start at the current position, lowest first, 1 cycle later
    """

    latency = 1

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.stream = StreamLayout(config)
        self.depth = ring_depth(config)
        units = self.stream.beat_units
        super().__init__(
            {
                "beats": In(stream.Signature(config.beat_bits)),
                "available": Out(range(self.depth * units + 1)),
                "move": In(1),
                "skip": In(range(units + 1)),
                "align": In(1),
                "run": Out(config.beat_bits),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        units, width = self.stream.beat_units, self.stream.unit_bits
        unit_address_bits = units.bit_length() - 1
        address_bits = (self.depth - 1).bit_length()
        # One bit more than the address distinguishes a full ring from an empty one.
        written = Signal(address_bits + 1)
        position = Signal(address_bits + 1 + unit_address_bits)
        offset, row = position[:unit_address_bits], position[unit_address_bits:]
        no_offset = Const(0, unit_address_bits)
        push, full, held = Signal(), Signal(), Signal(address_bits + 1)
        # A register, because the whole stream depends on it. So units that are read become room one cycle later.
        m.d.sync += full.eq(held >= Mux(push, self.depth - 1, self.depth))
        m.d.comb += [
            held.eq(written - row),
            self.beats.ready.eq(~full),
            push.eq(self.beats.valid & self.beats.ready),
            self.available.eq((Cat(no_offset, written) - position)[: address_bits + 1 + unit_address_bits]),
        ]
        m.d.sync += written.eq(written + push)

        moved = Signal.like(position)
        m.d.comb += moved.eq(position + self.skip)
        aligned = Cat(no_offset, moved[unit_address_bits:] + moved[:unit_address_bits].any())
        with m.If(self.move):
            m.d.sync += position.eq(Mux(self.align, aligned, moved))

        next_row = Signal(address_bits)
        m.d.comb += next_row.eq(row + 1)
        offset_read = Signal.like(offset)
        m.d.sync += offset_read.eq(offset)
        read = []
        for bank in range(units):
            m.submodules[f"bank_{bank}"] = memory = Memory(
                shape=width, depth=self.depth, init=[], attrs=buffer_attributes(platform, self.depth, width)
            )
            write_port, read_port = memory.write_port(), memory.read_port()
            m.d.comb += [
                write_port.addr.eq(written[:address_bits]),
                write_port.data.eq(self.beats.payload[bank * width : (bank + 1) * width]),
                write_port.en.eq(push),
                read_port.addr.eq(Mux(bank < offset, next_row, row)),
                read_port.en.eq(1),
            ]
            read.append(read_port.data)
        # Rotate so that the current unit comes first, by powers of two.
        for power in range(unit_address_bits):
            rotated = [Signal(width, name=f"rotate_{power}_{index}") for index in range(units)]
            for index in range(units):
                other = read[(index + (1 << power)) % units]
                m.d.comb += rotated[index].eq(Mux(offset_read[power], other, read[index]))
            read = rotated
        m.d.comb += self.run.eq(Cat(read))
        return m


class HeaderReader(Block):
    """Divides headers into the row exponents of each output tile and one record per group.

    Members
    -------
    command : the layers, in the order of the stream
    beats : header beats
    exponents : ``tile`` row exponents, one transfer per output tile
    records : scale mantissas and zero points of one group, ``tile`` each
    tile_ready : one cycle for each output tile when its exponents have been read: its records then come in time

    Throughput: 1 record in ``record_cycles`` (:class:`hw.spec.memory.geometry.StreamLayout`) cycles.

    An item is read when all of it is available. A read takes one cycle for each beat's worth, and one cycle before them
    for the comparison. In the same cycle, this comparison and the sum for the start of the next item would be the
    slowest path of the core.
    """

    tiles_ahead = 16
    """Number of output tiles whose exponents, and of groups whose records, are read in advance."""

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.stream = StreamLayout(config)
        super().__init__(
            {
                "command": In(command_signature(config)),
                "beats": In(stream.Signature(config.beat_bits)),
                "exponents": Out(stream.Signature(self.stream.exponents_bits)),
                "records": Out(stream.Signature(self.stream.record_bits)),
                "tile_ready": Out(1),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from an output tile's last beat of exponents to the exponents."""
        return 2 + self.stream.exponents_cycles

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "ring_depth": ring_depth(self.config)}

    def elaborate(self, platform) -> Module:
        m = Module()
        layout, config = self.stream, self.config
        m.submodules.buffer = buffer = HeaderBuffer(config)
        m.submodules.exponents_fifo = exponents = StreamFifo(layout.exponents_bits, self.tiles_ahead)
        m.submodules.records_fifo = records = StreamFifo(layout.record_bits, self.tiles_ahead)
        # A header has its exponents, then its records: groups + 1 items, and perhaps records that are not used.
        m.submodules.walker = walker = Walker(config, {"item": self._items, "tile": lambda command: command.out_tiles})
        wiring.connect(m, wiring.flipped(self.command), walker.command)
        wiring.connect(m, wiring.flipped(self.beats), buffer.beats)
        wiring.connect(m, exponents.o, wiring.flipped(self.exponents))
        wiring.connect(m, records.o, wiring.flipped(self.records))

        # One item takes ``chunks`` reads of ``chunk`` units; the last read skips only the units that it needs.
        is_exponents = walker.first.item
        plan = []
        for size in (layout.record_units, layout.exponents_units):
            chunks = ceil_div(size, layout.beat_units)
            chunk = ceil_div(size, chunks)
            plan.append((chunks, chunk, size - (chunks - 1) * chunk))
        (chunks, chunk, last_chunk), (exp_chunks, exp_chunk, exp_last) = plan
        place = Signal(range(max(chunks, exp_chunks)))
        last = Signal()
        skip = Signal.like(buffer.skip)
        size = Mux(is_exponents, layout.exponents_units, layout.record_units)
        read = Signal()
        m.d.comb += [
            last.eq(place == Mux(is_exponents, exp_chunks - 1, chunks - 1)),
            skip.eq(
                Mux(is_exponents, Mux(last, exp_last, exp_chunk), Mux(last, last_chunk, chunk)),
            ),
            buffer.move.eq(read),
            buffer.skip.eq(skip),
            buffer.align.eq(last & walker.last.item),
            walker.step.eq(read & last),
        ]
        # Registers, so that the path to ``read`` has no comparison. One item may be between the ring and the FIFO when
        # the FIFO's level is read: items are at least two cycles apart, so the item before it is in the FIFO.
        exponents_room, records_room = Signal(init=1), Signal(init=1)
        m.d.sync += [
            exponents_room.eq(exponents.level < self.tiles_ahead - 1),
            records_room.eq(records.level < self.tiles_ahead - 1),
        ]
        room = Mux(is_exponents, exponents_room, records_room)
        m.d.sync += read.eq(Mux(read, ~last, walker.active & room & (buffer.available >= size)))
        with m.If(read):
            m.d.sync += place.eq(Mux(last, 0, place + 1))

        self._assemble(m, buffer, read, last, is_exponents, exponents.i, plan)
        is_record = ~is_exponents & self._used(m, walker) if config.has_attention else ~is_exponents
        self._assemble(m, buffer, read, last, is_record, records.i, plan, records=True)
        m.d.comb += self.tile_ready.eq(exponents.i.valid & exponents.i.ready)
        return m

    def _items(self, command: data.View) -> Value:
        """Items of a header."""
        return command.groups + 1 + command.spare_records if self.config.has_attention else command.groups + 1

    def _used(self, m: Module, walker: Walker) -> Signal:
        """Whether the walker's record is one of the groups'. Only the records in front are."""
        left, used = Signal.like(walker.current.groups), Signal(init=1)
        with m.If(walker.step):
            with m.If(walker.first.item):
                m.d.sync += [left.eq(walker.current.groups - 1), used.eq(1)]
            with m.Else():
                m.d.sync += [left.eq(left - 1), used.eq(used & (left != 0))]
        return used

    def _assemble(self, m: Module, buffer, read, last, selected, target, plan, records: bool = False) -> None:
        """Collects the chunks of one kind of item from the buffer, one cycle after their reads."""
        name = "records" if records else "exponents"
        chunks, chunk, last_chunk = plan[0 if records else 1]
        width = self.stream.unit_bits
        valid = Signal(name=f"{name}_valid")
        m.d.sync += valid.eq(read & last & selected)
        m.d.comb += target.valid.eq(valid)
        run = buffer.run
        if chunks == 1:
            m.d.comb += target.payload.eq(run[: last_chunk * width])
            return
        earlier = Signal((chunks - 1) * chunk * width, name=f"{name}_earlier", reset_less=True)
        more = Signal(name=f"{name}_more")
        m.d.sync += more.eq(read & ~last & selected)
        with m.If(more):
            m.d.sync += earlier.eq(Cat(earlier, run[: chunk * width])[-len(earlier) :])
        m.d.comb += target.payload.eq(Cat(earlier, run[: last_chunk * width]))
