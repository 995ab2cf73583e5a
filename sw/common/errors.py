# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on, and how every command line reports them."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can change: a file, an option, a missing package. The message is one clear line."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an exception as one line of at most `limit` characters, for quoting inside a UserError."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command line and exits with its status.

    UserError, or a Python package that a command imports and finds missing: one line `error: ...` on stderr,
    status 2, no traceback. Interrupt: status 130. SIGTERM: status 143, raised as an exception so that the context
    managers remove whatever is half-written. A reader that closes the pipe early (`| head`) is no error.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {one_line(error, limit=2000)}", file=sys.stderr)
        status = 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("hw", "sw", "sim"):
            raise
        print(f"error: the Python package {error.name!r} is not installed", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit and would complain about the same closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
