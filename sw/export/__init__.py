# SPDX-License-Identifier: Apache-2.0
"""Exports a checkpoint to a folder with an ONNX file."""
