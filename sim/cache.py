# SPDX-License-Identifier: Apache-2.0
"""A cache of builds: directories named by the content of their sources, safe between processes."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["BUILD", "ROOT", "cached", "digest", "generator_digest", "locked", "scratch"]

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sim"


def digest(*parts: object) -> str:
    """16 hexadecimal digits of the content of `parts`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def generator_digest() -> str:
    """A digest of everything except the options that can change the generated Verilog."""
    sources = {str(p.relative_to(ROOT)): p.read_bytes() for p in sorted((ROOT / "hw").rglob("*.py"))}
    return digest(importlib.metadata.version("amaranth"), importlib.metadata.version("pyosys"), sources)


def scratch(out: Path) -> Path:
    """An empty directory beside `out`; the caller renames it when it is complete."""
    directory = out.with_name(f"{out.name}.partial")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def cached(out: Path, make: Callable[[Path], object]) -> Path:
    """The directory `out`. If it does not exist, `make` fills an empty one, which is renamed when it is complete."""
    with locked(out):
        if not out.exists():
            partial = scratch(out)
            make(partial)
            partial.rename(out)
    return out


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a directory against other threads and other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
