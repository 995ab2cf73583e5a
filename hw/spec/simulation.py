# SPDX-License-Identifier: Apache-2.0
"""Names of the ports that only the simulated device has; see :mod:`hw.rtl.common.clock_gate`."""

GATED_DOMAIN = "gated_{}"
"""Name of the clock domain with a number."""
GATED_CLOCK = GATED_DOMAIN + "_clk"
"""Name of its clock."""
CLOCKS_NEEDED = "clocks_needed"
"""Which of the gated clocks have an edge next, one bit each."""
