# SPDX-License-Identifier: Apache-2.0
"""Work spread over the processors.

numpy's matrix products have one thread each here (see sw), and release the interpreter while they run. A thread for
each of several products uses all processors, and so does the elementwise work between them, which a BLAS with threads
of its own would leave to one.
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

    The first exception is raised, after the calls that were under way. Not to be called from within such a function.
    """
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS, "sw.awq")
    return list(_pool.map(function, items))
