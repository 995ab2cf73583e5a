# SPDX-License-Identifier: Apache-2.0
"""The error of scores with cached keys whose bias is large in some rotary pairs, for every remedy of sw.program.keys.

    python -m sw.bench_keys

Keys are a bias and what distinguishes them, random numbers with a deviation of 1; the bias is 0 but in the planted
pairs. They are rotated, rounded as the cache does it, and multiplied by random queries. The figure is the root mean
square of the scores' errors, without their mean over the positions, which no softmax sees, relative to the deviation of
the scores that keys without the bias have. The command prints the table of docs/attention.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.attention import cache_keys, scores
from hw.spec.numerics.vector import rotary
from sw.common.command_line import Parser
from sw.common.errors import run_cli
from sw.program.keys import AUTO_BITS, KeyForm, KeyHeads, key_forms, pair_factors
from sw.program.weights import rotary_rows

HEAD, CONTEXT, QUERIES, SEED = 64, 1024, 64, 1
THETA = 1e6
"""The base of the rotation of Qwen2.5."""
CONFIG = AcceleratorConfig(operators="decoder", score_words=1 << 16)


@dataclass(frozen=True)
class Planted:
    """A bias. pairs: where it is; size: in deviations of what distinguishes keys; query: that of queries there."""

    name: str
    pairs: tuple[int, ...]
    size: float
    query: float = 0.0


CASES = (
    Planted("none", (), 0),
    Planted("30, a fast pair", (0,), 30),
    Planted("100, a fast pair", (0,), 100),
    Planted("30, a slow pair", (31,), 30),
    Planted("30, fast and slow pairs", (0, 5, 20, 31), 30),
    Planted("30, a fast pair where queries have 10", (0,), 30, 10),
)
COLUMNS = ("8 bits", "centre", "centre, factors", "16 bits", "all", "auto")


def measure(case: Planted) -> dict[str, float]:
    """The errors by COLUMNS but the last, and the bits that AUTO_BITS chooses."""
    rng = np.random.default_rng(SEED)
    angles = np.arange(CONTEXT)[:, None] * THETA ** (-np.arange(HEAD // 2) / (HEAD // 2))
    table = rotary_rows(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), HEAD)
    bias, query = np.zeros((2, HEAD), np.float32)
    for pair in case.pairs:
        bias[2 * pair], query[2 * pair] = case.size, case.query
    content, queries = (rng.standard_normal((rows, HEAD)).astype(np.float32) for rows in (CONTEXT, QUERIES))
    ones = np.ones((1, HEAD))
    heads = KeyHeads(bias[None], ones, ones + query**2, ones.astype(np.float32))
    factors = pair_factors(heads, table, CONTEXT)
    assert factors is not None, "there is a bias"
    folded = heads.folded(factors)
    ((centred,), (both,)) = (key_forms(one, table, CONTEXT, AUTO_BITS) for one in (heads, folded))
    keys, plain = _turned(content + bias, table), _turned(content, table)
    q = _turned(queries + query, table[-QUERIES:])
    exact = q.astype(np.float64) @ keys.T.astype(np.float64)
    usual = (q.astype(np.float64) @ plain.T.astype(np.float64)).std()

    def error(form: KeyForm) -> float:
        centre = np.zeros(HEAD, np.float32) if form.centre is None else form.centre
        cached = cache_keys(keys / form.factors, centre, form.bits)
        everything = np.ones(exact.shape, bool)
        difference = scores(CONFIG, q * form.factors, cached, np.array(1, np.float32), everything) - exact
        return float((difference - difference.mean(axis=1, keepdims=True)).std() / usual)

    none = KeyForm(None, 8, heads.factors[0])
    forms = (
        none,
        centred._replace(bits=8),
        both._replace(bits=8),
        none._replace(bits=16),
        both._replace(bits=16),
    )
    return {**{name: error(form) for name, form in zip(COLUMNS, forms)}, COLUMNS[-1]: both.bits}


def lines() -> Iterator[str]:
    """The table, in Markdown."""
    yield f"| bias | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for case in CASES:
        *errors, bits = measure(case).values()
        yield f"| {case.name} | {' | '.join(f'{100 * error:.2f} %' for error in errors)} | {bits:.0f} bits |"


def _turned(rows: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Rows at successive positions, rotated as on the device: float32."""
    pairs = rows.reshape(len(rows), -1, 2)
    both = rotary(pairs[..., 0], pairs[..., 1], table[:, ::2], table[:, 1::2])
    return np.stack(both, axis=-1).reshape(rows.shape)


def main() -> None:
    """The command line."""
    Parser(
        prog="python -m sw.bench_keys", description="Errors of scores with cached keys that have a bias."
    ).parse_args()
    print("\n".join(lines()))


if __name__ == "__main__":
    run_cli(main)
