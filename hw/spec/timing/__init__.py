# SPDX-License-Identifier: Apache-2.0
"""The performance model of attention, and of whole tokens and prompts."""
