# SPDX-License-Identifier: Apache-2.0
"""Objects of Verilator's run-time library, compiled once for all builds that use the same options.

For a small block they are three quarters of what is to be compiled.
"""

import os
from collections.abc import Callable
from pathlib import Path

from sim.cache import BUILD, cached

__all__ = ["RUNTIME", "link_objects", "runtime_objects"]

RUNTIME = ("verilated.o", "verilated_vpi.o", "verilated_threads.o")
"""Targets of the makefile that Verilator writes. They are the same for every design."""


def runtime_objects(key: str, folder: Path, compile_into: Callable[[tuple[str, ...]], None]) -> Path:
    """The folder of the objects, from the cache if they were compiled before.

    Parameters
    ----------
    key : changes with everything that can change the objects
    folder : a build's folder, with its makefile
    compile_into : makes these targets in that folder
    """

    def make(partial: Path) -> None:
        compile_into(RUNTIME)
        for name in RUNTIME:
            os.link(folder / name, partial / name)

    return cached(BUILD / "runtime" / key, make)


def link_objects(objects: Path, folder: Path) -> None:
    """Put the objects where a build's makefile finds that they are made already."""
    for name in RUNTIME:
        target = folder / name
        if not target.exists():
            os.link(objects / name, target)
        # Newer than the sources, whatever the times of the installed package are.
        os.utime(target)
