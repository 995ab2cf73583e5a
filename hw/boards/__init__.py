# SPDX-License-Identifier: Apache-2.0
"""What a board carries around the accelerator: clocks, pins, and a self-test that needs no processor."""
