# SPDX-License-Identifier: Apache-2.0
"""Values that the KV260's bitstream, its device-tree overlay and its driver share: addresses, names, clock."""

APP_NAME = "gristmill"
"""Name of the Kria app, for ``xmutil loadapp``; of its folder in ``/lib/firmware/xilinx``, and of its files."""
UIO_NAME = "gristmill"
"""Name of the control port's UIO device, in ``/sys/class/uio/uio*/name``."""
BUFFER_NAME = "udmabuf-gristmill"
"""Name of the u-dma-buf: ``/dev/{name}`` and ``/sys/class/u-dma-buf/{name}``."""
BUFFER_BYTES = 0x2000_0000
"""Size of this buffer, 512 MiB: it must fit the kernel's contiguous memory (``cma=``)."""
CONTROL_ADDRESS = 0xA000_0000
"""Physical address of the registers: the first address of M_AXI_HPM0_FPD (UG1085, system addresses)."""
CONTROL_BYTES = 0x1_0000
"""Size of the registers' window; addresses after the registers answer DECERR."""
FABRIC_HZ = 250_000_000
"""Frequency of the fabric's clock, pl_clk0: the bitstream is timed for it, and the overlay sets it."""
