# SPDX-License-Identifier: Apache-2.0
"""A decoder with its weights and its tokenizer: checkpoint readers produce it, and exporters read it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sw.model.decoder import DecoderConfig, DecoderLayer
from sw.model.lm_head import Table


@dataclass(frozen=True, eq=False, kw_only=True)
class TextSettings:
    """A model's tokenizer, special tokens and chat template.

    tokenizer_json: the tokenizer, as the package tokenizers writes it. bos_id, stop_ids: tokens that begin a text and
    tokens that end an answer. bos_token, eos_token: values of these variables in a chat template. chat_template: the
    template's text.
    """

    tokenizer_json: str
    bos_id: int | None
    stop_ids: list[int]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderSource(TextSettings):
    """A decoder as read from a checkpoint, with its text settings; see write_decoder for the weights.

    family: its model_type in sw.model.families. tied: the head has the embedding's weights (`head` may still be given,
    in another number format). rope_scaling: Hugging Face's description of config's rope_factors, if there is one.
    warnings: messages to show whenever the model is used, one line each.
    """

    name: str
    family: str
    config: DecoderConfig
    embedding: Table
    layers: Iterable[DecoderLayer]
    final_norm: np.ndarray
    head: Table | None
    tied: bool
    rope_scaling: dict[str, Any] | None = None
    warnings: Sequence[str] = ()
