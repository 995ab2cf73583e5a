# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding in config.json: its kinds of scaling, as transformers' modeling_rope_utils computes them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from sw.model.decoder import DecoderConfig

FULL = "full_attention"
"""The layer_types of layers without a window."""
LONGROPE = "longrope"
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotary_of(config: Settings, layer_type: str = FULL) -> tuple[str, Settings]:
    """The rotary embedding's kind (default, linear, llama3, longrope) and settings in layers of a type.

    transformers 5 calls them rope_parameters, which may have one object for each type. Raises UserError for others.
    """
    settings = config.part("rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling")
    if settings.get(layer_type) is not None:
        settings = settings.part(layer_type)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    fused = config.get("model_type") == "phi3"
    if fused and kind in ("su", "yarn"):
        kind = LONGROPE
    for part in () if fused else (settings, config):
        if part.number("partial_rotary_factor", 1.0) != 1:
            raise part.wrong("partial_rotary_factor", "1")
    if kind not in (kinds := ("default", LONGROPE) if fused else ("default", "linear", "llama3")):
        only = " and ".join(kinds[1:])
        raise UserError(f"{config.path}: rotary scaling {str(kind)[:80]!r} is not supported, only {only}")
    return kind, settings


def scaled(config: Settings, shape: DecoderConfig) -> DecoderConfig:
    """The decoder with the scaling of the rotary embedding in config.json. shape: without a scaling."""
    kind, settings = rotary_of(config)
    part = settings.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    size = int(shape.head_size * part)
    if not 0 < size <= shape.head_size:
        raise settings.wrong("partial_rotary_factor", "at most 1, and one element of a head at least", part)
    if part != 1:
        shape = replace(shape, rotary_size=size)
    if kind == "linear":
        factor = np.float32(settings.number("factor"))
        return replace(shape, rope_factors=np.full(shape.rotated // 2, factor, np.float32))
    if kind == "llama3":
        return replace(shape, rope_factors=_llama3(settings, shape))
    return _longrope(config, settings, shape) if kind == LONGROPE else shape


def rope_scaling(config: Settings) -> dict[str, Any] | None:
    """The scaling of the rotary embedding in config.json, without other settings; None if there is none."""
    kind, settings = rotary_of(config)
    if kind == "default":
        return None
    if kind == LONGROPE:
        return dict(settings.values)
    keys = ("factor",) if kind == "linear" else LLAMA3_KEYS
    return {"rope_type": kind} | {key: settings.number(key) for key in keys}


def _longrope(config: Settings, settings: Settings, shape: DecoderConfig) -> DecoderConfig:
    """The factors for texts up to the original context, which is also the limit here.

    transformers takes other factors, and so another rotation of all tokens, as soon as a text is longer.
    """
    key = "original_max_position_embeddings"
    original = settings.integer(key, config.integer(key, 4096))
    longest = config.integer("max_position_embeddings")
    factors = settings.get("short_factor")
    if not isinstance(factors, list) or not all(type(value) in (int, float) for value in factors):
        raise settings.wrong("short_factor", "a list of numbers")
    scale = longrope_scale(settings.number("factor", longest / original), original)
    return replace(
        shape,
        context_length=min(shape.context_length, original),
        rope_factors=np.array(factors, np.float32),
        rotary_scale=settings.number("attention_factor", scale),
    )


def longrope_scale(factor: float, original: int) -> float:
    """The factor of cosines and sines for a context that is `factor` times the original one."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def standard_rope_scaling(shape: DecoderConfig) -> dict[str, Any] | None:
    """The linear or Llama 3.1 scaling that gives the shape's factors; None if there are no factors or other ones."""
    if shape.rope_factors is None or shape.rotary_scale != 1 or shape.rotary_size:
        return None
    if (shape.rope_factors == shape.rope_factors[0]).all():
        return {"rope_type": "linear", "factor": float(shape.rope_factors[0])}
    values = (float(shape.rope_factors.max()), 1.0, 4.0, 8192.0)
    if not np.allclose(llama3_factors(shape.rotary_frequencies(), *values), shape.rope_factors, rtol=1e-5):
        return None
    return {"rope_type": "llama3"} | dict(zip(LLAMA3_KEYS, values, strict=True))


def _llama3(settings: Settings, shape: DecoderConfig) -> np.ndarray:
    factor, low, high, original = (settings.number(key) for key in LLAMA3_KEYS)
    if high <= low:
        raise settings.wrong("high_freq_factor", f"above low_freq_factor, {low:g},")
    return llama3_factors(shape.rotary_frequencies(), factor, low, high, original)


def llama3_factors(frequencies: np.ndarray, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """The divisors of the rotary frequencies in Llama 3.1, float32 (transformers' modeling_rope_utils).

    A frequency that turns at least `high` times within the `original` context is not changed. A frequency that turns at
    most `low` times is divided by `factor`. Between them the result is a linear mix of both.
    """
    turns = original * frequencies / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / factor)).astype(np.float32)
