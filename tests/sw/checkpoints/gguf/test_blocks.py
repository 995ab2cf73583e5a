# SPDX-License-Identifier: Apache-2.0
"""Every block format of GGUF against the gguf package's own dequantization, bit for bit."""

import gguf
import numpy as np
import pytest

from sw.checkpoints.gguf.blocks import FORMATS, dequantize_groups, unpack_groups
from tests.sw.fixtures.gguf_quantizer import quantize

HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}
"""Format -> places of its float16 numbers in a block, by default the first two bytes."""


def random_rows(kind: str, seed: int, n: int = 12, k: int = 1024) -> np.ndarray:
    """Rows of random bits, in which only the float16 numbers are finite ones of any size and sign."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows = rng.integers(0, 256, (n, k // block, size), np.uint8)
    for place in HALVES.get(kind, (0,)):
        values = rng.standard_normal(rows.shape[:2]) * np.exp2(rng.integers(-24, 15, rows.shape[:2]))
        rows[:, :, place : place + 2] = values.astype("<f2")[..., None].view(np.uint8)
    return rows.reshape(n, -1)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_random_bits(kind, seed):
    """Every pattern of bits: a field in the wrong place cannot hide."""
    rows = random_rows(kind, seed)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    groups, form = unpack_groups(rows, kind), FORMATS[kind]
    assert groups.q.dtype == np.uint8
    assert groups.scales.shape == (12, 1024 // form.group_size)
    assert int(groups.q.max()) < 1 << form.bits
    assert np.array_equal(dequantize_groups(groups).view(np.uint32), expected.view(np.uint32)), f"seed {seed}"


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_matrices(kind):
    """Matrices with rows of zeros, of one value, and of very different sizes."""
    rng = np.random.default_rng(7)
    values = (rng.standard_normal((40, 512)) * np.exp(rng.standard_normal((40, 1)) * 3)).astype(np.float32)
    values[3], values[4], values[5] = 0, 0.25, -0.25
    rows = quantize(values, kind)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(dequantize_groups(unpack_groups(rows, kind)), expected)
    # The maker of these fixtures quantizes: the error is near that of the format's steps.
    error = np.sqrt(np.mean((expected - values)[10:] ** 2) / np.mean(values[10:] ** 2))
    bits = 8 if kind == "Q8_0" else int(kind.removeprefix("I")[1])
    assert error < 2 * 2.0**-bits


def test_formats_that_the_package_knows():
    """A block's size is a whole number of groups, and the fields hold the levels."""
    for kind, form in FORMATS.items():
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        assert block % form.group_size == 0
        assert form.levels <= 1 << form.bits
