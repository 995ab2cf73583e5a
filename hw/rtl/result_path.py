# SPDX-License-Identifier: Apache-2.0
"""The way of results from the core to memory, through the vector unit if there is one."""

from amaranth.hdl import Cat, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.layouts import append_layout
from hw.rtl.attention.cache.places import PAGE_BITS
from hw.rtl.attention.cache_writer import CacheWriter
from hw.rtl.attention.chunk_sums import ChunkSums, sums_layout
from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import SETTLING, gate
from hw.rtl.common.delay import delay
from hw.rtl.common.float32 import FLOAT
from hw.rtl.common.results import output_payload, result_payload
from hw.rtl.memory.axi import ADDRESS_BITS, owed_layout, write_signature
from hw.rtl.memory.burst_cutter import burst_layout
from hw.rtl.memory.completion import Completion, expected_layout, expected_outputs
from hw.rtl.memory.gatherer import Gatherer, gather_layout
from hw.rtl.memory.operand_fetch import OperandFetch, operand_layout
from hw.rtl.memory.progress import Progress
from hw.rtl.memory.write_manager import WriteClient, WriteManager, write_clients
from hw.rtl.vector.epilogue import Epilogue
from hw.rtl.vector.layouts import MAX_PIECES, SECOND_UNIT, Operand, epilogue_layout, result_unit, row_layout
from hw.spec.config import AcceleratorConfig
from hw.spec.control.program import LENGTH_BITS
from hw.spec.memory.access import OUTSTANDING
from hw.spec.ops.scores import BANKS

CACHE_SETTLING = 1024
"""Cycles that are enough for the cache writer to come to rest: a head, with room for its bursts."""
EXPECTED = 16
"""Number of descriptors with outputs on their way to memory that :class:`hw.rtl.memory.completion.Completion` holds."""


def followed_rows(config: AcceleratorConfig) -> int:
    """Most rows of an output that is read while it is being written."""
    return config.max_tokens if config.reads_by_pieces else 1


class ResultPath(Block):
    """Writes the core's results to memory. With a vector unit they pass the epilogue, which may have a second output.

    Members
    -------
    results : from the core
    jobs : the places of the results; with a vector unit also of the second outputs: by
        :class:`hw.rtl.memory.write_manager.WriteClient`
    axi : the write port
    halt : send no further burst
    complete, complete_interrupt : a descriptor's outputs are in memory
    error, error_address : a burst had an error
    owed : bursts under way

    and with a vector unit

    epilogue : the epilogues
    expected : which outputs each descriptor has
    pieces, whole : by client: pieces in memory of the output that is being written; this output of the oldest
        descriptor that is not complete is in memory
    operands, bursts, beats : by :class:`hw.rtl.vector.layouts.Operand`: the places of the operands, and the read ports'
        bursts and data for them

    and with attention

    sums : one for each descriptor that uses the array, see :class:`hw.rtl.attention.chunk_sums.ChunkSums`
    append_job : the appends to a cache
    failed_rows, failed_index : with ``non_finite``: address and index of its append
    cache_first, cache_end, outside, outside_address, non_finite :
        see :class:`hw.rtl.attention.cache_writer.CacheWriter`
    scores : results that stay on chip
    stored : the scores of a descriptor are on chip; one cycle. This is an output of their descriptor, the last one of
        ``expected``
    row, inverse, inverted, release : 1/S of the rows of both banks of scores, and the release of a bank
    """

    container = True

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.clients = write_clients(config)
        members = {
            "results": In(stream.Signature(result_payload(config, config.lanes))),
            "jobs": In(stream.Signature(gather_layout())).array(self.clients - config.has_attention),
            "axi": Out(write_signature(config.port_width)),
            "halt": In(1),
            **dict.fromkeys(("complete", "complete_interrupt", "error"), Out(1)),
            "error_address": Out(ADDRESS_BITS),
            "owed": Out(owed_layout(OUTSTANDING)),
        }
        if config.has_vector_unit:
            operands = len(Operand)
            members |= {
                "epilogue": In(stream.Signature(epilogue_layout(config))),
                "expected": In(stream.Signature(expected_layout(expected_outputs(config)))),
                "pieces": Out(range(MAX_PIECES * followed_rows(config) + 1)).array(self.clients),
                "whole": Out(self.clients),
                "operands": In(stream.Signature(operand_layout(config.max_tokens))).array(operands),
                "bursts": Out(stream.Signature(burst_layout(config.port_width))).array(operands),
                "beats": In(stream.Signature(config.port_width)).array(operands),
            }
        if config.has_attention:
            output = stream.Signature(output_payload(config, config.vector_lanes, result_unit(config)))
            members |= {
                "sums": In(stream.Signature(sums_layout(config))),
                "append_job": In(stream.Signature(append_layout(config))),
                "cache_first": In(PAGE_BITS),
                "cache_end": In(PAGE_BITS),
                "outside": Out(1),
                "outside_address": Out(ADDRESS_BITS),
                "non_finite": Out(1),
                "failed_rows": Out(ADDRESS_BITS),
                "failed_index": Out(LENGTH_BITS),
                "scores": Out(output),
                "stored": In(1),
                "row": Out(row_layout(config)),
                "inverse": In(FLOAT),
                "inverted": In(BANKS),
                "release": Out(BANKS),
            }
        super().__init__(members)

    def elaborate(self, platform) -> Module:
        m = Module()
        writer = WriteManager(self.config.port_width, self.clients)
        (m.submodules.writer,) = gate(m, platform, writer, name="writer", cycles=SETTLING, watch=[writer.halt])
        wiring.connect(m, writer.axi, wiring.flipped(self.axi))
        m.d.comb += [
            writer.halt.eq(self.halt),
            self.error.eq(writer.error),
            self.error_address.eq(writer.error_address),
            self.owed.bursts.eq(writer.under_way),
            self.owed.oldest.eq(writer.oldest),
        ]
        if self.config.has_vector_unit:
            self._through_epilogue(m, writer, platform)
        else:
            self._directly(m, writer, platform)
        return m

    def _gather(self, m: Module, writer: WriteManager, client: WriteClient, gatherer: Gatherer, platform) -> None:
        name = f"gatherer_{client.value}"
        (m.submodules[name],) = gate(m, platform, gatherer, name=name, cycles=SETTLING)
        wiring.connect(m, wiring.flipped(self.jobs[client]), gatherer.job)
        wiring.connect(m, gatherer.pieces, writer.pieces[client])
        wiring.connect(m, gatherer.beats, writer.beats[client])

    def _directly(self, m: Module, writer: WriteManager, platform) -> None:
        gatherer = Gatherer(self.config)
        self._gather(m, writer, WriteClient.RESULTS, gatherer, platform)
        m.d.comb += [
            gatherer.results.valid.eq(self.results.valid),
            self.results.ready.eq(gatherer.results.ready),
            *(
                gatherer.results.payload[name].eq(self.results.payload[name])
                for name, _ in gatherer.results.payload.shape()
            ),
            self.complete.eq(writer.complete),
            self.complete_interrupt.eq(writer.complete_interrupt),
        ]

    def _through_epilogue(self, m: Module, writer: WriteManager, platform) -> None:
        config, lanes = self.config, self.config.vector_lanes
        epilogue = Epilogue(config)
        (m.submodules.epilogue,) = gate(
            m,
            platform,
            epilogue,
            name="epilogue",
            cycles=SETTLING,
            watch=[epilogue.available, *([epilogue.inverted] if config.has_attention else [])],
            pipeline=(epilogue.works, epilogue.settling),
        )
        m.submodules.completion = completion = Completion(expected_outputs(config), EXPECTED)
        m.submodules.progress = progress = Progress(self.clients, followed_rows(config))
        if config.has_attention:
            self._attention(m, writer, epilogue, platform)
        else:
            wiring.connect(m, wiring.flipped(self.results), epilogue.results)
        wiring.connect(m, wiring.flipped(self.epilogue), epilogue.job)
        wiring.connect(m, wiring.flipped(self.expected), completion.expected)
        outputs = {
            WriteClient.RESULTS: (epilogue.first, result_unit(config)),
            WriteClient.SECOND: (epilogue.second, SECOND_UNIT),
        }
        for client, (output, unit) in outputs.items():
            gatherer = Gatherer(config, lanes, unit)
            self._gather(m, writer, client, gatherer, platform)
            wiring.connect(m, output, gatherer.results)
        m.d.comb += [
            completion.written.eq(Cat(writer.complete, self.stored) if config.has_attention else writer.complete),
            self.whole.eq(completion.whole),
            progress.written.eq(writer.written),
            progress.complete.eq(writer.complete),
            *(count.eq(pieces) for count, pieces in zip(self.pieces, progress.pieces, strict=True)),
            self.complete.eq(completion.complete),
            self.complete_interrupt.eq(completion.complete_interrupt),
        ]
        fetches = [self._fetch(m, operand, epilogue, platform) for operand in Operand]
        m.d.comb += epilogue.available.eq(Cat(fetch.available for fetch in fetches))

    def _attention(self, m: Module, writer: WriteManager, epilogue: Epilogue, platform) -> None:
        """Chunks of values are added before the epilogue, and some of its results do not go to memory."""
        sums = ChunkSums(self.config)
        (m.submodules.chunk_sums,) = gate(m, platform, sums, name="chunk_sums", cycles=sums.sum_latency + SETTLING)
        wiring.connect(m, wiring.flipped(self.results), sums.i)
        wiring.connect(m, wiring.flipped(self.sums), sums.job)
        wiring.connect(m, sums.o, epilogue.results)
        wiring.connect(m, epilogue.scores, wiring.flipped(self.scores))
        cache = CacheWriter(self.config)
        (m.submodules.cache,) = gate(m, platform, cache, name="cache", cycles=CACHE_SETTLING)
        append = self.append_job
        taken = append.valid & append.ready
        # The next append is taken before the last rows of this one are checked.
        late = delay(m, Cat(taken, append.payload.rows, append.payload.index), cache.error_latency, name="append")
        with m.If(late[0]):
            m.d.sync += Cat(self.failed_rows, self.failed_index).eq(late[1:])
        wiring.connect(m, epilogue.cached, cache.rows)
        wiring.connect(m, cache.pieces, writer.pieces[WriteClient.CACHE])
        wiring.connect(m, cache.beats, writer.cache_beats)
        m.d.comb += [
            cache.job.payload.eq(append.payload.job),
            cache.job.valid.eq(append.valid),
            append.ready.eq(cache.job.ready),
            cache.first.eq(self.cache_first),
            cache.end.eq(self.cache_end),
            self.outside.eq(cache.outside),
            self.outside_address.eq(cache.outside_address),
            self.non_finite.eq(cache.non_finite),
            self.row.eq(epilogue.row),
            epilogue.inverse.eq(self.inverse),
            epilogue.inverted.eq(self.inverted),
            self.release.eq(epilogue.released),
        ]

    def _fetch(self, m: Module, operand: Operand, epilogue: Epilogue, platform) -> OperandFetch:
        """One of the epilogue's operands. The factor of the second output is one row for all tokens."""
        config, place = self.config, self.operands[operand]
        rows = 1 if operand is Operand.FACTOR else config.max_tokens
        periodic = operand is Operand.TABLE
        # The addend is read at the array's rate by many tokens. The sources of appends follow each other, and one is
        # fetched while the one before is read. Without attention a source is one chunk, and a table always is.
        chunks = 2 if operand is Operand.ADDEND or (operand is Operand.SOURCE and config.has_attention) else 1
        fetch = OperandFetch(config.port_width, rows, config.vector_lanes, chunks=chunks, periodic=periodic)
        cutting = fetch.cutter.regions
        name = f"fetch_{operand.name.lower()}"
        steps = [cutting.valid & cutting.ready, fetch.read, fetch.release]
        (m.submodules[name],) = gate(m, platform, fetch, name=name, cycles=SETTLING, events=steps)
        wiring.connect(m, fetch.bursts, wiring.flipped(self.bursts[operand]))
        wiring.connect(m, wiring.flipped(self.beats[operand]), fetch.beats)
        names = ("address", "pitch", "columns")
        m.d.comb += [
            fetch.jobs.valid.eq(place.valid),
            place.ready.eq(fetch.jobs.ready),
            *(fetch.jobs.payload[name].eq(place.payload[name]) for name in names),
            fetch.jobs.payload.tokens.eq(1 if rows == 1 else place.payload.tokens),
            fetch.read.eq(epilogue.read[operand]),
            fetch.release.eq(epilogue.release[operand]),
            fetch.token.eq(0 if rows == 1 else epilogue.token),
            epilogue.data[operand].eq(fetch.data),
        ]
        if not periodic:
            m.d.comb += fetch.column.eq(epilogue.column)
        return fetch
