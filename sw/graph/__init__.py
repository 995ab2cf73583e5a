# SPDX-License-Identifier: Apache-2.0
"""Reads, matches, writes and rewrites ONNX files."""
