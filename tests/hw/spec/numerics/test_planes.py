# SPDX-License-Identifier: Apache-2.0
"""Two planes of few bits equal one weight of many bits exactly, for all zero points."""

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.linear import Activations, NumericsError, Weights, accumulate, quantize_scales
from hw.spec.numerics.planes import plane_count, plane_zero_points, quantize_weights

N, GROUPS, SIZE, TOKENS = 9, 3, 32, 4
ZERO = np.zeros((3, 1))


def config(width: int, zero_point: str = "integer") -> AcceleratorConfig:
    return AcceleratorConfig(tile=8, weight_bits=width, zero_point=zero_point)


# Fixed zero points are below 16, which is too little for the low plane of 5 bits.
CASES = [(2, 4), (3, 6), (4, 5), (4, 8)]


@pytest.mark.parametrize(
    ("width", "bits", "zero_point"),
    [(*case, kind) for case in CASES for kind in ("integer", "fixed")] + [(5, 8, "integer")],
)
def test_sum_of_planes_is_the_layer(width, bits, zero_point):
    """In integers: sum_g sm * sum_k (q * 2^f - z) * X with sm of 16 - w bits, directly from the wide weights."""
    hardware, rng = config(width, zero_point), np.random.default_rng(width * bits)
    q = rng.integers(0, 1 << bits, (N, GROUPS * SIZE)).astype(np.uint8)
    q[:2] = [[(1 << bits) - 1], [0]]
    scales = rng.standard_normal((N, GROUPS)) * np.exp(rng.uniform(-7, 7, (N, 1)))
    scales[3] = 0
    if zero_point == "integer":
        zeros = rng.integers(0, 1 << bits, (N, GROUPS)).astype(np.float64)
    else:
        zeros = rng.uniform(-(1 << bits) + 1, (1 << bits) - 0.01, (N, GROUPS))
    x = rng.integers(-32767, 32768, (TOKENS, GROUPS * SIZE))
    activations = Activations(x, np.zeros(TOKENS, np.int64))

    planes = quantize_weights(hardware, bits, q, scales, zeros)
    assert len(planes) == 2 == plane_count(hardware, bits)
    for plane in planes:
        assert plane.q.max() <= hardware.weight_max
        assert np.abs(plane.scale_mantissas).max() < 1 << 15
        assert np.array_equal(plane.exponents, planes[0].exponents)
    mantissas, exponents = quantize_scales(scales, 16 - width)
    assert np.abs(mantissas).max() < 1 << (15 - width) and np.array_equal(exponents, planes[0].exponents)
    fixed = np.rint(zeros * 2**hardware.fraction_bits).astype(np.int64)
    steps = (q.astype(np.int64) << hardware.fraction_bits) - np.repeat(fixed, SIZE, axis=1)
    products = (x[:, None] * steps).reshape(TOKENS, N, GROUPS, SIZE).sum(axis=3)
    expected = (products * mantissas).sum(axis=2)
    assert np.array_equal(sum(accumulate(hardware, plane, activations) for plane in planes), expected)


def test_scales_of_planes():
    """The exponent is the smallest with which the largest mantissa fits, so the high plane's mantissas fit 16 bits."""
    (high, low) = quantize_weights(
        config(4), 8, np.zeros((3, 32), np.uint8), np.array([[2047.0], [2047.5], [-1.0]]), ZERO
    )
    assert low.scale_mantissas[:, 0].tolist() == [2047, 1024, -1024]
    assert high.scale_mantissas[:, 0].tolist() == [32752, 16384, -16384]
    assert low.exponents.tolist() == [15, 16, 5]


def test_one_plane_is_not_changed():
    q = np.arange(32, dtype=np.uint8)[None] % 16
    (plane,) = quantize_weights(config(4), 4, q, np.ones((1, 1)), np.full((1, 1), 7))
    assert isinstance(plane, Weights) and np.array_equal(plane.q, q)
    assert plane.zero_points.tolist() == [[7]] and plane.scale_mantissas.tolist() == [[16384]]


@pytest.mark.parametrize(
    ("width", "bits", "zero_point", "value", "message"),
    [
        (3, 7, "integer", 0, r"^its weights have 7 bits, and two planes of weight_bits \(3\) hold 6$"),
        (4, 8, "integer", 256, r"^zero point 256 is outside the field's 0 to 15$"),
        (4, 8, "integer", -1, r"^zero point -1 is outside the field's 0 to 15$"),
        (4, 8, "integer", 7.5, r"^zero point 7.5 has a fraction"),
        (4, 8, "fixed", 256, r"^zero point 256 is outside the field's -16 to 15.9995$"),
        (4, 8, "fixed", -257, r"^zero point -257 is outside the field's -16 to 15.9995$"),
        (4, 8, "fixed", np.nan, r"^zero point nan is outside every field$"),
    ],
)
def test_what_does_not_fit(width, bits, zero_point, value, message):
    with pytest.raises(NumericsError, match=message):
        plane_zero_points(config(width, zero_point), bits, np.array([value]))


def test_extreme_zero_points_fit():
    high, low = plane_zero_points(config(4, "fixed"), 8, np.array([255.9995, -256.0, 0.0]))
    assert (high * 16 + low).tolist() == [round(255.9995 * 2048), -256 * 2048, 0]
