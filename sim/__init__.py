# SPDX-License-Identifier: Apache-2.0
"""Verification and measurement: cocotb benches, their runner, and the simulated device's harness."""
