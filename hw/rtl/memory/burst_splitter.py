# SPDX-License-Identifier: Apache-2.0
"""Divides AXI4 bursts into short bursts while something else waits for the port."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.memory.burst_cutter import burst_layout, max_burst_beats
from hw.spec.memory.access import BURST_BOUNDARY


class BurstSplitter(Block):
    """Hands bursts on, whole, or in pieces of ``beats`` beats while ``split`` is 1.

    Parameters
    ----------
    width : bits of the port
    beats : length of the pieces in beats, a power of two below the longest burst

    Members
    -------
    whole : the bursts; each of them lies in one block of 4 KiB
    split : the rest of the burst is divided. It is read when a burst or a piece is taken in, so that it can change in
        the middle of a burst: the rest of that burst is then one burst
    bursts : the bursts or their pieces, in order

    Latency 1 cycle, throughput 1 burst per cycle.
    """

    latency = 1

    def __init__(self, width: int, beats: int):
        if beats & (beats - 1) or not 0 < beats < max_burst_beats(width):
            raise ValueError(f"pieces have a power of two of beats below {max_burst_beats(width)}, not {beats}")
        self.width, self.beats = width, beats
        bursts = stream.Signature(burst_layout(width))
        super().__init__({"whole": In(bursts), "split": In(1), "bursts": Out(bursts)})

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency, "beats": self.beats}

    def elaborate(self, platform) -> Module:
        m = Module()
        whole, burst = self.whole.payload, self.bursts.payload
        beat_bits = (self.width // 8 - 1).bit_length()
        # Beats of the burst that have been handed on, a multiple of the pieces' length; the same with one more piece.
        # The second is a register because long paths go through ``divide``.
        sent, rest = Signal.like(whole.beats), Signal.like(whole.beats)
        following = Signal(range(max_burst_beats(self.width) + self.beats + 1), init=self.beats)
        free, divide = Signal(), Signal()
        m.d.comb += [
            free.eq(~self.bursts.valid | self.bursts.ready),
            rest.eq(whole.beats - sent),
            divide.eq(self.split & (whole.beats > following)),
            self.whole.ready.eq(free & ~divide),
        ]
        with m.If(free):
            m.d.sync += [
                self.bursts.valid.eq(self.whole.valid),
                burst.beats.eq(Mux(divide, self.beats, rest)),
                burst.address.eq(whole.address),
                # The burst does not leave its block of 4 KiB, so only the address within the block changes.
                burst.address[: BURST_BOUNDARY.bit_length() - 1].eq(whole.address + (sent << beat_bits)),
            ]
            with m.If(self.whole.valid):
                m.d.sync += [
                    sent.eq(Mux(divide, following, 0)),
                    following.eq(Mux(divide, following + self.beats, self.beats)),
                ]
        return m
