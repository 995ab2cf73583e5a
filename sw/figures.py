# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.figures``: writes the figures of docs/figures.json into README.md and docs/.

``--check`` only compares. ``--take SECTION=FILE`` first replaces a section of docs/figures.json by the JSON that its
command printed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sw.common.command_line import Parser
from sw.common.errors import UserError, run_cli
from sw.pages.markdown import render
from sw.pages.store import ROOT, load, save, take
from sw.pages.tables import TABLES


def pages(root: Path = ROOT) -> list[Path]:
    """Every page that may quote a figure. hw.docs writes docs/README.md, which has none."""
    return [root / "README.md", *(path for path in sorted((root / "docs").glob("*.md")) if "README" not in path.name)]


def _source(text: str) -> tuple[str, Path]:
    section, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"SECTION=FILE is wanted, not {text!r}")
    return section, Path(path)


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 1 if --check finds a page that is not up to date."""
    parser = Parser(prog="python -m sw.figures", description="Write the measured figures into README.md and docs/.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    group.add_argument(
        "--take",
        type=_source,
        action="append",
        default=[],
        metavar="SECTION=FILE",
        help="replace a section of docs/figures.json by a command's JSON (repeatable)",
    )
    options = parser.parse_args(arguments)
    sections = load()
    for section, path in options.take:
        take(sections, section, _read(path))
    texts = {path: path.read_text(encoding="utf-8") for path in pages()}
    changed = {path: new for path, old in texts.items() if (new := render(old, sections, TABLES)) != old}
    if options.check:
        for path in changed:
            print(f"error: {path.relative_to(ROOT)} is not up to date; run python -m sw.figures", file=sys.stderr)
        return 1 if changed else 0
    if options.take:
        save(sections)
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
