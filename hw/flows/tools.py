# SPDX-License-Identifier: Apache-2.0
"""Runs external programs: yosys, and the steps of a bitstream with a log for each."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


class ToolError(RuntimeError):
    """A tool is missing, too old, or failed. The message is one line.

    Attributes
    ----------
    status : exit code: 2 before any work, 1 after a step has failed
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def yosys_command(script: str) -> list[str]:
    """The command that runs a yosys script in the current folder, with the yosys of this Python's environment.

    yosys does not support all characters in a path, so a script and the files that it names are in one folder. The
    temporary files of ABC, which yosys starts, are there too, because their path must not have a space.
    """
    program = (
        "import os, sys; os.environ['TMPDIR'] = '.'; "
        "from pyosys import libyosys; libyosys.run_pass('script ' + sys.argv[1])"
    )
    return [sys.executable, "-c", program, script]


def run_yosys(script: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a yosys script in its folder; the caller checks whether it failed. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        yosys_command(script.name),
        cwd=script.parent,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def run_logged(
    command: list[str],
    log: Path,
    what: str,
    *,
    folder: Path,
    seconds: float,
    limit: str,
    environment: Mapping[str, str] | None = None,
) -> float:
    """Run one step in ``folder`` with its output in ``log``, whose name is the step's; returns its time in seconds.

    Parameters: ``what`` is the step's name in messages; ``seconds`` is the timeout, and ``limit`` the timeout in words;
    ``environment`` is added to the process's own.

    Raises
    ------
    ToolError : the step failed, and the message quotes the log's first error; or it took too long
    """
    print(f"{log.stem:>12}  running; {log}", file=sys.stderr, flush=True)
    start = time.monotonic()
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"{what} took longer than {limit}; see {log}") from error
    if code:
        lines = log.read_text(errors="replace").splitlines()
        first = next((line.strip() for line in lines if line.startswith("ERROR")), "no error in its log")
        raise ToolError(f"{what} failed with exit code {code}: {first}; see {log}")
    return time.monotonic() - start
