# SPDX-License-Identifier: Apache-2.0
"""The input of the weight stream: it separates headers from bodies, and joins beats of a body to words."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.walker import command_signature
from hw.spec.config import AcceleratorConfig
from hw.spec.memory.geometry import StreamLayout


class WeightSplitter(Block):
    """Sends the beats of each output tile's header to ``header`` and those of its body to ``body``.

    Latency 0 cycles, throughput 1 beat per cycle: the path is combinational.

    Members
    -------
    command : the layers, in the order of the stream
    beats : the weight stream
    header, body : its two parts
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        beats = stream.Signature(config.beat_bits)
        super().__init__(
            {"command": In(command_signature(config)), "beats": In(beats), "header": Out(beats), "body": Out(beats)}
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        per_word = StreamLayout(self.config).beats_per_word
        command = self.command.payload
        active, in_body = Signal(), Signal()
        left = Signal(max(len(command.header_beats), len(command.body_words) + (per_word - 1).bit_length()))
        tiles_left, last_tile = Signal.like(command.out_tiles), Signal()
        header_beats, body_beats = Signal.like(command.header_beats), Signal.like(left)

        taken = Signal()
        m.d.comb += [
            self.header.payload.eq(self.beats.payload),
            self.body.payload.eq(self.beats.payload),
            self.header.valid.eq(self.beats.valid & active & ~in_body),
            self.body.valid.eq(self.beats.valid & active & in_body),
            self.beats.ready.eq(
                active & ((~in_body & self.header.ready) | (in_body & self.body.ready)),
            ),
            taken.eq(self.beats.valid & self.beats.ready),
        ]
        last, fresh, to_body = Signal(), Signal(), Signal()
        m.d.comb += [
            # What follows: the first header of a new command, the body of this tile, or else the next tile's header.
            fresh.eq(~active | (in_body & last_tile)),
            to_body.eq(active & ~in_body),
            self.command.ready.eq(~active | (taken & last & in_body & last_tile)),
        ]
        # ``taken`` only enables these registers, because it is known last. Without a command they may have any value.
        with m.If(~active | taken):
            m.d.sync += [left.eq(left - 1), last.eq(left == 2)]
            with m.If(~active | last):
                header = Mux(fresh, command.header_beats, header_beats)
                m.d.sync += [
                    in_body.eq(to_body),
                    left.eq(Mux(to_body, body_beats, header)),
                    last.eq(Mux(to_body, body_beats == 1, header == 1)),
                ]
        with m.If(~active | (taken & last & in_body)):
            m.d.sync += [
                tiles_left.eq(Mux(fresh, command.out_tiles, tiles_left - 1)),
                last_tile.eq(Mux(fresh, command.out_tiles == 1, tiles_left == 2)),
            ]
        with m.If(self.command.ready):
            m.d.sync += [
                active.eq(self.command.valid),
                header_beats.eq(command.header_beats),
                body_beats.eq(command.body_words * per_word),
            ]
        return m


class WordAssembler(Block):
    """Joins ``beats_per_word`` beats to a word, the first beat lowest. Latency 1 cycle, throughput 1 beat per cycle.

    If a beat holds a whole row of a slice, a beat is a word, and the path is combinational (latency 0).

    Members
    -------
    beats : the body of the stream
    words : the body as words
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.stream = StreamLayout(config)
        super().__init__(
            {
                "beats": In(stream.Signature(config.beat_bits)),
                "words": Out(stream.Signature(self.stream.word_bits)),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from the last beat of a word to the word."""
        return 0 if self.stream.beats_per_word == 1 else 1

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        beats, words = self.beats, self.words
        per_word = self.stream.beats_per_word
        if per_word == 1:
            m.d.comb += [words.payload.eq(beats.payload), words.valid.eq(beats.valid), beats.ready.eq(words.ready)]
            return m
        collected = Signal(data.ArrayLayout(self.config.beat_bits, per_word), reset_less=True)
        place = Signal(range(per_word))
        m.d.comb += [
            words.payload.eq(collected.as_value()),
            beats.ready.eq(~words.valid | words.ready),
        ]
        with m.If(words.ready):
            m.d.sync += words.valid.eq(0)
        with m.If(beats.valid & beats.ready):
            m.d.sync += [
                collected.eq(Cat(collected.as_value()[self.config.beat_bits :], beats.payload)),
                place.eq(place + 1),
            ]
            with m.If(place == per_word - 1):
                m.d.sync += [place.eq(0), words.valid.eq(1)]
        return m
