# SPDX-License-Identifier: Apache-2.0
"""Code that every command line needs. It also works on a machine that has only numpy."""

import argparse
from typing import NoReturn

from sw.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports wrong options like every other user error: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def check_positive(value: int | None, option: str) -> None:
    """Raises UserError unless an option is absent or at least 1."""
    if value is not None and value < 1:
        raise UserError(f"{option} is 1 or more, not {value}")
