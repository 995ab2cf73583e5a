# SPDX-License-Identifier: Apache-2.0
"""The designs whose figures are in docs/figures.json, from the command of each section.

For another design add a section with its command, its config in words, and any figures of the same form. Run the
command with its output in a file, then ``python -m sw.figures --take SECTION=FILE``. The tests measure every section.
"""

import json
import shlex
from argparse import ArgumentParser
from pathlib import Path

from hw.flows import command_line
from hw.spec.config import AcceleratorConfig

_FILE = Path(__file__).resolve().parents[2] / "docs" / "figures.json"


def sections_of(prefix: str) -> dict[str, dict]:
    """The sections whose names begin with this, by name."""
    sections = json.loads(_FILE.read_text(encoding="utf-8"))
    return {name: section for name, section in sections.items() if name.startswith(prefix)}


def config_of(section: dict) -> AcceleratorConfig:
    """The config that a section's command measures. Its board is the KV260."""
    parser = ArgumentParser()
    command_line.add_config_options(parser)
    parser.add_argument("--board", required=True, choices=["kv260"])
    for switch in ("--levels", "--json"):
        parser.add_argument(switch, action="store_true")
    words = shlex.split(section["command"])
    assert words[:3] == ["python", "-m", "hw.resources"], section["command"]
    return command_line.config_of(parser.parse_args(words[3:]), "ultrascaleplus")
