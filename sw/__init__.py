# SPDX-License-Identifier: Apache-2.0
"""Gristmill's software: models in, weight streams out, and the devices that run them."""
