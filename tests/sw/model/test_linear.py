# SPDX-License-Identifier: Apache-2.0
"""The definition of a QuantizedLinear, and the values that it refuses."""

import numpy as np
import pytest

from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear

N, K, GROUP = 10, 40, 16


def fields(**changes):
    rng = np.random.default_rng(2)
    good = {
        "name": "layer",
        "q": rng.integers(0, 16, (N, K), np.uint8),
        "scales": rng.standard_normal((N, 3)).astype(np.float32),
        "zero_points": rng.integers(0, 16, (N, 3), np.uint8),
        "group_size": GROUP,
        "bits": 4,
        "bias": rng.standard_normal(N).astype(np.float32),
    }
    return good | changes


@pytest.mark.parametrize("bias_in_node", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 7, 10, 4096])
def test_definition(bias_in_node, rows_at_once, monkeypatch):
    """The definition in its docstring, computed one weight at a time."""
    monkeypatch.setattr("sw.common.arrays.ROWS_AT_ONCE", rows_at_once)
    layer = QuantizedLinear(**fields(bias_in_node=bias_in_node))
    x = np.random.default_rng(3).standard_normal((3, K)).astype(np.float32)
    y = np.zeros((3, N))
    for m, n in np.ndindex(3, N):
        for k in range(K):
            g = k // GROUP
            y[m, n] += float(x[m, k]) * (int(layer.q[n, k]) - int(layer.zero_points[n, g])) * float(layer.scales[n, g])
        y[m, n] += layer.bias[n] if bias_in_node and layer.bias is not None else 0
    # Weights are rounded to float32 once.
    assert np.abs(layer.float_output(x) - y).max() < 1e-6 * np.abs(y).max()
    assert (layer.n, layer.k, layer.groups) == (N, K, 3)


def test_rows_in_another_order():
    layer = QuantizedLinear(**fields())
    order = np.random.default_rng(4).permutation(N)
    moved = layer.with_rows(order)
    assert np.array_equal(moved.dequantize(), layer.dequantize()[order])
    assert moved.bias is not None
    assert layer.bias is not None
    assert np.array_equal(moved.bias, layer.bias[order])


BAD = {
    "bits": ({"bits": 9}, "bits must be 1 to 8, not 9"),
    "group size": ({"group_size": 0}, "group_size must be positive, not 0"),
    "group size and scales": ({"group_size": 8}, r"scales must be float32 \[10, 5\] \(K 40, group_size 8\), not"),
    "type of q": ({"q": np.zeros((N, K), np.int8)}, r"q must be uint8 \[N, K\], not int8 \[10, 40\]"),
    "range of q": ({"q": np.full((N, K), 16, np.uint8)}, "q reaches 16, beyond the 4-bit maximum 15"),
    "type of scales": ({"scales": np.ones((N, 3))}, "not float64"),
    "shape of zero points": (
        {"zero_points": np.zeros((N, 2), np.uint8)},
        r"zero points must be .* not uint8 \[10, 2\]",
    ),
    "range of zero points": ({"zero_points": np.full((N, 3), 16, np.uint8)}, "a zero point is 16, beyond"),
    "bias": ({"bias": np.zeros(3, np.float32)}, r"bias must be float32 \[10\], not float32 \[3\]"),
    "infinite bias": ({"bias": np.full(N, np.inf, np.float32)}, "a bias is not finite"),
    "infinite zero point": ({"zero_points": np.full((N, 3), np.inf, np.float32)}, "a zero point is not finite"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_refused(changes, message):
    with pytest.raises(UserError, match=f"^layer layer: .*{message}"):
        QuantizedLinear(**fields(**changes))
