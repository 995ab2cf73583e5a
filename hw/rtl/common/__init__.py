# SPDX-License-Identifier: Apache-2.0
"""Parts that every block uses: FIFOs, delays, products, loops, RAM."""
