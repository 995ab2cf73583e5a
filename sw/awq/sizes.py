# SPDX-License-Identifier: Apache-2.0
"""A model's bytes before and after quantization; the same tensors are counted on both sides.

Before: the weights of the float model with 16 bits each, like published checkpoints, independent of their type here.
After: the written weights, with scales, zero points and both copies of a table that is stored twice. A table that two
nodes read counts once. Rotary tables and the graph's constants are in no checkpoint, and are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from sw.checkpoints.safetensors_file import SafetensorsFile
from sw.common.errors import UserError
from sw.graph.file import OnnxFile, expect_names

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
ROTARY = ("cos_cache", "sin_cache", "cos_cached", "sin_cached", "inv_freq")
PAPER_SMALLER = 55.08
PAPER = (
    "The paper's figure for Qwen2.5-0.5B, AWQ with groups of 64, is 55.08 %: from 988 MB to 443.81. The latter are MiB"
    " (465.37 MB, an AutoAWQ file to the byte), so that like for like it is 52.90 %."
)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights. before: in float16. after: quantized, as written."""

    before: int
    after: int

    @property
    def smaller(self) -> float:
        """Reduction in per cent."""
        return 100 * (1 - self.after / self.before)

    def line(self) -> str:
        """Both sizes as text."""
        sides = f"{self.before / 1e6:,.2f} MB in float16, {self.after / 1e6:,.2f} MB quantized"
        return f"{sides}: {self.smaller:.2f} % smaller"


def compare(before: Path, after: Path) -> Sizes:
    """The sizes of a float ONNX file and of its quantized form: an ONNX file or an AutoAWQ folder.

    Raises UserError if a file is missing or damaged, or if the float one has no weights.
    """
    sizes = Sizes(float16_bytes(before), written_bytes(after))
    if not sizes.before:
        raise UserError(f"{before} has no weights")
    return sizes


def float16_bytes(model: Path) -> int:
    """Bytes of a float ONNX file's weights with 16 bits each."""
    return sum(2 * count for _, kind, count in _weights(OnnxFile(model)) if kind in FLOATS)


def written_bytes(model: Path) -> int:
    """Bytes of the weights in an ONNX file, or in a folder's safetensors and scales."""
    if Path(model).is_dir():
        files = [SafetensorsFile(path) for path in sorted(Path(model).glob("*.safetensors"))]
        tensors = sum(file.size(name) for file in files for name in file.names)
        return tensors + sum(path.stat().st_size for path in Path(model).glob("*.npy"))
    return sum(_bytes(kind, count) for _, kind, count in _weights(OnnxFile(model)))


def _weights(file: OnnxFile) -> Iterator[tuple[str, int, int]]:
    """Name, element type and number of elements of each weight: without shapes, indices and rotary tables."""
    expect_names(file)
    for tensor in file.graph.initializer:
        constant = tensor.data_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
        # A scalar is a constant of the computation, for example an epsilon.
        if not constant and tensor.dims and not tensor.name.endswith(ROTARY):
            yield tensor.name, tensor.data_type, int(np.prod(tensor.dims))


def _bytes(kind: int, count: int) -> int:
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        return -(-count // 2)
    if kind in (TensorProto.INT2, TensorProto.UINT2):
        return -(-count // 4)
    return count * helper.tensor_dtype_to_np_dtype(kind).itemsize
