# SPDX-License-Identifier: Apache-2.0
"""The files for contributors agree with the rest of the repository."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_precommit_runs_what_lint_runs():
    """The same tools with the same options, in the same order."""
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    # The line after a failed ruff format lists the files and is no check.
    wanted = re.findall(r"^\t@\$\(BIN\)/([a-z]+(?: [\w.-]+)*)", lint[1], re.MULTILINE)
    hooks = re.findall(r"^ +entry: \.venv/bin/(.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert len(hooks) == 3
    assert hooks == wanted


def test_changelog_knows_this_version():
    """Newest first: the unreleased changes, then the version of pyproject.toml."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


def test_targets_and_commands_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    modules = set(re.findall(r"python -m ((?:hw|sim|sw)\.\w+)", text))
    assert len(modules) >= 5
    assert all((ROOT / module.replace(".", "/")).with_suffix(".py").exists() for module in modules)
