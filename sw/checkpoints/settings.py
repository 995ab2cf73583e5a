# SPDX-License-Identifier: Apache-2.0
"""JSON files of a Hugging Face folder whose values are read by key and type."""

import json
import sys
from pathlib import Path
from typing import Any

from sw.common.errors import UserError
from sw.common.text_files import read_json


class Settings:
    """A JSON object whose values are read by key and type; null means absent.

    Raises UserError, with the file, the key and the value, for values of another type.
    """

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self._values = values

    @property
    def values(self) -> dict[str, Any]:
        """The whole object."""
        return self._values

    def get(self, key: str) -> Any:
        """The unchecked value, or None."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a whole number from 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def part(self, key: str) -> "Settings":
        """An object inside; empty if it is absent."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Settings(self.path, value)

    def wrong(self, key: str, expected: str, found: Any = ...) -> UserError:
        """The error about a value, by default that of `key`."""
        found = self.get(key) if found is ... else found
        return UserError(f"{self.path}: {key} is {expected}, not {json.dumps(found)[:80]}")

    def _value(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        return default if value is None else value


def read_settings(path: Path, required: bool = False) -> Settings:
    """A JSON file; empty if it is missing and not required. Raises UserError if it is damaged."""
    return Settings(path, read_json(path, required))
