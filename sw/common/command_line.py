# SPDX-License-Identifier: Apache-2.0
"""What every command line needs, on a machine with numpy alone too."""

from hw.spec.cli import Parser
from sw.common.errors import UserError

__all__ = ["Parser", "check_positive"]


def check_positive(value: int | None, option: str) -> None:
    """Raises UserError unless an option is absent or at least 1."""
    if value is not None and value < 1:
        raise UserError(f"{option} is 1 or more, not {value}")
