# SPDX-License-Identifier: Apache-2.0
"""Numbers: what a layer computes, bit by bit, as numpy."""
