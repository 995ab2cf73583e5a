# SPDX-License-Identifier: Apache-2.0
"""The sequencer: decides in every cycle which token and which weights enter the array."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import Credits
from hw.rtl.common.walker import Walker, command_signature
from hw.rtl.core.activation_buffer import BANKS, bank_slices, bank_start
from hw.rtl.core.column import ring_depth
from hw.rtl.core.header import HeaderReader
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout


class Sequencer(Block):
    """Walks output tile, group, K-slice and token, and starts each slice when everything that it needs is available.

    A slice takes ``max(tokens, words_per_slice)`` cycles and is never interrupted. It starts when all its words are
    in the FIFO and, in a layer's first output tile, its activations are in the buffer. An output tile also waits for
    its header and for room in the ring of sums. So the array never stalls.

    Members
    -------
    command : the layers
    word_pushed : a word has entered the FIFO
    tile_ready : an output tile's header has been read
    slice_ready : a slice of activations can be read
    ring_release : an entry of the ring of sums is free again
    token : a token enters; outputs are registered, ``latency`` cycles after the decision
    load : the token is the first of its slice
    address : address of the token's activations
    pop : a word leaves the FIFO (after all its slices, if it has several)
    place : index of the slice in the word, if it has several
    paired : with attention: the word has successive rows in pairs
    works : a token or a word enters in this cycle
    waits_activations, waits_output : it waits for activations; it waits for room for sums

    Throughput: 1 token or 1 word per cycle, without a gap between slices, tiles and layers.
    """

    latency = 1

    def __init__(self, config: AcceleratorConfig, fifo_depth: int):
        self.config, self.fifo_depth = config, fifo_depth
        self.stream = StreamLayout(config)
        super().__init__(
            {
                "command": In(command_signature(config)),
                "word_pushed": In(1),
                "tile_ready": In(1),
                "slice_ready": In(1),
                "ring_release": In(1),
                "token": Out(1),
                "load": Out(1),
                "address": Out(range(BANKS * bank_slices(config))),
                "pop": Out(1),
                "place": Out(range(max(2, self.stream.slices_per_word))),
                **({"paired": Out(1)} if config.has_attention else {}),
                "works": Out(1),
                "waits_activations": Out(1),
                "waits_output": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "fifo_depth": self.fifo_depth}

    def elaborate(self, platform) -> Module:
        m = Module()
        config, words = self.config, self.stream.words_per_slice

        def slice_cycles(command):
            return Mux(command.tokens > words, command.tokens, words)

        m.submodules.walker = walker = Walker(
            config,
            {
                "phase": slice_cycles,
                "slice": lambda command: command.group_slices,
                "group": lambda command: command.groups,
                "tile": lambda command: command.out_tiles,
            },
        )
        wiring.connect(m, wiring.flipped(self.command), walker.command)
        phase = Signal(range(max(config.max_tokens, words) + 1))
        token, word = Signal(), Signal()
        m.d.comb += [token.eq(phase < walker.current.tokens), word.eq(phase < words)]

        step = self._gate(m, walker, token, word)
        m.d.comb += walker.step.eq(step)
        with m.If(step):
            m.d.sync += phase.eq(Mux(walker.last.phase, 0, phase + 1))
        m.d.sync += [self.token.eq(step & token), self.load.eq(step & walker.first.phase)]
        self._address(m, walker)
        if config.has_attention:
            m.d.sync += self.paired.eq(walker.current.paired)
        return m

    def _gate(self, m: Module, walker: Walker, token: Signal, word: Signal) -> Signal:
        """Counts credits for everything that a slice needs; returns the condition to advance."""
        config, slots = self.config, ring_depth(self.config)
        tile_starts, slice_starts = walker.tile_start, walker.first.phase
        m.d.sync += [self.pop.eq(0)]

        m.submodules.words = words = Credits(self.fifo_depth, least=self.stream.words_per_slice)
        m.submodules.headers = headers = Credits(HeaderReader.tiles_ahead)
        m.submodules.slices = slices = Credits(BANKS * bank_slices(config))
        ring, ring_kept = Signal(range(slots + 1)), Signal(range(slots + 1))
        fresh = walker.first.tile & ~walker.current.reuse
        have_activations, have_room, go, step = Signal(), Signal(), Signal(), Signal()
        # Conservative (room for max_tokens) and registered: this keeps two adders off the core's slowest path. The
        # previous tile's entries are already counted, because a tile takes at least two cycles, those of its header.
        room = Signal(init=1)
        m.d.sync += room.eq(ring <= slots - config.max_tokens)
        m.d.comb += [
            have_activations.eq(~fresh | slices.enough),
            have_room.eq(~tile_starts | room),
            go.eq(words.enough & have_activations & (~tile_starts | headers.enough) & have_room),
            step.eq(walker.active & (go | ~slice_starts)),
            self.works.eq(step),
            self.waits_activations.eq(walker.active & slice_starts & ~have_activations),
            self.waits_output.eq(walker.active & ~have_room),
            words.add.eq(self.word_pushed),
            headers.add.eq(self.tile_ready),
            slices.add.eq(self.slice_ready),
            ring_kept.eq(ring - self.ring_release),
        ]
        # ``step`` selects one of two sums, because it is known last.
        m.d.sync += ring.eq(Mux(step & tile_starts, ring_kept + walker.current.tokens, ring_kept))
        with m.If(step):
            m.d.comb += [
                headers.take.eq(tile_starts),
                slices.take.eq(slice_starts & fresh),
            ]
            self._pop(m, walker, words, word)
        return step

    def _pop(self, m: Module, walker: Walker, words: Credits, word: Signal) -> None:
        per_word = self.stream.slices_per_word
        if per_word == 1:
            m.d.comb += words.take.eq(word)
            m.d.sync += self.pop.eq(word)
            return
        # A word has several slices, and the next output tile starts with a new word.
        place = Signal(range(per_word))
        finished = walker.last.phase & ((place == per_word - 1) | walker.tile_end)
        m.d.comb += words.take.eq(finished)
        m.d.sync += [self.pop.eq(finished), self.place.eq(place)]
        with m.If(walker.last.phase):
            m.d.sync += place.eq(Mux(finished, 0, place + 1))

    def _address(self, m: Module, walker: Walker) -> None:
        """Activations are read in the order of memory, once per output tile.

        The address advances with the registered token, not with the decision, so no long path ends here.
        """
        restart = Signal()
        m.d.sync += restart.eq((walker.step & walker.tile_end) | (walker.command.valid & walker.command.ready))
        with m.If(self.token):
            m.d.sync += self.address.eq(self.address + 1)
        with m.If(restart):
            m.d.sync += self.address.eq(bank_start(self.config, walker.bank))
