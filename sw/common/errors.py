# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on, and how every command line reports them."""

from hw.spec.cli import UserError, one_line, run_cli

__all__ = ["UserError", "one_line", "run_cli"]
