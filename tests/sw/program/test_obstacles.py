# SPDX-License-Identifier: Apache-2.0
"""Graphs that cannot be compiled are refused, with the part and the reason."""

from dataclasses import replace

import pytest

from sw.graph.file import OnnxFile
from sw.graph.match import match_decoder
from sw.model.parts import Attention, Decoder, HeadNorm, Mismatch, Rotary
from sw.program.obstacles import Obstacle, check_decoder
from tests.sw.fixtures.random_decoder import CONFIG, write_random

CONTEXT = 32


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return OnnxFile(write_random(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def decoder(file):
    found = match_decoder(file)
    assert isinstance(found, Decoder)
    return found


def with_block(decoder: Decoder, index: int = 1, **changes) -> Decoder:
    blocks = list(decoder.blocks)
    blocks[index] = replace(blocks[index], **changes)
    return replace(decoder, blocks=tuple(blocks))


def test_accepted(file, decoder):
    assert check_decoder(file, decoder, CONTEXT) is decoder
    # Without a rotation, no table limits the context.
    blocks = tuple(replace(block, rotary=None) for block in decoder.blocks)
    check_decoder(file, replace(decoder, blocks=blocks), 1000)
    # Blocks may be rotated differently.
    check_decoder(file, with_block(decoder, rotary=None), CONTEXT)
    check_decoder(file, with_rotary(decoder, interleaved=True), CONTEXT)
    # A head that is not quantized stays in onnxruntime, with what follows it.
    check_decoder(file, replace(decoder, head=replace(decoder.head, quantized=False), logits="other"), CONTEXT)


def with_layer(decoder: Decoder, name: str, **changes) -> Decoder:
    """A decoder with another projection in its second block."""
    return with_block(decoder, **{name: replace(getattr(decoder.blocks[1], name), **changes)})


def with_rotary(decoder: Decoder, **changes) -> Decoder:
    rotary = decoder.blocks[1].rotary
    assert isinstance(rotary, Rotary)
    return with_block(decoder, rotary=replace(rotary, **changes))


def with_head_size(decoder: Decoder, size: int) -> Decoder:
    attention = decoder.blocks[1].attention
    assert isinstance(attention, Attention)
    return with_block(decoder, attention=replace(attention, head_size=size))


ATTENTION = "layers.1.self_attn"
NO_TABLE = f"{ATTENTION}: the tables of its rotation are not constants"
FLOAT = "its weights are not quantized"
CASES = [
    (lambda d: Mismatch("embed_tokens", "none"), "embed_tokens: none"),
    (lambda d: with_block(d, attention=Mismatch(ATTENTION, "no", "Softmax", "S")), f"{ATTENTION}: Softmax S: no"),
    (
        lambda d: with_block(d, q_norm=HeadNorm("w", 1e-6)),
        f"{ATTENTION}.q_norm: a norm of every head, of 16 elements: not a multiple of 32",
    ),
    (
        lambda d: with_block(d, k_norm=HeadNorm("w", 1e-6)),
        f"{ATTENTION}.k_norm: a norm of every head, of 16 elements: not a multiple of 32",
    ),
    (
        lambda d: with_block(with_head_size(d, 32), q_norm=HeadNorm("input_ids", 1e-6)),
        f"{ATTENTION}.q_norm: its weight input_ids is no constant of the 32 elements of a head",
    ),
    (
        lambda d: with_block(with_head_size(d, 32), k_norm=HeadNorm(d.final_norm.weight, 1e-6)),
        f"{ATTENTION}.k_norm: its weight model.norm.weight is no constant of the 32 elements of a head",
    ),
    (lambda d: with_layer(d, "o_proj", bias="b"), f"{ATTENTION}.o_proj: a bias besides the residual"),
    (lambda d: with_layer(d, "down_proj", bias="b"), "layers.1.mlp.down_proj: a bias besides the residual"),
    (
        lambda d: with_layer(d, "up_proj", quantized=False),
        f"layers.1.mlp.up_proj: MatMulNBits /model/layers.1/mlp/up_proj/MatMulNBits: {FLOAT}",
    ),
    (
        lambda d: with_layer(d, "down_proj", k=100),
        "layers.1.mlp.down_proj: its in_features 100 are no multiple of 32",
    ),
    (lambda d: with_layer(d, "q_proj", n=80), f"{ATTENTION}: heads of 16 elements, 144 in all: not a multiple of"),
    (lambda d: with_head_size(d, 24), f"{ATTENTION}: heads of 24 elements, 128 in all: not a multiple of 16 and 32"),
    (lambda d: with_head_size(d, 272), f"{ATTENTION}: heads of 272 elements"),
    (lambda d: with_rotary(d, position_ids="other"), f"{ATTENTION}: its rotation reads positions from other"),
    (lambda d: with_rotary(d, cos="input_ids"), NO_TABLE),
    (lambda d: with_rotary(d, size=0), NO_TABLE),
    (lambda d: with_head_size(d, 32), "layers: their numbers or sizes of heads differ"),
    (lambda d: replace(d, head=replace(d.head, k=72)), "model: its hidden size 72 is no multiple of 32"),
    (lambda d: replace(d, logits="other"), "lm_head: its output logits is not the logits"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message for _, message in CASES])
def test_refused(file, decoder, change, message):
    with pytest.raises(Obstacle) as raised:
        check_decoder(file, change(decoder), CONTEXT)
    assert str(raised.value).startswith(message)


def test_context(file, decoder):
    assert CONFIG.context_length == CONTEXT
    message = "^layers.0.self_attn: the tables of its rotation have 32 positions, and the context 33$"
    with pytest.raises(Obstacle, match=message):
        check_decoder(file, decoder, CONTEXT + 1)
