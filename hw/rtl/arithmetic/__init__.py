# SPDX-License-Identifier: Apache-2.0
"""Arithmetic with float32: operators and functions, as pipelines or digit by digit."""
