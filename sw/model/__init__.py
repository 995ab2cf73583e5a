# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder as plain data: linear layers, tables, sources."""
