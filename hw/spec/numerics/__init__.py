# SPDX-License-Identifier: Apache-2.0
"""Numerics: the definition of a layer's results in numpy, bit for bit."""
