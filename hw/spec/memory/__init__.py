# SPDX-License-Identifier: Apache-2.0
"""Memory: the layout of a layer's bytes, and how the accelerator reads and writes them."""
