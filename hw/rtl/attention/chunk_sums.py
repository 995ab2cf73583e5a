# SPDX-License-Identifier: Apache-2.0
"""Adds the chunks of values, between the array and the epilogue."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from hw.rtl.arithmetic.float_adder import FloatAdder
from hw.rtl.common.block import Block
from hw.rtl.common.delay import delay
from hw.rtl.common.fifo import CreditFifo, Credits, StreamFifo
from hw.rtl.common.results import result_payload
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.kv_cache import LONGEST_CONTEXT
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops.epilogue import MAX_HEAD


def sums_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The results of one descriptor.

    values : they are chunks of values; otherwise they are a layer, and the other fields have no meaning
    chunks : number of chunks, 1 or more
    tiles : number of column tiles, of ``tile`` columns each
    tokens : M
    """
    return data.StructLayout(
        {
            "values": 1,
            "chunks": range(LONGEST_CONTEXT // CHUNK + 1),
            "tiles": range(MAX_HEAD // config.tile + 1),
            "tokens": unsigned(config.max_tokens.bit_length()),
        }
    )


class ChunkSums(Block):
    """Adds the chunks of each column tile in ascending order, as float32; all other results pass.

    Of values, the core gives one layer of ``tile`` columns for each column tile of each chunk. The first chunk's
    results are stored, those of the others are added to them, and the sums of the last chunk leave. They have the
    places of one layer with all column tiles, which is a single piece. Bit for bit
    :func:`hw.spec.numerics.attention.weighted_values` before its product with 1/S.

    Members
    -------
    job : one for each descriptor that uses the array
    i : results of the core
    o : results of the descriptors

    Latency 0 cycles for results that pass, which are those of other layers and of values with one chunk; they wait
    until all sums have left. ``sum_latency`` cycles for sums. Throughput 1 transfer per cycle, but two chunks of the
    same column and token are ``interval`` cycles apart or more.
    """

    latency = 0
    _JOBS = 2

    def __init__(self, config: AcceleratorConfig):
        self.config, self.lanes = config, config.lanes
        self.adders = [FloatAdder() for _ in range(self.lanes)]
        results = stream.Signature(result_payload(config, self.lanes))
        super().__init__({"job": In(stream.Signature(sums_layout(config))), "i": In(results), "o": Out(results)})

    @property
    def add_latency(self) -> int:
        """Cycles from a transfer to its sums: the memory, the sum."""
        return 1 + self.adders[0].latency

    @property
    def sum_latency(self) -> int:
        """Cycles from a transfer to its sums at the output."""
        return self.add_latency + CreditFifo.latency

    @property
    def interval(self) -> int:
        """Cycles from a transfer to the next one that is added to the same sums: these are stored in the last one."""
        return self.add_latency + 1

    @property
    def fifo_depth(self) -> int:
        """Entries of the FIFO of sums: all transfers in the pipeline, and the cycles until an entry is free again."""
        return 1 << (self.sum_latency + 1).bit_length()

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "latency": self.latency,
            "sum_latency": self.sum_latency,
            "interval": self.interval,
            "lanes": self.lanes,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        per_row = self.config.tile // self.lanes
        parts = {"values": data.ArrayLayout(FLOAT_BITS, self.lanes), "token": self.i.payload.token.shape()}
        out = {**parts, "column": self.i.payload.column.shape(), "piece_end": 1, "last": 1}
        m.submodules.fifo = fifo = CreditFifo(data.StructLayout(out), self.fifo_depth)
        m.submodules.left = left = Credits(self.fifo_depth, init=self.fifo_depth, least=self.fifo_depth)
        job, job_valid, job_end = self._jobs(m, per_row)
        i, step, passes = self.i.payload, Signal(), Signal()
        first, final, free = Signal(init=1), Signal(), Signal()
        store, add, claim = Signal(), Signal(), Signal()
        added = delay(m, Cat(add, final), self.add_latency, name="added", reset=True)
        m.d.comb += [
            passes.eq(job_valid & job.passes & left.enough),
            self.i.ready.eq(job_valid & Mux(job.passes, left.enough & self.o.ready, first | (free & fifo.room))),
            step.eq(self.i.valid & self.i.ready),
            store.eq(step & ~job.passes & first),
            add.eq(step & ~job.passes & ~first),
            claim.eq(add & final),
            fifo.claim.eq(claim),
            left.take.eq(claim),
            left.add.eq(fifo.o.valid & fifo.o.ready),
        ]
        # Whether the tile is the last one: a register, but for the first tile of a job.
        later, later_last = Signal(), Signal()
        last_tile, tile, following_tile = Signal(), Signal.like(job.last_tile), Signal.like(job.last_tile)
        place = Signal(data.StructLayout({name: out[name] for name in ("token", "column", "piece_end", "last")}))
        column_bits = per_row.bit_length() - 1
        m.d.comb += [
            following_tile.eq(tile + 1),
            last_tile.eq(Mux(later, later_last, job.one_tile)),
            place.token.eq(i.token),
            place.column.eq(Mux(job.values, Cat(i.column[:column_bits], tile), i.column)),
            place.piece_end.eq(i.piece_end & last_tile),
            place.last.eq(i.last & last_tile),
            job_end.eq(step & i.last & last_tile & (job.passes | final)),
        ]
        with m.If(step & i.last & job.values):
            m.d.sync += [
                tile.eq(Mux(last_tile, 0, following_tile)),
                later.eq(~last_tile),
                later_last.eq(following_tile == job.last_tile),
            ]
        # The number of the chunk after this one, from 1.
        following = Signal.like(job.chunks, init=2)
        with m.If(step & ~job.passes & i.last & last_tile):
            m.d.sync += [
                first.eq(final),
                final.eq(~final & (following == job.chunks)),
                following.eq(Mux(final, 2, following + 1)),
            ]
        self._wait(m, job.entries, add, added[0], free)
        sums = self._add(m, store, add, added[0] & ~added[1], Cat(i.column[:column_bits], tile, i.token))
        ends = delay(m, place, self.add_latency, name="place")
        o = self.o.payload
        m.d.comb += [
            fifo.i.valid.eq(added.all()),
            Cat(fifo.i.payload.values).eq(Cat(sums)),
            *(fifo.i.payload[name].eq(ends[name]) for name, _ in place.shape()),
            # No sum is left if results pass.
            self.o.valid.eq(fifo.o.valid | (passes & self.i.valid)),
            fifo.o.ready.eq(self.o.ready),
            Cat(o.values).eq(Mux(passes, Cat(i.values), Cat(fifo.o.payload.values))),
            *(o[name].eq(Mux(passes, place[name], fifo.o.payload[name])) for name, _ in place.shape()),
            # Sums have all columns, and are one piece.
            o.keep.eq(Mux(passes, i.keep, ~0)),
            o.chunk_end.eq(Mux(passes, i.chunk_end & last_tile, fifo.o.payload.last)),
        ]
        return m

    def _jobs(self, m: Module, per_row: int) -> tuple[data.View, Value, Signal]:
        """The current job with what follows from it, whether there is one, and the signal that ends it.

        passes : its results pass
        last_tile, one_tile : index of its last column tile; there is only one, or it has none
        entries : of a chunk in the memory; of its first two column tiles, if it has more; or any higher number if a
            transfer need not wait for the one before
        """
        given, end = self.job.payload, Signal(name="job_end")
        limit = Signal(range(self.interval + 1))
        layout = {
            "values": 1,
            "passes": 1,
            "chunks": given.chunks.shape(),
            "last_tile": range(MAX_HEAD // self.config.tile),
            "one_tile": 1,
            "entries": limit.shape(),
        }
        m.submodules.jobs = jobs = StreamFifo(data.StructLayout(layout), self._JOBS)
        entries = Mux(given.tiles == 1, given.tokens, given.tokens << 1) << (per_row.bit_length() - 1)
        m.d.comb += [
            limit.eq(Mux(entries < self.interval, entries, self.interval)),
            jobs.i.valid.eq(self.job.valid),
            self.job.ready.eq(jobs.i.ready),
            jobs.i.payload.values.eq(given.values),
            jobs.i.payload.passes.eq(~given.values | (given.chunks == 1)),
            jobs.i.payload.chunks.eq(given.chunks),
            jobs.i.payload.last_tile.eq(given.tiles - 1),
            jobs.i.payload.one_tile.eq(~given.values | (given.tiles == 1)),
            jobs.i.payload.entries.eq(limit),
            jobs.o.ready.eq(end),
        ]
        return jobs.o.payload, jobs.o.valid, end

    def _wait(self, m: Module, entries: Value, add: Signal, added: Value, free: Signal) -> None:
        """Whether the sums of the next transfer are stored.

        Transfers go round the entries of a chunk, so it is the case if fewer transfers are in the pipeline. The result
        is a register. When a job's first transfer is added it is right, because a transfer was stored before.
        """
        count = Signal(range(self.interval))
        with m.If(add != added):
            m.d.sync += count.eq(count + Mux(add, 1, -1))
        m.d.sync += free.eq(Mux(add == added, count < entries, Mux(add, count + 1 < entries, count <= entries)))

    def _add(self, m: Module, store: Signal, add: Signal, keeps: Value, entry: Value) -> list[Value]:
        """Adds, and stores the first chunk's results and those sums that it ``keeps``. Returns the sums.

        A first chunk comes after the last sums of the values before, which are not kept, and they came after all
        others were stored. So there is one write in a cycle at most.
        """
        i, depth = self.i.payload, self.config.max_tokens * MAX_HEAD // self.lanes
        shape = data.ArrayLayout(FLOAT_BITS, self.lanes)
        m.submodules.sums = memory = Memory(shape=shape, depth=depth, init=[])
        write, read = memory.write_port(), memory.read_port()
        sums = [Signal(FLOAT_BITS, name=f"sum_{lane}") for lane in range(self.lanes)]
        late = delay(m, Cat(i.values), 1, name="values")
        valid = delay(m, add, 1, name="adding", reset=True)
        for lane, adder in enumerate(self.adders):
            m.submodules[f"adder_{lane}"] = adder
            m.d.comb += [
                adder.valid.eq(valid),
                Cat(adder.a).eq(read.data[lane]),
                Cat(adder.b).eq(late.word_select(lane, FLOAT_BITS)),
                sums[lane].eq(Cat(adder.result)),
            ]
        m.d.comb += [
            read.en.eq(add),
            read.addr.eq(entry),
            write.en.eq(store | keeps),
            write.addr.eq(Mux(store, entry, delay(m, entry, self.add_latency, name="entry"))),
            Cat(write.data).eq(Mux(store, Cat(i.values), Cat(sums))),
        ]
        return sums
