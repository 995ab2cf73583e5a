# SPDX-License-Identifier: Apache-2.0
"""Linear layers of an AutoAWQ GEMM checkpoint, without any loss.

Format (github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py), tensors of one layer, G = group_size:
    qweight int32 [K, N / 8], qzeros int32 [K / G, N / 8], scales float16 or bfloat16 [K / G, N],
    bias [N] or absent
    w[n, k] = (q[k, n] - z[k // G, n]) * s[k // G, n]
Nibble i (from the low bits) of word c is output column 8c + COLUMNS[i].
"""

from dataclasses import dataclass

import numpy as np

from sw.checkpoints.packed.layers import has_words, read_bias
from sw.checkpoints.packed.words import MIN_BLOCK, block_size, matrix, split_groups
from sw.checkpoints.safetensors_file import Checkpoint
from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4
MIDDLE = 1 << (BITS - 1)


@dataclass(frozen=True)
class AwqFormat:
    """Settings of quantization_config: group_size, or 0 for all of K, and whether layers have zero points."""

    group_size: int
    zero_point: bool

    def is_quantized(self, checkpoint: Checkpoint, name: str) -> bool:
        """By the tensors: programs compare names with modules_to_not_convert in different ways."""
        return has_words(checkpoint, name)

    def read(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear:
        """See LayerFormat."""
        q = unpack_words(matrix(checkpoint, f"{name}.qweight"))
        n, k = q.shape
        scales = np.ascontiguousarray(checkpoint.floats(f"{name}.scales").T)
        if f"{name}.qzeros" in checkpoint or self.zero_point:
            zero_points = unpack_words(matrix(checkpoint, f"{name}.qzeros"))
        else:
            zero_points = np.full(scales.shape, MIDDLE, np.uint8)
        group = self.group_size or k
        for what, values in (("scales", scales), ("qzeros", zero_points)):
            if k % group or values.shape != (n, k // group):
                problem = f"{what} hold {list(values.shape[::-1])} values, qweight {[k, n]}, and group_size is {group}"
                raise UserError(f"{checkpoint.folder}: layer {name}: {problem}")
        block = block_size(k, group)
        scales, zero_points = (split_groups(values, k, group, block) for values in (scales, zero_points))
        return QuantizedLinear(name, q, scales, zero_points, block, BITS, read_bias(checkpoint, name))


def awq_format(settings: Settings) -> AwqFormat:
    """The format of a folder. settings: its quantization_config. Raises UserError if it is not GEMM with 4 bits."""
    # AutoAWQ writes the version in upper or lower case, GPTQModel the others; in transformers a missing one means gemm.
    for key in ("version", "checkpoint_format", "format"):
        version = settings.get(key) or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise UserError(f"{settings.path.parent} is AutoAWQ's {key} {str(version)[:80]!r}, and only GEMM is read")
    if settings.get("backend") == "llm-awq":
        raise settings.wrong("quantization_config's backend", "autoawq", "llm-awq")
    bits = settings.integer("bits", BITS)
    if bits != BITS:
        raise settings.wrong("quantization_config's bits", f"{BITS}", bits)
    zero_point = settings.flag("zero_point", True)
    if settings.get("group_size") == -1:
        return AwqFormat(0, zero_point)
    size = settings.integer("group_size", 128)
    if size % MIN_BLOCK:
        raise settings.wrong("group_size", f"-1 or a multiple of {MIN_BLOCK}", size)
    return AwqFormat(size, zero_point)


def unpack_words(words: np.ndarray) -> np.ndarray:
    """int32 [R, C] as uint8 [8 * C, R]: the nibbles in the order of columns, transposed."""
    words = np.ascontiguousarray(words.T).view(np.uint32)
    values = np.empty((len(words), len(COLUMNS), words.shape[1]), np.uint8)
    for nibble, column in enumerate(COLUMNS):
        values[:, column] = words >> (BITS * nibble) & 15
    return values.reshape(-1, words.shape[1])


def pack_words(values: np.ndarray) -> np.ndarray:
    """The inverse of unpack_words: uint8 [8 * C, R], each below 16, as int32 [R, C]."""
    columns = values.reshape(-1, len(COLUMNS), values.shape[1])
    words = np.zeros((len(columns), values.shape[1]), np.uint32)
    for nibble, column in enumerate(COLUMNS):
        words |= columns[:, column].astype(np.uint32) << (BITS * nibble)
    return np.ascontiguousarray(words.T).view(np.int32)
