# SPDX-License-Identifier: Apache-2.0
"""Runs work on all processors.

A matrix product of numpy has one thread here (see sw) and releases the interpreter while it runs. So several products
in several threads use all processors, and so does the elementwise work between them; with a multi-threaded BLAS that
work would run on one processor.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = os.cpu_count() or 1
_pool: ThreadPoolExecutor | None = None

Item = TypeVar("Item")
Result = TypeVar("Result")


def threaded(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The function's results, in order; it runs in as many threads as there are processors.

    The first exception is raised, after the running calls have ended. `function` must not call `threaded` itself.
    """
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS, "sw.awq")
    return list(_pool.map(function, items))
