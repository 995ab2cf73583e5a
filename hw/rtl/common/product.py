# SPDX-License-Identifier: Apache-2.0
"""Products with a number of a few bits."""

from amaranth.hdl import Mux, Value


def small_product(platform, a: Value, b: Value) -> Value:
    """``a * b``, where ``b`` has a few bits.

    On ECP5 it is made of adders if ``b`` is unsigned. This part's multipliers are in a few rows far from most logic,
    and open tools use none of their registers. The routing to a multiplier, its delay of 3.9 ns and the routing back,
    in every processing element, would be the critical path.
    """
    if getattr(platform, "family", None) != "ecp5" or b.shape().signed:
        return a * b
    terms = [Mux(bit, a << place, 0) for place, bit in enumerate(b)]
    while len(terms) > 1:
        terms = [sum(terms[first : first + 2]) for first in range(0, len(terms), 2)]
    return Value.cast(terms[0])
