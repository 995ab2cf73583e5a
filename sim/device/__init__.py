# SPDX-License-Identifier: Apache-2.0
"""The simulated device: generated Verilog, compiled with Verilator to a shared library that software calls."""
