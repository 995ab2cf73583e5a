# SPDX-License-Identifier: Apache-2.0
"""Appends keys and values to a KV cache in memory."""

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.beats import CacheBeats
from hw.rtl.attention.cache.geometry import SLOT_BITS, CacheGeometry, log2
from hw.rtl.attention.cache.jobs import CacheJobs
from hw.rtl.attention.cache.layouts import job_layout
from hw.rtl.attention.cache.places import PAGE_BITS, CachePlaces, place_layout
from hw.rtl.attention.cache.steps import CacheSteps
from hw.rtl.attention.cache.store import HeadStore, plan_layout
from hw.rtl.attention.head_float import HeadFloat
from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.results import output_payload
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.write_manager import piece_layout, strobed_layout
from hw.rtl.vector.layouts import result_unit
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.kv_cache import KEY_BITS


class CacheWriter(Block):
    """Rounds rows of float32 numbers to block floating point, and writes exactly the bytes of
    :meth:`hw.spec.memory.kv_cache.KeyCache.append`, :meth:`hw.spec.memory.kv_cache.ValueCache.append` and
    :meth:`hw.spec.memory.kv_cache.ValueCache.append_exponents`.

    Members
    -------
    job : an append, for which the descriptor's rules hold
    rows : its rows, token by token with ascending columns, in whole transfers
    pieces, beats : for the client CACHE of :class:`hw.rtl.memory.write_manager.WriteManager`. A piece is up to 1 KiB of
        one port's region. It may cross 4 KiB; the write manager divides it. ``last`` marks the last piece of a job;
        ``interrupt`` is 0
    first, end : the addresses to which it may write, in units of 4,096 bytes: from ``first`` on, and below ``end``
    outside, outside_address : a piece was not inside these addresses. It stays until the next reset. Neither this
        piece nor any after it is written, but rows are still taken, and pieces that were sent get their data
    non_finite : a row had an infinity or a NaN. It stays until the next reset. Nothing of its head is written, nor of
        any after it

    Latency: ``latency`` cycles, and one for each transfer of a row, from the last transfer of the last row of a bundle
    to its first piece.

    Throughput: 1 beat per cycle. Rows of neighbouring slots are written together, as a bundle of up to
    :func:`hw.spec.memory.kv_cache.append_bundle`. With tile T and ports of P bytes, keys in G groups and planes take
    ``1 + G + 4 G weight_bits / max(1, P / T)`` cycles for a bundle; values with D columns take ``D / min(R, P)`` for
    each row, where R is the bytes of T weights, and ``D / 32`` for the bundle. After a bundle there are ``head_gap``
    cycles without a beat, after a job ``job_gap``. No row takes less time than its transfers and ``row_gap`` cycles.

    Raises
    ------
    ConfigError : hardware of this config cannot have a KV cache, see :func:`hw.spec.memory.kv_cache.check_cache`
    """

    head_gap, job_gap = 2, CacheSteps.SETTLING + 3
    _JOBS_AHEAD, _FIFO = 2, 16
    _HEADS = 8
    """Heads between the last row and the last mantissa, at least: in HeadFloat and in the FIFO behind it."""

    def __init__(self, config: AcceleratorConfig):
        self.config, self.shape = config, CacheGeometry(config)
        self.float = HeadFloat(config.vector_lanes)
        rows = output_payload(config, config.vector_lanes, result_unit(config))
        super().__init__(
            {
                "job": In(stream.Signature(job_layout(config))),
                "rows": In(stream.Signature(rows)),
                "pieces": Out(stream.Signature(piece_layout())),
                "beats": Out(stream.Signature(strobed_layout(config.port_width))),
                "first": In(PAGE_BITS),
                "end": In(PAGE_BITS),
                "outside": Out(1),
                "outside_address": Out(ADDRESS_BITS),
                "non_finite": Out(1),
            }
        )

    @property
    def latency(self) -> int:
        """See the class."""
        return self.float.exponent_latency + 15

    @property
    def row_gap(self) -> int:
        """See the class. HeadFloat holds two heads, each until its exponents are known and its rows have left."""
        return self.float.exponent_latency // 2 + 2

    @property
    def error_latency(self) -> int:
        """Cycles from a job's last row to ``non_finite``."""
        return self.float.exponent_latency

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "latency": self.latency,
            "head_gap": self.head_gap,
            "job_gap": self.job_gap,
            "row_gap": self.row_gap,
            "lanes": self.config.vector_lanes,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        config, shape = self.config, self.shape
        m.submodules.head_float = self.float
        m.submodules.jobs = jobs = CacheJobs(config, shape)
        m.submodules.store = store = HeadStore(shape)
        m.submodules.steps = steps = CacheSteps(config, shape)
        self._take_rows(m, jobs, store)
        wiring.connect(m, self.float.heads, store.heads)
        wiring.connect(m, self.float.mantissas, store.mantissas)
        wiring.connect(m, jobs.placed, steps.jobs)
        wiring.connect(m, store.bundle, steps.bundle)
        m.submodules.places = places = CachePlaces(shape)
        m.submodules.make_beats = beats = CacheBeats(shape)
        m.d.comb += [
            places.valid.eq(steps.valid),
            places.step.eq(steps.step),
            places.region.eq(steps.region),
            places.header_beats.eq(steps.header_beats),
            places.first.eq(self.first),
            places.end.eq(self.end),
            places.stop.eq(self.float.non_finite),
            beats.step.eq(steps.step),
            store.address.eq(beats.address),
            beats.words.eq(store.words),
            self.outside.eq(places.outside),
            self.outside_address.eq(places.outside_address),
            self.non_finite.eq(self.float.non_finite),
        ]
        self._send(m, steps, places, beats)
        return m

    def _take_rows(self, m: Module, jobs: CacheJobs, store: HeadStore) -> None:
        """Feeds the rows of one job after the other; its place is computed meanwhile."""
        rows, config, lanes = self.rows, self.config, self.config.vector_lanes
        unit = log2(result_unit(config))
        m.submodules.jobs_fifo = fifo = StreamFifo(job_layout(config), self._JOBS_AHEAD)
        wiring.connect(m, fifo.o, jobs.job)
        active, keys, wide, token_left = Signal(), Signal(), Signal(), Signal(range(config.max_tokens))
        last_column = Signal.like(rows.payload.column)
        # The slots of the rows, as far as it matters which ones are written together.
        bundle_last, slot, left = self.shape.bundle - 1, Signal(SLOT_BITS), Signal(SLOT_BITS)
        last_slot = Signal(SLOT_BITS)
        m.submodules.plans = plans = StreamFifo(plan_layout(self.shape), self._HEADS)
        wiring.connect(m, plans.o, store.plan)
        job, to = self.job.payload, self.float.rows
        step, row_end = Signal(), Signal()
        m.d.comb += [
            self.job.ready.eq(~active & fifo.i.ready),
            fifo.i.valid.eq(self.job.valid & ~active),
            fifo.i.payload.eq(job),
            to.valid.eq(rows.valid & active),
            rows.ready.eq(to.ready & active),
            step.eq(to.valid & to.ready),
            row_end.eq(rows.payload.column == last_column),
            to.payload.last.eq(row_end),
            to.payload.keys.eq(keys),
            to.payload.wide.eq(wide),
            *(
                Value.cast(value).eq(number)
                for value, number in zip(to.payload.values, rows.payload.values, strict=True)
            ),
        ]
        with m.If(self.job.valid & self.job.ready):
            m.d.sync += [
                active.eq(1),
                keys.eq(job.keys),
                wide.eq(job.keys & (job.planes == max(KEY_BITS) // config.weight_bits)),
                token_left.eq(job.tokens - 1),
                last_column.eq((job.columns - lanes) >> unit),
                slot.eq(job.slot),
                left.eq(job.slots - job.slot - 1),
                last_slot.eq(job.slots - 1),
            ]
        with m.Elif(step & row_end):
            m.d.sync += [
                active.eq(token_left != 0),
                token_left.eq(token_left - 1),
                # A cache that is full begins again at its first slot.
                slot.eq(Mux(left == 0, 0, slot + 1)),
                left.eq(Mux(left == 0, last_slot, left - 1)),
            ]
        member = self.shape.member(slot)
        m.d.comb += [
            plans.i.valid.eq(step & row_end),
            plans.i.payload.member.eq(member),
            plans.i.payload.last.eq((member == bundle_last) | (token_left == 0) | (left == 0)),
        ]

    def _send(self, m: Module, steps: CacheSteps, places: CachePlaces, beats: CacheBeats) -> None:
        """Puts pieces and beats into FIFOs, in which each step has its entries."""
        floats = self.config.port_width // FLOAT_BITS
        m.submodules.pieces_fifo = pieces = StreamFifo(place_layout(self.shape), self._FIFO)
        m.submodules.beats_fifo = data = StreamFifo(self.beats.payload.shape(), self._FIFO)
        wiring.connect(m, data.o, wiring.flipped(self.beats))
        piece = pieces.o.payload
        m.d.comb += [
            pieces.i.valid.eq(places.write_piece),
            pieces.i.payload.eq(places.piece),
            data.i.valid.eq(places.write_beat),
            data.i.payload.eq(beats.beat),
            self.pieces.valid.eq(pieces.o.valid),
            pieces.o.ready.eq(self.pieces.ready),
            self.pieces.payload.address.eq(piece.address),
            self.pieces.payload.last_float.eq((piece.last_beat << log2(floats)) | floats - 1),
            self.pieces.payload.last.eq(piece.last),
        ]
        # Steps on their way to the FIFOs, and those that are made before their levels count.
        most = self._FIFO - (CachePlaces.latency + 3)
        m.d.sync += steps.room.eq((pieces.level <= most) & (data.level <= most))
