# SPDX-License-Identifier: Apache-2.0
"""Makes a GTKWave save file from a waveform (VCD): payload, valid and ready of each stream of a block are a group."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Scope", "Stream", "read_scopes", "save_file", "streams"]

_BINARY, _HEX = "@28", "@22"
_OPEN_GROUP, _CLOSED_GROUP, _END = "@800200", "@c00200", "@1000200"
_CLOSED_END = "@1401200"
_ROOT = "$rootio"
"""Verilator's own scope, which repeats the top module's ports."""


@dataclass(frozen=True)
class Variable:
    """A signal of a scope. bits: its range in GTKWave's form, such as ``[7:0]``; empty for a single bit."""

    name: str
    bits: str


@dataclass
class Scope:
    """A module instance. path: the names of all instances down to this one."""

    path: tuple[str, ...]
    variables: list[Variable] = field(default_factory=list)

    def full_name(self, variable: Variable) -> str:
        """A signal's name in GTKWave."""
        return ".".join([*self.path, variable.name]) + variable.bits


@dataclass(frozen=True)
class Stream:
    """A stream of a scope: its payload (whole, or its parts), valid and ready."""

    name: str
    variables: tuple[Variable, ...]


def read_scopes(vcd: Path) -> list[Scope]:
    """All scopes of a waveform in the file's order; only the header is read."""
    scopes: list[Scope] = []
    path: list[Scope] = []
    with vcd.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            words = line.split()
            match words[:1]:
                case ["$scope"]:
                    path.append(Scope((*(path[-1].path if path else ()), words[2])))
                    scopes.append(path[-1])
                case ["$upscope"]:
                    path.pop()
                case ["$var"]:
                    # $var wire 8 id name [7:0] $end
                    path[-1].variables.append(Variable(words[4], words[5] if words[5] != "$end" else ""))
                case ["$enddefinitions"]:
                    break
    return scopes


def streams(variables: Sequence[Variable]) -> list[Stream]:
    """The streams among the signals of a scope: NAMEvalid and NAMEready, and other signals that begin with NAME.

    Amaranth's streams are ``i_valid`` at the top and ``i__valid`` inside; AXI's channels ``m_axi_hp0_arvalid``.
    """
    by_name = {variable.name: variable for variable in variables}
    found = []
    for name in by_name:
        prefix = name.removesuffix("valid")
        if prefix in ("", name) or f"{prefix}ready" not in by_name:
            continue
        # An AXI channel has members instead of a payload: letters after the channel's name.
        member = r"payload(\.\w+)*" if prefix.endswith("_") else r"[a-z]+"
        payload = [v for v in variables if re.fullmatch(re.escape(prefix) + member, v.name)]
        payload = [v for v in payload if not v.name.endswith(("valid", "ready"))]
        found.append(Stream(prefix.rstrip("_"), (*payload, by_name[name], by_name[f"{prefix}ready"])))
    return found


def _group(name: str, lines: Sequence[str], closed: bool = False) -> list[str]:
    start, end = (_CLOSED_GROUP, _CLOSED_END) if closed else (_OPEN_GROUP, _END)
    return [start, f"-{name}", *lines, end, f"-{name}"] if lines else []


def _shown(scope: Scope, variables: Sequence[Variable]) -> Iterator[str]:
    for variable in variables:
        yield _HEX if variable.bits else _BINARY
        yield scope.full_name(variable)


def _stream_groups(scope: Scope, found: Sequence[Stream], closed: bool = False) -> list[str]:
    return [line for item in found for line in _group(item.name, list(_shown(scope, item.variables)), closed)]


def save_file(vcd: Path) -> str:
    """The text of a .gtkw file: clock, reset, the block's streams and other ports, and its parts' streams, folded."""
    root, top, *inner = read_scopes(vcd)
    assert root.path == (_ROOT,) and len(top.path) == 1, "not a waveform of Verilator"
    ports = {variable.name for variable in root.variables}
    outside = [variable for variable in top.variables if variable.name in ports]
    first = [variable for variable in outside if variable.name in ("clk", "rst")]
    found = streams(outside)
    taken = {*first, *(variable for item in found for variable in item.variables)}
    lines = [f'[dumpfile] "{vcd}"', f"[treeopen] {top.path[0]}.", *_shown(top, first), *_stream_groups(top, found)]
    lines += _group("other ports", list(_shown(top, [v for v in outside if v not in taken])))
    for scope in inner:
        name = ".".join(scope.path[1:])
        lines += _group(name, _stream_groups(scope, streams(scope.variables)), closed=True)
    return "\n".join(lines) + "\n"
