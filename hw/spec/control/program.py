# SPDX-License-Identifier: Apache-2.0
"""A program: descriptors in memory, one directly after the other, word 0 of each first."""

PROGRAM_ALIGNMENT = 128
"""Alignment in bytes of a program."""
LENGTH_BITS = 24
"""Width of a program's length in descriptors: with 64 bytes each it cannot reach the end of the address space."""
