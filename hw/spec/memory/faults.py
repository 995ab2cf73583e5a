# SPDX-License-Identifier: Apache-2.0
"""Faults of the simulated memory; the C++ model uses these numbers."""

import enum


class Fault(enum.IntEnum):
    """A fault of the simulated memory, in a range of addresses."""

    NONE = 0
    """No fault: it ends all faults, and bursts without an answer are answered."""
    READ_ERROR = 1
    """Bursts that touch the range are answered with SLVERR."""
    WRITE_ERROR = 2
    """Bursts that touch the range are answered with SLVERR, and nothing is written."""
    READ_SILENT = 3
    """Bursts that touch the range are not answered."""
    WRITE_SILENT = 4
    """Bursts that touch the range get no B."""
    READ_BLOCKED = 5
    """ARREADY is low on all ports."""
    WRITE_BLOCKED = 6
    """AWREADY and WREADY are low."""
