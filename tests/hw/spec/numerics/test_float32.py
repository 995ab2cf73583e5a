# SPDX-License-Identifier: Apache-2.0
"""float32's sum, product and order against Python's integers: random bits, neighbours of ties, extremes."""

import numpy as np
import pytest

from hw.spec.numerics import float32
from sim.bench.floats import extremes, floats, near, tie_products, tie_sums, tiny_products, tiny_sums
from tests.hw.spec.numerics import exact
from tests.hw.spec.numerics.exact import bits

OPERATIONS = {"mul": (float32.mul, exact.mul), "add": (float32.add, exact.add)}


def check(name: str, a: np.ndarray, b: np.ndarray) -> None:
    """Compare bits; the message has both operands."""
    vector, oracle = OPERATIONS[name]
    results = bits(vector(floats(a), floats(b)))
    for x, y, result in zip(a.tolist(), b.tolist(), results.tolist()):
        expected = oracle(x, y)
        assert result == expected, f"{name}({x:#010x}, {y:#010x}) is {result:#010x}, not {expected:#010x}"


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


@pytest.mark.parametrize("operands", [tie_sums, tiny_sums])
def test_hard_sums(operands):
    check("add", *operands(np.random.default_rng(3), 5_000))


@pytest.mark.parametrize("operands", [tie_products, tiny_products])
def test_hard_products(operands):
    """Numpy rounds to the grid of subnormal numbers; the definition rounds to 24 bits, and then decides."""
    check("mul", *operands(np.random.default_rng(5), 10_000))


def test_signs_of_zero():
    """A result that is flushed keeps its sign. 2**-126 - 2**-150 has 24 bits, so it is not rounded up."""
    assert bits(float32.add(floats(0x00800001), floats(0x80800000))) == 0
    assert bits(float32.add(floats(0x80800001), floats(0x00800000))) == 1 << 31
    assert bits(float32.mul(floats(0x00FFFFFF), floats(0x3F000000))) == 0
    assert bits(float32.mul(floats(0x80FFFFFF), floats(0x3F000000))) == 1 << 31


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
