# SPDX-License-Identifier: Apache-2.0
"""Designs for boards around the accelerator: clocks, pins, and a self-test that needs no processor."""
