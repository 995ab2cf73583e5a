# SPDX-License-Identifier: Apache-2.0
"""Quantizes the linear layers of a float decoder graph, block after block.

Each layer is calibrated with inputs that earlier, already quantized layers compute from the text, so these are the
inputs of the final model. Besides the calibration text, other windows go through the same blocks, with the weights of
the models to compare: float, rounded to nearest, or AWQ. Memory holds the weights of one block and the scales of all
blocks; quantized weights are in files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from sw.awq.calibration import Step, walk
from sw.awq.clipping import clip
from sw.awq.compensation import compensate, corrected
from sw.awq.folding import Fold, find_fold
from sw.awq.graph import Group
from sw.awq.int8_head import quantize_head
from sw.awq.rounding import Form, Rounded, nearest
from sw.awq.search import Scale, Statistics, output_error, scaled_gram, search_scale
from sw.awq.threads import THREADS, threaded
from sw.common.arrays import slices
from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.graph.float_linears import FloatSite, find_sites
from sw.model.linear import FloatLinear, QuantizedLinear
from sw.model.lm_head import Linear
from sw.text.scoring import negative_log_likelihood

METHODS = ("awq", "rtn")
"""rtn: round to nearest, without any search."""
ROUNDINGS = ("gptq", "nearest")
"""How AWQ's weights become integers: with compensation (see sw.awq.compensation), or each by itself."""
FLOAT = "float"
ROWS_AT_ONCE = 64
"""Tokens whose logits are in memory at the same time; a vocabulary may have 150,000 tokens."""

LARGEST_TOKEN = 4
"""A token's squared activations count at most this many times the median token's. A few tokens, often the first of a
sequence, have far larger ones in the input of down_proj than all others (massive activations, Sun et al. 2024, arXiv
2402.17762), and would decide alone which error is least. The norm after the residual sum divides by them, so their
errors matter no more than those of other tokens."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Texts:
    """Windows of token ids.

    Members
    -------
    calibration, evaluation: windows; in an evaluation window all tokens but the first are scored.
    beginning: tokens at the start of every window, which are not scored (see sw.perplexity).
    """

    calibration: Sequence[Sequence[int]]
    evaluation: Sequence[Sequence[int]] = ()
    beginning: Sequence[int] = ()


@dataclass(frozen=True)
class LayerReport:
    """Results for one layer.

    Members
    -------
    name, k, n: the layer in the graph.
    error_rtn, error: mean squared error of its output on the calibration text relative to the output's mean square:
        for rounding to nearest without scales, and for the quantized weights.
    ratio: exponent of the scale, 0 if there is none.
    fold: constant or layer that absorbs the scale; None if there is none.
    """

    name: str
    k: int
    n: int
    error_rtn: float
    error: float
    ratio: float = 0.0
    fold: str | None = None


@dataclass
class Result:
    """A quantized model.

    Members
    -------
    layers: name of a node -> function that returns its layer, for sw.graph.rewrite.write_quantized.
    updates: name of a constant -> its new value.
    reports: results for all layers but the head, in the graph's order.
    nll: FLOAT or a method -> -ln p of every scored token, float64.
    """

    layers: dict[str, Callable[[], QuantizedLinear]] = field(default_factory=dict)
    updates: dict[str, np.ndarray] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    nll: dict[str, np.ndarray] = field(default_factory=dict)


def quantize(
    file: OnnxFile,
    form: Form,
    texts: Texts,
    scratch: Path,
    *,
    method: str = "awq",
    rounding: str = ROUNDINGS[0],
    compare: Sequence[str] = (),
    int8_head: bool = True,
    progress: Progress = lambda done, name: None,
) -> Result:
    """Quantizes every float linear layer of a decoder.

    method: one of METHODS. rounding: one of ROUNDINGS, for AWQ. compare: further models (FLOAT or METHODS) to score on
    texts.evaluation; all have the same head. scratch: directory for files that the result's functions read. int8_head:
    the head becomes int8 (see sw.awq.int8_head), else it stays float. progress: called with the fraction that is done
    and a layer's name.
    Raises UserError for graphs that are not decoders or have no float linear layers, and for values that are not
    finite.
    """
    return _Quantizer(file, form, texts, scratch, method, rounding, compare, int8_head).run(progress)


class _Quantizer:
    def __init__(
        self,
        file: OnnxFile,
        form: Form,
        texts: Texts,
        scratch: Path,
        method: str,
        rounding: str,
        compare: Sequence[str],
        int8_head: bool,
    ):
        self.rounding = rounding
        self.file, self.form, self.texts, self.scratch = file, form, texts, scratch
        self.method, self.compare, self.int8_head = method, list(compare) if texts.evaluation else [], int8_head
        self.searches = "awq" in (method, *self.compare)
        self.sites = find_sites(file)
        self.result = Result()
        self._rounded: dict[str, Rounded] = {}
        self._order = {site.name: index for index, site in enumerate(self.sites)}
        if not self.body:
            raise UserError(f"{file.path} has no float linear layers but the head")
        if self.compare and len(self.body) == len(self.sites):
            raise UserError(f"{file.path} has no float linear layer that makes the logits")

    @property
    def body(self) -> list[FloatSite]:
        """All layers but the head."""
        return [site for site in self.sites if not site.is_head]

    def run(self, progress: Progress) -> Result:
        windows = [*self.texts.calibration] * self._paths
        for _ in self.compare:
            windows += [window[:-1] for window in self.texts.evaluation]
        windows = [[*self.texts.beginning, *window] for window in windows]
        costs = {site.name: float(site.n) * site.k * (site.k + 2 * len(windows[0])) for site in self.body}
        total, done = sum(costs.values()), 0.0
        for step in walk(self.file, self.sites, windows, bool(self.compare)):
            for group in step.groups:
                if group.sites[0].is_head:
                    self._score(step, group)
                    continue
                progress(done / total, group.sites[0].name)
                self._quantize(step, group)
                done += sum(costs[site.name] for site in group.sites)
        progress(1.0, "")
        self.result.layers = {site.name: partial(self._layer, site) for site in self.body}
        if self.int8_head:
            self.result.layers |= {site.name: partial(self._head, site) for site in self.sites if site.is_head}
        self.result.reports.sort(key=lambda report: self._order[report.name])
        return self.result

    @property
    def _paths(self) -> int:
        """How often the calibration text is computed: by the quantized layers, and for gptq by the float model, too."""
        return 2 if self.searches and self.rounding == "gptq" else 1

    def _quantize(self, step: Step, group: Group) -> None:
        """Quantizes one group of layers, and computes their products for all windows."""
        weights = [site.weight(self.file) for site in group.sites]
        count = len(self.texts.calibration)
        inputs = step.inputs(group)
        exact = inputs[count : 2 * count] if self._paths > 1 else None
        statistics = gather(inputs[:count], exact)
        del inputs, exact
        plain = [nearest(weight, self.form) for weight in weights]
        fold, scale, searched = None, None, plain
        if self.searches:
            fold = find_fold(self.file, step, group)
            scale, searched = search(weights, statistics, self.form, fold, self.rounding)
        factors = np.float32(1) if scale is None else scale.values
        chosen = searched if self.method == "awq" else plain
        for site, weight, near, found, take in zip(group.sites, weights, plain, searched, chosen):
            values = {FLOAT: weight, "rtn": near.values(), "awq": found.values() / factors}
            before, after = (self._error(values[way] - weight, weight, statistics) for way in ("rtn", self.method))
            report = LayerReport(site.name, site.k, site.n, before, after)
            if scale is not None and self.method == "awq":
                name = fold.name if fold else None
                report = LayerReport(site.name, site.k, site.n, before, after, scale.ratio, name)
            self.result.reports.append(report)
            self._rounded[site.name] = self._spilled(site, take)
            of_each = [values["awq" if self.searches else "rtn"]] * count
            of_each += [weight] * (count * (self._paths - 1))
            for way in self.compare:
                of_each += [values[way]] * len(self.texts.evaluation)
            step.compute(site, of_each, self._own_bias(site))
        if fold and scale is not None and self.method == "awq":
            self._fold(fold, scale.values)

    def _fold(self, fold: Fold, scale: np.ndarray) -> None:
        if fold.site is None:
            self._divide(fold.gamma, scale)
            return
        factors = fold.factors(scale)
        self._rounded[fold.site.name] = self._rounded[fold.site.name].divided(factors)
        if fold.site.bias:
            self._divide(fold.site.bias, factors)

    def _divide(self, name: str, factors: np.ndarray) -> None:
        value = self.result.updates.get(name)
        value = self.file.constant(name, name) if value is None else value
        self.result.updates[name] = (value.astype(np.float32) / factors.reshape(value.shape)).astype(np.float32)

    def _error(self, difference: np.ndarray, weight: np.ndarray, statistics: Statistics) -> float:
        return output_error(difference, statistics.gram) / max(output_error(weight, statistics.gram), 1e-30)

    def _own_bias(self, site: FloatSite) -> np.ndarray | None:
        """The bias that the layer's node adds itself, or None."""
        if not site.bias or site.node.op_type != "Gemm":
            return None
        return self.file.constant(site.bias, site.name).astype(np.float32).reshape(-1)

    def _spilled(self, site: FloatSite, rounded: Rounded) -> Rounded:
        """The same weights with q in a file."""
        path = self.scratch / f"{self._order[site.name]}.npy"
        np.save(path, rounded.q)
        return Rounded(rounded.form, np.load(path, mmap_mode="r"), rounded.scales, rounded.zero_points)

    def _layer(self, site: FloatSite) -> QuantizedLinear:
        return self._rounded[site.name].layer(site.name)

    def _head(self, site: FloatSite) -> QuantizedLinear:
        return quantize_head(site.weight(self.file), site.name)

    def _score(self, step: Step, group: Group) -> None:
        """Computes -ln p of the evaluation windows for every model in `compare`."""
        site = group.sites[0]
        head: Linear = self._head(site) if self.int8_head else FloatLinear(site.name, site.weight(self.file))
        weight = head.dequantize() if isinstance(head, QuantizedLinear) else head.weight
        bias = self.file.constant(site.bias, site.name).astype(np.float32).reshape(-1) if site.bias else np.float32(0)
        xs = step.inputs(group)[self._paths * len(self.texts.calibration) :]
        count = len(self.texts.evaluation)

        def nll(item: tuple[np.ndarray, Sequence[int]]) -> np.ndarray:
            x, targets = item[0][len(self.texts.beginning) :], np.array(item[1][1:])
            parts = slices(len(x), ROWS_AT_ONCE)
            return np.concatenate([negative_log_likelihood(x[rows] @ weight.T + bias, targets[rows]) for rows in parts])

        for index, way in enumerate(self.compare):
            items = zip(xs[index * count : (index + 1) * count], self.texts.evaluation)
            self.result.nll[way] = np.concatenate(threaded(nll, items))


def gather(inputs: Sequence[np.ndarray], exact: Sequence[np.ndarray] | None = None) -> Statistics:
    """Statistics of a layer's inputs, float32 [tokens, K] for every window, in which no token counts too much.

    exact: the inputs in the float model, for the drift.
    """
    tokens, size = sum(map(len, inputs)), inputs[0].shape[1]
    factors = _factors(inputs)

    def total(share: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gram, magnitude = np.zeros((size, size), np.float32), np.zeros(size)
        drift = np.zeros((size, size) if exact else (0, 0), np.float32)
        for window in share:
            x = inputs[window] * factors[window]
            gram += x.T @ x
            magnitude += np.abs(x).sum(axis=0, dtype=np.float64)
            if exact:
                drift += (exact[window] * factors[window] - x).T @ x
        return gram, magnitude, drift

    # One sum per thread and not per window, because the matrix may have 100 MB.
    count = min(THREADS, len(inputs))
    gram, magnitude, drift = _sums(threaded(total, [range(first, len(inputs), count) for first in range(count)]))
    found = drift / np.float32(tokens) if exact else None
    return Statistics(gram / np.float32(tokens), (magnitude / tokens).astype(np.float32), tokens, found)


def _sums(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The sums of the first arrays, of the second ones, and so on, in the places of the first part's."""
    for part in parts[1:]:
        for whole, more in zip(parts[0], part):
            whole += more
    return list(parts[0])


def _factors(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the inputs of each token are multiplied by, float32 [tokens, 1] of every window: see LARGEST_TOKEN."""
    squares = threaded(lambda x: np.einsum("tk,tk->t", x, x), inputs)
    limit = np.float32(LARGEST_TOKEN) * np.median(np.concatenate(squares))
    if not limit > 0:
        return [np.ones((len(square), 1), np.float32) for square in squares]
    return [np.sqrt(limit / np.maximum(square, limit)).astype(np.float32)[:, None] for square in squares]


def search(
    weights: Sequence[np.ndarray],
    statistics: Statistics,
    form: Form,
    fold: Fold | None,
    rounding: str = ROUNDINGS[0],
) -> tuple[Scale | None, list[Rounded]]:
    """AWQ of layers that share an input: their scale (None without a fold), and the rounded weights times the scale."""
    scale, gram = None, statistics.gram
    scaled = corrected(weights, statistics) if rounding == "gptq" else list(weights)
    if fold is not None:
        classes = None if fold.rows is None else np.unique(fold.rows, return_inverse=True)[1]
        scale = search_scale(weights, statistics, form, classes)
        gram = scaled_gram(gram, scale.values)
        scaled = [weight * scale.values for weight in scaled]
    found = [clip(weight, gram, form) for weight in scaled]
    if rounding == "gptq":
        found = [compensate(weight, gram, start) for weight, start in zip(scaled, found)]
    return scale, found
