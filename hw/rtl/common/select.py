# SPDX-License-Identifier: Apache-2.0
"""Selection by a tree of multiplexers."""

from collections.abc import Sequence

from amaranth.hdl import Mux, Value


def select(values: Sequence[Value], index: Value) -> Value:
    """One of ``2**len(index)`` values, by a tree of multiplexers.

    Of constants yosys makes a tree with fewer levels than of a ``Switch``, whose comparisons with the index remain.
    """
    if len(values) == 1:
        return values[0]
    low, high = (select(values[start::2], index[1:]) for start in (0, 1))
    return Mux(index[0], high, low)
