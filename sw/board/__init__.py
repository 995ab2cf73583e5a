# SPDX-License-Identifier: Apache-2.0
"""What sw.doctor checks on a board."""
