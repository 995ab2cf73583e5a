# SPDX-License-Identifier: Apache-2.0
"""Control: registers, descriptors, the command that the core gets, and what is refused."""
