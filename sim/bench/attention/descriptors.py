# SPDX-License-Identifier: Apache-2.0
"""Random descriptors of attention, and descriptors that are one step on either side of each of its rules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.control.descriptor import DATA_ALIGNMENT, FLOAT_BYTES
from hw.spec.memory.kv_cache import KEY_BITS, LONGEST_CONTEXT, KeyCache, ValueCache
from hw.spec.numerics.block_float import BLOCK
from hw.spec.ops import OPS
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.epilogue import MAX_HEAD
from hw.spec.ops.scores import ScoresDescriptor
from hw.spec.ops.values import ValuesDescriptor

__all__ = ["AttentionDescriptor", "AttentionRule", "attention_rules", "random_append", "random_attention"]

AttentionDescriptor = AppendDescriptor | ScoresDescriptor | ValuesDescriptor
_FIELD = {field.name: field for op in OPS.values() for field in op.fields}


def _any(random: np.random.Generator, *names: str) -> dict[str, int]:
    """Random values of fields."""
    return {name: int(random.integers(1 << _FIELD[name].width)) * _FIELD[name].unit for name in names}


def _pitch(random: np.random.Generator, size: int) -> int:
    """A pitch of rows of ``size`` bytes."""
    return DATA_ALIGNMENT * (-(-size // DATA_ALIGNMENT) + int(random.choice([0, 0, 1, 100])))


def _head(config: AcceleratorConfig, random: np.random.Generator, planes: int = 1) -> int:
    """A random head size of which so many planes fit."""
    return BLOCK * int(random.integers(1, min(MAX_HEAD, config.max_k // planes) // BLOCK, endpoint=True))


def random_append(config: AcceleratorConfig, random: np.random.Generator) -> AppendDescriptor:
    """A valid descriptor, anywhere in memory."""
    keys, bits = int(random.integers(2)), int(random.choice(KEY_BITS))
    size = _head(config, random, max(KEY_BITS) // config.weight_bits)
    slots = int(random.integers(1, random.choice([40, 1000, LONGEST_CONTEXT]), endpoint=True))
    cache = KeyCache(config, size, slots, bits) if keys else ValueCache(config, size, slots)
    return AppendDescriptor(
        keys=keys,
        planes=cache.planes,
        tokens=int(random.integers(1, config.max_tokens, endpoint=True)),
        out_features=size,
        activation_pitch=_pitch(random, FLOAT_BYTES * size),
        slot=int(random.integers(slots)),
        slots=slots,
        add=int(random.integers(2)) * keys,
        interrupt=int(random.integers(2)),
        wait=int(random.integers(3)),
        **_any(random, "activations", "addend", "weights", "weights_stride", "exponents"),
    )


def random_attention(
    config: AcceleratorConfig, random: np.random.Generator, bank: int
) -> tuple[ScoresDescriptor, ValuesDescriptor]:
    """Valid descriptors of scores and of the values for them, anywhere in memory."""
    bits = int(random.choice(KEY_BITS))
    size = _head(config, random, bits // config.weight_bits)
    units = config.score_words // SCORE_UNIT
    tokens = int(random.integers(1, min(config.max_tokens, units), endpoint=True))
    most = min(units // tokens * SCORE_UNIT, LONGEST_CONTEXT)
    positions = int(random.choice([most, int(random.integers(1, most, endpoint=True))]))
    slots = int(random.integers(positions, LONGEST_CONTEXT, endpoint=True))
    window = int(random.integers(2)) * int(random.integers(1, LONGEST_CONTEXT))
    turn = int(random.integers(1 if window else positions, slots, endpoint=True))
    cache = KeyCache(config, size, slots, bits)
    common = dict(tokens=tokens, bank=bank, interrupt=int(random.integers(2)), wait=int(random.integers(3)))
    scores = ScoresDescriptor.from_cache(
        cache,
        positions,
        turn=turn,
        window=window,
        causal=int(random.integers(2)),
        activation_pitch=_pitch(random, FLOAT_BYTES * size),
        **common,
        **_any(random, "activations", "weights", "score_factor"),
    )
    head = _head(config, random)
    values = ValuesDescriptor(
        out_features=head,
        positions=positions,
        slots=slots,
        result_pitch=_pitch(random, FLOAT_BYTES * head),
        **common,
        **_any(random, "results", "weights", "weights_stride", "exponents"),
    )
    return scores, values


class AttentionRule(NamedTuple):
    """A rule: descriptors that are accepted one after another, then one that is accepted, and one that is refused."""

    rule: str
    before: tuple[AttentionDescriptor, ...]
    good: AttentionDescriptor
    bad: AttentionDescriptor


def attention_rules(config: AcceleratorConfig) -> Iterator[AttentionRule]:
    """Every rule that applies to this hardware."""
    units = config.score_words // SCORE_UNIT
    tokens = min(2, config.max_tokens)
    slots = min(units // tokens, 4) * SCORE_UNIT
    keys, values = KeyCache(config, 64, slots, 8), ValueCache(config, 64, slots)
    append = AppendDescriptor(
        keys=1, planes=keys.planes, tokens=tokens, out_features=64, activations=0, activation_pitch=256,
        weights=0, weights_stride=keys.stride, slot=0, slots=slots,
    )  # fmt: skip
    append_values = replace(append, keys=0, planes=values.planes)
    scores = ScoresDescriptor.from_cache(
        keys, slots, tokens=tokens, activations=0, activation_pitch=256, weights=0, turn=slots, score_factor=0
    )
    output = ValuesDescriptor(
        tokens=tokens, out_features=64, positions=slots, slots=slots, weights=0, weights_stride=values.stride,
        exponents=0, results=0, result_pitch=256,
    )  # fmt: skip

    def rule(name: str, base: AttentionDescriptor, good: dict, bad: dict, *before: AttentionDescriptor):
        return AttentionRule(name, before, replace(base, **good), replace(base, **bad))

    yield rule("head of keys", append, dict(out_features=32), dict(out_features=48))
    yield rule("no head", append, {}, dict(out_features=0))
    largest = dict(out_features=MAX_HEAD, activation_pitch=2 * FLOAT_BYTES * MAX_HEAD)
    yield rule("largest head", append, largest, largest | dict(out_features=MAX_HEAD + BLOCK))
    yield rule("planes of keys", append, dict(planes=16 // config.weight_bits), dict(planes=3))
    yield rule("planes of values", append_values, {}, dict(planes=16 // config.weight_bits))
    yield rule("slot", append, dict(slot=slots - 1), dict(slot=slots))
    yield rule("slots", append, dict(slots=LONGEST_CONTEXT), dict(slots=LONGEST_CONTEXT + 1))
    yield rule("vector", append, dict(add=1), dict(add=1, keys=0, planes=values.planes))
    yield rule("wait", append, dict(wait=2), dict(wait=3))
    if tokens > 1:
        yield rule("pitch of rows", append, {}, dict(activation_pitch=128))
        yield rule("pitch of queries", scores, {}, dict(activation_pitch=128))
        yield rule("pitch of outputs", output, {}, dict(result_pitch=128), scores)
    yield rule("header", scores, {}, dict(header_beats=scores.header_beats + 1))
    yield rule("body", scores, {}, dict(body_words=scores.body_words + 1))
    yield rule("planes of scores", scores, {}, dict(planes=1 if config.weight_bits == 4 else 4))
    yield rule("turn", scores, {}, dict(turn=slots + 1))
    yield rule("keys after the turn", scores, dict(turn=slots - 1, window=1), dict(turn=slots - 1))
    yield rule("positions", scores, dict(window=1), dict(window=1, out_features=slots + 1))
    yield rule("stride", scores, {}, dict(weights_stride=0))
    room = units // tokens * SCORE_UNIT
    if room < LONGEST_CONTEXT:
        most = dict(slots=LONGEST_CONTEXT, turn=LONGEST_CONTEXT, weights_stride=1 << 24)
        yield rule("bank", scores, most | dict(out_features=room), most | dict(out_features=room + 1))
    yield rule("bank that holds scores", scores, dict(bank=1), {}, scores)
    yield rule("scores that are read", scores, {}, dict(bank=1), replace(scores, bank=1), scores, output)
    yield rule("values of no scores", output, {}, dict(bank=1), scores)
    yield rule("positions of values", output, {}, dict(positions=slots - 1), scores)
    yield (
        rule("rows of values", output, {}, dict(tokens=tokens % config.max_tokens + 1), scores)
        if tokens > 1
        else (rule("values", output, {}, dict(bank=1), scores))
    )
    yield rule("slots of values", output, {}, dict(slots=slots - 1), scores)
    yield rule("head of values", output, dict(out_features=32), dict(out_features=40), scores)
