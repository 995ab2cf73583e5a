# SPDX-License-Identifier: Apache-2.0
"""Programs that others wrote: yosys, and the steps of a bitstream with a log each."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from hw.flows.errors import FlowError


class ToolError(FlowError):
    """A tool is missing, too old, or failed. The message is one line.

    Attributes
    ----------
    status : exit code: 2 before any work, 1 after a step failed
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def yosys_command(script: str) -> list[str]:
    """The command that runs a yosys script of the current folder, with the yosys that lies beside this Python.

    yosys cannot be told a path with every character, so a script and the files that it names are in one folder. The
    files of ABC, which yosys starts, are there too: their path may not have a space.
    """
    program = (
        "import os, sys; os.environ['TMPDIR'] = '.'; "
        "from pyosys import libyosys; libyosys.run_pass('script ' + sys.argv[1])"
    )
    return [sys.executable, "-c", program, script]


def run_yosys(script: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a yosys script in its folder; the caller sees whether it failed. Raises subprocess.TimeoutExpired."""
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
    """Run one step in ``folder`` with its output in ``log``, which names it; returns the seconds that it took.

    Parameters: ``what`` it is in messages; ``seconds`` that it may take, and the same as ``limit`` in words;
    ``environment`` beside the process's own.

    Raises
    ------
    ToolError : it failed, and the message quotes the log's first error; or it took too long
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
