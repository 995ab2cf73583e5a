# SPDX-License-Identifier: Apache-2.0
"""A decoder as its ONNX graph holds it, part by part: the tensors between the parts and the numbers that they need.

Every part is plain data. Tensors, constants and nodes are given by their names in the graph, so that a part is compared
and printed without the file. Weights are read where they are needed: see sw.graph.match, which finds the parts.
"""

from dataclasses import dataclass

from sw.model.decoder import PROJECTIONS, DecoderShape


@dataclass(frozen=True)
class Mismatch:
    """The reason why a graph, or the attention of a block, does not match the types here.

    Members
    -------
    part: name of the decoder's part, as Hugging Face names its modules: layers.0.self_attn.q_proj.
    operator, node: the operator that does not fit, and the name of its node (or of the node's first output, if it has
        none); both empty if a part is missing.
    problem: a text about the problem.
    """

    part: str
    problem: str
    operator: str = ""
    node: str = ""

    @property
    def what(self) -> str:
        """The problem, with the node that has it."""
        return f"{self.operator} {self.node}: {self.problem}" if self.operator else self.problem

    def __str__(self) -> str:
        return f"{self.part}: {self.what}"


@dataclass(frozen=True)
class Projection:
    """A linear layer of the graph, or some of its output rows.

    Members
    -------
    name: name of its node, or of the node's first output if it has none.
    input: the activations, [..., k].
    product: the node's first output, with all rows; unique.
    output: the tensor that other nodes read, [..., n] or wider: the product with its bias.
    k, n: in_features, and out_features of these rows.
    first_row: index of the first of these rows among the node's rows.
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
    input: x, or "" if a node that adds two tensors first (SkipSimplifiedLayerNormalization) does not output the sum.
    added: the two tensors that the node adds first; empty if it adds none.
    weight: the constant. node: name of the last operator's node.
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
    size: number of a head's first elements that are rotated; 0 if the tables do not define it.
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
    node: the node's name. output: tensor [..., heads * head_size].
    scale: factor of a score. softcap: scores become softcap * tanh(score / softcap); 0: they do not change.
    window: number of positions that a token attends to, itself included; None: all.
    past_key, ... sin_cache: the node's tensors of these names in onnxruntime; "" for absent ones.
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
    """One layer of a decoder: y = x + attention(norm(x)), then y + mlp(norm(y)).

    Parts with weights have the same names as in sw.model.decoder.DecoderLayer, which holds the weights themselves.

    Members
    -------
    q_proj, k_proj, v_proj: rows of one layer or three. Their biases are part of them.
    q_norm, k_norm: norms of every head, or None.
    rotary: None if there is none, or if the attention does not match.
    attention: a Mismatch if the graph computes it by other operators; the layers around it are matched all the same.
    gate_proj, up_proj: rows of one layer or two. activation: activation of gate, "silu".
    middle, end: the tensors after attention and after mlp; "" if the next norm's node does not output them.
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
    """The table lookup that selects a row for each token id.

    Members
    -------
    node: name of the Gather or GatherBlockQuantized node; `operator` is its type. table: the constant that it reads.
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
    head: its input is `final_norm.output`, or tokens selected from it. logits: the graph's output.
    """

    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Projection
    logits: str

    @property
    def mismatches(self) -> list[Mismatch]:
        """The blocks' mismatches; empty if every block matches as a whole."""
        return [block.attention for block in self.blocks if isinstance(block.attention, Mismatch)]

    @property
    def shape(self) -> DecoderShape | None:
        """The sizes; None if a block's attention does not match, or if blocks differ."""
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
