# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a Hugging Face model folder: config.json as a decoder's shape, and the settings of its text.

    config.json              shapes, rotary embedding, eos_token_id, bos_token_id
    generation_config.json   eos_token_id
    tokenizer_config.json    bos_token, eos_token, chat_template
    chat_template.jinja      the chat template, as current versions of transformers write it
    tokenizer.json           the tokenizer
Only the first and the last are required.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sw.common.errors import UserError
from sw.common.text_files import read_json, read_text
from sw.model.decoder import MAX_POSITIONS, DecoderConfig
from sw.text.folder import apply_settings, read_tokenizer

FULL = "full_attention"
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": (None, "silu"),
    "use_sliding_window": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
"""Keys of config.json that transformers uses for these families, and the supported values."""
HARMLESS = frozenset(
    {
        "attention_dropout",  # for training, like the next two
        "initializer_range",
        "pretraining_tp",
        "torch_dtype",  # each tensor has its own float format
        "dtype",
        "use_cache",
        "pad_token_id",
        "max_window_layers",  # of sliding windows, which are refused
        "sliding_window",
        "transformers_version",
        "auto_map",  # the classes are checked by name
        "_name_or_path",
    }
)
"""Keys of config.json that cannot change a result of these families. transformers does not read any other key."""
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


class Settings:
    """A JSON object whose values are read by key and type; null means absent.

    Raises UserError, with the file, the key and the value, for values of another type.
    """

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self._values = values

    @property
    def values(self) -> dict[str, Any]:
        """The whole object."""
        return self._values

    def get(self, key: str) -> Any:
        """The unchecked value, or None."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a whole number from 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def part(self, key: str) -> "Settings":
        """An object inside; empty if it is absent."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Settings(self.path, value)

    def wrong(self, key: str, expected: str, found: Any = ...) -> UserError:
        """The error about a value, by default that of `key`."""
        found = self.get(key) if found is ... else found
        return UserError(f"{self.path}: {key} is {expected}, not {json.dumps(found)[:80]}")

    def _value(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        return default if value is None else value


def read_settings(path: Path, required: bool = False) -> Settings:
    """A JSON file; empty if it is missing and not required. Raises UserError if it is damaged."""
    return Settings(path, read_json(path, required))


def decoder_config(config: Settings) -> DecoderConfig:
    """The shape in config.json. Raises UserError for families and variants that the graph does not express."""

    def refuse(problem: str) -> UserError:
        return UserError(f"{config.path}: {problem}")

    family, classes = config.get("model_type"), config.get("architectures")
    if not isinstance(family, str) or family not in FAMILIES:
        raise refuse(f"model_type {str(family)[:80]!r} is not supported ({', '.join(FAMILIES)} are)")
    if classes is not None and classes != [FAMILIES[family]]:
        raise refuse(f"architectures {str(classes)[:80]} is not supported for {family}, only {FAMILIES[family]}")
    kinds = config.get("layer_types") or []
    if config.flag("use_sliding_window", False) or not isinstance(kinds, list) or set(map(str, kinds)) - {FULL}:
        raise refuse("attention with a sliding window is not supported")
    for key, values in FIXED.items():
        if config.get(key) not in values:
            raise refuse(f"{key} {str(config.get(key))[:80]!r} is not supported, only {values[-1]}")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kind, rotary = _rotary(config)
    shape = DecoderConfig(
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        layer_count=config.integer("num_hidden_layers"),
        head_count=heads,
        kv_head_count=config.integer("num_key_value_heads", heads),
        head_size=config.integer("head_dim", max(hidden // heads, 1)),
        vocab_size=config.integer("vocab_size"),
        context_length=min(config.integer("max_position_embeddings"), MAX_POSITIONS),
        rope_theta=rotary.number("rope_theta", config.number("rope_theta", 10000.0)),
        norm_epsilon=config.number("rms_norm_eps"),
    )
    if kind == "default":
        return shape
    if kind == "linear":
        factor = np.float32(rotary.number("factor"))
        return replace(shape, rope_factors=np.full(shape.head_size // 2, factor, np.float32))
    return replace(shape, rope_factors=_factors(rotary, shape))


def _rotary(config: Settings) -> tuple[str, Settings]:
    """The rotary embedding's kind (default, linear, llama3) and settings; transformers 5 calls them rope_parameters."""
    settings = config.part("rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling")
    for part in (settings, config):
        if part.number("partial_rotary_factor", 1.0) != 1:
            raise part.wrong("partial_rotary_factor", "1")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{config.path}: rotary scaling {str(kind)[:80]!r} is not supported, only linear and llama3")
    return kind, settings


def rope_scaling(config: Settings) -> dict[str, Any] | None:
    """The scaling of the rotary embedding in config.json, without other settings; None if there is none."""
    kind, settings = _rotary(config)
    if kind == "default":
        return None
    keys = ("factor",) if kind == "linear" else LLAMA3_KEYS
    return {"rope_type": kind} | {key: settings.number(key) for key in keys}


def standard_rope_scaling(shape: DecoderConfig) -> dict[str, Any] | None:
    """The linear or Llama 3.1 scaling that gives the shape's factors; None if there are no factors or other ones."""
    if shape.rope_factors is None:
        return None
    if (shape.rope_factors == shape.rope_factors[0]).all():
        return {"rope_type": "linear", "factor": float(shape.rope_factors[0])}
    values = (float(shape.rope_factors.max()), 1.0, 4.0, 8192.0)
    if not np.allclose(llama3_factors(shape.rotary_frequencies(), *values), shape.rope_factors, rtol=1e-5):
        return None
    return {"rope_type": "llama3"} | dict(zip(LLAMA3_KEYS, values, strict=True))


def _factors(settings: Settings, shape: DecoderConfig) -> np.ndarray:
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


@dataclass(frozen=True)
class TextSettings:
    """See sw.model.source.DecoderSource, whose members these are."""

    tokenizer_json: str
    bos_id: int | None
    stop_ids: list[int]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


def text_settings(folder: Path, config: Settings) -> TextSettings:
    """The folder's text settings. Raises UserError if there is no tokenizer.json or a file is damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json, and a model's text needs one")
    tokenizer = read_tokenizer(path)
    tokens = read_settings(folder / "tokenizer_config.json")
    changed = apply_settings(tokenizer, tokens.values, tokens.path)
    bos, eos = _token_text(tokens, "bos_token"), _token_text(tokens, "eos_token")
    stop_ids = [
        *_token_ids(config, "eos_token_id"),
        *_token_ids(read_settings(folder / "generation_config.json"), "eos_token_id"),
        *([] if eos is None else [tokenizer.token_to_id(eos)]),
    ]
    stop_ids = list(dict.fromkeys(token for token in stop_ids if token is not None))
    bos_ids = _token_ids(config, "bos_token_id")
    bos_id = bos_ids[0] if bos_ids else None if bos is None else tokenizer.token_to_id(bos)
    return TextSettings(
        tokenizer_json=tokenizer.to_str(pretty=True) if changed else read_text(path),
        bos_id=bos_id,
        stop_ids=stop_ids,
        bos_token=bos if bos is not None or bos_id is None else tokenizer.id_to_token(bos_id),
        eos_token=eos if eos is not None or not stop_ids else tokenizer.id_to_token(stop_ids[0]),
        chat_template=_chat_template(folder, tokens),
    )


def _token_ids(settings: Settings, key: str) -> list[int]:
    value = settings.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    # Above 32 bits the tokenizers package raises an OverflowError.
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 32 for token in ids):
        raise settings.wrong(key, "a token id or a list of them")
    return ids


def _token_text(settings: Settings, key: str) -> str | None:
    """A special token's text, from a text or from an object with content."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise settings.wrong(key, "a token's text")
    return value


def _chat_template(folder: Path, tokens: Settings) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    value = tokens.get("chat_template")
    if isinstance(value, list):
        # There are several named templates; transformers takes the one named default.
        named = {str(item.get("name")): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default", next(iter(named.values()), None) if len(named) == 1 else None)
        if value is None:
            raise tokens.wrong("chat_template", "text, or a list with a template named default")
    if value is not None and not isinstance(value, str):
        raise tokens.wrong("chat_template", "text")
    return value
