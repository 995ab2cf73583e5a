# SPDX-License-Identifier: Apache-2.0
"""Reads small files beside a model, and text files that a user names."""

import json
import sys
from pathlib import Path
from typing import Any

from sw.common.errors import UserError, one_line

WARNINGS = "gristmill_warnings"
"""Key in the config.json of our exports: warnings to show whenever the model is used, one line each."""
SUBFOLDER = "onnx"
"""Folder in which transformers.js and onnx-community put the graphs of a model; its text files are one folder up."""


def read_text(path: Path | str) -> str:
    """A UTF-8 file's text; "-" is stdin. Raises UserError if the file cannot be read or is not UTF-8."""
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()).decode()
    except UnicodeDecodeError:
        raise UserError(f"{'stdin' if str(path) == '-' else path} is not UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None


def text_directory(model: Path) -> Path:
    """The folder with the tokenizer and the JSON files of an ONNX file: its own folder, or the one above `onnx`."""

    def has_texts(folder: Path) -> bool:
        return any((folder / name).is_file() for name in ("tokenizer.json", "config.json"))

    folder = model.absolute().parent
    above = folder.name == SUBFOLDER and not has_texts(folder) and has_texts(folder.parent)
    return folder.parent if above else model.parent


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """A file with a JSON object; empty if it is missing and not required. Raises UserError if it is damaged."""
    if not required and not path.exists():
        return {}
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values
