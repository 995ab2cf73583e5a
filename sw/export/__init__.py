# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a folder with an ONNX file."""
