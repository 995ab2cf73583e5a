# SPDX-License-Identifier: Apache-2.0
"""What the simulated memory can be made to do wrong: the C++ model has its numbers from here."""

import enum


class Fault(enum.IntEnum):
    """What the simulated memory does wrong, in a range of addresses."""

    NONE = 0
    """Nothing any more: ends all faults, and what was silent is answered."""
    READ_ERROR = 1
    """Bursts that touch the range are answered with SLVERR."""
    WRITE_ERROR = 2
    """The same, and nothing is written."""
    READ_SILENT = 3
    """Bursts that touch the range are not answered."""
    WRITE_SILENT = 4
    """The same: their B does not come."""
    READ_BLOCKED = 5
    """ARREADY is low on all ports."""
    WRITE_BLOCKED = 6
    """AWREADY and WREADY are low."""
