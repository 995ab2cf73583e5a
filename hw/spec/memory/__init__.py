# SPDX-License-Identifier: Apache-2.0
"""Memory: where a layer's bytes are, in which order, and how the accelerator reads and writes them."""
