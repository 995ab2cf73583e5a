# SPDX-License-Identifier: Apache-2.0
"""The measured figures that README and docs quote: docs/figures.json, and how they get into the pages.

This package knows the file and Markdown. `python -m sw.figures` is its command line.
"""
