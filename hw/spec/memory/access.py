# SPDX-License-Identifier: Apache-2.0
"""Sizes of the accesses on the memory ports, for the RTL and for the performance model."""

BURST_BOUNDARY = 4096
"""No AXI burst crosses a multiple of this number of bytes (Arm IHI 0022)."""
MAX_BURST_BEATS = 256
"""Length of the longest INCR burst of AXI4."""
OUTSTANDING = 8
"""Maximum number of bursts that a port has under way: 8 times 4 KiB cover 2,048 cycles of latency."""
WEIGHT_BURSTS_AHEAD = 4
"""Maximum number of bursts of weights that a port is ahead of the core, a power of two. 4 bursts of 4 KiB cover 1,024
cycles of latency. The starts of the ports' regions are a quarter of the DRAM's banks (32 KiB) apart. With 8 bursts,
ports could drift apart by this distance, and would then use the same bank for a whole layer."""
EARLY_BURST_BEATS = 16
"""Longest burst of the weights of a layer that waits for the results of another one. Its activations are the next data
that the core needs, and they are requested behind these bursts. So the bursts are short, and few are under way."""
EARLY_BURSTS = 5
"""A port begins such a burst only if fewer bursts than this are under way: enough for the latency of DDR."""
CHUNK_BYTES = 512
"""Bytes of activations that a port reads before the next port's turn: long enough for DDR, and short enough that a
single token uses all ports. Chunks end at multiples of this size, so each of them is one burst: none crosses 4 KiB, and
none is too long."""
CHUNKS_AHEAD = 4
"""Number of chunks that a port's FIFO holds: while some leave the FIFO, others arrive from memory, on every port."""
BLOCKS_AHEAD = 16
"""With attention: blocks of activations that are requested, at most, behind the one that is taken from the ports. The
rows of queries, and the pieces of a layer's rows, are short blocks: their number has to cover the memory's latency."""
PIECE_FLOATS = 256
"""Results of one row that are written together: 1 KiB. Shorter writes would delay reads by more than their own time."""
IDEAL_READ_LATENCY = 32
"""Cycles from AR to the first R of the simulated memory `ideal`; after that it moves a beat per cycle and port."""
IDEAL_WRITE_LATENCY = 16
"""Cycles from the last W to B of the memory `ideal`."""
