# SPDX-License-Identifier: Apache-2.0
"""ONNX files: read, understood, written and rewritten."""
