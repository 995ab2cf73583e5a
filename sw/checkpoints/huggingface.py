# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a Hugging Face model folder: config.json as a decoder's shape, and the settings of its text.

    config.json              shapes, rotary embedding, eos_token_id, bos_token_id
    generation_config.json   eos_token_id
    tokenizer_config.json    bos_token, eos_token, chat_template
    chat_template.jinja      the chat template, as current versions of transformers write it
    tokenizer.json           the tokenizer
Only the first and the last are required.
"""

from pathlib import Path

from sw.checkpoints.families import check_fixed, with_family
from sw.checkpoints.rotary import rotary_of, scaled
from sw.checkpoints.settings import Settings, read_settings
from sw.common.errors import UserError
from sw.common.text_files import read_text
from sw.model.decoder import MAX_POSITIONS, DecoderConfig
from sw.model.families import FAMILIES, Family
from sw.model.source import TextSettings
from sw.text.folder import apply_settings, read_tokenizer


def decoder_config(config: Settings) -> DecoderConfig:
    """The shape in config.json. Raises UserError for families and variants that the graph does not express."""
    name, family = family_of(config)
    check_fixed(config, name)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    _, rotary = rotary_of(config)
    shape = DecoderConfig(
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        layer_count=config.integer("num_hidden_layers"),
        head_count=heads,
        kv_head_count=config.integer("num_key_value_heads", heads),
        head_size=config.integer("head_dim", family.head_size or max(hidden // heads, 1)),
        vocab_size=config.integer("vocab_size"),
        context_length=min(config.integer("max_position_embeddings"), MAX_POSITIONS),
        rope_theta=rotary.number("rope_theta", config.number("rope_theta", family.theta)),
        norm_epsilon=config.number("rms_norm_eps"),
    )
    return with_family(config, scaled(config, shape), name)


def family_of(config: Settings) -> tuple[str, Family]:
    """The model_type in config.json and its family. Raises UserError if it is not supported."""
    name, classes = config.get("model_type"), config.get("architectures")
    if not isinstance(name, str) or name not in FAMILIES:
        problem = f"model_type {str(name)[:80]!r} is not supported ({', '.join(FAMILIES)} are)"
        raise UserError(f"{config.path}: {problem}")
    expected = FAMILIES[name].class_name
    if classes is not None and classes != [expected]:
        problem = f"architectures {str(classes)[:80]} is not supported for {name}, only {expected}"
        raise UserError(f"{config.path}: {problem}")
    return name, FAMILIES[name]


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
