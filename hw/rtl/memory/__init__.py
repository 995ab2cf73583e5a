# SPDX-License-Identifier: Apache-2.0
"""The AXI side: what reads weights and activations from memory, and writes results to it."""
