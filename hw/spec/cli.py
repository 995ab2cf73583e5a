# SPDX-License-Identifier: Apache-2.0
"""The end of every command line of the project: its exit status, one line for an error, and closed or full outputs.

Programs that start each other (a bench starts the generator, a device its builder) read this status and this line.
"""

import argparse
import codecs
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""
TERMINATED = 143
"""Exit status after SIGTERM."""
_CLOSED = (errno.EPIPE, errno.ECONNRESET)
"""Errors of a write to a pipe or socket whose reader has closed it."""
_REPLACE = "gristmill.replace"
"""Name of the error handler of both streams."""


class UserError(Exception):
    """An error that the user can correct: a file, an option, a missing package. The message is one clear line."""


class OutputError(BaseException):
    """A write to standard output failed. It is not an Exception, so that only :func:`run_cli` handles it.

    Attributes
    ----------
    closed : whether a reader has closed its pipe, which is no error
    """

    def __init__(self, error: OSError):
        super().__init__(error.strerror or str(error))
        self.closed = error.errno in _CLOSED


class Parser(argparse.ArgumentParser):
    """Reports wrong options in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an exception as one line of at most `limit` characters, for use in a UserError."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command line and exits with its status.

    After a UserError, a file that the system cannot read or write (OSError), or a missing Python package: one line
    `error: ...` on stderr, status 2, no traceback. Interrupt: status 130. SIGTERM: status 143; it is raised as an
    exception so that context managers remove incomplete files.

    If the reader of stdout closes the pipe early (`| head`), the command ends without a message, with status 0 unless
    it has its own status already. Any other failure to write to stdout is an error. Text that cannot be written to
    stderr is lost, and the command continues. Output to streams that are closed from the start is discarded.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    _open_streams()
    status: int | str | None = 0
    try:
        try:
            status = main() or 0
        except SystemExit as leave:
            # For example after --help.
            status = leave.code
    except OutputError as lost:
        if not lost.closed:
            status = _error(f"cannot write to standard output: {lost}")
    except UserError as error:
        status = _error(one_line(error, limit=2000))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("hw", "sw", "sim"):
            raise
        status = _error(f"the Python package {error.name!r} is not installed")
    except OSError as error:
        status = _error(_describe(error))
    except KeyboardInterrupt:
        status = INTERRUPTED
    try:
        # The rest of the output may be in the buffer; a short output is there completely.
        sys.stdout.flush()
    except OutputError as lost:
        if not lost.closed:
            status = _error(f"cannot write to standard output: {lost}")
    sys.exit(status)


def _error(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _describe(error: OSError) -> str:
    """The error without its number, and its file if it is known."""
    if error.strerror is None:
        return one_line(error)
    if error.filename is not None:
        return f"{error.strerror}: {os.fsdecode(error.filename)}"
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        return "the current folder does not exist any more"
    return error.strerror


# Streams


class _Output(io.FileIO):
    """Standard output. The first write that fails raises OutputError; later writes are discarded without an error.

    The interpreter flushes again when it exits, and would report the same failure.
    """

    failed = False

    def write(self, data) -> int:
        if self.failed:
            return len(data)
        try:
            while (written := super().write(data)) is None:
                # Another program has set the terminal or pipe to non-blocking.
                select.select([], [self], [])
        except OSError as error:
            self.failed = True
            self.fail(error)
            return len(data)
        return written

    def fail(self, error: OSError) -> None:
        raise OutputError(error)


class _Messages(_Output):
    """Standard error. A message that cannot be written is lost, and the command continues."""

    def fail(self, error: OSError) -> None:
        pass


def _open_streams() -> None:
    """Replaces the streams of the process by the classes above, with encodings that never fail.

    A text may have characters that the terminal's encoding lacks, and a path may have bytes that are not valid text.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It is closed. The next opened file would get this number, and then the output of child processes.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    codecs.register_error(_REPLACE, _replace)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    for name, kind in (("stdout", _Output), ("stderr", _Messages)):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            raw = kind(stream.fileno(), "w", closefd=False)
            unbuffered = stream.line_buffering or stream.write_through
            options = {"encoding": stream.encoding, "errors": _REPLACE, "line_buffering": unbuffered}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **options))


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """The original byte of a path, or a question mark for a character that the encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)
    code = ord(error.object[error.start])
    # Python represents bytes that are not valid text like this (PEP 383).
    return bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else "?", error.start + 1
