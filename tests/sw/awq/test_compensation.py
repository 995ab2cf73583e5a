# SPDX-License-Identifier: Apache-2.0
"""Second-order rounding equals the definition, column by column, and lowers the error on inputs it has not seen."""

import numpy as np
import pytest

from sw.awq import compensation
from sw.awq.clipping import clip
from sw.awq.compensation import DAMPING, compensate, corrected, inverse_factor
from sw.awq.quantizer import gather, search
from sw.awq.rounding import ZERO_POINTS, Form, nearest
from sw.awq.search import output_error
from tests.sw.awq.test_search import case

FORMS = [Form(bits, 32, kind) for bits in (2, 3, 4) for kind in ZERO_POINTS] + [Form(8, 64)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("k", [64, 80])
def test_equals_the_definition(form, k):
    """Optimal brain surgery, in float64: the inverse of the rest of the matrix gives each change of the later weights.

    80 columns: the last group is short.
    """
    weight, statistics = case(12, k, seed=1)
    made = compensate(weight, statistics.gram, clip(weight, statistics.gram, form))
    h = statistics.gram.astype(np.float64)
    h += np.eye(k) * DAMPING * h.diagonal().mean()
    left = weight.astype(np.float64)
    for column in range(k):
        s, z = made.scales[:, column // form.group_size], made.zero_points[:, column // form.group_size]
        q = np.clip(np.rint(left[:, column] / s + z), 0, form.top)
        assert np.array_equal(made.q[:, column], q), column
        inverse = np.linalg.inv(h[column:, column:])
        left[:, column + 1 :] -= np.outer(left[:, column] - (q - z) * s, inverse[0, 1:] / inverse[0, 0])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_formats(form):
    weight, statistics = case(300, 80, seed=2)
    made = compensate(weight, statistics.gram, clip(weight, statistics.gram, form))
    assert made.q.dtype == np.uint8 and made.q.shape == weight.shape and made.q.max() <= form.top
    assert np.array_equal(made.scales, made.scales.astype(np.float16).astype(np.float32)) and made.scales.min() > 0
    whole = made.zero_points * form.fraction
    assert np.array_equal(whole, np.rint(whole)) and whole.min() >= 0 and made.zero_points.max() <= form.top
    layer = made.layer("x")
    assert np.array_equal(layer.dequantize(), made.values())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lowers_the_error(bits):
    """On other inputs of the same distribution, relative to the search for ranges with rounding to nearest."""
    rng, form = np.random.default_rng(bits), Form(bits, 32)
    weight = (rng.standard_normal((64, 128)) / 11).astype(np.float32)
    x = rng.standard_normal((4096, 48)) @ rng.standard_normal((48, 128)) + 0.3 * rng.standard_normal((4096, 128))
    seen, other = (gather([part.astype(np.float32)]).gram for part in np.split(x, 2))
    start = clip(weight, seen, form)
    before, after = (output_error(made.values() - weight, other) for made in (start, compensate(weight, seen, start)))
    assert after < 0.6 * before


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_of_what_is_left(bits, monkeypatch):
    """A range by the error that later columns cannot compensate is better than one by the weights' own error."""
    rng, form = np.random.default_rng(bits), Form(bits, 32)
    weight = (rng.standard_normal((64, 128)) / 11).astype(np.float32)
    x = rng.standard_normal((4096, 48)) @ rng.standard_normal((48, 128)) + 0.3 * rng.standard_normal((4096, 128))
    gram = gather([(x * np.exp(rng.standard_normal(128))).astype(np.float32)]).gram
    start = clip(weight, gram, form)
    good = output_error(compensate(weight, gram, start).values() - weight, gram)
    monkeypatch.setattr(compensation, "_metric", lambda *_: np.eye(32, dtype=np.float32))
    assert good < 0.75 * output_error(compensate(weight, gram, start).values() - weight, gram)


def test_inputs_without_correlation():
    """Nothing can be compensated, so weights are rounded to nearest, in ranges that are not worse."""
    weight, form = case(16, 64, seed=3)[0], Form(4, 32)
    for scale in (0, 1, 1e6):
        gram = np.eye(64, dtype=np.float32) * np.float32(scale)
        made = compensate(weight, gram, nearest(weight, form))
        steps = form.split(weight) / made.scales[:, :, None] + made.zero_points[:, :, None]
        assert np.array_equal(made.q, np.clip(np.rint(steps), 0, form.top).reshape(weight.shape))
        assert output_error(made.values() - weight, np.eye(64)) <= output_error(
            nearest(weight, form).values() - weight, np.eye(64)
        )


def test_factor():
    gram = case(1, 48, seed=4)[1].gram
    factor = inverse_factor(gram)
    damped = gram + np.eye(48) * DAMPING * gram.diagonal().mean()
    assert np.array_equal(factor, np.triu(factor))
    assert np.allclose(factor @ damped @ factor.T, np.eye(48), atol=1e-6)
    # Sums in float32 may be indefinite by more than the damping.
    gram = np.diag(np.linspace(-0.1, 1, 48, dtype=np.float32))
    factor = inverse_factor(gram)
    damping = 1 / factor[-1, -1] ** 2 - 1
    assert damping == pytest.approx(10 * DAMPING * gram.diagonal().mean(), rel=1e-6)


def test_corrected_weights():
    """They give the float model's outputs for inputs with errors, as well as a matrix can; without errors, W."""
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((16, 32)).astype(np.float32)
    x = rng.standard_normal((512, 32)).astype(np.float32)
    shift = np.eye(32) + 0.1 * rng.standard_normal((32, 32))
    wrong = (x @ shift.T).astype(np.float32)
    statistics = gather(np.split(wrong, 4), np.split(x, 4))
    (made,) = corrected([weight], statistics)
    before, after = (float(np.square(wrong @ each.T - x @ weight.T).mean()) for each in (weight, made))
    assert after < 0.05 * before
    assert np.allclose(corrected([weight], gather([x], [x]))[0], weight)
    assert corrected([weight], gather([x]))[0] is weight


def test_rounding_is_chosen():
    weight, statistics = case(32, 64, seed=5)
    by_name = {name: search([weight], statistics, Form(4, 32), None, name)[1][0] for name in ("nearest", "gptq")}
    start = clip(weight, statistics.gram, Form(4, 32))
    assert np.array_equal(by_name["nearest"].q, start.q)
    assert np.array_equal(by_name["gptq"].q, compensate(weight, statistics.gram, start).q)
