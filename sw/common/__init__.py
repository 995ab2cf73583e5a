# SPDX-License-Identifier: Apache-2.0
"""Code that every part of the software uses: errors, files, command lines, progress."""
