# SPDX-License-Identifier: Apache-2.0
"""The generator: every block of the accelerator as an Amaranth component."""
