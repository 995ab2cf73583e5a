# SPDX-License-Identifier: Apache-2.0
"""What the command lines share: options and reports."""
