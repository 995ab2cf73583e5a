# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file's metadata and tensors mean in the architectures besides llama and qwen2, as in llama.cpp.

One thing differs: llama.cpp ignores the window of Phi-3, because old files have a wrong one, and warns that results may
be worse; here it is used, as in transformers.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.rotary import longrope_scale
from sw.common.errors import UserError
from sw.model.decoder import GELU_TANH, DecoderConfig, scale_residual
from sw.model.families import ARCHITECTURES

NO_ROPE_STEP = 4
"""Every fourth layer of SmolLM3 has no rotation; no key says so."""
GEMMA_PATTERN = 6
GEMMA_27B_LAYERS = 62
"""Gemma 3 27B scales its scores by hidden_size / heads, not by the size of a head; no key says so."""
LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = {"input_norm": "attn_norm", "post_attention_norm": "ffn_norm"}
NORMS_OF = {
    "qwen3": {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"},
    "qwen3moe": {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"},
    "gemma3": {
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
        "attention_out_norm": "post_attention_norm",
        "mlp_out_norm": "post_ffw_norm",
    },
}
"""Architecture -> its norms besides NORMS: name in DecoderLayer -> the tensor's name in a block."""
FUSED = {("q_proj", "k_proj", "v_proj"): "attn_qkv", ("gate_proj", "up_proj"): "ffn_up"}
"""Layers that are rows of one layer, in this order, in Phi-3 -> the tensor's name in a block."""


def with_architecture(model: GgufFile, shape: DecoderConfig) -> DecoderConfig:
    """The decoder with what its architecture's keys say. shape: what all architectures have.

    Raises UserError for values that are not supported.
    """
    return SPECIAL.get(model.meta("general.architecture"), lambda model, shape: shape)(model, shape)


def logits_divisor(model: GgufFile) -> float:
    """What the logits are divided by."""
    return _factor(model, "granite.logit_scale") or 1.0


def norm_tensors(architecture: str) -> dict[str, str]:
    """The norms of a block: name in DecoderLayer -> name of the tensor."""
    return NORMS | NORMS_OF.get(architecture, {})


def layer_tensors(architecture: str) -> tuple[str, ...]:
    """The names of a block's linear layers."""
    return ("attn_qkv", "attn_output", "ffn_up", "ffn_down") if architecture == "phi3" else LAYERS


def _factor(model: GgufFile, key: str) -> float:
    """A factor that is not negative; 0, as in llama.cpp, if there is none."""
    value = model.number(key, 0.0)
    if not 0 <= value < np.inf:
        raise UserError(f"{model.path}: metadata {key} is a positive number, not {value:g}")
    return value


def _smollm3(model: GgufFile, shape: DecoderConfig) -> DecoderConfig:
    return replace(shape, unrotated=frozenset(range(NO_ROPE_STEP - 1, shape.layer_count, NO_ROPE_STEP)))


def _granite(model: GgufFile, shape: DecoderConfig) -> DecoderConfig:
    shape = replace(
        shape,
        attention_scale=_factor(model, "granite.attention.scale") or None,
        embedding_scale=_factor(model, "granite.embedding_scale") or 1.0,
    )
    return scale_residual(shape, _factor(model, "granite.residual_scale") or 1.0)


def _phi3(model: GgufFile, shape: DecoderConfig) -> DecoderConfig:
    """LongRoPE's factors for texts up to the original context, which is also the limit here."""
    window = model.integer("phi3.attention.sliding_window", 0)
    if window:
        shape = replace(shape, windows=(window,) * shape.layer_count)
    if "rope_factors_short.weight" not in model:
        return shape
    longest = model.integer("phi3.context_length")
    original = model.integer("phi3.rope.scaling.original_context_length", longest)
    if original < 2:
        raise UserError(f"{model.path}: metadata phi3.rope.scaling.original_context_length is {original}, not above 1")
    scale = model.number("phi3.rope.scaling.attn_factor", longrope_scale(longest / original, original))
    return replace(
        shape,
        context_length=min(shape.context_length, original),
        rope_factors=model.float_tensor("rope_factors_short.weight"),
        rotary_scale=scale,
    )


def _gemma3(model: GgufFile, shape: DecoderConfig) -> DecoderConfig:
    window = model.integer("gemma3.attention.sliding_window", 0)
    pattern = model.meta("gemma3.attention.sliding_window_pattern", GEMMA_PATTERN)
    if isinstance(pattern, list):
        slides = [bool(item) for item in pattern]
    else:
        period = model.integer("gemma3.attention.sliding_window_pattern", GEMMA_PATTERN) or 1
        slides = [(index + 1) % period != 0 for index in range(shape.layer_count)]
    if len(slides) < shape.layer_count:
        problem = f"has {len(slides)} values, and the model {shape.layer_count} layers"
        raise UserError(f"{model.path}: metadata gemma3.attention.sliding_window_pattern {problem}")
    size = shape.head_size
    if shape.layer_count == GEMMA_27B_LAYERS:
        size = shape.hidden_size // shape.head_count
    return replace(
        shape,
        windows=tuple(window if slides[index] else None for index in range(shape.layer_count)) if window else (),
        local_rope_theta=model.number("gemma3.rope.freq_base_swa", 10000.0),
        attention_scale=size**-0.5,
        embedding_scale=shape.hidden_size**0.5,
        activation=GELU_TANH,
    )


SPECIAL: dict[str, Callable[[GgufFile, DecoderConfig], DecoderConfig]] = {
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
    "gemma3": _gemma3,
}
"""Architecture -> what its own keys change."""
assert SPECIAL.keys() <= set(ARCHITECTURES)
