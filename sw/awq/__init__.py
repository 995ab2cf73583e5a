# SPDX-License-Identifier: Apache-2.0
"""Activation-aware weight quantisation of a float decoder graph: see sw.quantize."""
