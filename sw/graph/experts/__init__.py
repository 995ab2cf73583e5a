# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts in ONNX graphs: how they are written, and how they are found again."""
