# SPDX-License-Identifier: Apache-2.0
"""A decoder as its ONNX graph holds it, part by part: the tensors between the parts and the numbers that they need.

Every part is plain data. Tensors, constants and nodes are given by their names in the graph, so that a part is compared
and printed without the file. Weights are read where they are needed: see sw.graph.match, which finds the parts.
"""

from dataclasses import dataclass

from sw.model.decoder import PROJECTIONS, DecoderShape


@dataclass(frozen=True)
class Mismatch:
    """Why a graph, or the attention of a block, is not of the shape that the types here describe.

    Members
    -------
    part: of the decoder, as Hugging Face names its modules: layers.0.self_attn.q_proj.
    operator, node: what is in the way: an operator, and the name of its node (of its first output, if it has none);
        both empty if something is missing.
    problem: in words.
    """

    part: str
    problem: str
    operator: str = ""
    node: str = ""

    @property
    def what(self) -> str:
        """What is in the way."""
        return f"{self.operator} {self.node}: {self.problem}" if self.operator else self.problem

    def __str__(self) -> str:
        return f"{self.part}: {self.what}"


@dataclass(frozen=True)
class Projection:
    """A linear layer of the graph, or some of its output rows.

    Members
    -------
    name: of its node, or of the node's first output if it has none.
    input: the activations, [..., k].
    product: the node's first output, with all rows. No two layers have the same.
    output: the tensor that others read, [..., n] or wider: the product with its bias.
    k, n: in_features, and out_features of these rows.
    first_row: of these rows among the node's.
    rows: out_features of the node.
    bias: constant of the node's rows that the node or an Add after it adds; or "".
    quantized: whether the weights are integers with scales.
    """

    name: str
    input: str
    product: str
    output: str
    k: int
    n: int
    first_row: int = 0
    rows: int = 0
    bias: str = ""
    quantized: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the node."""
        return self.n == self.rows


@dataclass(frozen=True)
class Norm:
    """A root mean square norm: output = x / sqrt(mean(x^2) + epsilon) * weight, along the last axis.

    Members
    -------
    input: x. A node that adds two tensors first (SkipSimplifiedLayerNormalization) may keep the sum to itself: then "".
    added: the two tensors of such a node, else empty.
    weight: the constant. node: of the last operator.
    """

    input: str
    output: str
    weight: str
    epsilon: float
    node: str
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadNorm:
    """A norm of every head of queries or keys, before the rotation. weight: constant, [head_size]."""

    weight: str
    epsilon: float


@dataclass(frozen=True)
class Rotary:
    """The rotation of queries and keys by their position.

    Members
    -------
    cos, sin: tensors, [positions, size / 2].
    size: elements of a head that are rotated, the first of it; 0 if the tables do not say.
    interleaved: element 2i is rotated against 2i + 1, not i against i + size / 2.
    position_ids: tensor; "" if the attention counts positions itself.
    in_attention: whether the attention's node rotates.
    """

    cos: str
    sin: str
    size: int
    interleaved: bool
    position_ids: str
    in_attention: bool


@dataclass(frozen=True)
class Attention:
    """Causal attention with a KV cache, a GroupQueryAttention node (com.microsoft).

    Members
    -------
    node: its name. output: tensor [..., heads * head_size].
    scale: of a score. softcap: scores become softcap * tanh(score / softcap); 0: they stay.
    window: positions that a token looks back at, itself included; None: all.
    past_key, ... sin_cache: the node's tensors of these names in onnxruntime; "" for those that it has not.
    """

    node: str
    output: str
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    softcap: float
    window: int | None
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    seqlens_k: str
    total_sequence_length: str


@dataclass(frozen=True)
class Block:
    """One layer of a decoder: x + attention(norm(x)), and of that y + mlp(norm(y)).

    What has weights is called as in sw.model.decoder.DecoderLayer, which holds the weights themselves.

    Members
    -------
    q_proj, k_proj, v_proj: rows of one layer or three. Their biases are part of them.
    q_norm, k_norm: of every head, where there are such.
    rotary: None if there is none, or if the attention is not understood.
    attention: a Mismatch where the graph computes it by other operators; the layers around it are known all the same.
    gate_proj, up_proj: rows of one layer or two. activation: of gate, "silu".
    middle, end: the tensors after attention and after mlp; "" if the next norm's node keeps them to itself.
    """

    input_norm: Norm
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    rotary: Rotary | None
    attention: Attention | Mismatch
    o_proj: Projection
    middle: str
    post_attention_norm: Norm
    gate_proj: Projection
    up_proj: Projection
    activation: str
    down_proj: Projection
    end: str

    @property
    def projections(self) -> dict[str, Projection]:
        """The seven linear layers by Hugging Face's names of their modules, in the order of a checkpoint."""
        return {module: getattr(self, name) for name, module in PROJECTIONS.items()}


@dataclass(frozen=True)
class Embedding:
    """The rows that token ids choose.

    Members
    -------
    node: Gather or GatherBlockQuantized, as `operator` says. table: the constant that the node reads.
    ids: the graph's input. output: tensor [..., hidden_size].
    """

    node: str
    operator: str
    table: str
    ids: str
    output: str


@dataclass(frozen=True)
class Decoder:
    """A whole decoder: token ids to logits.

    Members
    -------
    head: its input is `final_norm.output`, or tokens chosen from it. logits: the graph's output.
    """

    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Projection
    logits: str

    @property
    def in_the_way(self) -> list[Mismatch]:
        """What keeps the blocks from being understood as a whole; empty if everything is."""
        return [block.attention for block in self.blocks if isinstance(block.attention, Mismatch)]

    @property
    def shape(self) -> DecoderShape | None:
        """The sizes; None if a block's attention is not understood, or blocks differ."""
        shapes = {_shape(self, block) for block in self.blocks}
        return shapes.pop() if len(shapes) == 1 else None


def _shape(decoder: Decoder, block: Block) -> DecoderShape | None:
    attention = block.attention
    if isinstance(attention, Mismatch):
        return None
    return DecoderShape(
        hidden_size=decoder.head.k,
        intermediate_size=block.down_proj.k,
        layer_count=len(decoder.blocks),
        head_count=attention.heads,
        kv_head_count=attention.kv_heads,
        head_size=attention.head_size,
        vocab_size=decoder.head.n,
        norm_epsilon=block.input_norm.epsilon,
    )
