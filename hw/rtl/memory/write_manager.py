# SPDX-License-Identifier: Apache-2.0
"""The AXI4 write manager: writes short pieces of results to memory."""

import enum

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.memory.axi import ADDRESS_BITS, constant_address_fields, is_error, write_layout, write_signature
from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.access import BURST_BOUNDARY, OUTSTANDING, PIECE_FLOATS

PIECE_BYTES = PIECE_FLOATS * FLOAT_BITS // 8


class WriteClient(enum.IntEnum):
    """The clients of the write port. Their order of precedence is that of :func:`precedence`."""

    RESULTS = 0
    SECOND = 1
    """The second output of the vector unit."""
    CACHE = 2
    """Bytes of a KV cache."""


def write_clients(config: AcceleratorConfig) -> int:
    """Number of clients of the write port in hardware of this config: the first ones of :class:`WriteClient`."""
    if config.has_attention:
        return len(WriteClient)
    return WriteClient.CACHE if config.has_vector_unit else WriteClient.SECOND


def precedence(clients: int) -> list[int]:
    """The clients in order of precedence.

    With attention the second output is written before the results, because the next layer reads it as activations while
    the results are read later. Other hardware has the order of :class:`WriteClient`.
    """
    first = [WriteClient.SECOND] if clients > WriteClient.CACHE else []
    return first + [client for client in range(clients) if client not in first]


def piece_layout() -> data.StructLayout:
    """A piece of memory to write.

    address : address of its first byte, a multiple of 128; of CACHE, a multiple of a beat
    last_float : index of its last float: its length minus 1; pieces of CACHE are whole beats
    last : it is the last piece of its descriptor
    interrupt : the descriptor requests an interrupt
    """
    return data.StructLayout(
        {"address": unsigned(ADDRESS_BITS), "last_float": range(PIECE_FLOATS), "last": 1, "interrupt": 1}
    )


def strobed_layout(width: int) -> data.StructLayout:
    """A beat of CACHE on a port of ``width`` bits: its data, and which of its bytes are written."""
    return data.StructLayout({"data": unsigned(width), "strobe": unsigned(width // 8)})


def last_beat(last_float, width: int):
    """Index of a piece's last beat on a port of ``width`` bits."""
    return last_float >> (width // FLOAT_BITS).bit_length() - 1


class WriteManager(Block):
    """Writes pieces with INCR bursts: one burst per piece, or two if a piece crosses a 4 KiB boundary.

    A burst is sent to AW as soon as its piece is known; its data follows, never before it. All bursts have the same ID,
    so they are acknowledged in order. If several clients have pieces, those of the first one in the order of
    :func:`precedence` are written first. The clients' outputs of a descriptor are complete one by one.

    Parameters
    ----------
    width : bits of the port
    clients : number of clients
    outstanding : bursts that may be under way, a power of two

    Members
    -------
    pieces : the pieces of each client
    beats : the data of each client's pieces; every piece starts with a new beat
    cache_beats : with CACHE, its beats, of which it chooses the bytes that are written
    axi : AW, W and B
    halt : send no further burst; bursts that were sent to AW still get their data
    under_way : bursts sent to AW and not yet acknowledged
    complete : by client: the last burst of a descriptor was acknowledged, none of its bursts had an error; one cycle
    written : with several clients, by client: a piece is in memory, and so are those before it of the same descriptor;
        one cycle
    complete_interrupt : valid with ``complete``: the descriptor requests an interrupt
    error : a burst was answered with SLVERR or DECERR; one cycle, with its address in ``error_address``
    oldest : address of the oldest burst under way, if any

    Latency: 3 cycles from a piece to its first AW, 1 from a beat to W, 1 from B to ``complete``. Throughput 1 beat
    per cycle, also from burst to burst. No output depends on an input of the same cycle.
    """

    latency = StreamFifo.latency + 2
    """Cycles from a piece's transfer to the first cycle of AWVALID."""
    data_latency, complete_latency = StreamFifo.latency, 1
    """Cycles from a beat's transfer to WVALID, and from the last BVALID to ``complete``."""

    _PIECES_AHEAD = 2
    most_in_flight = _PIECES_AHEAD + 1 + OUTSTANDING
    """Maximum number of a client's descriptors in this block: the last piece waits, is cut, or has bursts under way."""

    def __init__(self, width: int, clients: int = 1, outstanding: int = OUTSTANDING):
        if outstanding < 2 or outstanding & (outstanding - 1):
            raise ValueError(f"outstanding bursts are a power of two from 2 up, not {outstanding}")
        self.width, self.clients, self.outstanding = width, clients, outstanding
        self.has_cache = clients > WriteClient.CACHE
        strobed = {"cache_beats": In(stream.Signature(strobed_layout(width)))} if self.has_cache else {}
        super().__init__(
            {
                "pieces": In(stream.Signature(piece_layout())).array(clients),
                "beats": In(stream.Signature(width)).array(clients - self.has_cache),
                **strobed,
                "axi": Out(write_signature(width)),
                "halt": In(1),
                "under_way": Out(range(outstanding + 1)),
                "complete": Out(clients),
                **({"written": Out(clients)} if clients > 1 else {}),
                "complete_interrupt": Out(1),
                "error": Out(1),
                "error_address": Out(ADDRESS_BITS),
                "oldest": Out(ADDRESS_BITS),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {
            "latency": self.latency,
            "data_latency": self.data_latency,
            "complete_latency": self.complete_latency,
        }

    def elaborate(self, platform) -> Module:
        m = Module()
        floats = self.width // FLOAT_BITS
        # The bursts under way, for their acknowledgement; ``last`` marks the last burst of a descriptor,
        # ``end`` that of a piece.
        client = range(self.clients)
        end = {"end": 1} if self.clients > 1 else {}
        tag = data.StructLayout({"address": ADDRESS_BITS, "last": 1, **end, "interrupt": 1, "client": client})
        # Bursts whose data is not sent yet: a subset of ``tags``, so this FIFO cannot overflow first. ``keep``: floats
        # of the last beat that are written; ``single``: the burst is one beat.
        share = data.StructLayout(
            {"last_beat": range(PIECE_FLOATS // floats), "single": 1, "keep": floats, "client": client}
        )
        m.submodules.tags = tags = StreamFifo(tag, self.outstanding)
        m.submodules.shares = shares = StreamFifo(share, self.outstanding)
        m.d.comb += [self.under_way.eq(tags.level), self.oldest.eq(tags.o.payload.address)]
        self._ask(m, tags, shares)
        self._send(m, shares)
        self._acknowledge(m, tags)
        return m

    def _ask(self, m: Module, tags: StreamFifo, shares: StreamFifo) -> None:
        """Cuts pieces at 4 KiB boundaries and sends the parts to AW."""
        aw, floats = self.axi.aw, self.width // FLOAT_BITS
        active, tag, take = Signal(), Signal(tags.shape), Signal()
        piece, client, found = self._choose(m, take)
        left, keep = Signal(range(PIECE_FLOATS // floats)), Signal(floats)
        offset_bits, page_bits = (self.width // 8 - 1).bit_length(), (BURST_BOUNDARY - 1).bit_length()
        room = Signal(page_bits - offset_bits)
        fits, length, start, may = Signal(), Signal.like(left), Signal(), Signal()
        m.d.comb += [
            # Beats up to the boundary. Like ``left`` and AxLEN it is one less, which saves all adders but one.
            room.eq(~tag.address[offset_bits:page_bits]),
            fits.eq(left <= room),
            length.eq(Mux(fits, left, room)),
            may.eq((~aw.valid | aw.ready) & tags.i.ready & ~self.halt),
            start.eq(active & may),
            # Not from ``start``, because long paths go through it to the clients' FIFOs.
            take.eq(~active | (may & fits)),
            tags.i.valid.eq(start),
            tags.i.payload.eq(tag),
            tags.i.payload.last.eq(tag.last & fits),
            *([tags.i.payload.end.eq(fits)] if self.clients > 1 else []),
            shares.i.valid.eq(start),
            shares.i.payload.last_beat.eq(length),
            shares.i.payload.single.eq(length == 0),
            shares.i.payload.keep.eq(keep | ~fits.replicate(floats)),
            shares.i.payload.client.eq(tag.client),
            *constant_address_fields(aw.payload, self.width),
        ]
        with m.If(start):
            m.d.sync += [aw.valid.eq(1), aw.payload.addr.eq(tag.address), aw.payload.len.eq(length)]
        with m.Elif(aw.ready):
            m.d.sync += aw.valid.eq(0)
        with m.If(take):
            m.d.sync += [
                active.eq(found),
                tag.client.eq(client),
                tag.address.eq(piece.address),
                tag.last.eq(piece.last),
                tag.interrupt.eq(piece.interrupt),
                left.eq(last_beat(piece.last_float, self.width)),
                keep.eq(Cat(index <= piece.last_float & floats - 1 for index in range(floats))),
            ]
        with m.Elif(start):
            # The rest is after the boundary.
            m.d.sync += [
                tag.address.eq((tag.address[page_bits:] + 1) << page_bits),
                left.eq(left - room - 1),
            ]

    def _choose(self, m: Module, take: Signal) -> tuple[data.View, Value, Value]:
        """The piece of the first client that has one, this client, and whether any client has a piece."""
        fifos, earlier, order = [], Const(0), precedence(self.clients)
        for index in order:
            pieces = self.pieces[index]
            # With this FIFO, ``pieces.ready`` does not depend on AWREADY.
            m.submodules[f"fifo_{index}"] = fifo = StreamFifo(piece_layout(), self._PIECES_AHEAD)
            wiring.connect(m, wiring.flipped(pieces), fifo.i)
            m.d.comb += fifo.o.ready.eq(take & ~earlier)
            earlier |= fifo.o.valid
            fifos.append(fifo)
        piece, client = fifos[-1].o.payload.as_value(), Const(order[-1])
        for index, fifo in reversed(list(zip(order, fifos[:-1]))):
            piece, client = Mux(fifo.o.valid, fifo.o.payload.as_value(), piece), Mux(fifo.o.valid, index, client)
        return data.View(piece_layout(), piece), client, earlier

    def _send(self, m: Module, shares: StreamFifo) -> None:
        """Sends every burst's beats to W, without a cycle between two bursts."""
        # As in ``_choose``: ``beats.ready`` does not depend on WREADY.
        m.submodules.data = fifo = StreamFifo(write_layout(self.width), 2)
        wiring.connect(m, fifo.o, wiring.flipped(self.axi.w))
        share, beat = shares.o.payload, Signal(8)
        last, push = Signal(), Signal()
        # Whether the first beat is next, and whether the last is if it is not the first: compared a cycle before.
        first, ends = Signal(init=1), Signal()
        keep = Signal.like(share.keep)
        m.d.comb += [
            last.eq(Mux(first, share.single, ends)),
            keep.eq(share.keep | ~last.replicate(len(keep))),
            fifo.i.payload.strb.eq(Cat(bit.replicate(FLOAT_BITS // 8) for bit in keep)),
            fifo.i.payload.last.eq(last),
            push.eq(fifo.i.valid & fifo.i.ready),
            shares.o.ready.eq(push & last),
        ]
        for index, beats in enumerate(self.beats):
            with m.If(share.client == index):
                m.d.comb += [
                    beats.ready.eq(shares.o.valid & fifo.i.ready),
                    fifo.i.valid.eq(beats.valid & shares.o.valid),
                    fifo.i.payload.data.eq(beats.payload),
                ]
        if self.has_cache:
            beats = self.cache_beats
            with m.If(share.client == WriteClient.CACHE):
                m.d.comb += [
                    beats.ready.eq(shares.o.valid & fifo.i.ready),
                    fifo.i.valid.eq(beats.valid & shares.o.valid),
                    fifo.i.payload.data.eq(beats.payload.data),
                    fifo.i.payload.strb.eq(beats.payload.strobe),
                ]
        with m.If(push):
            m.d.sync += [beat.eq(Mux(last, 0, beat + 1)), first.eq(last), ends.eq(beat + 1 == share.last_beat)]

    def _acknowledge(self, m: Module, tags: StreamFifo) -> None:
        """Counts acknowledgements, and stores an error until the last acknowledgement of its descriptor."""
        b, tag = self.axi.b, tags.o.payload
        # ``failed``: an error of each client's current descriptor.
        bad, failed = Signal(), Array(Signal(name=f"failed_{index}") for index in range(self.clients))
        good = Signal()
        m.d.comb += [
            b.ready.eq(1),
            tags.o.ready.eq(b.valid),
            bad.eq(is_error(b.payload.resp)),
            good.eq(b.valid & tag.last & ~bad & ~failed[tag.client]),
        ]
        m.d.sync += [
            self.error.eq(b.valid & bad),
            self.error_address.eq(tag.address),
            self.complete.eq(good << tag.client),
            self.complete_interrupt.eq(good & tag.interrupt),
        ]
        if self.clients > 1:
            m.d.sync += self.written.eq((b.valid & tag.end & ~bad & ~failed[tag.client]) << tag.client)
        with m.If(b.valid):
            m.d.sync += failed[tag.client].eq(~tag.last & (failed[tag.client] | bad))
