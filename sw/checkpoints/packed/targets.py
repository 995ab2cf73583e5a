# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' lists of modules: names, patterns (re:...) and class names.

The rules are those of the package (compressed_tensors/utils/match.py): a name must be equal, a pattern must match from
the name's beginning, and a class counts with its base classes. A module whose name or class is in the ignore list is
float. Of several targets that match, an exact name counts before a pattern, and a pattern before a class.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sw.checkpoints.packed.patterns import read_pattern
from sw.checkpoints.settings import Settings

PATTERN = "re:"
LINEAR = ("Linear", "Module")
"""Names of the classes of a linear layer, as targets may name them."""

Scheme = TypeVar("Scheme")


@dataclass(frozen=True)
class Target:
    """One entry of a list. text: the entry. pattern: None for a name."""

    text: str
    pattern: re.Pattern[str] | None

    def names(self, module: str) -> bool:
        """Whether the entry matches this name of a module."""
        return self.text == module if self.pattern is None else self.pattern.match(module) is not None


@dataclass(frozen=True)
class Targets(Generic[Scheme]):
    """The targets of all groups, each with its group's scheme, and the modules that are not quantized."""

    schemes: Mapping[Target, Scheme]
    ignored: Sequence[Target]

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a linear layer, or None if it is float."""
        if any(target.names(module) or target.text in LINEAR for target in self.ignored):
            return None
        order = sorted(self.schemes, key=lambda target: (PATTERN in target.text, target.text))
        for target in order:
            if target.names(module):
                return self.schemes[target]
        return next((self.schemes[target] for target in order if target.text in LINEAR), None)


def read_targets(settings: Settings, key: str, where: str) -> list[Target]:
    """The list `key` of these settings; empty if it is absent.

    where: the list's name for messages. Raises UserError for anything but a list of texts, and for bad patterns.
    """
    texts = settings.get(key)
    texts = [] if texts is None else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise settings.wrong(where, "a list of names", texts)
    return [Target(text, _pattern(settings, where, text)) for text in texts]


def _pattern(settings: Settings, where: str, text: str) -> re.Pattern[str] | None:
    return read_pattern(settings.path, where, text.removeprefix(PATTERN)) if text.startswith(PATTERN) else None
