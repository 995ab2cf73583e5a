# SPDX-License-Identifier: Apache-2.0
"""Finds constants that can absorb the scale of a tensor's channels, so that the model still computes the same.

    a norm's weight     if the norm makes the tensor, and the layers that share the scale are its only readers
    up_proj's rows      for down_proj: its input is activation(gate) * up
    v_proj's rows       for o_proj: attention mixes tokens, not channels. With grouped queries several heads read one
                        head of v, and their channels share a scale. The model's cache is scaled, too
The first is found from the graph's structure. The others are found by a trial: a layer's rows are scaled, the nodes
between the two layers are run, and the tensor must be scaled as predicted and everything else must be unchanged. So it
does not matter how an exporter writes attention, and a scale is folded only if this is certain to be right.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sw.awq.calibration import Step
from sw.awq.graph import FloatSite, Group, is_own
from sw.common.errors import UserError
from sw.graph.file import OnnxFile
from sw.ort.feeds import CACHE_RANK, empty_cache_shape


@dataclass(frozen=True, eq=False)
class Fold:
    """A place for a group's scale.

    Members
    -------
    gamma: the constant whose elements are divided by the scale; or "".
    site, rows: a layer, and the output row that makes each channel, int [K]; or None.
    """

    gamma: str = ""
    site: FloatSite | None = None
    rows: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Name of the constant or layer."""
        return self.site.name if self.site else self.gamma

    def factors(self, scale: np.ndarray) -> np.ndarray:
        """The divisors of the rows of `site`, float32 [N]. scale: [K], equal for channels of one row."""
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
    """Candidates for the rows that make K channels: all, half of them (gate and up in one layer), or heads of v."""
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
    # With more query heads than key-value heads, several neighbouring query heads share a key-value head.
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
    """(key-value heads, head size) from the KV cache's inputs, or None."""
    for item in file.inputs:
        sizes = item.type.tensor_type.shape.dim
        if len(sizes) == CACHE_RANK:
            shape = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in sizes]
            try:
                _, count, _, size = empty_cache_shape(file, item.name, shape)
            except UserError:
                return None
            return count, size
    return None
