# SPDX-License-Identifier: Apache-2.0
"""docs/figures.json: every figure that README and docs quote, with its command and configuration.

The file holds sections by name. A section has three members: command, the shell command that prints the figures;
config, everything else that is needed to repeat the measurement; figures, the JSON that the command prints, or the part
of it that is quoted.
"""

import json
from pathlib import Path
from typing import Any

from sw.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "figures.json"
MEMBERS = ("command", "config", "figures")

Sections = dict[str, dict[str, Any]]


def load(path: Path = FILE) -> Sections:
    """All sections. Raises UserError if the file is missing, is not JSON, or a section lacks a member."""
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    for name, section in sections.items():
        if tuple(section) != MEMBERS:
            raise UserError(f"{path}: section {name} has {', '.join(section)}, not {', '.join(MEMBERS)}")
    return sections


def save(sections: Sections, path: Path = FILE) -> None:
    """Writes all sections. An object or list that holds no other is one line, so that a diff shows a whole row."""
    path.write_text(_text(sections) + "\n", encoding="utf-8")


def _text(value: Any, indent: str = "") -> str:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if not any(isinstance(item, dict | list) for item in inner):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    keys = [""] * len(inner)
    if isinstance(value, dict):
        keys = [json.dumps(key, ensure_ascii=False) + ": " for key in value]
    parts = [f"{deeper}{key}{_text(item, deeper)}" for key, item in zip(keys, inner, strict=True)]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([start, ",\n".join(parts), indent + end])


def find(sections: Sections, path: str) -> Any:
    """The figure at a path such as ``tokens.ideal.cycles``: the name of a section, then steps into its figures.

    A step names a member of an object. In a list a step keeps the rows that have this value in any member; when a
    single row is left, it is taken: ``gemm.16.ideal.cycles``. Raises UserError if there is no such figure, or several.
    """
    name, *steps = path.split(".")
    value: Any = sections[name]["figures"] if name in sections else None
    for step in steps:
        if isinstance(value, list):
            value = [row for row in value if step in map(str, row.values())]
            value = value[0] if len(value) == 1 else value or None
        elif isinstance(value, dict):
            value = value.get(step)
        else:
            value = None
    if value is None or isinstance(value, dict | list):
        raise UserError(f"there is no single figure {path} in {FILE.name}")
    return value


def take(sections: Sections, name: str, document: Any) -> None:
    """Replaces a section's figures by the output of its command. Of an object, only the section's members are taken.

    Raises UserError if there is no such section, or if the document has another form.
    """
    if name not in sections:
        raise UserError(f"{FILE.name} has no section {name}, but {', '.join(sections)}")
    old = sections[name]["figures"]
    if type(old) is not type(document):
        raise UserError(f"section {name} of {FILE.name} is a {type(old).__name__}, not a {type(document).__name__}")
    if isinstance(old, dict):
        if missing := [key for key in old if key not in document]:
            raise UserError(f"section {name} of {FILE.name} needs {', '.join(missing)}, which the document lacks")
        document = {key: document[key] for key in old}
    sections[name]["figures"] = document
