# SPDX-License-Identifier: Apache-2.0
"""Output directories that are either complete or absent."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sw.common.errors import UserError, one_line


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside `target`; its files appear in `target` when the block ends without an exception.

    A target that does not exist is created by one rename. If it exists, each file is replaced by a rename of its own,
    and other files stay. After an exception (also after an interrupt) the target is unchanged.
    Raises UserError if the target is not a directory or cannot be written.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} exists and is not a directory")
    made: list[Path] = []
    try:
        parent = target.absolute().parent
        while not parent.exists():
            made.append(parent)
            parent = parent.parent
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    except OSError as error:
        raise UserError(f"cannot write to {target}: {one_line(error)}") from None
    try:
        work.chmod(0o755)
        yield work
        _move(work, target)
        made.clear()
    except OSError as error:
        # numpy's message says how many numbers it could not write, but not why.
        why = one_line(error) if error.errno else f"{one_line(error)}; is the disk full?"
        raise UserError(f"cannot write to {target}: {why}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            try:
                parent.rmdir()
            except OSError:
                break


def _move(work: Path, target: Path) -> None:
    if not target.exists():
        try:
            work.rename(target)
            return
        except OSError:
            # Another process may have created the same directory first; then the files are replaced one by one.
            if not target.is_dir():
                raise
    for path in sorted(work.iterdir()):
        path.replace(target / path.name)
