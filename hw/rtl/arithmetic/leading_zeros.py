# SPDX-License-Identifier: Apache-2.0
"""The number of leading zeros."""

from amaranth.hdl import Cat, Const, Mux, Value


def leading_zeros(value: Value) -> Value:
    """The number of 0 bits above the highest 1 of ``value``; undefined if ``value`` is 0.

    ``ceil(log2(bits))`` bits. Pairs of halves are joined in a tree, so the depth is one multiplexer per power of two,
    and synthesis joins two of them in a LUT.
    """
    size = 1 << (len(value) - 1).bit_length()
    # Each entry: whether a bit is set, and the number of zeros above the first one. The highest bits come first.
    parts = [(bit, Const(0, 0)) for bit in reversed(Cat(Const(1, size - len(value)), value))]
    while len(parts) > 1:
        parts = [
            (high_any | low_any, Cat(Mux(high_any, high, low), ~high_any))
            for (high_any, high), (low_any, low) in zip(parts[::2], parts[1::2])
        ]
    return parts[0][1]
