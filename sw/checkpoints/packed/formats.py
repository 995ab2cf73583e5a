# SPDX-License-Identifier: Apache-2.0
"""The format of a folder's quantized layers, by the settings beside its tensors.

config.json             quantization_config, or compression_config of older compressed-tensors
quant_config.json       of older AutoAWQ
quantize_config.json    of AutoGPTQ and GPTQModel
"""

from collections.abc import Callable
from pathlib import Path

from sw.checkpoints.autoawq import awq_format
from sw.checkpoints.packed.auto_round import auto_round_format
from sw.checkpoints.packed.compressed_tensors import compressed_format
from sw.checkpoints.packed.gptq import gptq_format
from sw.checkpoints.packed.layers import LayerFormat
from sw.checkpoints.settings import Settings, read_settings
from sw.common.errors import UserError

KEYS = ("quantization_config", "compression_config")
AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size", "zero_point": "zero_point", "version": "version"}
"""Keys of AutoAWQ's older quant_config.json -> those of config.json."""
GPTQ_KEYS = ("bits", "group_size", "checkpoint_format")
"""Keys of quantize_config.json that must not contradict config.json."""
READERS: dict[str, Callable[[Settings], LayerFormat]] = {
    "awq": awq_format,
    "gptq": gptq_format,
    "compressed-tensors": compressed_format,
    "auto-round": auto_round_format,
    "intel/auto-round": auto_round_format,
}
"""quant_method -> the reader of its settings."""
HINT = "python -m sw.quantize quantizes the float model"
REFUSED = {
    "bitsandbytes": "4-bit weights (NF4, FP4) are indices into a table of values, which the accelerator does not have,"
    " and 8-bit layers have float columns",
    "fp8": "its weights are 8-bit floats, and the accelerator has integers",
    "fbgemm_fp8": "its weights are 8-bit floats, and the accelerator has integers",
}
"""quant_method -> why it is not read."""


def layer_format(config: Settings) -> LayerFormat:
    """The format of a folder's quantized layers. config: its config.json.

    Raises UserError for a folder without quantized layers, and for a format or settings that are not read.
    """
    settings, folder = quantization(config), config.path.parent
    if settings is None:
        hint = "python -m sw.quantize quantizes float checkpoints"
        raise UserError(f"{folder} is not quantized: its config.json has no quantization_config ({hint})")
    method = settings.get("quant_method")
    name = method.lower() if isinstance(method, str) else ""
    if name in READERS:
        return READERS[name](settings)
    why = REFUSED.get(name, f"{', '.join(READERS)} are read")
    raise UserError(f"{folder} is quantized by {str(method)[:80]!r}, which is not supported: {why} ({HINT})")


def quantization(config: Settings) -> Settings | None:
    """A folder's settings of quantized layers, with the key names of config.json's quantization_config.

    config: the folder's config.json. None if there are no settings. Raises UserError if another file contradicts
    config.json.
    """
    if config.get("quantization") is not None:
        raise UserError(f"{config.path}: quantization, which MLX writes, is not supported, only quantization_config")
    settings = next((config.part(key) for key in KEYS if config.get(key) is not None), None)
    older = read_settings(config.path.with_name("quant_config.json"))
    if older.values:
        values = {name: older.get(key) for key, name in AWQ_KEYS.items()}
        settings = _checked(config.path, settings, older.path, values, "awq")
    older = read_settings(config.path.with_name("quantize_config.json"))
    if older.values and settings is None:
        return Settings(older.path, {"quant_method": "gptq", **older.values})
    if older.values and settings is not None and settings.get("quant_method") == "gptq":
        return _checked(config.path, settings, older.path, {key: older.get(key) for key in GPTQ_KEYS}, "gptq")
    return settings


def _checked(config: Path, settings: Settings | None, path: Path, values: dict[str, object], method: str) -> Settings:
    """Settings of config.json, or if it has none the values of the separate file at `path`."""
    values = {key: value for key, value in values.items() if value is not None}
    if settings is None:
        return Settings(path, {"quant_method": method, **values})
    for name, value in values.items():
        found = settings.get(name)
        if found is not None and str(found).lower() != str(value).lower():
            problem = f"{name} is {str(found)[:40]} in {config.name} and {str(value)[:40]} in {path.name}"
            raise UserError(f"{config.parent}: {problem}: remove the file that is wrong")
    return settings
