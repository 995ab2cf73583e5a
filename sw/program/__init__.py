# SPDX-License-Identifier: Apache-2.0
"""Compilation: a matched decoder becomes programs, which compute everything between two attentions on the device.

    ids -> embedding -> program 0 -> attention 0 -> program 1 -> attention 1 -> ... -> program L -> logits

`obstacles` says why a graph cannot be compiled, `weights` brings layers into the order that the epilogues need, `load`
writes them into the device's memory, `lower` makes the jobs of each program. docs/programs.md shows what a program is.
"""
