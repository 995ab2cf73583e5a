# SPDX-License-Identifier: Apache-2.0
"""The control side: registers, descriptors, errors, counters."""
