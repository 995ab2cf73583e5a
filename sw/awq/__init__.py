# SPDX-License-Identifier: Apache-2.0
"""Activation-aware weight quantization of a float decoder graph: see sw.quantize."""
