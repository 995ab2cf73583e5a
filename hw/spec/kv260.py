# SPDX-License-Identifier: Apache-2.0
"""What the KV260's bitstream, its device-tree overlay and its driver agree on: addresses, names, the fabric's clock."""

APP_NAME = "gristmill"
"""Of the Kria app: the folder in ``/lib/firmware/xilinx`` and its files, and what ``xmutil loadapp`` takes."""
UIO_NAME = "gristmill"
"""Of the control port's UIO device, in ``/sys/class/uio/uio*/name``."""
BUFFER_NAME = "udmabuf-gristmill"
"""Of the u-dma-buf: ``/dev/{name}`` and ``/sys/class/u-dma-buf/{name}``."""
BUFFER_BYTES = 0x2000_0000
"""Size of that buffer, 512 MiB: it has to fit the kernel's contiguous memory (``cma=``)."""
CONTROL_ADDRESS = 0xA000_0000
"""Physical address of the registers: the first one behind M_AXI_HPM0_FPD (UG1085, system addresses)."""
CONTROL_BYTES = 0x1_0000
"""Size of the registers' window; what lies beyond the registers answers DECERR."""
FABRIC_HZ = 250_000_000
"""Frequency of the fabric's clock, pl_clk0, that the bitstream is timed for and the overlay sets."""
