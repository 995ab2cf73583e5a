# SPDX-License-Identifier: Apache-2.0
"""Linear layers of an AutoAWQ GEMM checkpoint, without any loss.

Format (github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py), tensors of one layer, G = group_size:
    qweight int32 [K, N / 8], qzeros int32 [K / G, N / 8], scales float16 [K / G, N], bias float16 [N] or absent
    w[n, k] = (q[k, n] - z[k // G, n]) * s[k // G, n]
Nibble i (from the low bits) of word c is output column 8c + COLUMNS[i].
"""

from dataclasses import dataclass

import numpy as np

from sw.checkpoints.huggingface import Settings, read_settings
from sw.checkpoints.safetensors_file import Checkpoint
from sw.common.errors import UserError
from sw.model.linear import FloatLinear, QuantizedLinear
from sw.model.lm_head import Linear

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4
MIDDLE = 1 << (BITS - 1)
MAX_SPLIT = 128
OLDER_KEYS = {"w_bit": "bits", "q_group_size": "group_size", "zero_point": "zero_point", "version": "version"}
"""Keys of AutoAWQ's older quant_config.json -> those of config.json."""


@dataclass(frozen=True)
class AwqFormat:
    """Settings of quantization_config: group_size, or 0 for all of K, and whether layers have zero points."""

    group_size: int
    zero_point: bool


def awq_format(config: Settings) -> AwqFormat:
    """The format of a folder. Raises UserError if it is not AutoAWQ GEMM with 4 bits. config: its config.json."""
    settings = quantization(config)
    folder = config.path.parent
    if settings is None:
        hint = "python -m sw.quantize quantizes float checkpoints"
        raise UserError(f"{folder} is not quantized: its config.json has no quantization_config ({hint})")
    method = settings.get("quant_method")
    if not isinstance(method, str) or method.lower() != "awq":
        hint = "of quantized checkpoints only AutoAWQ GEMM is read; python -m sw.quantize quantizes the float model"
        raise UserError(f"{folder} is quantized by {str(method)[:80]!r}, which is not supported ({hint})")
    # AutoAWQ writes the version in upper or lower case; in transformers a missing version means gemm.
    version = settings.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UserError(f"{folder} is AutoAWQ's version {str(version)[:80]!r}, and only GEMM is read")
    bits = settings.integer("bits", BITS)
    if bits != BITS:
        raise settings.wrong("quantization_config's bits", f"{BITS}", bits)
    zero_point = settings.flag("zero_point", True)
    if settings.get("group_size") == -1:
        return AwqFormat(0, zero_point)
    size = settings.integer("group_size", 128)
    if size < 16 or size & (size - 1):
        raise settings.wrong("group_size", "-1 or a power of two from 16 (ONNX MatMulNBits has no others)", size)
    return AwqFormat(size, zero_point)


def quantization(config: Settings) -> Settings | None:
    """A folder's settings of quantized layers, with the key names of config.json's quantization_config.

    config: the folder's config.json. Older programs write a separate file: AutoAWQ quant_config.json, AutoGPTQ
    quantize_config.json. None if there are no settings. Raises UserError if such a file contradicts config.json.
    """
    for key in ("compression_config", "quantization"):
        if config.get(key) is not None:
            raise UserError(f"{config.path}: {key} is not supported, only AutoAWQ's quantization_config")
    settings = config.part("quantization_config") if config.get("quantization_config") is not None else None
    path = config.path.with_name("quant_config.json")
    older = read_settings(path)
    if older.values:
        values = {name: older.get(key) for key, name in OLDER_KEYS.items() if older.get(key) is not None}
        if settings is None:
            return Settings(path, {"quant_method": "awq", **values})
        for name, value in values.items():
            found = settings.get(name)
            if found is not None and str(found).lower() != str(value).lower():
                problem = f"{name} is {str(found)[:40]} in {config.path.name} and {str(value)[:40]} in {path.name}"
                raise UserError(f"{config.path.parent}: {problem}: remove the file that is wrong")
    if settings is None and read_settings(config.path.with_name("quantize_config.json")).values:
        return Settings(config.path.with_name("quantize_config.json"), {"quant_method": "gptq"})
    return settings


def read_linear(checkpoint: Checkpoint, name: str, form: AwqFormat | None) -> Linear:
    """The layer of the tensors `name`.qweight and so on, or of `name`.weight if it is not quantized.

    form: None for a checkpoint without quantized layers. A single group over all of K becomes several groups with the
    same scale and zero point, because ONNX's group sizes are powers of two. Raises UserError for missing tensors and
    for shapes that do not match.
    """
    bias = checkpoint.floats(f"{name}.bias") if f"{name}.bias" in checkpoint else None
    if form is None or (f"{name}.qweight" not in checkpoint and f"{name}.weight" in checkpoint):
        weight = checkpoint.floats(f"{name}.weight")
        if weight.ndim != 2 or (bias is not None and bias.shape != (len(weight),)):
            raise UserError(f"{checkpoint.folder}: the shapes of {name}.weight and bias do not fit")
        return FloatLinear(name, weight, bias)
    q = unpack_words(_words(checkpoint, f"{name}.qweight"))
    n, k = q.shape
    scales = np.ascontiguousarray(checkpoint.floats(f"{name}.scales").T)
    if f"{name}.qzeros" in checkpoint or form.zero_point:
        zero_points = unpack_words(_words(checkpoint, f"{name}.qzeros"))
    else:
        zero_points = np.full(scales.shape, MIDDLE, np.uint8)
    group = form.group_size or k
    for what, values in (("scales", scales), ("qzeros", zero_points)):
        if k % group or values.shape != (n, k // group):
            problem = f"{what} hold {list(values.shape[::-1])} values, qweight {[k, n]}, and group_size is {group}"
            raise UserError(f"{checkpoint.folder}: layer {name}: {problem}")
    if not form.group_size:
        group = max(16, min(k & -k, MAX_SPLIT))
        scales, zero_points = (np.repeat(values, -(-k // group), axis=1) for values in (scales, zero_points))
    return QuantizedLinear(name, q, scales, zero_points, group, BITS, bias)


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


def _words(checkpoint: Checkpoint, name: str) -> np.ndarray:
    words = checkpoint.integers(name)
    if words.ndim != 2 or 0 in words.shape:
        raise UserError(f"{checkpoint.folder}: tensor {name} is {list(words.shape)}, not a matrix")
    return words
