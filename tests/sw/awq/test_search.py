# SPDX-License-Identifier: Apache-2.0
"""Rounding equals a plain loop, and no search increases the error that it measures."""

import math

import numpy as np
import pytest

from sw.awq.clipping import clip
from sw.awq.folding import Fold
from sw.awq.quantizer import LARGEST_TOKEN, gather, search
from sw.awq.rounding import ZERO_POINTS, Form, Rounded, nearest
from sw.awq.search import RATIOS, Statistics, output_error, scaled_gram, search_scale

FORMS = [Form(bits, size, kind) for bits in (3, 4, 8) for size in (32, 64) for kind in ZERO_POINTS]
FORMS = [form for form in FORMS if form.bits < 8 or form.zero_point == "integer"]


def case(n: int, k: int, tokens: int = 256, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, Statistics]:
    """Weights, and statistics of correlated inputs whose channels differ by factors of e^spread."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((n, k)) * rng.uniform(0.5, 2, (n, 1)) / math.sqrt(k)).astype(np.float32)
    x = rng.standard_normal((tokens, k)) + rng.standard_normal((tokens, 1)) + rng.standard_normal(k)
    x *= np.exp(spread * rng.standard_normal(k))
    halves = np.array_split(x.astype(np.float32), 3)
    return weight, gather(halves)


def loss(weight: np.ndarray, rounded: Rounded, gram: np.ndarray) -> float:
    difference = (rounded.values() - weight).astype(np.float64)
    return float(np.einsum("nk,kj,nj->", difference, gram.astype(np.float64), difference))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nearest_is_a_plain_loop(form):
    """The cases include a group of zeros, a group above zero, a group below zero, and a short last group."""
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((5, 2 * form.group_size + 7)) / 10).astype(np.float32)
    weight[0, : form.group_size] = 0
    weight[1, : form.group_size] = np.abs(weight[1, : form.group_size]) + np.float32(0.1)
    weight[2, : form.group_size] = -np.abs(weight[2, : form.group_size])
    rounded = nearest(weight, form)
    assert rounded.q.dtype == np.uint8 and rounded.q.shape == weight.shape
    for n in range(len(weight)):
        for g in range(3):
            group = weight[n, g * form.group_size : (g + 1) * form.group_size]
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            s = np.float32(np.float16(max((high - low) / np.float32(form.top), np.float32(2.0**-24))))
            z = np.float32(round(float(-low / s * np.float32(form.fraction)))) / np.float32(form.fraction)
            z = min(max(z, np.float32(0)), np.float32(form.top))
            assert (rounded.scales[n, g], rounded.zero_points[n, g]) == (s, z)
            for k, w in enumerate(group):
                expected = min(max(round(float(w / s + z)), 0), form.top)
                assert rounded.q[n, g * form.group_size + k] == expected
    # Half a step, the rounding of the zero point, and the rounding of the scale to float16 at the largest weight.
    group = np.arange(weight.shape[1]) // form.group_size
    step = rounded.scales[:, group]
    assert (
        np.abs(rounded.values() - weight) <= (1.0 if form.fraction == 1 else 0.51) * step + form.top * step * 2**-11
    ).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scales_are_float16(form):
    weight, statistics = case(48, 160, seed=2)
    for rounded in (nearest(weight, form), clip(weight, statistics.gram, form)):
        for made in (rounded, rounded.divided(np.linspace(0.3, 3, 48, dtype=np.float32))):
            assert np.array_equal(made.scales, made.scales.astype(np.float16).astype(np.float32))
            assert made.scales.min() > 0
            whole = made.zero_points * form.fraction
            assert np.array_equal(whole, np.rint(whole)) and whole.min() >= 0 and made.zero_points.max() <= form.top
            layer = made.layer("x")
            assert layer.zero_points.dtype == (np.uint8 if form.zero_point == "integer" else np.float32)
            assert np.array_equal(layer.dequantize(), made.values())


def test_divided_rows():
    weight, _ = case(8, 64)
    rounded = nearest(weight, Form())
    factors = (2.0 ** np.arange(-4, 4)).astype(np.float32)
    assert np.array_equal(rounded.divided(factors).values(), rounded.values() / factors[:, None])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("k", [64, 200])
def test_clipping_is_never_worse(form, k):
    """It is not worse in any row, and clearly better in total; a second sweep is not worse than one."""
    weight, statistics = case(70, k, seed=3)
    plain, once, twice = nearest(weight, form), *(clip(weight, statistics.gram, form, sweeps) for sweeps in (1, 2))
    before, after, again = (
        np.array([loss(weight[n : n + 1], made.rows(slice(n, n + 1)), statistics.gram) for n in range(len(weight))])
        for made in (plain, once, twice)
    )
    assert (after <= before * (1 + 1e-3)).all()
    assert (again <= after * (1 + 1e-3)).all()
    assert after.sum() < 0.9 * before.sum()


def test_clipping_uses_other_groups():
    """Two channels in two groups are always equal: their errors should cancel, which needs both groups."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    x = rng.standard_normal((512, 32)).astype(np.float32)
    statistics = gather([np.concatenate([x, x], axis=1)])
    alone = statistics.gram.copy()
    alone[:32, 32:] = alone[32:, :32] = 0
    form = Form(4, 32)
    together = loss(weight, clip(weight, statistics.gram, form), statistics.gram)
    assert together < 0.9 * loss(weight, clip(weight, alone, form), statistics.gram)


def test_scale_is_never_worse_than_none():
    """The measure is the error of the outputs after the search for ranges."""
    for seed in range(4):
        weight, statistics = case(64, 128, seed=seed, spread=seed / 2)
        other, _ = case(32, 128, seed=seed + 10)
        scale = search_scale([weight, other], statistics, Form())
        losses = []
        for s in (scale.values, np.ones(128, np.float32)):
            gram = scaled_gram(statistics.gram, s)
            made = [clip(w * s, gram, Form(), sweeps=1).values() / s - w for w in (weight, other)]
            losses.append(sum(output_error(difference, statistics.gram) for difference in made))
        assert losses[0] <= losses[1] * (1 + 1e-4)
        assert scale.ratio in RATIOS
        assert seed == 0 or losses[0] < 0.95 * losses[1]
        assert scale.values.max() * scale.values.min() == pytest.approx(1, rel=1e-4)


def test_classes_share_a_scale():
    weight, statistics = case(64, 128, seed=5, spread=2.0)
    classes = np.arange(128) % 32
    values = search_scale([weight], statistics, Form(), classes).values
    assert len(np.unique(values)) == 32
    assert all(len(np.unique(values[classes == number])) == 1 for number in range(32))


def test_gather():
    """The Gram matrix and mean magnitude of several windows, of different lengths."""
    rng = np.random.default_rng(6)
    parts = [rng.standard_normal((count, 24)).astype(np.float32) for count in (5, 1, 9, 3)]
    whole = np.concatenate(parts).astype(np.float64)
    statistics = gather(parts)
    assert statistics.tokens == 18
    assert np.allclose(statistics.gram, whole.T @ whole / 18, rtol=1e-5, atol=1e-6)
    assert np.allclose(statistics.magnitude, np.abs(whole).mean(axis=0), rtol=1e-5)
    assert statistics.drift is None
    drift = gather(parts, [2 * part + 1 for part in parts]).drift
    assert drift is not None and np.allclose(drift, (whole + 1).T @ whole / 18, rtol=1e-4, atol=1e-5)


def test_no_token_counts_too_much():
    """A token 1,000 times as large as the others counts as much as LARGEST_TOKEN of them, and the others as before."""
    rng = np.random.default_rng(8)
    x = np.sign(rng.standard_normal((64, 24))).astype(np.float32)
    sink = x[:1] * np.float32(1000)
    statistics = gather([np.concatenate([sink, x[1:20]]), x[20:]])
    others = x[1:].astype(np.float64)
    expected = (others.T @ others + LARGEST_TOKEN * x[:1].T @ x[:1]) / 64
    assert np.allclose(statistics.gram, expected, rtol=1e-5, atol=1e-6)
    zeros = gather([np.zeros((9, 24), np.float32), sink])
    assert np.allclose(zeros.gram, sink.T @ sink / 10, rtol=1e-5)


def test_planted_outliers():
    """The purpose of AWQ: six channels of 256 have activations 60 times as large and dominate the output, but rounding
    to nearest treats their weights like all others. The scale gives them a finer grid; the others lose very little.
    """
    rng = np.random.default_rng(7)
    weight = (rng.standard_normal((128, 256)) / 16).astype(np.float32)
    x = rng.standard_normal((1024, 256)).astype(np.float32)
    x[:, rng.choice(256, 6, replace=False)] *= 60
    calibration, held_out = gather([x[:512]]), gather([x[512:]])
    scale, (rounded,) = search([weight], calibration, Form(), Fold("norm"))
    assert scale is not None and scale.ratio > 0
    plain = output_error(nearest(weight, Form()).values() - weight, held_out.gram)
    only_scale = output_error(nearest(weight * scale.values, Form()).values() / scale.values - weight, held_out.gram)
    awq = output_error(rounded.values() / scale.values - weight, held_out.gram)
    assert only_scale < plain / 3
    assert awq < plain / 3
