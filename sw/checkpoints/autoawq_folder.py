# SPDX-License-Identifier: Apache-2.0
"""The files of an AutoAWQ folder besides its tensors: config.json as transformers reads it, and the text files."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sw.checkpoints.autoawq import BITS
from sw.checkpoints.integer_tables import KEY
from sw.checkpoints.settings import Settings
from sw.common.text_files import read_json
from sw.model.families import FAMILIES

TEXT_KEYS = ("bos_token", "eos_token", "chat_template")
"""Keys that our exporters write to config.json, and Hugging Face to tokenizer_config.json."""
COPIED = ("tokenizer.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_config(
    folder: Path,
    settings: Settings,
    *,
    group_size: int,
    tied: bool,
    biased: bool,
    floats: Sequence[str],
    tables: Mapping[str, Any],
) -> None:
    """Writes config.json.

    settings: config.json of the ONNX model. tied: whether the head is the embedding. biased: whether q, k and v have
    biases. floats: modules that are not quantized. tables: the entry of sw.checkpoints.integer_tables for each integer
    table.
    """
    family = str(settings.get("model_type"))
    values = {key: value for key, value in settings.values.items() if key not in ("name", KEY, *TEXT_KEYS)}
    values |= {
        "architectures": [FAMILIES[family].class_name],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": list(floats) or None,
        },
    }
    if family == "llama":
        values["attention_bias"] = biased
    if tables:
        values[KEY] = dict(tables)
    _write_json(folder / "config.json", values)


def write_text_files(source: Path, folder: Path, settings: Settings) -> None:
    """Copies the text files beside the model. Values from our config.json go to the files that Hugging Face uses."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokens = read_json(source / "tokenizer_config.json") or {"tokenizer_class": "PreTrainedTokenizerFast"}
    has_template = (source / "chat_template.jinja").is_file()
    for key in TEXT_KEYS:
        if tokens.get(key) is None and settings.get(key) is not None and not (has_template and key == "chat_template"):
            tokens[key] = settings.get(key)
    _write_json(folder / "tokenizer_config.json", tokens)
    if not (folder / "generation_config.json").exists():
        values = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id")}
        _write_json(folder / "generation_config.json", values)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
