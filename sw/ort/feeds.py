# SPDX-License-Identifier: Apache-2.0
"""Inputs for a model's session: a decoder's prompt with an empty cache, or noise for any other model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from sw.common.errors import UserError
from sw.common.text_files import read_json, text_directory
from sw.graph.attention import group_query_attention, rotary_table
from sw.graph.file import OnnxFile, tensor_type
from sw.graph.nodes import TOKEN_IDS

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
LOGITS_TO_KEEP = ("num_logits_to_keep", "logits_to_keep")
"""Inputs of exports by transformers 4.45 and later: number of tokens, from the end, whose logits are needed; 0: all."""
CACHE_RANK = 4
"""Number of axes of the tensors with the keys or values of past tokens; no other input of a decoder has four."""


def reads_token_ids(file: OnnxFile) -> bool:
    """Whether a model reads the token ids of a prompt. Any other model gets noise."""
    return any(item.name == TOKEN_IDS for item in file.inputs)


def unknown_input(path: Path, name: str, kind: str) -> UserError:
    """The error for an input of a name or type that no decoder has."""
    return UserError(f"{path}: input {name} ({kind}) is none that a decoder has")


def build_feeds(
    file: OnnxFile,
    session: onnxruntime.InferenceSession,
    input_ids: Sequence[int] | None,
    tokens: int = 8,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """One feed per input of the session, which runs the model of `file`.

    Models with an input named input_ids get the given token ids as one sequence, an attention_mask of ones,
    position_ids from 0 and an empty KV cache (inputs of four axes). Every other float input gets seeded standard
    normal noise; its last symbolic axis has size `tokens`, the other symbolic axes have size 1.
    Raises UserError for missing or empty input_ids and for any other input.
    """
    inputs = session.get_inputs()
    is_decoder = reads_token_ids(file)
    if is_decoder and not input_ids:
        raise UserError(f"{file.path} reads token ids (input_ids), and none were given")
    ids = np.asarray(input_ids if is_decoder else [], np.int64)[None, :]
    prompt = {
        TOKEN_IDS: ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None, :],
    }
    noise = np.random.default_rng(seed)
    feeds = {}
    for item in inputs:
        dtype = DTYPES.get(item.type)
        if dtype is None:
            raise UserError(f"{file.path}: input {item.name} is {item.type}, which cannot be fed")
        if is_decoder and item.name in prompt:
            values = prompt[item.name]
        elif is_decoder and item.name in LOGITS_TO_KEEP:
            values = all_logits(len(item.shape))
        elif is_decoder and len(item.shape) == CACHE_RANK:
            values = np.zeros(empty_cache_shape(file, item.name, item.shape))
        elif np.issubdtype(dtype, np.floating):
            values = noise.standard_normal(_noise_shape(item.shape, tokens))
        else:
            raise unknown_input(file.path, item.name, item.type)
        feeds[item.name] = values.astype(dtype)
    return feeds


def all_logits(axes: int) -> np.ndarray:
    """The value of an input in LOGITS_TO_KEEP, int64 with one element, that requests every token's logits."""
    return np.zeros((1,) * axes, np.int64)


def every_token(file: OnnxFile, name: str) -> OrtValue:
    """The value of an input in LOGITS_TO_KEEP, in its own type and shape, that requests every token's logits."""
    item = next(item for item in file.inputs if item.name == name)
    kind = tensor_type(item)
    if kind not in DTYPES:
        raise unknown_input(file.path, name, kind)
    return OrtValue.ortvalue_from_numpy(all_logits(len(item.type.tensor_type.shape.dim)).astype(DTYPES[kind]))


def empty_cache_shape(file: OnnxFile, name: str, shape: Sequence[Any]) -> tuple[int, int, int, int]:
    """The shape of a KV cache's input [batch, kv_heads, past, head_size] for one sequence without a past.

    Transformers' exporter writes fixed sizes as symbols that are numbers. onnxruntime-genai's builder does not give
    head_size; it is then read from genai_config.json or config.json beside the model, or from the rotary table of the
    attention node that reads the input. Raises UserError if none of them gives it.
    """
    shape = [int(size) if isinstance(size, str) and size.isdecimal() else size for size in shape]
    if len(shape) != CACHE_RANK or not isinstance(shape[1], int):
        raise UserError(f"{file.path}: {name} is {list(shape)}, not [batch, kv_heads, past, head_size]")
    size = shape[3] if isinstance(shape[3], int) else _configured_head_size(file) or _rotary_head_size(file, name)
    if not size:
        raise UserError(f"{file.path}: nothing says the head size of {name} (a config.json with head_dim would)")
    return 1, shape[1], 0, size


def _configured_head_size(file: OnnxFile) -> int | None:
    for name, keys in (("genai_config.json", ("model", "decoder", "head_size")), ("config.json", ("head_dim",))):
        value: Any = read_json(text_directory(file.path) / name)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int):
            return value
    return None


def _rotary_head_size(file: OnnxFile, name: str) -> int | None:
    for node in file.consumers.get(name, []):
        table = rotary_table(node)
        if group_query_attention(node) is not None and file.is_constant(table):
            return 2 * file.shape(table, node.name)[1]
    return None


def _noise_shape(shape: Sequence[Any], tokens: int) -> list[int]:
    symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    return [size if isinstance(size, int) else tokens if i == symbolic[-1] else 1 for i, size in enumerate(shape)]
