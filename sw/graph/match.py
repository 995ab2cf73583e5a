# SPDX-License-Identifier: Apache-2.0
"""Matches an ONNX file with the parts of a decoder (sw.model.parts). It uses the nodes' operators, not their names.

The matcher follows the residual stream from the embedding to the head. Each node that adds to the stream ends attention
or mlp, and the linear layer before it is o_proj or down_proj. From there the matcher goes back to the norm that reads
the stream. sw.model.parts lists all possible parts of a decoder; a mismatch names the first node that is none of them.

The matcher supports our exports, those of onnxruntime-genai's builder, and, except for their attention, those of torch,
optimum and transformers.
"""

import onnx

from sw.graph.attention import match_attention
from sw.graph.experts.match import find_mixtures, silu_of
from sw.graph.file import OnnxFile
from sw.graph.nodes import (
    CONTRIB,
    SAME_VALUES,
    STANDARD,
    TOKEN_IDS,
    attributes,
    before_logits,
    logits_name,
    name_of,
    read,
)
from sw.graph.norms import adds
from sw.graph.projections import Layers, NotThisShape
from sw.model.parts import Block, Decoder, Embedding, Mismatch, Norm, Projection

GATHERS = ("Gather", "GatherBlockQuantized")
CHOICES = (*SAME_VALUES, "Gather", "GatherND", "Slice")
"""Operators that may select the tokens whose logits are computed, between the last norm and the head."""
SILU = "silu"


def match_decoder(file: OnnxFile) -> Decoder | Mismatch:
    """The decoder that a graph computes, or the reason why it does not match. Reads no weights.

    If only a block's attention consists of other operators, the result is a decoder with the reason in that block.
    Raises UserError if the attributes of a quantized layer are damaged.
    """
    try:
        return _Walk(file).decoder()
    except NotThisShape as error:
        return error.mismatch


class _Walk:
    """One pass over a graph. `_ahead`: the nodes that are still ahead, the next one last."""

    def __init__(self, file: OnnxFile):
        self.file = file
        self.layers = Layers(file)
        self._mixtures = {mixture.output for mixture in find_mixtures(file)}
        self._ahead = list(file.graph.node)[::-1]

    def decoder(self) -> Decoder:
        embedding = self._embedding()
        head = self._head()
        last = self._chosen_from(head.input)
        stream, blocks = self.layers.uncast(embedding.output), []
        norm = self._norm(stream, "layers.0.input_layernorm")
        while norm.output not in last:
            block, norm = self._block(f"layers.{len(blocks)}", stream, norm)
            blocks.append(block)
            stream = block.end
        if not blocks:
            raise self.layers.wrong("layers.0", "where a layer of the decoder is expected", norm.output)
        return Decoder(embedding, tuple(blocks), norm, head, logits_name(self.file))

    def _embedding(self) -> Embedding:
        part = "embed_tokens"
        nodes = [node for node in self.layers.readers(TOKEN_IDS) if node.op_type in GATHERS]
        if len(nodes) != 1 or nodes[0].input[1] != TOKEN_IDS or not self.file.is_constant(nodes[0].input[0]):
            problem = f"{len(nodes)} nodes choose rows of a constant table by {TOKEN_IDS}, not one"
            raise NotThisShape(Mismatch(part, problem))
        node, output = nodes[0], nodes[0].output[0]
        # A Cast may follow a float16 table, a Reshape may follow GatherBlockQuantized, and a scale any of them.
        while len(following := self.layers.readers(output)) == 1 and self._keeps_rows(following[0]):
            output = following[0].output[0]
        return Embedding(name_of(node), node.op_type, node.input[0], TOKEN_IDS, output)

    def _keeps_rows(self, node: onnx.NodeProto) -> bool:
        """Whether a node's output is the embedding's rows, maybe scaled by one factor."""
        if node.op_type != "Mul":
            return node.op_type in SAME_VALUES
        return any(self.file.is_constant(name) and not self.file.shape(name, name) for name in node.input)

    def _head(self) -> Projection:
        tensors = before_logits(self.file)
        found = [layer for layer in self.layers.projections if layer.product in tensors]
        if len(found) != 1:
            raise self.layers.wrong("lm_head", "where the output of a linear layer is expected", logits_name(self.file))
        return found[0]

    def _chosen_from(self, tensor: str) -> list[str]:
        """A tensor, and the tensors that its rows were selected from."""
        found = [tensor]
        # The number of nodes limits the steps, because a damaged graph may have cycles.
        for _ in self.file.graph.node:
            node = self.file.producers.get(found[-1])
            if node is None or node.op_type not in CHOICES:
                break
            found.append(node.input[0])
        return found

    def _block(self, part: str, stream: str, input_norm: Norm) -> tuple[Block, Norm]:
        """One block, and the norm after it."""
        total, branch = self._sum(stream, f"{part}.self_attn")
        if branch in self.layers.norms:
            raise self.layers.wrong(f"{part}.self_attn", "a norm between o_proj and the residual", branch)
        o = self.layers.rows(branch, f"{part}.self_attn.o_proj")
        q, k, v, attention = match_attention(self.layers, f"{part}.self_attn", input_norm, o)
        middle, post_norm = self._after(total, f"{part}.post_attention_layernorm")
        total, branch = self._sum(middle, f"{part}.mlp")
        if branch in self._mixtures:
            raise self.layers.wrong(f"{part}.mlp", "a mixture of experts, whose router chooses on the host", branch)
        down = self.layers.rows(branch, f"{part}.mlp.down_proj")
        gate, up = self._gate_and_up(f"{part}.mlp", post_norm, down)
        index = int(part.rpartition(".")[2])
        end, norm = self._after(total, f"layers.{index + 1}.input_layernorm")
        block = Block(
            input_norm=input_norm,
            q_proj=q.layer,
            k_proj=k.layer,
            v_proj=v,
            q_norm=q.norm,
            k_norm=k.norm,
            rotary=q.rotary,
            attention=attention,
            o_proj=o,
            middle=middle,
            post_attention_norm=post_norm,
            gate_proj=gate,
            up_proj=up,
            activation=SILU,
            down_proj=down,
            end=end,
        )
        return block, norm

    def _sum(self, stream: str, part: str) -> tuple[onnx.NodeProto, str]:
        """The next node that adds to the stream, and what it adds."""
        while self._ahead:
            node = self._ahead.pop()
            if adds(node) or (node.op_type == "Add" and self._may_add(node, stream)):
                operands = [self.layers.uncast(name) for name in node.input[:2]]
                if stream not in operands:
                    problem = f"it adds {operands[0]} and {operands[1]}, not to the residual {stream or 'before it'}"
                    raise self.layers.blame(part, problem, node)
                operands.remove(stream)
                return node, operands[0]
        raise NotThisShape(Mismatch(part, f"no node adds to the residual {stream}"))

    def _may_add(self, node: onnx.NodeProto, stream: str) -> bool:
        """Whether an Add is part of the residual stream, or is where the stream's next Add is expected."""
        if any(self.file.is_constant(name) for name in node.input):
            return False
        return any(self.layers.uncast(name) == stream or self.layers.makes(name) for name in node.input)

    def _after(self, total: onnx.NodeProto, part: str) -> tuple[str, Norm]:
        """The stream after a sum, and the norm that reads it."""
        if adds(total):
            norm = self.layers.norms.get(total.output[0])
            if norm is None:
                raise self.layers.blame(part, "its weight is not a constant, or it adds a bias", total)
            return norm.input, norm
        return total.output[0], self._norm(total.output[0], part)

    def _norm(self, stream: str, part: str) -> Norm:
        norms = [norm for norm in self.layers.by_input.get(stream, []) if not norm.added]
        if len(norms) == 1:
            return norms[0]
        others = [node for node in self.layers.readers(stream) if node.op_type != "Add"]
        problem = f"{len(norms)} root mean square norms read the residual {stream}, not one"
        if norms or not others:
            raise NotThisShape(Mismatch(part, problem))
        raise self.layers.blame(part, "where a root mean square norm is expected", others[0])

    def _gate_and_up(self, part: str, norm: Norm, down: Projection) -> tuple[Projection, Projection]:
        node = self.file.producers.get(down.input)
        if node is None or node.op_type != "Mul" or len(node.input) != 2:
            raise self.layers.wrong(part, "where the product of activated gate and up is expected", down.input)
        operands = list(node.input)
        gates = [self._silu_of(name) for name in operands]
        if not any(gates):
            other = operands[1] if self.layers.makes(operands[0]) else operands[0]
            raise self.layers.wrong(part, "it is not x * sigmoid(x) of gate, the only activation that is known", other)
        place = 0 if gates[0] else 1
        gate = self.layers.rows(gates[place] or "", f"{part}.gate_proj")
        up = self.layers.rows(operands[1 - place], f"{part}.up_proj")
        self.layers.expect_input({f"{part}.gate_proj": gate, f"{part}.up_proj": up}, norm.output)
        return gate, up

    def _silu_of(self, name: str) -> str | None:
        """The tensor x if the named tensor is SiLU(x)."""
        node = self.file.producers.get(name)
        if node is None or (x := silu_of(self.file, name)):
            return None if node is None else x
        swish = (node.op_type == "Swish" and node.domain in STANDARD) or (
            node.op_type == "QuickGelu" and node.domain == CONTRIB
        )
        alpha = {"Swish": 1.0, "QuickGelu": 1.702}.get(node.op_type)
        return read(node, 0) if swish and attributes(node).get("alpha", alpha) == 1 else None
