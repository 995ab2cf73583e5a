# SPDX-License-Identifier: Apache-2.0
"""AutoRound's settings (github.com/intel/auto-round), whose layers are packed as those of other formats.

`packing_format` says whose: see LAYOUTS, which follows the table in auto_round_extension/humming/qlinear_humming.py of
auto-round 0.16. `extra_config` has settings of some layers, by name or by pattern. Scales may be negative.
"""

import re
from collections.abc import Mapping
from typing import Any

from sw.checkpoints.autoawq import awq_format
from sw.checkpoints.packed.gptq import gptq_format
from sw.checkpoints.packed.layers import LayerFormat
from sw.checkpoints.settings import Settings

LAYOUTS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "gemm",
}
"""Values of packing_format -> the checkpoint_format that it means."""
FIXED: dict[str, tuple[object, ...]] = {
    "data_type": ("int", None),
    "rotation_config": (None, {}),
    "static_kv_dtype": (None,),
    "super_bits": (None,),
}
"""Settings that change what a layer computes or how it is packed, and the values that are read."""
FLOAT_BITS = 16
"""Weights and activations with this many bits or more are floats."""
SIZES = ("bits", "group_size")


def auto_round_format(settings: Settings) -> LayerFormat:
    """The format of a folder. settings: its quantization_config. Raises UserError for what is not read."""
    layout = settings.get("packing_format")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise settings.wrong("quantization_config's packing_format", " or ".join(LAYOUTS), layout)
    _check(settings, "quantization_config's ")
    sizes = {key: settings.get(key) for key in SIZES}
    extra = settings.part("extra_config").values
    others = {f"{re.escape(name)}$": own for name in extra if (own := _sizes(settings, name, extra[name], sizes))}
    if LAYOUTS[layout] != "gemm":
        return gptq_format(Settings(settings.path, {**sizes, "checkpoint_format": LAYOUTS[layout], "dynamic": others}))
    if others:
        raise settings.wrong("quantization_config's extra_config", "without layers of other sizes", extra)
    return awq_format(Settings(settings.path, {**sizes, "zero_point": not settings.flag("sym", True)}))


def _check(settings: Settings, where: str) -> None:
    for key, values in FIXED.items():
        if settings.get(key) not in values:
            raise settings.wrong(f"{where}{key}", "null" if values[0] is None else str(values[0]), settings.get(key))
    bits = settings.get("act_bits")
    if bits is not None and (not isinstance(bits, int) or bits < FLOAT_BITS):
        raise settings.wrong(f"{where}act_bits", "16 (only weights may be quantized)", bits)


def _sizes(settings: Settings, name: str, values: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of one layer; empty if it has those of the folder, or is float.

    Raises UserError for a pattern of names with other sizes: its rules are not those of any regular expression.
    """
    where = f"quantization_config's extra_config {name[:80]}"
    if not isinstance(values, Mapping):
        raise settings.wrong(where, "an object", values)
    own = Settings(settings.path, dict(values))
    bits = own.get("bits")
    if isinstance(bits, int) and bits >= FLOAT_BITS:
        return {}
    _check(own, f"{where}'s ")
    found = {key: own.get(key) for key in SIZES if own.get(key) not in (None, sizes[key])}
    if found and not re.fullmatch(r"[\w.]+", name):
        raise settings.wrong(where, "a layer's name if its sizes are others", values)
    return found
