# SPDX-License-Identifier: Apache-2.0
"""Quantized layers of Hugging Face folders: integers that are packed into 32-bit words, with scales of groups."""
