# SPDX-License-Identifier: Apache-2.0
"""Cocotb benches, one module per hardware block. sim/benches.py lists the parameters of each bench."""
