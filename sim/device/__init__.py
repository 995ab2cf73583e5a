# SPDX-License-Identifier: Apache-2.0
"""The simulated device: generated Verilog, verilated into a shared library that software drives in batches."""
