# SPDX-License-Identifier: Apache-2.0
"""float32's sum, product and order against Python's integers: random bits, neighbours of ties, extremes."""

import numpy as np
import pytest

from hw.spec.numerics import float32
from tests.hw.spec.numerics import exact
from tests.hw.spec.numerics.exact import bits, extremes, floats

OPERATIONS = {"mul": (float32.mul, exact.mul), "add": (float32.add, exact.add)}


def check(name: str, a: np.ndarray, b: np.ndarray) -> None:
    """Compare bits; the message has both operands."""
    vector, oracle = OPERATIONS[name]
    results = bits(vector(floats(a), floats(b)))
    for x, y, result in zip(a.tolist(), b.tolist(), results.tolist()):
        expected = oracle(x, y)
        assert result == expected, f"{name}({x:#010x}, {y:#010x}) is {result:#010x}, not {expected:#010x}"


def near(random: np.random.Generator, count: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Finite numbers and others whose exponents differ by at most ``distance``."""
    a = random.integers(0, 1 << 32, count, dtype=np.uint32)
    exponent = (a >> 23 & 255).astype(np.int64) + random.integers(-distance, distance, count, endpoint=True)
    fields = random.integers(0, 1 << 23, count) | np.clip(exponent, 0, 254) << 23 | random.integers(0, 2, count) << 31
    return a, fields.astype(np.uint32)


@pytest.mark.parametrize("name", OPERATIONS)
def test_extremes(name: str):
    a, b = np.meshgrid(extremes(), extremes())
    check(name, a.ravel(), b.ravel())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("seed", range(2))
def test_random_bits(name: str, seed: int):
    random = np.random.default_rng(seed)
    check(name, *random.integers(0, 1 << 32, (2, 20_000), dtype=np.uint32))
    a = random.integers(0, 1 << 32, 2_000, dtype=np.uint32)
    check(name, a, random.choice(extremes(), 2_000))


@pytest.mark.parametrize("distance", [0, 1, 2, 25, 27])
def test_sums_of_near_exponents(distance: int):
    """Cancellation, every alignment, and what a far operand does to the last bit."""
    check("add", *near(np.random.default_rng(distance), 10_000, distance))


def test_sums_that_are_ties():
    """The small operand is half a unit of the large one, or a little more or less; and the sum carries."""
    random = np.random.default_rng(3)
    large = random.integers(60, 250, 3_000) << 23 | random.choice([0, 1, 2, 0x3FFFFF, 0x7FFFFE, 0x7FFFFF], 3_000)
    distance = random.integers(22, 26, 3_000, endpoint=True)
    small = ((large >> 23) - distance) << 23 | random.choice([0, 1, 0x400000, 0x7FFFFF], 3_000)
    signs = random.integers(0, 4, 3_000)
    check("add", (large | (signs & 1) << 31).astype(np.uint32), (small | (signs >> 1) << 31).astype(np.uint32))


def test_sums_become_zero():
    """Results below the smallest normal number, which all are exact: the sign stays."""
    random = np.random.default_rng(4)
    a = random.integers(0x00800000, 0x02000000, 5_000)
    b = a + random.integers(-20, 20, 5_000) | 1 << 31
    check("add", a.astype(np.uint32), b.astype(np.uint32))
    assert bits(float32.add(floats(0x00800001), floats(0x80800000))) == 0
    assert bits(float32.add(floats(0x80800001), floats(0x00800000))) == 1 << 31


def test_products_that_are_ties():
    """Significands of 12 and 13 bits: their product has 25, the last of which is often one."""
    random = np.random.default_rng(5)
    a = (random.integers(0, 1 << 12, 5_000) << 11) | random.integers(90, 160, 5_000) << 23
    b = (random.integers(0, 1 << 12, 5_000) << 11) | random.integers(90, 160, 5_000) << 23
    check("mul", a.astype(np.uint32), b.astype(np.uint32))


def test_products_near_the_smallest_normal():
    """Numpy rounds to the grid of subnormal numbers; the definition rounds to 24 bits, and then decides."""
    random = np.random.default_rng(6)
    a = random.integers(1 << 23, 1 << 24, 20_000)
    # Of 2**47 in units of 2**-173: what rounds up to 2**-126 is at most 2**22 below it.
    b = ((1 << 47) - random.integers(0, 3, 20_000) * (1 << 22)) // a + random.integers(-1, 2, 20_000)
    kept = (b >= 1 << 23) & (b < 1 << 24)
    a, b = a[kept], b[kept]
    for low, high in ((0, 1 << 22), (1 << 22, 1 << 23), (1 << 23, 1 << 25)):
        assert ((a * b < (1 << 47) - low) & (a * b > (1 << 47) - high)).any(), "the range between them is not tested"
    check("mul", (a - (1 << 23) | 60 << 23).astype(np.uint32), (b - (1 << 23) | 67 << 23).astype(np.uint32))
    # 2**-126 - 2**-150 is a number of 24 bits, so it is not rounded, and flushed.
    assert bits(float32.mul(floats(0x00FFFFFF), floats(0x3F000000))) == 0


def test_overflow():
    assert bits(float32.add(floats(0x7F7FFFFF), floats(0x73000000))) == 0x7F800000
    assert bits(float32.add(floats(0x7F7FFFFF), floats(0x72FFFFFF))) == 0x7F7FFFFF
    assert bits(float32.mul(floats(0x7F7FFFFF), floats(0xBF800001))) == 0xFF800000


def test_shapes_broadcast():
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3, 1), np.arange(4, dtype=np.float32)
    for function in (float32.add, float32.mul):
        result = function(a, b)
        assert result.shape == (2, 3, 4)
        assert result.dtype == np.float32


def test_flush():
    numbers = floats(extremes())
    expected = [n & 1 << 31 if n & 0x7F800000 == 0 else n for n in extremes().tolist()]
    assert bits(float32.flush(numbers)).tolist() == expected


def test_order():
    """Keys compare as the numbers do; NaN is above infinity; zeros and subnormals are equal."""
    random = np.random.default_rng(7)
    numbers = np.concatenate([extremes(), random.integers(0, 1 << 32, 300, dtype=np.uint32)])
    keys = float32.order(floats(numbers)).tolist()

    def rank(number: int) -> tuple:
        if exact.is_nan(number):
            return (3, 0)
        if exact.is_infinite(number):
            return (0 if number >> 31 else 2, 0)
        return (1, exact.value(number))

    ranks = [rank(n) for n in numbers.tolist()]
    for key, r in zip(keys, ranks):
        assert [key < other for other in keys] == [r < other for other in ranks]
        assert [key == other for other in keys] == [r == other for other in ranks]
