# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: sends each unit the fields of a checked descriptor that it needs (its share)."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import Credits, StreamFifo
from hw.rtl.control.attention_shares import writes_results
from hw.rtl.control.descriptor_check import work_layout
from hw.rtl.control.share import JOBS_AHEAD, Share, Side
from hw.rtl.control.shares import shares, side_layout, side_names
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.gatherer import Gatherer
from hw.rtl.memory.write_manager import WriteClient, WriteManager, write_clients
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.ops.base import Wait

TABLE_DEPTH = 4
"""Descriptors whose shares are not all sent: the last of them is in the descriptor check."""


class Cursor(wiring.Component):
    """Sends one side's shares of one descriptor, each as soon as its unit is ready and it may be sent.

    Members
    -------
    valid, work : there is a descriptor; its fields for this side
    wanted : with a vector unit, by share: its unit needs this descriptor; otherwise it follows from ``work``
    may : by share: it may be sent; stays 1 until the share is sent
    sent : by share
    finished : all shares of this descriptor are sent, since the cycle before
    step : go to the next descriptor; only if ``finished``

    and an output for each share. Latency 0 cycles, throughput 1 descriptor in 2 cycles.
    """

    def __init__(self, config: AcceleratorConfig, side: Side, shares: tuple[Share, ...]):
        self.config, self.shares = config, shares
        flags = data.StructLayout({share.name: 1 for share in shares})
        super().__init__(
            {
                "valid": In(1),
                "work": In(side_layout(config, side)),
                **({"wanted": In(flags)} if config.has_vector_unit else {}),
                "may": In(flags),
                "sent": Out(flags),
                "finished": Out(1),
                "step": In(1),
                **{share.name: Out(stream.Signature(share.layout)) for share in shares},
            }
        )

    def needs(self, share: Share) -> Value:
        """Whether the share's unit needs this descriptor."""
        return self.wanted[share.name] if self.config.has_vector_unit else share.wanted(self.work)

    def elaborate(self, platform) -> Module:
        m = Module()
        finished = []
        for share in self.shares:
            output, wanted, sent = getattr(self, share.name), self.needs(share), self.sent[share.name]
            m.d.comb += [
                output.valid.eq(self.valid & wanted & self.may[share.name] & ~sent),
                *(output.payload[field].eq(value) for field, value in share.fields(self.work).items()),
            ]
            with m.If(self.step):
                m.d.sync += sent.eq(0)
            with m.Elif(output.valid & output.ready):
                m.d.sync += sent.eq(1)
            finished.append(~wanted | sent)
        # A register, because both cursors and the table move on it.
        m.d.sync += self.finished.eq(self.valid & Cat(finished).all() & ~self.step)
        return m


class Dispatcher(Block):
    """Sends every unit its share as soon as the unit is ready.

    Two cursors walk over the descriptors, in order: one sends the shares of the weights side, the other one those of
    the activations side. The activations cursor is never ahead. It stays before a descriptor that waits for the results
    of earlier descriptors; meanwhile the weights cursor goes on, and the descriptors between the two are in a table. If
    no descriptor waits, both cursors are at the same descriptor, and the next one follows when all shares are sent.

    With a vector unit, a layer of one token whose activations are a row that the descriptor just before it writes does
    not wait for all of this row: if all earlier descriptors are complete, its activations are requested as far as they
    are in memory. The block that was sent then follows the row. With ``config.reads_by_pieces`` the same holds for
    layers of several tokens whose activations are exactly the rows of an output. And a layer whose activations have in
    their last piece all columns that the descriptor before writes, as the last head of attention does, gets all other
    pieces at once.

    The core, the activation unit and the gatherer each have some layers in advance, so fetching, computing and
    writing can each work on another layer. A layer's weights are requested only after all of its activations: memory
    answers in order, and the layer cannot start without its activations. While the activations cursor waits, there are
    no activations to request, and the weights come before them.

    Members
    -------
    work : checked descriptors; a payload does not change from the cycle before its ``valid`` to its transfer
    complete : a descriptor's results are in memory; one cycle for each
    waiting : a layer's activations side waits; it is not known for how long
    early : with ``waiting``: the last weights that were sent are of a layer that waits
    core : the layer, for the core
    unit : the layer and its activations' address, for the activation unit
    blocks : the layer's activations, unless it reuses those of the previous layer
    asking : the last block is not completely requested
    regions : the layer's weights
    results_job : the place of the layer's results

    and with a vector unit the shares of the second output, the epilogue and its operands, and

    whole : by client of the write manager: this output of the oldest incomplete descriptor is in memory
    follow : the last block is a row, or rows, being written: those of the client ``followed``
    follow_tail : with ``config.reads_by_pieces`` and ``follow``: only columns of the last piece of the rows are written

    Latency from the first cycle of a work's ``valid``: 0 cycles for ``core``, ``blocks`` and ``regions``, 1 for the
    others; from ``complete`` to the shares that have waited for it 1 cycle more. Throughput: 1 layer in 5 cycles, in
    ``period`` if it reuses activations; the rule of ``work`` adds 1.
    """

    period = 3
    """Cycles from one layer to the next if no unit is a reason to wait."""

    most_in_flight = TABLE_DEPTH - 1 + JOBS_AHEAD
    """Maximum number of descriptors in this block: in the table without its last one, or all shares are sent, and the
    job waits in the FIFO."""
    _MOST_INCOMPLETE = 1 + JOBS_AHEAD + Gatherer.most_in_flight + WriteManager.most_in_flight
    """Maximum number of descriptors whose activations side has started and whose results are not in memory."""

    def __init__(self, config: AcceleratorConfig):
        self.config, self.shares = config, shares(config)
        outputs = {share.name: Out(stream.Signature(share.layout)) for share in self.shares}
        super().__init__(
            {
                "work": In(stream.Signature(work_layout(config))),
                "complete": In(1),
                "waiting": Out(1),
                "early": Out(1),
                **outputs,
                "asking": In(1),
                **self._follow_members(),
            }
        )

    def _follow_members(self) -> dict[str, wiring.Member]:
        clients = write_clients(self.config)
        vector = {"whole": In(clients), "follow": Out(1), "followed": Out(range(clients))}
        if self.config.reads_by_pieces:
            vector["follow_tail"] = Out(1)
        return vector if self.config.has_vector_unit else {}

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"period": self.period}

    def elaborate(self, platform) -> Module:
        m = Module()
        cursors = {}
        for side in Side:
            cursor = Cursor(self.config, side, tuple(share for share in self.shares if share.side is side))
            m.submodules[side.name.lower()] = cursors[side] = cursor
            for share in cursor.shares:
                self._output(m, share, getattr(cursor, share.name))
        weights, activations = cursors[Side.WEIGHTS], cursors[Side.ACTIVATIONS]
        # A register, like ``waiting``: the cursors are at different descriptors.
        apart = Signal()
        table = self._walk(m, weights, activations, apart)
        self._wait(m, activations, *table)
        self._order(m, weights, activations, apart)
        return m

    def _output(self, m: Module, share: Share, source) -> None:
        """Connects a cursor's output to the dispatcher's output, through a FIFO if the share has one."""
        if share.ahead:
            m.submodules[f"{share.name}_fifo"] = fifo = StreamFifo(share.layout, share.ahead)
            wiring.connect(m, source, fifo.i)
            source = fifo.o
        wiring.connect(m, source, wiring.flipped(getattr(self, share.name)))

    def _walk(self, m: Module, weights: Cursor, activations: Cursor, apart: Signal) -> tuple[list[data.View], Signal]:
        """Moves the cursors over the table, a ring. Its last descriptor is still the one at the input: it is taken when
        both cursors have sent it, or when the next one is needed because the activations side waits.

        Returns the activations side's table, and the index of its cursor's entry.
        """
        work, taken, last = self.work, Signal(), Signal()
        stored = TABLE_DEPTH - 1
        m.submodules.full = full = Credits(stored, least=stored)
        m.submodules.behind = behind = Credits(stored)
        m.submodules.lead = lead = Credits(stored)
        m.d.comb += [
            apart.eq(lead.enough),
            last.eq(~behind.enough),
            weights.valid.eq(~last | work.valid),
            activations.valid.eq(~last | apart | work.valid),
            taken.eq(
                work.valid & ((last & ~apart & weights.finished & activations.finished) | (self.waiting & ~full.enough))
            ),
            work.ready.eq(taken),
            weights.step.eq(weights.finished & (~last | taken)),
            activations.step.eq(activations.finished & (weights.finished | apart)),
            # Distances: from the activations cursor to the input, from the weights cursor, and between the two.
            full.add.eq(taken),
            full.take.eq(activations.step),
            behind.add.eq(taken),
            behind.take.eq(weights.step),
            lead.add.eq(weights.step),
            lead.take.eq(activations.step),
        ]
        written = Signal(range(TABLE_DEPTH))
        m.d.sync += written.eq(written + taken)
        table, place = [], Signal()
        for side, cursor in ((Side.WEIGHTS, weights), (Side.ACTIVATIONS, activations)):
            name, names = side.name.lower(), side_names(self.config, side)
            place = Signal(range(TABLE_DEPTH), name=f"place_{name}")
            # Registers, because long paths start at the entry that a cursor reads, and a LUT memory is slower.
            # With a vector unit there are many shares, so it is computed before the table which ones are wanted.
            wanted = {"wanted": cursor.wanted.shape()} if self.config.has_vector_unit else {}
            layout = data.StructLayout({**side_layout(self.config, side).members, **wanted})
            table = [Signal(layout, name=f"{name}_{index}", reset_less=True) for index in range(TABLE_DEPTH)]
            m.d.sync += place.eq(place + cursor.step)
            for index, entry in enumerate(table):
                # Always: so a descriptor is in the table in the first cycle of its ``valid``.
                with m.If(written == index):
                    m.d.sync += [entry[field].eq(work.payload[field]) for field in names]
                    if wanted:
                        m.d.sync += [entry.wanted[share.name].eq(share.wanted(work.payload)) for share in cursor.shares]
            entry = Array(Value.cast(entry) for entry in table)[place]
            if wanted:
                m.d.comb += Cat(cursor.work, cursor.wanted).eq(entry)
            else:
                m.d.comb += Value.cast(cursor.work).eq(entry)
        return table, place

    def _wait(self, m: Module, activations: Cursor, table: list[data.View], place: Signal) -> None:
        """Whether the activations side may be sent. It then has started, and counts as incomplete."""
        may, started = Signal(), Signal()
        m.submodules.incomplete = incomplete = Credits(self._MOST_INCOMPLETE)
        m.d.comb += [
            may.eq(started | (activations.work.wait == Wait.NOTHING) | ~incomplete.enough),
            incomplete.add.eq(activations.valid & may & ~started),
            incomplete.take.eq(self.complete),
            *(activations.may[share.name].eq(may) for share in activations.shares),
        ]
        if self.config.has_vector_unit:
            early = self._follow(m, activations, table, place, may, incomplete)
            m.d.comb += [activations.may[share.name].eq(may | early) for share in activations.shares if share.early]
        m.d.sync += [
            self.waiting.eq(activations.valid & ~may),
            started.eq(activations.valid & may & ~activations.step),
        ]

    def _follow(
        self, m: Module, activations: Cursor, table: list[data.View], place: Signal, may: Signal, incomplete: Credits
    ) -> Value:
        """Whether the descriptor reads rows that are being written; only the one that writes them is incomplete."""
        work, early = activations.work, Signal()
        m.submodules.several = several = Credits(incomplete.limit, least=2)
        by_pieces = self.config.reads_by_pieces
        # The places of the rows that the descriptor before writes, and whether it writes these and no others.
        rows = {
            WriteClient.RESULTS: (
                work.results,
                work.result_pitch,
                writes_results(work) if self.config.has_attention else ~work.quiet,
            ),
            WriteClient.SECOND: (work.second_results, work.second_pitch, work.second),
        }
        single, matches = work.command.tokens == 1, Signal(len(rows))
        # All comparisons are long, so they end in registers. ``fits`` is about the descriptor of the cycle before, and
        # after a step this is another one.
        fits, current = Signal(), activations.valid & ~activations.step
        # All of the activations are in the row.
        columns = Signal.like(work.out_features)
        contained = work.activation_beats <= columns >> (self.config.port_width // FLOAT_BITS).bit_length() - 1
        follows = work.wait == Wait.ACTIVATIONS
        if self.config.has_attention:
            # Values have no activations in memory.
            follows &= ~work.values
        written_columns = work.out_features >> work.silu
        if by_pieces:
            # Several rows: as many as before, all of their columns, and nothing between two of them.
            tokens = Signal.like(work.command.tokens)
            with m.If(activations.step):
                m.d.sync += tokens.eq(work.command.tokens)
            exactly = work.by_pieces & (work.fetch_pitch == columns * FLOAT_BYTES)
            m.d.sync += fits.eq(current & follows & (work.command.tokens == tokens) & Mux(single, contained, exactly))
        else:
            m.d.sync += fits.eq(current & single & follows & contained)
        with m.If(activations.step):
            m.d.sync += columns.eq(written_columns)
        for client, (row, pitch, written) in rows.items():
            address, known = Signal.like(row, name=f"row_{client.value}"), Signal(name=f"known_{client.value}")
            one_place = single | (pitch == written_columns * FLOAT_BYTES) if by_pieces else single
            with m.If(activations.step):
                m.d.sync += [address.eq(row), known.eq(written & one_place)]
            # Every entry of the table is compared, so that no choice of an entry comes before the comparison.
            equal = Signal(len(table), name=f"equal_{client.value}")
            m.d.sync += equal.eq(Cat(known & (entry.activations == address) for entry in table))
            m.d.comb += matches[client].eq(equal.bit_select(place, 1))
        m.d.comb += [
            several.add.eq(incomplete.add),
            several.take.eq(incomplete.take),
            early.eq(matches.any() & fits & incomplete.enough & ~several.enough),
        ]
        blocks, second = activations.blocks, ~matches[WriteClient.RESULTS]
        if by_pieces:
            tail = self._tail(m, activations, table, place, columns, follows & current)
            early = early | (tail & incomplete.enough & ~several.enough)
            second &= ~tail
            with m.If(blocks.valid & blocks.ready):
                m.d.sync += self.follow_tail.eq(tail & ~matches.any())
        with m.If(blocks.valid & blocks.ready):
            m.d.sync += [self.follow.eq(~may), self.followed.eq(second)]
        with m.Elif(may | self.whole.bit_select(self.followed, 1)):
            m.d.sync += self.follow.eq(0)
        return early

    def _tail(
        self, m: Module, activations: Cursor, table: list[data.View], place: Signal, columns: Signal, follows: Value
    ) -> Value:
        """Whether the descriptor before writes only columns of the last piece of the rows that this one reads."""
        work = activations.work
        end, pitch, known = Signal(ADDRESS_BITS), Signal.like(work.result_pitch), Signal()
        with m.If(activations.step):
            m.d.sync += [
                end.eq(work.results_end),
                pitch.eq(work.result_pitch),
                known.eq(writes_results(work) & ~work.second & ~work.pieces),
            ]
        equal, fits = Signal(len(table)), Signal()
        # Columns of the last piece.
        last = (work.last_slice[: (PIECE_FLOATS // self.config.tile).bit_length() - 1] + 1) * self.config.tile
        m.d.sync += [
            equal.eq(Cat(known & (entry.row_end == end) for entry in table)),
            fits.eq(follows & work.by_pieces & (work.fetch_pitch == pitch) & (columns <= last)),
        ]
        return equal.bit_select(place, 1) & fits

    def _order(self, m: Module, weights: Cursor, activations: Cursor, apart: Signal) -> None:
        """Whether each share of the weights side may be sent."""
        ahead = self.waiting & (weights.work.wait != Wait.WEIGHTS)
        if self.config.has_attention:
            # Many descriptors have no weights, so the cursors are often apart while those of a running layer are read.
            m.submodules.ahead = layers = Credits(TABLE_DEPTH)
            (regions,) = (share for share in weights.shares if share.name == "regions")
            # A register, because the transfer is known late. The activations side is at least as late with the layer.
            m.d.sync += layers.add.eq(weights.regions.valid & weights.regions.ready)
            m.d.comb += [
                layers.take.eq(activations.step & regions.wanted(activations.work)),
                self.early.eq(layers.enough),
            ]
        else:
            m.d.sync += self.early.eq(apart | weights.sent["regions"])
        for share in weights.shares:
            if not share.after:
                m.d.comb += weights.may[share.name].eq(1)
                continue
            (before,) = (other for other in activations.shares if other.name == share.after)
            sent = activations.may[before.name] & (activations.sent[before.name] | ~activations.needs(before))
            # The activations side may go on in the cycle after the share was offered.
            output, offered = getattr(weights, share.name), Signal(name=f"{share.name}_offered")
            requested = ~self.asking | share.apart(weights.work) if self.config.has_attention else ~self.asking
            m.d.comb += weights.may[share.name].eq(offered | (requested & (ahead | (~apart & sent))))
            m.d.sync += offered.eq(output.valid & ~output.ready)
