# SPDX-License-Identifier: Apache-2.0
"""A draw from pieces of the logits is the draw from all of them, and reads few pieces of peaked logits."""

import numpy as np
import pytest

from hw.spec.numerics.vector import PIECE, piece_maxima
from sw.common.errors import UserError
from sw.text import piece_sampling
from sw.text.sampling import Sampler

COLUMNS = (5, 256, 700, 3000, 20_000)
TEMPERATURES = (0.1, 0.7, 1.0, 2.0, 1e30, 1e-30)


class Pieces:
    """Logits in pieces. ``read`` counts the pieces that were read."""

    def __init__(self, logits: np.ndarray):
        self.maxima, self.columns, self.count = piece_maxima(logits)[0], len(logits), 0
        self._rows = np.full(len(self.maxima) * PIECE, np.nan, np.float32)
        self._rows[: len(logits)] = logits
        self._rows = self._rows.reshape(-1, PIECE)

    def read(self, pieces: np.ndarray) -> np.ndarray:
        self.count += len(pieces)
        return self._rows[pieces]

    def draw(self, sampler: Sampler) -> int:
        return sampler.from_pieces(self.maxima, PIECE, self.columns, self.read)


def random_logits(rng: np.random.Generator) -> np.ndarray:
    """Flat and peaked, with equal ones, excluded ones, and all the same."""
    columns, kind = int(rng.choice(COLUMNS)), int(rng.integers(4))
    logits = (rng.standard_normal(columns) * rng.choice([0.01, 1, 3, 10])).astype(np.float32)
    if kind == 1:
        logits = np.round(logits)
    elif kind == 2:
        logits[rng.random(columns) < 0.3] = -np.inf
        logits[rng.integers(columns)] = 0
    elif kind == 3:
        logits[:] = 0
    return logits


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_same_token(temperature, top_p):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for draw in range(60):
        logits, options = random_logits(rng), (temperature, top_p, draw)
        assert Pieces(logits).draw(Sampler(*options)) == Sampler(*options)(logits)


def test_equal_sums_are_not_certain():
    """A uniform that equals a sum of probabilities: rounding decides, so all pieces are read."""
    pieces = Pieces(np.zeros(1024, np.float32))
    for u in (0.0, 0.25, 0.5, np.nextafter(0.5, 0), np.nextafter(1, 0)):
        sampler, whole = Sampler(1.0), Sampler(1.0)
        for made in (sampler, whole):
            made._rng = type("Fixed", (), {"random": lambda self, u=u: u})()  # type: ignore[assignment]
        assert pieces.draw(sampler) == whole(np.zeros(1024, np.float32))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_few_pieces(top_p):
    """Peaked logits, as a model that is certain has them: the first pieces are enough."""
    rng, columns = np.random.default_rng(2), 151_936
    for seed in range(20):
        logits = rng.standard_normal(columns).astype(np.float32)
        logits[rng.integers(columns, size=5)] += np.arange(21, 26, dtype=np.float32)
        pieces = Pieces(logits)
        assert pieces.draw(Sampler(0.7, top_p, seed)) == Sampler(0.7, top_p, seed)(logits)
        assert pieces.count == piece_sampling.FIRST < len(pieces.maxima)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_numbers(value):
    pieces = Pieces(np.full(300, value, np.float32))
    with pytest.raises(UserError, match=r"the model's logits are no numbers .* their maximum is (nan|inf|-inf)"):
        pieces.draw(Sampler(1.0))
    assert pieces.count == 0
