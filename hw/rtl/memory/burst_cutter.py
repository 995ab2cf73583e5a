# SPDX-License-Identifier: Apache-2.0
"""Cuts linear regions of memory into AXI4 bursts."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.spec.memory.access import BURST_BOUNDARY, MAX_BURST_BEATS

BEAT_COUNT_BITS = 32
"""Bits of a region's length in beats. A descriptor's regions are shorter than 4 GiB."""


def region_layout() -> data.StructLayout:
    """A region of memory: address, a multiple of the beat's bytes, and length in beats, at least 1."""
    return data.StructLayout({"address": unsigned(ADDRESS_BITS), "beats": unsigned(BEAT_COUNT_BITS)})


def max_burst_beats(width: int) -> int:
    """Beats of the longest burst on a port of ``width`` bits."""
    return min(MAX_BURST_BEATS, BURST_BOUNDARY // (width // 8))


def burst_layout(width: int) -> data.StructLayout:
    """A burst: address and length in beats, at least 1."""
    return data.StructLayout({"address": unsigned(ADDRESS_BITS), "beats": range(max_burst_beats(width) + 1)})


class BurstCutter(Block):
    """Cuts each region into maximal INCR bursts that never cross a 4 KiB boundary.

    Parameters
    ----------
    width : bits of the port

    Members
    -------
    regions : regions to cut; the end of a region is below 2^40 (the descriptor check ensures this)
    bursts : the bursts, in order

    Latency 1 cycle, throughput 1 burst per cycle, without a gap between regions.
    """

    latency = 1

    def __init__(self, width: int):
        self.width = width
        super().__init__(
            {
                "regions": In(stream.Signature(region_layout())),
                "bursts": Out(stream.Signature(burst_layout(width))),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"latency": self.latency}

    def elaborate(self, platform) -> Module:
        m = Module()
        beat_bytes, longest = self.width // 8, max_burst_beats(self.width)
        beat_bits, index_bits = (beat_bytes - 1).bit_length(), (longest - 1).bit_length()
        burst, region = self.bursts.payload, self.regions.payload
        # Beats of the region after the current burst.
        left, last = Signal(BEAT_COUNT_BITS), Signal()
        taken = Signal()
        m.d.comb += [
            taken.eq(self.bursts.valid & self.bursts.ready),
            self.regions.ready.eq(~self.bursts.valid | (taken & last)),
        ]
        first, following = Signal.like(burst.beats), Signal.like(burst.beats)
        # A burst ends at a multiple of ``longest`` beats, which divides 4 KiB. The first burst of a region may start
        # between two multiples; all others start at a multiple.
        room = longest - region.address[beat_bits : beat_bits + index_bits]
        # After a region's last burst the remaining length is not read.
        fits, following_fits = Signal(), Signal()
        m.d.comb += [
            fits.eq(region.beats <= room),
            following_fits.eq(left <= longest),
            first.eq(Mux(fits, region.beats, room)),
            following.eq(Mux(following_fits, left, longest)),
        ]
        # Without a region these registers may have any value, so no path to them starts at the region's valid.
        with m.If(self.regions.ready):
            m.d.sync += [
                self.bursts.valid.eq(self.regions.valid),
                burst.address.eq(region.address),
                burst.beats.eq(first),
                left.eq(region.beats - room),
                last.eq(fits),
            ]
        with m.Elif(taken):
            m.d.sync += [
                burst.address.eq(burst.address + (burst.beats << beat_bits)),
                burst.beats.eq(following),
                left.eq(left - longest),
                last.eq(following_fits),
            ]
        return m
