# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats: safetensors, Hugging Face folders, AutoAWQ, GPTQ, compressed-tensors, GGUF."""
