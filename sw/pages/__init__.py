# SPDX-License-Identifier: Apache-2.0
"""The measured figures that README and docs quote: reads docs/figures.json and writes the figures into the pages.

This package handles the file and Markdown. `python -m sw.figures` is its command line.
"""
