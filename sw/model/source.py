# SPDX-License-Identifier: Apache-2.0
"""A decoder with its weights and its tokenizer, as a checkpoint gives it and an exporter takes it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sw.model.decoder import DecoderConfig, DecoderLayer
from sw.model.lm_head import Table


@dataclass(frozen=True, eq=False)
class DecoderSource:
    """A decoder as an exporter found it; see write_decoder for the weights.

    family: llama or qwen2. tied: the head has the embedding's weights (`head` may still be given, in other numbers).
    bos_id, stop_ids: tokens that begin a text and that end an answer. bos_token, eos_token: what a chat template
    knows by these names. chat_template: its text. rope_scaling: Hugging Face's description of the rope_factors that
    config has, if there is one. warnings: what a user should know whenever the model is used, one line each.
    """

    name: str
    family: str
    config: DecoderConfig
    embedding: Table
    layers: Iterable[DecoderLayer]
    final_norm: np.ndarray
    head: Table | None
    tied: bool
    tokenizer_json: str
    bos_id: int | None
    stop_ids: list[int]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    rope_scaling: dict[str, Any] | None = None
    warnings: Sequence[str] = ()
