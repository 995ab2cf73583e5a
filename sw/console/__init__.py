# SPDX-License-Identifier: Apache-2.0
"""Options and reports that the command lines share."""
