# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: several mlps of one block, of which a router chooses a few for every token.

The definition, for one token with the router's weights w[e] (0 of experts that are not chosen), in float32:

    y = 0
    for e in ascending order, if w[e] is not 0:
        h = swiglu(gate[e](x), up[e](x))
        y = y + w[e] * down[e](h)            (two roundings)

gate, up and down are linear layers. So y depends neither on the other tokens of a call nor on the order in which the
experts of a call are computed. The router is Softmax and TopK of onnxruntime; see sw.graph.experts.write.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from sw.common.errors import UserError
from sw.model.lm_head import Linear

EXPERT = ("gate_proj", "up_proj", "down_proj")
"""The linear layers of an expert."""


@dataclass(frozen=True)
class Routing:
    """What all mixtures of a decoder have in common.

    Members
    -------
    count: experts of a block. used: experts of a token. size: intermediate size of an expert.
    normalised: the weights of a token's experts are divided by their sum.
    dense: indices of the layers that have an mlp and no experts.

    Raises UserError for sizes that no mixture has.
    """

    count: int
    used: int
    size: int
    normalised: bool = True
    dense: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= self.used <= self.count:
            raise UserError(f"the model uses {self.used} experts of a token, and has {self.count}")
        if self.size < 1:
            raise UserError(f"the intermediate size of an expert is {self.size}, not a positive number")

    def shapes(self, hidden: int) -> dict[str, tuple[int, int]]:
        """(N, K) of an expert's layers. hidden: hidden_size."""
        return {"gate_proj": (self.size, hidden), "up_proj": (self.size, hidden), "down_proj": (hidden, self.size)}


@dataclass(frozen=True, eq=False)
class Experts:
    """The weights of one block's mixture.

    router: float32 [count, hidden_size]. experts: the layers in EXPERT of each, consumed one by one.
    """

    router: np.ndarray
    experts: Iterable[Mapping[str, Linear]]


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """SiLU(gate) * up, float32: SiLU is computed in float64 and rounded once, so that all processors agree."""
    wide = gate.astype(np.float64)
    # exp(-x) of a large negative x is infinite, and the quotient is 0.
    with np.errstate(over="ignore"):
        activated = (wide / (1 + np.exp(-wide))).astype(np.float32)
    return activated * up


def add_weighted(total: np.ndarray, rows: np.ndarray, weights: np.ndarray, results: np.ndarray) -> None:
    """total[rows] += weights * results, with a rounding of the product and one of the sum.

    total: float32 [M, hidden]. rows: int [R], all different. weights: float32 [R]. results: float32 [R, hidden].
    """
    total[rows] += weights[:, None] * results
