# SPDX-License-Identifier: Apache-2.0
"""Which descriptors are refused, and why: one step on either side of each rule."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.control.descriptor import DESCRIPTOR_WORDS, Descriptor, VectorDescriptor, region_bytes
from hw.spec.control.refusal import refusal
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import LayerLayout
from hw.spec.ops import LINEAR, VECTOR
from hw.spec.presets import preset
from sim.bench.descriptors import cases, random_linear, random_vector
from sim.bench.layers import random_layer

NONE, OPCODE, SHAPE = ErrorCode.NONE, ErrorCode.OPCODE, ErrorCode.SHAPE
CONFIGS = {
    f"{name} {operators}": replace(preset(name), operators=operators)
    for name in ("small", "wide", "tile16")
    for operators in ("linear", "decoder")
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LINEAR_ONLY, DECODER = CONFIGS["tile16 linear"], CONFIGS["tile16 decoder"]


def linear(**fields: int) -> Descriptor:
    """A layer for either of the two configs."""
    layer = LayerLayout(LINEAR_ONLY, 256, 40, 128)
    return replace(Descriptor.from_layer(layer, 2, activations=0, weights=0), **fields)


def vector(**fields: int) -> VectorDescriptor:
    values = dict(tokens=2, out_features=40, activations=0, source_pitch=0, result_pitch=256)
    return VectorDescriptor(**values | fields)


def code(descriptor: Any, config: AcceleratorConfig = LINEAR_ONLY, before: Any = None) -> ErrorCode:
    return refusal(config, descriptor.to_words(), None if before is None else before.to_words())


@EVERY_CONFIG
def test_rules_of_epilogues(config: AcceleratorConfig):
    found = list(cases(config))
    for case, good, bad in found:
        assert code(good, config) == NONE, case
        assert code(bad, config) == SHAPE, case
    operations = {type(good) for _, good, _ in found}
    assert operations == ({Descriptor, VectorDescriptor} if config.has_vector_unit else {Descriptor})


@EVERY_CONFIG
def test_valid_ones(config: AcceleratorConfig):
    random = np.random.default_rng(1)
    for _ in range(100):
        assert code(random_linear(random_layer(config, random, config.max_k, 40), random), config) == NONE
        n = int(random.integers(1, random.choice([40, 1000, MAX_N]), endpoint=True))
        assert code(random_vector(config, random, n), config) == (NONE if config.has_vector_unit else OPCODE)


def test_pitches_of_one_token_have_no_effect():
    parts = dict(add=1, rotary=1, head=16, rotary_heads=1, second=1)
    pitches = dict(result_pitch=128, addend_pitch=128, second_pitch=0, table_pitch=0)
    assert code(linear(tokens=1, **parts, **pitches), DECODER) == NONE
    assert code(vector(tokens=1, source_pitch=128, **parts, **pitches), DECODER) == NONE


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("tokens", 16, 17),
        ("tokens", 1, 0),
        ("out_features", 1, 0),
        ("header_beats", 2, 1),
        ("header_beats", 2, 3),
        ("body_words", 32, 31),
        ("body_words", 32, 33),
        ("group_slices", 8, 16),
        ("groups", 2, 3),
    ],
)
def test_counts(name: str, good: int, bad: int):
    assert code(linear(**{name: good})) == NONE
    assert code(linear(**{name: bad})) == SHAPE


def test_limits_of_shapes():
    """N and K; the counts that follow from them are right."""
    c = LINEAR_ONLY
    for n, expected in ((MAX_N, NONE), (MAX_N + 1, SHAPE)):
        layer = LayerLayout(c, 128, MAX_N, 128)
        made = replace(Descriptor.from_layer(layer, 1, activations=0, weights=0), out_features=n)
        assert code(replace(made, weights_stride=(1 << 32) - 4096)) == expected
    longer = replace(c, max_k=2 * c.max_k)
    made = Descriptor.from_layer(LayerLayout(longer, c.max_k + 128, 16, 128), 1, activations=0, weights=0)
    assert (code(made), code(made, longer)) == (SHAPE, NONE)


def test_stride():
    layer = LayerLayout(LINEAR_ONLY, 256, 400, 128)
    made = Descriptor.from_layer(layer, 1, activations=0, weights=0)
    assert code(replace(made, weights_stride=region_bytes(layer))) == NONE
    assert code(replace(made, weights_stride=region_bytes(layer) - 4096)) == SHAPE


def test_reuse():
    """It needs a linear layer with the same activations. N and the epilogue may be others."""
    first, again = linear(), linear(reuse=1, out_features=20)
    assert code(again) == SHAPE
    assert code(again, before=first) == NONE
    assert code(again, before=replace(first, tokens=3)) == SHAPE
    one_group = Descriptor.from_layer(LayerLayout(LINEAR_ONLY, 128, 40, 128), 2, activations=0, weights=0)
    assert code(again, before=one_group) == SHAPE
    assert code(replace(again, reuse=0)) == NONE


@EVERY_CONFIG
def test_opcodes_and_reserved_bits(config: AcceleratorConfig):
    """The operation decides which bits are reserved; a set one counts before everything else."""
    layer = random_layer(config, np.random.default_rng(1))
    good = Descriptor.from_layer(layer, 1, activations=0, weights=0).to_words()
    for opcode in range(256):
        words = [good[0] & ~0xFF | opcode, *good[1:]]
        # Bits of linear layers are reserved in VECTOR.
        assert refusal(config, words) == (NONE if opcode == 1 else OPCODE)
    present = LINEAR.fields_of(config)
    used = {bit for field in present for bit in range(field.low, field.low + field.width)}
    assert (
        len(used) == len({bit for field in LINEAR.fields for bit in range(field.low, field.low + field.width)})
    ) == (config.has_vector_unit)
    for bit in set(range(32 * DESCRIPTOR_WORDS)) - used:
        words = [*good[:2], 0, *good[3:]]
        assert refusal(config, words) == SHAPE
        words[bit // 32] |= 1 << bit % 32
        assert refusal(config, words) == OPCODE, bit


def test_reserved_bits_of_vector():
    used = {bit for field in VECTOR.fields for bit in range(field.low, field.low + field.width)}
    for bit in range(32 * DESCRIPTOR_WORDS):
        if bit not in used:
            words = vector().to_words()
            words[bit // 32] |= 1 << bit % 32
            assert refusal(DECODER, words) == OPCODE, bit
