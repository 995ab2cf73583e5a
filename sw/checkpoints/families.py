# SPDX-License-Identifier: Apache-2.0
"""What config.json of each family says besides the shape: windows, layers without a rotation, multipliers."""

from collections.abc import Callable
from dataclasses import replace

from sw.checkpoints.rotary import FULL, rotary_of
from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from sw.model.decoder import GELU_TANH, DecoderConfig, scale_residual
from sw.model.experts import Routing
from sw.model.families import FAMILIES

SLIDING = "sliding_attention"
FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": (None, "silu"),
    "use_sliding_window": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
"""Keys of config.json that transformers uses for these families, and the supported values."""
FIXED_OF: dict[str, dict[str, tuple[object, ...]]] = {
    "gemma3_text": {
        # transformers reads hidden_activation.
        "hidden_act": (None, GELU_TANH),
        "hidden_activation": (None, GELU_TANH),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False),
    },
}
"""The same for one family, whose values replace those of FIXED."""
HARMLESS = frozenset(
    {
        "attention_dropout",  # for training, like the next four
        "embd_pdrop",
        "resid_pdrop",
        "initializer_range",
        "pretraining_tp",
        "torch_dtype",  # each tensor has its own float format
        "dtype",
        "use_cache",
        "pad_token_id",
        "max_window_layers",  # of sliding windows in Qwen, which are refused
        "sliding_window",  # of families that are not in WINDOWED, where use_sliding_window is false
        "transformers_version",
        "output_router_logits",  # for training, like the next two
        "router_aux_loss_coef",
        "router_jitter_noise",
        "auto_map",  # the classes are checked by name
        "_name_or_path",
    }
)
"""Keys of config.json that cannot change a result of these families. transformers does not read any other key."""
WINDOWED = {"mistral": 4096, "ministral": 4096, "phi3": None, "gemma3_text": 4096, "mixtral": None}
"""Family with sliding windows -> transformers' window if config.json has none. null means no window."""
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
GEMMA_PATTERN = 6


def check_fixed(config: Settings, family: str) -> None:
    """Raises UserError for a value of config.json that would change a result and is not supported."""
    for key, values in (FIXED | FIXED_OF.get(family, {})).items():
        if config.get(key) not in values:
            raise UserError(f"{config.path}: {key} {str(config.get(key))[:80]!r} is not supported, only {values[-1]}")


def with_family(config: Settings, shape: DecoderConfig, family: str) -> DecoderConfig:
    """The decoder with what its family's keys say. shape: what all families have, with the rotary base of the family.

    Raises UserError for values that are not supported.
    """
    shape = replace(shape, windows=_windows(config, family, shape.layer_count))
    return SPECIAL.get(family, lambda config, shape: shape)(config, shape)


def logits_divisor(config: Settings, family: str) -> float:
    """What the logits are divided by."""
    return config.number("logits_scaling", 1.0) if family == "granite" else 1.0


def _windows(config: Settings, family: str, count: int) -> tuple[int | None, ...]:
    """The window of each layer; () if there are none."""
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) - {FULL, SLIDING}):
        raise config.wrong("layer_types", f"a list of {FULL} and {SLIDING}")
    window = None
    if family in WINDOWED and config.values.get("sliding_window", WINDOWED[family]) is not None:
        window = config.integer("sliding_window", WINDOWED[family])
    if family == "gemma3_text" and kinds is None:
        pattern = config.integer("sliding_window_pattern", GEMMA_PATTERN)
        kinds = [FULL if (index + 1) % pattern == 0 else SLIDING for index in range(count)]
    # transformers' Mistral and Phi-3 do not read layer_types: a window is that of all layers.
    every = [FULL if window is None else SLIDING] * count
    kinds = every if kinds is None else [str(kind) for kind in kinds]
    if family not in ("ministral", "gemma3_text") and kinds[:count] != every:
        if family not in WINDOWED:
            raise UserError(f"{config.path}: attention with a sliding window is not supported in {family}")
        raise config.wrong("layer_types", f"{every[0]} for all {count} layers, as sliding_window says,")
    if len(kinds) < count:
        raise config.wrong("layer_types", f"a list for {count} layers")
    if SLIDING in kinds and window is None:
        raise config.wrong("sliding_window", "a whole number from 1, because layer_types has sliding_attention,")
    return tuple(window if kind == SLIDING else None for kind in kinds[:count]) if SLIDING in kinds[:count] else ()


def _smollm3(config: Settings, shape: DecoderConfig) -> DecoderConfig:
    layers = config.get("no_rope_layers")
    if layers is None:
        interval = config.integer("no_rope_layer_interval", 4)
        layers = [int((index + 1) % interval != 0) for index in range(shape.layer_count)]
    if not isinstance(layers, list) or len(layers) < shape.layer_count or not set(layers) <= {0, 1}:
        raise config.wrong("no_rope_layers", f"a list of 0 and 1 for {shape.layer_count} layers")
    return replace(shape, unrotated=frozenset(index for index in range(shape.layer_count) if not layers[index]))


def _granite(config: Settings, shape: DecoderConfig) -> DecoderConfig:
    embedding, attention, residual, _ = (config.number(key, 1.0) for key in MULTIPLIERS)
    return scale_residual(replace(shape, attention_scale=attention, embedding_scale=embedding), residual)


def _gemma3(config: Settings, shape: DecoderConfig) -> DecoderConfig:
    local = config.number("rope_local_base_freq", 10000.0)
    if config.get("rope_parameters") is not None:
        _, settings = rotary_of(config, SLIDING)
        local = settings.number("rope_theta", local)
    return replace(
        shape,
        local_rope_theta=local,
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_scale=shape.hidden_size**0.5,
        activation=GELU_TANH,
    )


def _experts(config: Settings, size_key: str, counts: tuple[int, int]) -> Routing:
    """The sizes that all families with experts have. counts: experts and experts of a token if there is no key."""
    keys = [key for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    values = {config.integer(key) for key in keys} or {counts[0]}
    if len(values) > 1:
        raise config.wrong("num_experts", f"equal to num_local_experts {config.get('num_local_experts')}")
    count, used = values.pop(), config.integer("num_experts_per_tok", counts[1])
    if used > count:
        raise config.wrong("num_experts_per_tok", f"at most the number of experts {count}")
    return Routing(count, used, config.integer(size_key))


def _mixtral(config: Settings, shape: DecoderConfig) -> DecoderConfig:
    return replace(shape, routing=_experts(config, "intermediate_size", (8, 2)))


def _qwen3_moe(config: Settings, shape: DecoderConfig) -> DecoderConfig:
    listed, step = config.get("mlp_only_layers"), config.integer("decoder_sparse_step", 1)
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or not all(type(index) is int for index in listed):
        raise config.wrong("mlp_only_layers", "a list of indices of layers")
    dense = frozenset(index for index in range(shape.layer_count) if index in listed or (index + 1) % step)
    routing = _experts(config, "moe_intermediate_size", (128, 8))
    return replace(shape, routing=replace(routing, normalised=config.flag("norm_topk_prob", False), dense=dense))


SPECIAL: dict[str, Callable[[Settings, DecoderConfig], DecoderConfig]] = {
    "smollm3": _smollm3,
    "granite": _granite,
    "gemma3_text": _gemma3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
"""Family -> what its own keys change."""
assert SPECIAL.keys() | WINDOWED.keys() <= FAMILIES.keys()
