# SPDX-License-Identifier: Apache-2.0
"""The output of every exporter: a folder with model.onnx, model.onnx.data, tokenizer.json and config.json."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sw.common.atomic import atomic_directory
from sw.common.status_line import Progress, StatusLine
from sw.common.text_files import WARNINGS
from sw.graph.decoder import write_decoder
from sw.model.source import DecoderSource

# This is part of the key of cached exports: increase it when the output of an exporter changes.
EXPORTER_VERSION = 5
QUIET_SECONDS = 2.0
"""A shorter export shows no progress."""


def write_folder(
    out: Path, source: DecoderSource, metadata: dict[str, str], lm_head: str, progress: Progress | None
) -> Path:
    """Writes directory `out` and returns the path of its model.onnx. After an error `out` is unchanged.

    metadata: properties of the ONNX model. lm_head: one of sw.model.lm_head.HEAD_MODES. progress: as for write_decoder.
    Raises UserError if weights and configuration do not match, and if the directory cannot be written.
    """
    with atomic_directory(out) as work:
        (work / "tokenizer.json").write_text(source.tokenizer_json, encoding="utf-8")
        (work / "config.json").write_text(json.dumps(_config_json(source), indent=2) + "\n")
        write_decoder(
            work,
            source.config,
            source.embedding,
            source.layers,
            source.final_norm,
            source.head,
            metadata,
            lm_head=lm_head,
            progress=progress,
        )
    return Path(out) / "model.onnx"


@contextmanager
def export_status() -> Iterator[Progress]:
    """Shows the progress of a long export on stderr."""
    start = time.monotonic()
    with StatusLine() as status:

        def show(done: int, total: int) -> None:
            if time.monotonic() - start > QUIET_SECONDS:
                status.count("exporting layer {done} of {total}", done, total)

        yield show


def _config_json(source: DecoderSource) -> dict[str, Any]:
    """Hugging Face's keys and the chat template, so that one file beside the graph has all its settings."""
    config = source.config
    scaling = {} if source.rope_scaling is None else {"rope_scaling": source.rope_scaling}
    return {
        "model_type": source.family,
        "name": source.name,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layer_count,
        "num_attention_heads": config.head_count,
        "num_key_value_heads": config.kv_head_count,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        **scaling,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": source.tied,
        "bos_token_id": source.bos_id,
        "eos_token_id": source.stop_ids,
        "bos_token": source.bos_token,
        "eos_token": source.eos_token,
        "chat_template": source.chat_template,
        **({WARNINGS: list(source.warnings)} if source.warnings else {}),
    }
