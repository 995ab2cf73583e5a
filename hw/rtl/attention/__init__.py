# SPDX-License-Identifier: Apache-2.0
"""Attention: scores on chip, and their softmax."""
