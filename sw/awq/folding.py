# SPDX-License-Identifier: Apache-2.0
"""Where the scale of a tensor's channels goes, so that the model computes the same without it.

    a norm's weight     which makes the tensor, if the layers that share the scale are its only readers
    up_proj's rows      for down_proj: its input is activation(gate) * up
    v_proj's rows       for o_proj: attention mixes tokens, not channels. With grouped queries several heads read one
                        head of v, and their channels share a scale. What the model keeps in its cache is scaled too
The first is seen in the graph. For the others the graph is tried: a layer's rows are scaled, the nodes between the two
layers run, and the tensor must be scaled as predicted and everything else unchanged. So the exporter's way to write
attention does not matter, and whatever is not certain is not folded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sw.awq.calibration import Step
from sw.awq.graph import Group, is_own
from sw.common.errors import UserError
from sw.graph.file import OnnxFile, tensor_shape
from sw.graph.float_linears import FloatSite
from sw.ort.feeds import CACHE_RANK, empty_cache_shape


@dataclass(frozen=True, eq=False)
class Fold:
    """A place for a group's scale.

    Members
    -------
    gamma: constant whose elements are divided by the scale; or "".
    site, rows: layer, and which of its output rows makes each channel, int [K]; or None.
    """

    gamma: str = ""
    site: FloatSite | None = None
    rows: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Of the constant or layer."""
        return self.site.name if self.site else self.gamma

    def factors(self, scale: np.ndarray) -> np.ndarray:
        """What the rows of `site` are to be divided by, float32 [N]. scale: [K], equal for channels of one row."""
        assert self.site is not None and self.rows is not None
        factors = np.ones(self.site.n, np.float32)
        factors[self.rows] = scale
        return factors


def find_fold(file: OnnxFile, step: Step, group: Group) -> Fold | None:
    """A place for the scale of a group's input, or None if none is certain."""
    if not group.only_readers:
        return None
    if group.gamma:
        return Fold(group.gamma)
    for site in step.made_of(group):
        bias = None
        if site.bias:
            if not is_own(file, site.bias):
                continue
            if site.node.op_type != "Gemm":
                bias = file.constant(site.bias, site.name).astype(np.float32).reshape(-1)
        for rows in _row_maps(file, site.n, group.k):
            if step.scales_with(group, site, rows, bias):
                return Fold(site=site, rows=rows)
    return None


def _row_maps(file: OnnxFile, n: int, k: int) -> Iterator[np.ndarray]:
    """Which rows of a layer may make K channels: all, half of them (gate and up in one), or heads of v."""
    channels = np.arange(k)
    if n == k:
        yield channels
    if n == 2 * k:
        yield k + channels
        yield channels
    heads = kv_heads(file)
    if heads is None:
        return
    count, size = heads
    # More query heads than key-value heads: each of the latter serves a number of neighbours among the former.
    if k % (count * size) == 0 and k > count * size:
        value = channels // size // (k // (count * size)) * size + channels % size
    elif k == count * size:
        value = channels
    else:
        return
    if n == count * size != k:
        yield value
    if n == k + 2 * count * size:
        yield k + count * size + value


def kv_heads(file: OnnxFile) -> tuple[int, int] | None:
    """(key-value heads, head size) that the KV cache's inputs say, or None."""
    for item in file.inputs:
        shape = tensor_shape(item)
        if len(shape) == CACHE_RANK:
            try:
                _, count, _, size = empty_cache_shape(file, item.name, shape)
            except UserError:
                return None
            return count, size
    return None
