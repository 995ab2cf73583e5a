# SPDX-License-Identifier: Apache-2.0
"""The core: from streams of weights and activations to float32 results."""
