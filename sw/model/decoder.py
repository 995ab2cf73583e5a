# SPDX-License-Identifier: Apache-2.0
"""A decoder of one of sw.model.families as plain data, independent of the format of its weight files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from sw.common.errors import UserError
from sw.model.experts import Experts, Routing
from sw.model.lm_head import Linear

MAX_POSITIONS = 32768
"""Maximum number of positions in an export's rotary tables: for longer contexts they would take many megabytes."""
MAX_HEAD_SIZE = 1024
MAX_LAYERS = 4096
"""Blocks of a decoder: far more than any model has, and few enough for a list of them."""
ROTARY_UNIT = 16
SILU, GELU_TANH = "silu", "gelu_pytorch_tanh"
ACTIVATIONS = (SILU, GELU_TANH)
GLOBAL, LOCAL = "", "local_"
"""Prefixes of the names of rotary tables."""
PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""The linear layers of a block, in the order of a checkpoint -> Hugging Face's names of their modules in it."""


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder, in elements, and the epsilon of its norms: what its ONNX graph says as well."""

    hidden_size: int
    intermediate_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_size: int
    vocab_size: int
    norm_epsilon: float

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every linear layer in PROJECTIONS."""
        heads, kv_heads = self.head_count * self.head_size, self.kv_head_count * self.head_size
        return {
            "q_proj": (heads, self.hidden_size),
            "k_proj": (kv_heads, self.hidden_size),
            "v_proj": (kv_heads, self.hidden_size),
            "o_proj": (self.hidden_size, heads),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }


@dataclass(frozen=True)
class DecoderConfig(DecoderShape):
    """A decoder's shape, and what its graph computes besides. context_length: tokens.

    Members
    -------
    rope_theta: base of the rotary frequencies. rope_factors: float32 [rotary_size / 2] that divide them (Llama 3.1), or
        None. rotary_size: a head's first elements that are rotated; 0: all. rotary_scale: factor of cosines and sines.
    local_rope_theta: base in layers with a window, which have no factors; None: as in all others (Gemma 3).
    unrotated: indices of layers without a rotation.
    windows: of each layer, the number of positions that a token attends to, itself included; None: all. () if all see
        all positions.
    attention_scale: factor of scores; None: 1 / sqrt(head_size). embedding_scale: factor of the embedding's rows.
    activation: that of gate, one of ACTIVATIONS. routing: that of layers with experts, or None.

    Raises UserError for values that no decoder has.
    """

    context_length: int
    rope_theta: float
    rope_factors: np.ndarray | None = None
    rotary_size: int = 0
    rotary_scale: float = 1.0
    local_rope_theta: float | None = None
    unrotated: frozenset[int] = frozenset()
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    activation: str = SILU
    routing: Routing | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("rotary_size", "activation") or not isinstance(value, int | float):
                continue
            if not 0 < value < math.inf:
                raise UserError(f"{field.name} of the model is {value}, not a positive number")
        if self.head_count % self.kv_head_count:
            raise UserError(f"{self.head_count} heads are not a multiple of {self.kv_head_count} key-value heads")
        if self.head_size > MAX_HEAD_SIZE:
            raise UserError(f"head size {self.head_size} is above {MAX_HEAD_SIZE}")
        if self.layer_count > MAX_LAYERS:
            raise UserError(f"the model has {self.layer_count:,} layers, which is above {MAX_LAYERS:,}")
        if self.rotary_size % ROTARY_UNIT:
            problem = f"a rotation of {self.rotary_size} elements of a head is no multiple of {ROTARY_UNIT}"
            raise UserError(f"{problem}, which onnxruntime's GroupQueryAttention needs")
        if self.head_size % 2:
            raise UserError(f"head size {self.head_size} is odd: rotary embedding needs pairs")
        if self.rope_factors is not None:
            expect_shape("the table of rotary factors", self.rope_factors.shape, (self.rotated // 2,))
            if not (self.rope_factors > 0).all():
                raise UserError("a rotary factor of the model is not positive")

    @property
    def rotated(self) -> int:
        """A head's first elements that are rotated."""
        return self.rotary_size or self.head_size

    def window(self, index: int) -> int | None:
        """The window of a layer; None if it sees all positions of the context."""
        window = self.windows[index] if self.windows else None
        return None if window is None or window >= self.context_length else window

    def rotation(self, index: int) -> str | None:
        """The name of a layer's rotary tables: GLOBAL or LOCAL; None without a rotation."""
        if index in self.unrotated:
            return None
        # The base belongs to the kind of layer, also if its window is longer than the context.
        is_local = self.local_rope_theta is not None and self.windows and self.windows[index] is not None
        return LOCAL if is_local else GLOBAL

    def rotary_frequencies(self, theta: float | None = None) -> np.ndarray:
        """Radians per position of each pair of elements, float64 [rotated / 2], before rope_factors."""
        return (theta or self.rope_theta) ** (-np.arange(0, self.rotated, 2) / self.rotated)

    def rotary_cache(self, name: str = GLOBAL) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin) of the tables GLOBAL or LOCAL, float32 [context_length, rotated / 2]."""
        frequencies = self.rotary_frequencies(self.local_rope_theta if name == LOCAL else None)
        if self.rope_factors is not None and name == GLOBAL:
            frequencies = frequencies / self.rope_factors
        angles = np.outer(np.arange(self.context_length), frequencies)
        cosines, sines = np.cos(angles) * self.rotary_scale, np.sin(angles) * self.rotary_scale
        return cosines.astype(np.float32), sines.astype(np.float32)


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer; the norms are float32 [hidden_size]. Rows of q and k are in Hugging Face's order
    (the two halves of a head are rotated against each other).

    q_norm, k_norm: norms of every head, float32 [head_size], or None. attention_out_norm, mlp_out_norm: norms of what
    attention and mlp add to the residual, or None (Gemma 3). post_attention_norm: the norm before mlp. experts: instead
    of gate_proj, up_proj and down_proj, which are None, or None.
    """

    input_norm: np.ndarray
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    post_attention_norm: np.ndarray
    gate_proj: Linear | None = None
    up_proj: Linear | None = None
    down_proj: Linear | None = None
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None
    attention_out_norm: np.ndarray | None = None
    mlp_out_norm: np.ndarray | None = None
    experts: Experts | None = None


def expect_shape(what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError unless weights have the shape that the model's configuration gives."""
    if shape != expected:
        raise UserError(f"{what} is {list(shape)}, but the model's configuration asks for {list(expected)}")


def scale_residual(config: DecoderConfig, factor: float) -> DecoderConfig:
    """The decoder in which `factor` does not scale what attention and mlp add to the residual (Granite).

    The whole residual is divided by the factor instead: the embedding's scale by the factor, and the epsilon of every
    norm by its square, so that all norms have the same results.
    """
    return replace(
        config, embedding_scale=config.embedding_scale / factor, norm_epsilon=config.norm_epsilon / factor**2
    )


def split_rows(
    whole: Linear, parts: Sequence[str], shapes: Mapping[str, tuple[int, int]], name: str
) -> dict[str, Linear]:
    """The layers whose rows follow each other in one layer.

    shapes: (N, K) of each. name: of the whole layer. Raises UserError if they do not fit.
    """
    counts = [shapes[part][0] for part in parts]
    expect_shape(name, (whole.n, whole.k), (sum(counts), shapes[parts[0]][1]))
    ends = np.cumsum(counts)
    return {part: whole.with_rows(slice(int(end - count), int(end))) for part, count, end in zip(parts, counts, ends)}
