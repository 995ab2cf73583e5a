# SPDX-License-Identifier: Apache-2.0
"""Control: registers, descriptors, and the rules for refusing them."""
