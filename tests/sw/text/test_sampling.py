# SPDX-License-Identifier: Apache-2.0
"""Tokens are drawn as the docstring says: the results equal a second implementation in plain Python."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from sw.common.errors import UserError
from sw.text.sampling import Sampler


def plain_choice(logits, temperature, top_p, u):
    """The definition, token by token."""
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    chances = [weight / math.fsum(weights) for weight in weights]
    allowed, reached = [], 0.0
    for token in sorted(range(len(logits)), key=lambda token: (-chances[token], token)):
        allowed.append(token)
        reached += chances[token]
        if top_p < 1 and reached >= top_p:
            break
    target, total = u * math.fsum(chances[token] for token in allowed), 0.0
    for token in allowed:
        total += chances[token]
        if total > target:
            return token
    raise AssertionError("u is below 1")


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_against_plain(temperature, top_p):
    rng = np.random.default_rng(7)
    sampler, draws = Sampler(temperature, top_p, seed=5), np.random.default_rng(5)
    chosen = []
    for _ in range(300):
        # Some logits are equal, and some excluded.
        logits = rng.integers(-8, 8, 40).astype(np.float32) / 2
        logits[rng.integers(0, 40, 5)] = -np.inf
        chosen.append(sampler(logits))
        assert chosen[-1] == plain_choice(logits.tolist(), temperature, top_p, draws.random())
    assert len(set(chosen)) > 10


def test_frequencies():
    """The frequency of each token is its probability, within four standard deviations."""
    chances, draws = np.array([0.5, 0.25, 0.15, 0.1]), 20_000
    sampler = Sampler(1.0, seed=1)
    logits = np.log(chances).astype(np.float32)
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=4)
    assert np.all(np.abs(counts - draws * chances) < 4 * np.sqrt(draws * chances * (1 - chances)))
    # The two most probable tokens reach 0.7 together, so no other is drawn.
    sampler = Sampler(1.0, top_p=0.7, seed=1)
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=4)
    assert counts[2:].sum() == 0
    assert abs(counts[0] - draws * 2 / 3) < 4 * math.sqrt(draws * 2 / 9)


def test_bounds_of_intervals():
    """A draw that equals a cumulative sum belongs to the next token."""
    sampler = Sampler(1.0)
    # Excluded tokens between the others, before them and after them.
    logits = np.full(8, -np.inf, np.float32)
    logits[[1, 2, 4, 6]] = 3
    draws = iter((0.0, 0.25, 0.5, np.nextafter(1, 0)))
    sampler._rng = SimpleNamespace(random=lambda: next(draws))  # type: ignore[assignment]
    assert [sampler(logits) for _ in range(4)] == [1, 2, 4, 6]


def test_greedy():
    """The first of equal logits is taken, and the generator is not used."""
    sampler = Sampler()
    assert sampler(np.array([1, 3, 3, -np.inf], np.float32)) == 1
    assert sampler(np.full(5, -2.0, np.float32)) == 0


def test_extremes():
    """No temperature and no range of logits causes an overflow: warnings are errors here."""
    logits = np.array([-3e38, 0, 3e38, -np.inf, 3e38], np.float32)
    for temperature in (5e-324, 1e-300, 1.0, 1e300):
        sampler = Sampler(temperature, 0.999, 3)
        found = {sampler(logits) for _ in range(200)}
        assert found == ({2, 4} if temperature <= 1 else {0, 1, 2, 4})
    assert Sampler(1.0)(np.array([-np.inf, 5], np.float32)) == 1
    assert Sampler(1.0)(np.array([2.0], np.float32)) == 0


def test_seed():
    logits = np.zeros(1000, np.float32)

    def draw(seed):
        sampler = Sampler(1.0, seed=seed)
        return [sampler(logits) for _ in range(10)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_numbers(temperature, value):
    with pytest.raises(UserError, match=r"the model's logits are no numbers .* their maximum is (nan|inf)"):
        Sampler(temperature)(np.array([1, value, 2], np.float32))
    with pytest.raises(UserError, match="their maximum is -inf"):
        Sampler(temperature)(np.full(3, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is a number from 0, not -1.0"),
        ({"temperature": math.nan}, "temperature is a number from 0, not nan"),
        ({"temperature": math.inf}, "temperature is a number from 0, not inf"),
        ({"top_p": 0.0}, "top_p is above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top_p is above 0 and at most 1, not 1.5"),
        ({"top_p": math.nan}, "top_p is above 0 and at most 1, not nan"),
        ({"seed": -1}, "seed is a whole number from 0, not -1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampler(**options)
