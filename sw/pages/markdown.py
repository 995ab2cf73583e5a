# SPDX-License-Identifier: Apache-2.0
"""Figures in Markdown: replaces tables between markers and numbers before markers.

A marker is an HTML comment, which a rendered page does not show.

- ``<!-- table: NAME -->`` and ``<!-- end -->``, each on a line of its own: between them is the table of that name
  (sw.pages.tables).
- ``47.8<!--= PATH FORMAT -->``: the number before the marker is the figure at PATH (sw.pages.store.find). FORMAT is a
  format specification of Python, by default ``,``. ``PATH * NUMBER FORMAT`` scales the figure first.
"""

import re
from collections.abc import Callable, Mapping

from sw.common.errors import UserError
from sw.pages.store import Sections, find

Table = Callable[[Sections], str]

_TABLE = re.compile(r"^(<!-- table: (\w+) -->)$.*?^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
_OPEN = re.compile(r"^<!-- table:", re.MULTILINE)
_NUMBER = re.compile(r"([-+]?\d[\d,.]*(?:e[-+]\d+)?)?<!--= (\S+)(?: \* (\S+))?(?: (\S+))? -->")
_ANY_NUMBER = re.compile(r"<!--=")


def render(text: str, sections: Sections, tables: Mapping[str, Table]) -> str:
    """The page with the figures of the sections.

    Raises UserError for a marker that is damaged, or names a table or a figure that does not exist.
    """

    def table(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in tables:
            raise UserError(f"there is no table {name}, but {', '.join(tables)}")
        return f"{start}\n{tables[name](sections)}\n{end}"

    def number(match: re.Match[str]) -> str:
        old, path, factor, form = match.groups()
        marker = match[0][len(old or "") :]
        value = find(sections, path)
        if old is None:
            raise UserError(f"there is no number before {marker}")
        return format(value * float(factor) if factor else value, form or ",") + marker

    if len(_TABLE.findall(text)) != len(_OPEN.findall(text)):
        raise UserError("a table has no <!-- end -->, or its name is damaged")
    if len(_NUMBER.findall(text)) != len(_ANY_NUMBER.findall(text)):
        raise UserError("the marker of a figure is damaged")
    return _NUMBER.sub(number, _TABLE.sub(table, text))
