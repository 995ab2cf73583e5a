# SPDX-License-Identifier: Apache-2.0
"""The contract between hardware and software: plain data and numpy, used by RTL, packer, driver and docs."""
