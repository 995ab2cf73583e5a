# SPDX-License-Identifier: Apache-2.0
"""GGUF files: metadata, float tensors, and quantized linear layers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sw.checkpoints.gguf.blocks import FORMATS, dequantize_groups, unpack_groups
from sw.checkpoints.gguf.header import GgufTensor, read_header
from sw.checkpoints.gguf.layers import AT_ONCE, quantized_layer
from sw.checkpoints.gguf.parts import expect_part, gguf_parts
from sw.common.arrays import is_finite, slices
from sw.common.errors import UserError, one_line
from sw.model.linear import FloatLinear, QuantizedLinear

FLOATS = ("F32", "F16", "BF16")


class GgufFile:
    """A GGUF model, of which a tensor's data is read when it is asked for. Of a model in several files, any part may be
    given.

    path: the first part. Metadata is read from the first part.
    dequantize: all layers and tables are returned as floats.
    Raises UserError if a file is missing, truncated, damaged, big-endian or not GGUF, and if parts do not match.
    """

    def __init__(self, path: Path, *, dequantize: bool = False):
        self._dequantize = dequantize
        if not Path(path).is_file():
            raise UserError(f"no such file: {path}")
        parts = gguf_parts(Path(path))
        self.path = parts[0]
        self._fields: dict[str, Any] = {}
        self._tensors: dict[str, GgufTensor] = {}
        announced = []
        for number, part in enumerate(parts):
            fields, tensors = read_header(part)
            if number == 0:
                self._fields = fields
            split = (_split(part, fields, "split.no", 0), _split(part, fields, "split.count", 0) or 1)
            expect_part(part, number, len(parts), *split)
            announced.append(_split(part, fields, "split.tensors.count", -1))
            if announced[-1] != announced[0]:
                counts = f"{announced[0]} tensors, and this part {announced[-1]}"
                raise UserError(f"{part} is of another model: {parts[0].name} announces {counts}")
            if twice := sorted(tensors.keys() & self._tensors.keys()):
                raise UserError(f"{part}: tensor {twice[0]} is in another part as well")
            self._tensors |= tensors
        if announced[0] not in (-1, len(self._tensors)):
            raise UserError(
                f"{self.path}: its parts have {len(self._tensors)} tensors, and {announced[0]} are announced"
            )

    @property
    def tensors(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    @property
    def keys(self) -> list[str]:
        """The names of all metadata."""
        return list(self._fields)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._tensors

    def meta(self, key: str, default: Any = ...) -> Any:
        """The value of a metadata key. Raises UserError if it is damaged, or absent and no default is given."""
        if key in self._fields:
            try:
                return _decoded(self._fields[key])
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}: metadata {key} cannot be read ({one_line(error)})") from None
        if default is ...:
            raise UserError(f"{self.path} has no metadata {key}")
        return default

    def integer(self, key: str, default: Any = ...) -> Any:
        """The value of a key that is a whole number >= 0, or the default. Raises UserError for other values."""
        value = self.meta(key, default)
        # Some programs write one value for each block; in the supported families all of them are the same.
        if isinstance(value, list) and value and all(other == value[0] for other in value):
            value = value[0]
        if value is not default and not (isinstance(value, int) and value >= 0):
            raise UserError(f"{self.path}: metadata {key} is a whole number, not {str(value)[:80]}")
        return value

    def number(self, key: str, default: Any = ...) -> float:
        """The value of a key that is a number. Raises UserError for other values."""
        value = self.meta(key, default)
        if not isinstance(value, int | float):
            raise UserError(f"{self.path}: metadata {key} is a number, not {str(value)[:80]}")
        return float(value)

    def texts(self, key: str) -> list[str]:
        """The value of a key that is a list of texts. Raises UserError for other values."""
        value = self.meta(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{self.path}: metadata {key} is a list of texts, not {str(value)[:80]}")
        return value

    def float_tensor(self, name: str) -> np.ndarray:
        """Any tensor that the gguf package can dequantize, as float32 [N, K] or [N]; some rows are read at a time."""
        return self._floats(self._tensor(name))

    def _floats(self, tensor: GgufTensor) -> np.ndarray:
        name = tensor.name
        values = np.empty(tensor.shape, np.float32)
        rows_at_once = max(1, AT_ONCE // max(1, values[:1].size))
        for rows in slices(len(values), rows_at_once) if values.ndim > 1 else [slice(None)]:
            try:
                values[rows] = _dequantized(tensor.read(rows), tensor.kind)
            except NotImplementedError:
                raise UserError(f"{self.path}: tensor {name} is {tensor.kind}, which cannot be read") from None
            if not np.isfinite(values[rows]).all():
                raise UserError(f"{self.path}: tensor {name} holds values that are not finite")
        return values

    def linear(self, name: str) -> QuantizedLinear | FloatLinear:
        """The linear layer of the tensors `name`.weight and, if present, `name`.bias; see sw.checkpoints.gguf.layers.

        Raises UserError for block formats other than those of sw.checkpoints.gguf.blocks, unless they are dequantized.
        """
        bias = self.float_tensor(f"{name}.bias") if f"{name}.bias" in self else None
        return self._layer(name, self._tensor(f"{name}.weight"), bias)

    def expert(self, name: str, index: int, count: int) -> QuantizedLinear | FloatLinear:
        """The linear layer of one of `count` experts, whose weights follow each other in the tensor `name`.weight.

        Raises UserError as `linear` does, and for another number of experts.
        """
        tensor = self._tensor(f"{name}.weight")
        if len(tensor.shape) != 3 or tensor.shape[0] != count:
            problem = f"tensor {tensor.name} is {list(tensor.shape)}, and the model has {count} experts"
            raise UserError(f"{self.path}: {problem}")
        offset = tensor.offset + index * tensor.shape[1] * tensor.row_bytes
        return self._layer(f"{name}.{index}", replace(tensor, shape=tensor.shape[1:], offset=offset), None)

    def _layer(self, name: str, tensor: GgufTensor, bias: np.ndarray | None) -> QuantizedLinear | FloatLinear:
        if tensor.kind in FLOATS or self._dequantize:
            if len(tensor.shape) != 2:
                raise UserError(f"{self.path}: tensor {tensor.name} is {list(tensor.shape)}, not a matrix")
            return FloatLinear(name, self._floats(tensor), bias)
        if tensor.kind not in FORMATS:
            known = ", ".join((*FORMATS, *FLOATS))
            hint = "python -m sw.quantize makes a model of it that can be run"
            raise UserError(f"{self.path}: tensor {tensor.name} is {tensor.kind}; layers may be {known} ({hint})")
        return quantized_layer(name, tensor, bias)

    def table(self, name: str) -> QuantizedLinear | np.ndarray:
        """The rows of tensor `name`.weight, one for each token, without loss: a quantized layer, float16 or float32.

        Block formats other than those of sw.checkpoints.gguf.blocks become float32.
        """
        tensor = self._tensor(f"{name}.weight")
        if tensor.kind in FORMATS and not self._dequantize:
            return quantized_layer(name, tensor)
        if tensor.kind != "F16":
            return self.float_tensor(tensor.name)
        values = tensor.read()
        if not is_finite(values):
            raise UserError(f"{self.path}: tensor {tensor.name} holds values that are not finite")
        return values

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise UserError(f"{self.path} has no tensor {name}")
        return self._tensors[name]


def _dequantized(data: np.ndarray, kind: str) -> np.ndarray:
    """Raw data as floats. Raises NotImplementedError for formats that the gguf package cannot dequantize."""
    # A damaged block may hold an infinity; the caller refuses what comes of it.
    with np.errstate(invalid="ignore", over="ignore"):
        if kind in FORMATS and data.ndim == 2:
            return dequantize_groups(unpack_groups(data, kind))
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def _decoded(value: Any) -> Any:
    """A metadata value with texts as str."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [text.decode() for text in value]
    return value


def _split(path: Path, fields: dict[str, Any], key: str, default: int) -> int:
    """A metadata number about the parts of a model. Raises UserError if it is none."""
    value = fields.get(key, default)
    if not isinstance(value, int):
        raise UserError(f"{path}: metadata {key} is a whole number, not {str(value)[:80]}")
    return value
