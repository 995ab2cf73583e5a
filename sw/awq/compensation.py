# SPDX-License-Identifier: Apache-2.0
"""Second-order rounding: the error of each rounded weight is compensated by the weights after it.

This is GPTQ (Frantar et al. 2022, arXiv 2210.17323), after AWQ's scales and ranges. The error of row n of the weights
is dW[n] H dW[n]^T, with H the Gram matrix of the layer's inputs and a small multiple of the identity. If column k is
rounded with the error e, the best change of the columns after it is

    w[j] -= e * U[k, j] / U[k, k],   with H^-1 = U^T U and U upper triangular
U comes from one Cholesky factor without an inverse of H: H = R R^T with R upper triangular, and U = R^-1.

The columns are rounded in the order of the model, because the hardware's groups are neighbours. A group's scale and
zero point are chosen when its first column is reached, for the weights as they are then: the metric is that of the
error which no later column can compensate, the inverse of U[g, g]^T U[g, g].
"""

from collections.abc import Sequence

import numpy as np

from sw.awq.clipping import Group
from sw.awq.rounding import Form, Rounded, extent
from sw.awq.search import Statistics
from sw.awq.threads import threaded
from sw.common.arrays import slices

DAMPING = 0.05
"""What is added to H's diagonal, relative to its mean. With GPTQ's 0.01 the error on other texts is larger."""
ROWS_AT_ONCE = 256
"""Rows of the weights that one thread rounds; each column is a few operations of numpy on them."""


def compensate(weight: np.ndarray, gram: np.ndarray, start: Rounded) -> Rounded:
    """float32 [N, K] rounded with compensation, for inputs with Gram matrix `gram`, float32 [K, K].

    start: the same weights by sw.awq.clipping, whose scales and zero points are candidates. Uses all processors.
    """
    form, factor = start.form, inverse_factor(gram)
    metrics = [_metric(form, factor[part, part]) for part in form.parts(len(gram))]
    factor = factor.astype(np.float32)

    def rounded(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _round_rows(weight[rows], start.rows(rows), factor, metrics)

    parts = threaded(rounded, slices(len(weight), ROWS_AT_ONCE))
    return Rounded(form, *(np.concatenate(values) for values in zip(*parts)))


def corrected(weights: Sequence[np.ndarray], statistics: Statistics) -> list[np.ndarray]:
    """The weights, float32 [N, K] each, that give the float model's outputs for the inputs of the quantized one, by
    least squares: W + W D H^-1 with D the drift. Without a drift they are unchanged.

    This is the target of GPTAQ (Li et al. 2025, arXiv 2504.02692).
    """
    if statistics.drift is None:
        return list(weights)
    factor = inverse_factor(statistics.gram)
    change = (statistics.drift @ factor.T @ factor).astype(np.float32)
    return [weight + weight @ change for weight in weights]


def inverse_factor(gram: np.ndarray) -> np.ndarray:
    """U, upper triangular float64 [K, K]: U^T U is the inverse of the Gram matrix with damping."""
    h = gram.astype(np.float64)
    diagonal, damping = np.einsum("kk->k", h), DAMPING
    own, mean = diagonal.copy(), diagonal.mean() or 1.0
    while True:
        # The sum of a Gram matrix in float32 may be a little indefinite: more damping then.
        diagonal[:] = own + damping * mean
        try:
            factor = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
        else:
            return np.triu(np.linalg.inv(factor))


def _metric(form: Form, factor: np.ndarray) -> np.ndarray:
    """The Gram matrix of what is left of a group's error after compensation, float32 [group_size, group_size]."""
    metric = np.linalg.inv(factor.T @ factor)
    padding = form.group_size - len(metric)
    return np.pad(metric, (0, padding)).astype(np.float32)


def _round_rows(
    weight: np.ndarray, start: Rounded, factor: np.ndarray, metrics: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q uint8 [N, K], scales, zero points) of some rows, in the calling thread."""
    form, left = start.form, np.ascontiguousarray(weight.T)
    q, scales, zero_points = np.empty(left.shape, np.uint8), start.scales.copy(), start.zero_points.copy()
    top = np.float32(form.top)
    for index, part in enumerate(form.parts(len(left))):
        s, z = _choose(form, left[part], metrics[index], scales[:, index], zero_points[:, index])
        scales[:, index], zero_points[:, index] = s, z
        columns, upper = left[part], factor[part, part]
        errors = np.empty_like(columns)
        for k, column in enumerate(columns):
            steps = np.clip(np.rint(column / s + z), 0, top)
            q[part.start + k] = steps
            errors[k] = (column - (steps - z) * s) / upper[k, k]
            columns[k + 1 :] -= upper[k, k + 1 :, None] * errors[k]
        left[part.stop :] -= factor[part, part.stop :].T @ errors
    return np.ascontiguousarray(q.T), scales, zero_points


def _choose(
    form: Form, columns: np.ndarray, metric: np.ndarray, scales: np.ndarray, zero_points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best scale and zero point of each row for a group's weights, float32 [S, R]. scales, zero_points: tried too."""
    groups = form.split(np.ascontiguousarray(columns.T))[:, 0]
    tried = Group(form, groups, metric, np.zeros_like(groups))
    tried.consider(scales[None], zero_points[None])
    tried.search(*extent(groups))
    return tried.scales, tried.zero_points
