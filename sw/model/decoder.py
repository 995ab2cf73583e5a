# SPDX-License-Identifier: Apache-2.0
"""A Llama or Qwen2 decoder as plain data, independent of the format of its weight files."""

import math
from dataclasses import dataclass, fields

import numpy as np

from sw.common.errors import UserError
from sw.model.lm_head import Linear

MAX_POSITIONS = 32768
"""Maximum number of positions in an export's rotary tables: for longer contexts they would take many megabytes."""
MAX_HEAD_SIZE = 1024


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: sizes in elements, context_length in tokens.

    rope_factors: float32 [head_size / 2] that divide the rotary frequencies (Llama 3.1), or None.

    Raises UserError for values that are not valid for a decoder.
    """

    hidden_size: int
    intermediate_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_size: int
    vocab_size: int
    context_length: int
    rope_theta: float
    norm_epsilon: float
    rope_factors: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "rope_factors" and not 0 < value < math.inf:
                raise UserError(f"{field.name} of the model is {value}, not a positive number")
        if self.head_count % self.kv_head_count:
            raise UserError(f"{self.head_count} heads are not a multiple of {self.kv_head_count} key-value heads")
        if self.head_size % 2:
            raise UserError(f"head size {self.head_size} is odd: rotary embedding needs pairs")
        if self.head_size > MAX_HEAD_SIZE:
            raise UserError(f"head size {self.head_size} is above {MAX_HEAD_SIZE}")
        if self.rope_factors is not None:
            expect_shape("the table of rotary factors", self.rope_factors.shape, (self.head_size // 2,))
            if not (self.rope_factors > 0).all():
                raise UserError("a rotary factor of the model is not positive")

    def rotary_frequencies(self) -> np.ndarray:
        """Radians per position of each pair of elements, float64 [head_size / 2], before rope_factors."""
        return self.rope_theta ** (-np.arange(0, self.head_size, 2) / self.head_size)

    def rotary_cache(self) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin), float32 [context_length, head_size / 2]."""
        frequencies = self.rotary_frequencies()
        if self.rope_factors is not None:
            frequencies = frequencies / self.rope_factors
        angles = np.outer(np.arange(self.context_length), frequencies)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer; the norms are float32 [hidden_size]. Rows of q and k are in Hugging Face's order
    (the two halves of a head are rotated against each other).
    """

    input_norm: np.ndarray
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    post_attention_norm: np.ndarray
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


def expect_shape(what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError unless weights have the shape that the model's configuration gives."""
    if shape != expected:
        raise UserError(f"{what} is {list(shape)}, but the model's configuration asks for {list(expected)}")
