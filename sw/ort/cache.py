# SPDX-License-Identifier: Apache-2.0
"""The keys and values of past tokens, between two calls of a decoder's graph.

onnxruntime's GroupQueryAttention appends in place. With it, past and present are one buffer for the whole context, and
a token costs no copy. Any other graph makes a new present from the past; this present is the next past.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnxruntime import OrtValue

from sw.common.errors import UserError
from sw.graph.attention import appended, group_query_attention
from sw.graph.file import OnnxFile, tensor_shape, tensor_type
from sw.ort.feeds import CACHE_RANK, DTYPES, empty_cache_shape


@dataclass(frozen=True)
class _Pair:
    past: str
    present: str
    empty: np.ndarray


class KvCache:
    """The cache of one sequence.

    context: maximum number of tokens.
    Raises UserError if inputs and outputs do not match.
    """

    def __init__(self, file: OnnxFile, context: int):
        self._pairs = [_pair(file, name, present) for name, present in pair_names(file)]
        self.in_place = bool(self._pairs) and all(_appends(file, pair) for pair in self._pairs)
        self._values: dict[str, OrtValue] = {}
        self._fixed: dict[str, OrtValue] = {}
        # The same memory as that of _fixed.
        self._buffers: dict[str, np.ndarray] = {}
        if self.in_place:
            for pair in self._pairs:
                batch, heads, _, size = pair.empty.shape
                buffer = self._buffers[pair.past] = np.zeros((batch, heads, context, size), pair.empty.dtype)
                self._fixed[pair.past] = self._fixed[pair.present] = OrtValue.ortvalue_from_numpy(buffer)
        self.reset()

    @property
    def inputs(self) -> list[str]:
        """The graph's inputs that come from the cache."""
        return [pair.past for pair in self._pairs]

    @property
    def outputs(self) -> list[str]:
        """The graph's outputs that go to the cache."""
        return [pair.present for pair in self._pairs]

    @property
    def fixed(self) -> dict[str, OrtValue]:
        """Inputs and outputs whose buffers never change."""
        return self._fixed

    def feed(self) -> dict[str, OrtValue]:
        """The inputs for the next tokens."""
        return self._values

    def take(self, values: dict[str, OrtValue]) -> None:
        """Keeps the graph's outputs for the next call."""
        if not self.in_place:
            self._values = {pair.past: values[pair.present] for pair in self._pairs}

    def arrays(self) -> dict[str, np.ndarray]:
        """The cache by the graph's inputs: [batch, heads, positions, size]; positions are the context or the tokens."""
        return dict(self._buffers) if self.in_place else {name: value.numpy() for name, value in self._values.items()}

    def restore(self, arrays: Mapping[str, np.ndarray], length: int) -> None:
        """Keeps the first `length` tokens of `arrays`. Raises ValueError if a shape differs."""
        for pair in self._pairs:
            values = arrays[pair.past]
            if self.in_place:
                if values.shape != self._buffers[pair.past].shape:
                    raise ValueError(f"{pair.past} is {list(values.shape)}")
                self._buffers[pair.past][:] = values
            else:
                if values.shape[:2] + values.shape[3:] != pair.empty.shape[:2] + pair.empty.shape[3:]:
                    raise ValueError(f"{pair.past} is {list(values.shape)}")
                kept = np.ascontiguousarray(values[:, :, :length])
                self._values[pair.past] = OrtValue.ortvalue_from_numpy(kept)

    def shorten(self, length: int) -> None:
        """Removes all but the first `length` tokens."""
        if not self.in_place:
            self.restore(self.arrays(), length)

    def reset(self) -> None:
        """Removes all tokens."""
        if not self.in_place:
            self._values = {pair.past: OrtValue.ortvalue_from_numpy(pair.empty) for pair in self._pairs}


def pair_names(file: OnnxFile) -> list[tuple[str, str]]:
    """(past, present) of every cache tensor: by the operator that appends to it if it is known, else by their order.

    Raises UserError if their numbers differ.
    """
    past = [item.name for item in file.inputs if _rank(item) == CACHE_RANK]
    outputs = [item.name for item in file.graph.output]
    longer = [next((made for made, _ in appended(file, name) if made in outputs), None) for name in past]
    if None not in longer and len(set(longer)) == len(past):
        return [(name, str(present)) for name, present in zip(past, longer)]
    present = [item.name for item in file.graph.output if _rank(item) in (CACHE_RANK, None) and item.name != outputs[0]]
    if len(past) != len(present):
        raise UserError(f"{file.path}: {len(past)} inputs are a KV cache, and {len(present)} outputs")
    return list(zip(past, present))


def _pair(file: OnnxFile, past: str, present: str) -> _Pair:
    item = next(item for item in file.graph.input if item.name == past)
    kind = tensor_type(item)
    dtype = DTYPES.get(kind)
    if dtype not in (np.float32, np.float16):
        kind = kind.removeprefix("tensor(").removesuffix(")")
        raise UserError(f"{file.path}: the KV cache {past} is {kind}, not float or float16")
    return _Pair(past, present, np.zeros(empty_cache_shape(file, past, tensor_shape(item)), dtype))


def _appends(file: OnnxFile, pair: _Pair) -> bool:
    """Whether attention that appends in place is the only reader of the past."""
    made = list(appended(file, pair.past))
    if len(file.consumers.get(pair.past, [])) != 1 or len(made) != 1:
        return False
    return made[0][0] == pair.present and group_query_attention(made[0][1]) is not None


def _rank(item: onnx.ValueInfoProto) -> int | None:
    return len(tensor_shape(item)) if item.type.tensor_type.HasField("shape") else None
