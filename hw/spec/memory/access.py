# SPDX-License-Identifier: Apache-2.0
"""How the accelerator uses its memory ports: sizes that the RTL is built with and that the performance model knows."""

BURST_BOUNDARY = 4096
"""Bytes; no AXI burst crosses a multiple of it (Arm IHI 0022)."""
MAX_BURST_BEATS = 256
"""Longest INCR burst of AXI4."""
OUTSTANDING = 8
"""Bursts that a port may have under way: 8 times 4 KiB cover 2,048 cycles of latency."""
WEIGHT_BURSTS_AHEAD = 6
"""Bursts of weights that a port may be ahead of the core. Ports whose regions begin a quarter of the DRAM's banks apart
(32 KiB) must not drift apart by as much: with 8 bursts of 4 KiB they do, and then meet in a bank for a whole layer."""
CHUNK_BYTES = 512
"""Activations that a port reads before it is the next port's turn: long enough for DDR, and a single token spreads over
all ports. Chunks end at multiples of this, so that each of them is one burst: none crosses 4 KiB, none is too long."""
CHUNKS_AHEAD = 4
"""Chunks that a port's FIFO holds: while some are handed over others arrive, from every port."""
PIECE_FLOATS = 256
"""Results of one row that are written together: 1 KiB. Shorter writes cost the reads more than they take themselves."""
IDEAL_READ_LATENCY = 32
"""Cycles from AR to the first R of the simulated memory `ideal`, which otherwise moves a beat per cycle and port."""
IDEAL_WRITE_LATENCY = 16
"""Cycles from the last W to B of that memory."""
