# SPDX-License-Identifier: Apache-2.0
"""Progress is one line on a terminal and ten lines elsewhere; the terminal's line is cleared at the end."""

import pytest

from sw.common.status_line import StatusLine


def counted(terminal, monkeypatch, capsys):
    """The output of a count of 200 steps and another of five steps."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
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


def test_terminal_after_an_error(monkeypatch, capsys):
    """The message is on a line of its own."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pytest.raises(RuntimeError), StatusLine() as status:
        status.count("{done} of {total}", 1, 2000)
        raise RuntimeError
    assert capsys.readouterr().err == "\r1 of 2,000\x1b[K\r\x1b[K"
