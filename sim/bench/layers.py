# SPDX-License-Identifier: Apache-2.0
"""Layers for the benches: random and extreme data, and their streams into and out of the core."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hw.spec.config import FIXED_ZERO_POINT_BITS, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import LayerLayout, fit_layer
from hw.spec.memory.packing import pack
from hw.spec.memory.transfers import Transfer, result_transfers
from hw.spec.numerics.linear import Activations, Weights, linear
from hw.spec.ops.command import LayerCommand
from sim.bench.packing import Layout

__all__ = [
    "Job",
    "activation_payloads",
    "activations_of",
    "beats",
    "job",
    "random_layer",
    "result_count",
    "results",
    "weights_of",
]

DATA = ("random", "minimum", "maximum", "bound", "negative_bound", "zero_rows")
"""Kinds of data: see :func:`weights_of`."""


class Job(NamedTuple):
    """One layer with its data, and whether it reuses the activations of the previous job.

    paired : successive rows of weights are in pairs
    whole : the layer whose header the stream has, if it has more groups
    """

    layer: LayerLayout
    weights: Weights
    activations: Activations
    reuse: bool = False
    paired: bool = False
    whole: LayerLayout | None = None

    @property
    def tokens(self) -> int:
        """M."""
        return len(self.activations.exponents)

    @property
    def command(self) -> int:
        """The core's command for this job."""
        command = LayerCommand.from_layer(self.layer, self.tokens, self.reuse)
        if self.whole:
            spare = self.whole.groups - self.layer.groups
            command = replace(command, header_beats=self.whole.header_beats, spare_records=spare)
        return replace(command, paired=int(self.paired)).to_int(self.layer.config)


def _zero_point_range(config: AcceleratorConfig) -> tuple[int, int]:
    if config.zero_point == "integer":
        return 0, config.weight_max
    half = 1 << (FIXED_ZERO_POINT_BITS - 1)
    return -half, half - 1


def weights_of(layer: LayerLayout, random: np.random.Generator, kind: str = "random") -> Weights:
    """A layer's weights.

    ``random``: random values, scales of both signs. ``moderate``: the same, with results about as large as the
    activations, so that layers can follow each other. ``minimum``, ``maximum``: every field at this end of its range.
    ``bound``: with maximal activations the sums reach the accumulators' upper bound; ``negative_bound``: the lower one.
    ``zero_rows``: random, but every second row has zero scales.
    """
    config, n, k, groups = layer.config, layer.n, layer.k, layer.groups
    low, high = _zero_point_range(config)
    q = random.integers(0, config.weight_max, (n, k), endpoint=True).astype(np.uint8)
    zero_points = random.integers(low, high, (n, groups), endpoint=True)
    scales = random.integers(-config.scale_max, config.scale_max, (n, groups), endpoint=True)
    exponents = random.integers(-40, 40, n)
    if kind == "moderate":
        exponents = random.integers(-7, -4, n)
    elif kind == "minimum":
        q[:], zero_points[:], scales[:], exponents[:] = 0, low, -config.scale_max, -128
    elif kind == "maximum":
        q[:], zero_points[:], scales[:], exponents[:] = config.weight_max, high, config.scale_max, 127
    elif kind.endswith("bound"):
        q[:], zero_points[:] = config.weight_max, low
        scales[:] = -config.scale_max if kind.startswith("negative") else config.scale_max
    elif kind == "zero_rows":
        scales[::2], exponents[::2] = 0, 0
    return Weights(q, zero_points, scales, exponents)


def activations_of(layer: LayerLayout, tokens: int, random: np.random.Generator, kind: str = "random") -> Activations:
    """Activations for a layer: random, or all at the end of the range that `kind` gives."""
    config = layer.config
    mantissas = random.integers(-config.activation_max, config.activation_max, (tokens, layer.k), endpoint=True)
    exponents = random.integers(-40, 40, tokens)
    if kind == "minimum":
        mantissas[:], exponents[:] = -config.activation_max, -128
    elif kind == "maximum":
        mantissas[:], exponents[:] = config.activation_max, 127
    elif kind.endswith("bound"):
        mantissas[:] = config.activation_max
        mantissas[1::2] *= -1
    elif kind == "zero_rows":
        mantissas[::2], exponents[::2] = 0, 0
    return Activations(mantissas, exponents)


def job(
    config: AcceleratorConfig,
    random: np.random.Generator,
    k: int,
    n: int,
    group_size: int,
    tokens: int,
    kind: str = "random",
    reuse: Job | None = None,
) -> Job:
    """A job with the true K ``k``; :func:`hw.spec.memory.geometry.fit_layer` pads K and splits groups."""
    layer = fit_layer(config, k, n, group_size)
    if reuse is not None:
        return Job(layer, weights_of(layer, random, kind), reuse.activations, True)
    activations = activations_of(layer, tokens, random, kind)
    activations.mantissas[:, k:] = 0
    return Job(layer, weights_of(layer, random, kind), activations)


def random_layer(
    config: AcceleratorConfig, random: np.random.Generator, max_k: int = 320, max_tiles: int = 4
) -> LayerLayout:
    """A layer of random shape: any legal group_size, any number of groups up to ``max_k``, any N."""
    while True:
        size = config.tile * int(random.integers(1, max(2, config.max_group_size // config.tile), endpoint=True))
        groups = int(random.integers(1, max(1, min(max_k, config.max_k) // size), endpoint=True))
        n = int(random.integers(1, config.tile * max_tiles, endpoint=True))
        try:
            return LayerLayout(config, groups * size, n, size)
        except ConfigError:
            continue


def beats(job: Job) -> list[int]:
    """The weight stream's payloads."""
    layer, weights = job.layer, job.weights
    if job.whole:
        more = weights_of(job.whole, np.random.default_rng(len(weights.q[0])))
        more.q[:, : layer.k], more.zero_points[:, : layer.groups] = weights.q, weights.zero_points
        more.scale_mantissas[:, : layer.groups] = weights.scale_mantissas
        layer, weights = job.whole, more._replace(exponents=weights.exponents)
    rows = pack(layer, weights, job.paired)
    body = job.layer.body_words * layer.stream.beats_per_word
    rows = rows[: layer.header_beats + body] if job.whole else rows
    return [int.from_bytes(row.tobytes(), "little") for row in rows]


def activation_payloads(job: Job, fields: Layout) -> list[int]:
    """The activation stream's payloads: slice by slice, all tokens of a slice in a row."""
    tile = job.layer.config.tile
    mantissas = job.activations.mantissas.reshape(job.tokens, -1, tile).transpose(1, 0, 2).reshape(-1, tile)
    exponents = np.tile(job.activations.exponents, len(mantissas) // job.tokens)
    return fields.pack(mantissas=mantissas, exponent=exponents)


def results(job: Job) -> list[tuple[list[int], Transfer]]:
    """The expected results: (float32 bits of the existing lanes, the other fields) of every transfer."""
    y = linear(job.layer.config, job.weights, job.activations).view(np.uint32)
    transfers = result_transfers(job.layer.config, job.tokens, job.layer.n)
    return [(y[item.token, item.columns.start : item.columns.stop].tolist(), item) for item in transfers]


def result_count(jobs: Sequence[Job]) -> int:
    """Number of transfers of results of several jobs."""
    return sum(len(result_transfers(item.layer.config, item.tokens, item.layer.n)) for item in jobs)
