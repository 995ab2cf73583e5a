# SPDX-License-Identifier: Apache-2.0
"""GGUF files: metadata, float tensors, and quantized linear layers without any loss.

Block formats (ggml, 32 weights a block along K, little endian):
    Q4_0  d:f16 qs[16]         w = d * (q - 8)
    Q4_1  d:f16 m:f16 qs[16]   w = d * q + m
    Q8_0  d:f16 qs[32]:i8      w = d * q
In a 4-bit block the low nibbles are elements 0 to 15 and the high nibbles elements 16 to 31.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sw.checkpoints.gguf_parts import expect_part, gguf_parts
from sw.common.arrays import is_finite
from sw.common.errors import UserError, one_line
from sw.model.linear import FloatLinear, QuantizedLinear

BLOCK = 32
QUANTIZED = ("Q4_0", "Q4_1", "Q8_0")
FLOATS = ("F32", "F16", "BF16")


class GgufFile:
    """A GGUF model, memory-mapped. Of a model in several files, any part may be given.

    path: the first part. Metadata is read from the first part.
    dequantize: all layers and tables are returned as floats, including K-quants.
    Raises UserError if a file is missing, truncated, big-endian or not GGUF, and if parts do not match.
    """

    def __init__(self, path: Path, *, dequantize: bool = False):
        self._dequantize = dequantize
        if not Path(path).is_file():
            raise UserError(f"no such file: {path}")
        parts = gguf_parts(Path(path))
        self.path = parts[0]
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        for number, part in enumerate(parts):
            fields = self._add(part)
            if number == 0:
                self._fields = fields
            split = (_split(part, fields, "split.no", 0), _split(part, fields, "split.count", 0) or 1)
            expect_part(part, number, len(parts), *split)
        tensors = _split(self.path, self._fields, "split.tensors.count", len(self._tensors))
        if tensors != len(self._tensors):
            raise UserError(f"{self.path}: its parts have {len(self._tensors)} tensors, and {tensors} are announced")

    def _add(self, path: Path) -> dict[str, Any]:
        """Adds one part's tensors; returns its metadata."""
        try:
            reader = gguf.GGUFReader(path)
            tensors, fields = {tensor.name: tensor for tensor in reader.tensors}, reader.fields
        except Exception as error:
            # The reader checks only the magic number: a damaged file can cause any exception in numpy.
            raise UserError(f"{path} is not a complete GGUF file ({one_line(error)})") from error
        if reader.endianess is not gguf.GGUFEndian.LITTLE:
            hint = "`gguf-convert-endian FILE little`, of the Python package gguf, converts it in place"
            raise UserError(f"{path} is big-endian, which is not read ({hint})")
        if twice := sorted(tensors.keys() & self._tensors.keys()):
            raise UserError(f"{path}: tensor {twice[0]} is in another part as well")
        self._tensors |= tensors
        return fields

    @property
    def tensors(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    @property
    def keys(self) -> list[str]:
        """The names of all metadata."""
        return [key for key in self._fields if not key.startswith("GGUF.")]

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._tensors

    def meta(self, key: str, default: Any = ...) -> Any:
        """The value of a metadata key. Raises UserError if it is damaged, or absent and no default is given."""
        if key in self._fields:
            try:
                return self._fields[key].contents()
            except Exception as error:
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
        """Any tensor that the gguf package can dequantize, as float32 [N, K] or [N]."""
        tensor = self._tensor(name)
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which cannot be read") from None
        if not np.isfinite(values).all():
            raise UserError(f"{self.path}: tensor {name} holds values that are not finite")
        return np.ascontiguousarray(values, dtype=np.float32)

    def linear(self, name: str) -> QuantizedLinear | FloatLinear:
        """The linear layer of the tensors `name`.weight and, if present, `name`.bias, without loss.

        Raises UserError for block formats not listed above (K-quants, for example), unless they are dequantized.
        """
        tensor = self._tensor(f"{name}.weight")
        kind = tensor.tensor_type.name
        bias = self.float_tensor(f"{name}.bias") if f"{name}.bias" in self else None
        if kind in FLOATS or self._dequantize:
            return FloatLinear(name, self.float_tensor(tensor.name), bias)
        if kind not in QUANTIZED:
            known = ", ".join(QUANTIZED + FLOATS)
            hint = "python -m sw.quantize makes a model of it that can be run"
            raise UserError(f"{self.path}: tensor {tensor.name} is {kind}; linear layers may be {known} ({hint})")
        return self._quantized(name, tensor, bias)

    def table(self, name: str) -> QuantizedLinear | np.ndarray:
        """The rows of tensor `name`.weight, one for each token, without loss: a quantized layer, float16 or float32.

        Other block formats (K-quants, for example) become float32.
        """
        tensor = self._tensor(f"{name}.weight")
        kind = tensor.tensor_type.name
        if kind in QUANTIZED and not self._dequantize:
            return self._quantized(name, tensor)
        if kind != "F16":
            return self.float_tensor(tensor.name)
        if not is_finite(tensor.data):
            raise UserError(f"{self.path}: tensor {tensor.name} holds values that are not finite")
        return np.asarray(tensor.data)

    def _quantized(self, name: str, tensor: "gguf.ReaderTensor", bias: np.ndarray | None = None) -> QuantizedLinear:
        q, scales, zero_points, bits = decode_blocks(np.asarray(tensor.data), tensor.tensor_type.name)
        return QuantizedLinear(name, q, scales, zero_points, BLOCK, bits, bias)

    def _tensor(self, name: str) -> "gguf.ReaderTensor":
        if name not in self._tensors:
            raise UserError(f"{self.path} has no tensor {name}")
        return self._tensors[name]


def decode_blocks(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Raw GGUF blocks, uint8 [N, bytes of a row], as (q uint8 [N, K], scales [N, G], zero points [N, G], bits).

    Zero points are uint8 for Q4_0 and Q8_0 and float32 for Q4_1.
    """
    n = rows.shape[0]
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = np.ascontiguousarray(rows).reshape(n, -1, size)
    scales = _halves(blocks, 0)
    if kind == "Q8_0":
        q = (blocks[:, :, 2:] ^ 0x80).reshape(n, -1)
        return q, scales, np.full(scales.shape, 128, np.uint8), 8
    nibbles = blocks[:, :, size - 16 :]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    if kind == "Q4_0":
        return q.reshape(n, -1), scales, np.full(scales.shape, 8, np.uint8), 4
    minimum = _halves(blocks, 2)
    # A block of equal weights has d = 0, and -m/d does not exist: its weights become q = 1, scale m, zero point 0.
    flat = scales == 0
    # In a damaged block both values may be infinite: QuantizedLinear refuses the resulting NaN.
    with np.errstate(invalid="ignore"):
        zero_points = np.divide(-minimum, scales, out=np.zeros_like(scales), where=~flat)
    q[flat] = 1
    return q.reshape(n, -1), np.where(flat, minimum, scales), zero_points, 4


def _split(path: Path, fields: dict[str, Any], key: str, default: int) -> int:
    """A metadata number about the parts of a model."""
    if key not in fields:
        return default
    try:
        return int(fields[key].contents())
    except Exception as error:
        raise UserError(f"{path}: metadata {key} cannot be read ({one_line(error)})") from None


def _halves(blocks: np.ndarray, offset: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, :, offset : offset + 2]).view("<f2")[:, :, 0].astype(np.float32)
