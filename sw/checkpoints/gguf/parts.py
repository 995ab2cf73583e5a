# SPDX-License-Identifier: Apache-2.0
"""A GGUF model in several files: NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split names them."""

import re
from pathlib import Path

from sw.common.errors import UserError

PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE | re.DOTALL)


def gguf_parts(path: Path) -> list[Path]:
    """All files of the model to which the part `path` belongs, in order; only `path` if its name is not that of a part.

    Raises UserError if a part is missing or the name is impossible (part 3 of 2).
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise UserError(f"{path} is named part {number} of {count}, and there is no such part")
    width = len(match["number"])
    parts = [
        path.with_name(f"{match['name']}-{i:0{width}}-of-{match['count']}{match['suffix']}")
        for i in range(1, count + 1)
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(
            f"{path} is part {number} of {count}, and {missing[0]} is missing: all parts go into one folder"
        )
    return parts


def expect_part(path: Path, number: int, count: int, split_no: int, split_count: int) -> None:
    """Checks that a part's metadata (split.no from 0, split.count) matches its place among the parts.

    Raises UserError for a part of another model, and for a part whose name does not give the names of the others.
    """
    if (split_no, split_count) == (number, count):
        return
    if count == 1:
        part = f"part {split_no + 1} of {split_count} of a model"
        name = f"NAME-{split_no + 1:05}-of-{split_count:05}.gguf"
        raise UserError(f"{path} is {part}: keep all parts in one folder, under the names they had ({name})")
    problem = f"its metadata says part {split_no + 1} of {split_count}, its name says part {number + 1} of {count}"
    raise UserError(f"{path}: {problem}")
