# SPDX-License-Identifier: Apache-2.0
"""The contract between hardware and software: plain data and numpy, read by the RTL, the packer, the driver and the docs."""
