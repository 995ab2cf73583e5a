# SPDX-License-Identifier: Apache-2.0
"""Progress is one line on a terminal and ten lines elsewhere; the terminal's line is cleared at the end."""

import fcntl
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from sw.common.status_line import StatusLine

ROOT = Path(__file__).resolve().parents[3]


def counted(terminal, monkeypatch, capsys):
    """The output of a count of 200 steps and another of five steps."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    with StatusLine() as status:
        for done in range(201):
            status.count("{done} of {total}", done, 200, "!" * (done == 200))
        status.count("{done}/{total}", 5, 5)
        status.clear()
    return capsys.readouterr().err


def test_without_terminal(monkeypatch, capsys):
    shown = counted(False, monkeypatch, capsys)
    assert shown == "".join(f"{done} of 200\n" for done in range(20, 200, 20)) + "200 of 200!\n5/5\n"


def test_terminal(monkeypatch, capsys):
    shown = counted(True, monkeypatch, capsys)
    assert "\n" not in shown
    assert shown.endswith("\r200 of 200!\x1b[K\r5/5\x1b[K\r\x1b[K")
    assert len(shown.split("\r")) == 1 + 201 + 2


def test_terminal_without_sequences(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with StatusLine() as status:
        status.count("{done} of {total}", 2, 2)
    assert capsys.readouterr().err == "2 of 2\n"


@pytest.mark.parametrize(("columns", "most"), [(20, 19), (0, 79)])
def test_narrow_terminal(columns, most):
    """A long text stays on its line: on a real terminal, of 80 columns where it does not say how many it has."""
    leader, follower = os.openpty()
    try:
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        script = (
            "from sw.common.status_line import StatusLine\n"
            "with StatusLine() as status: status.count('{done} of {total} layers, ' + 'x' * 100, 1, 2)"
        )
        environment = {**os.environ, "TERM": "xterm"}
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=follower, check=True, timeout=60
        )
        shown = os.read(leader, 1000).decode()
    finally:
        os.close(leader)
        os.close(follower)
    text, rest = shown.removeprefix("\r").split("\x1b[K", 1)
    assert rest == "\r\x1b[K"
    assert text == f"1 of 2 layers, {'x' * 100}"[:most]


def test_terminal_after_an_error(monkeypatch, capsys):
    """The message is on a line of its own."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pytest.raises(RuntimeError), StatusLine() as status:
        status.count("{done} of {total}", 1, 2000)
        raise RuntimeError
    assert capsys.readouterr().err == "\r1 of 2,000\x1b[K\r\x1b[K"
