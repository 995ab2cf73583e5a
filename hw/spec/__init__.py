# SPDX-License-Identifier: Apache-2.0
"""The contract between hardware and software: plain data and numpy, read by RTL, packer, driver and docs."""
