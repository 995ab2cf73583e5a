# SPDX-License-Identifier: Apache-2.0
"""Payload packing is exact and reversible at every width that the hardware uses."""

import numpy as np
import pytest

from sim.bench.packing import Layout, pack_elements, unpack_elements

WIDTHS = [1, 2, 3, 4, 5, 8, 11, 16, 27, 32, 48, 60, 63]


@pytest.mark.parametrize(
    ("bits", "signed"), [(bits, signed) for bits in WIDTHS for signed in (False, True)] + [(64, True)]
)
def test_round_trip(bits: int, signed: bool):
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    values = np.random.default_rng(bits).integers(low, high, (7, 5), endpoint=True)
    values[0, :2] = low, high
    payloads = pack_elements(values, bits)
    mask = (1 << bits) - 1
    assert payloads == [sum((int(v) & mask) << (bits * i) for i, v in enumerate(row)) for row in values]
    assert np.array_equal(unpack_elements(payloads, bits, 5, signed), values)


def test_value_out_of_range_is_named():
    with pytest.raises(ValueError, match="Value 16 does not fit an element of 4 bits"):
        pack_elements(np.array([[3, 16]]), 4)


def test_layout():
    layout = Layout({"q": (0, 16, False), "x": (16, 9, True), "wide": (25, 80, True)})
    assert layout.width == 105
    payloads = layout.pack(q=np.array([[1, 2, 3, 15], [0, 0, 0, 1]]), x=[-256, 255], wide=[-(1 << 79), 5])
    assert payloads[0] == 0xF321 | (0x100 << 16) | ((1 << 79) << 25)
    out = layout.unpack(payloads, q=4)
    assert out["q"].tolist() == [[1, 2, 3, 15], [0, 0, 0, 1]]
    assert out["x"].tolist() == [-256, 255]
    assert out["wide"].tolist() == [-(1 << 79), 5]
    assert layout.pack(x=1) == [1 << 16]


def test_layout_errors():
    layout = Layout({"q": (0, 16, False), "x": (16, 9, True)})
    with pytest.raises(ValueError, match="Payload has no field y; it has q, x"):
        layout.pack(y=1)
    with pytest.raises(ValueError, match="Value 256 does not fit field x: -256 to 255"):
        layout.pack(x=256)
    with pytest.raises(ValueError, match="Field q of 16 bits does not hold 3 equal elements"):
        layout.pack(q=[[1, 2, 3]])
    with pytest.raises(ValueError, match="Fields describe 2 and 3 transfers"):
        layout.pack(q=[1, 2], x=[1, 2, 3])
