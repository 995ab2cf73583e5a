# SPDX-License-Identifier: Apache-2.0
"""Random descriptors of every operation, and descriptors that are one step on either side of each rule."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.control.descriptor import (
    DATA_ALIGNMENT,
    DESCRIPTOR_WORDS,
    FLOAT_BYTES,
    WEIGHT_ALIGNMENT,
    Descriptor,
    DescriptorField,
    VectorDescriptor,
)
from hw.spec.memory.geometry import LayerLayout
from hw.spec.numerics.vector import PARTIAL_SUMS, PIECE
from hw.spec.ops import OPS, Op
from hw.spec.ops.epilogue import EPILOGUE_FIELDS, FLAGS, HEAD_UNIT, MAX_HEAD, PIECE_BYTES
from sim.bench.attention.descriptors import AttentionDescriptor

__all__ = ["AnyDescriptor", "Case", "cases", "fields_of", "mutations", "op_of", "random_linear", "random_vector"]

AnyDescriptor = Descriptor | VectorDescriptor | AttentionDescriptor
FIELD = {field.name: field for op in OPS.values() for field in op.fields}


def fields_of(config: AcceleratorConfig, descriptor: AnyDescriptor) -> tuple[DescriptorField, ...]:
    """The fields of a descriptor that this hardware has."""
    return op_of(descriptor).fields_of(config)


def op_of(descriptor: AnyDescriptor) -> Op:
    """The operation of a descriptor, also if its opcode is wrong."""
    return next(op for op in OPS.values() if op.fields == descriptor.op_fields)


def _any(name: str, random: np.random.Generator) -> int:
    """A random value of a field."""
    return int(random.integers(1 << FIELD[name].width)) * FIELD[name].unit


def _pitch(name: str, size: int, tokens: int, random: np.random.Generator) -> int:
    """A random pitch for rows of `size` bytes, or 0."""
    if tokens == 1:
        # It has no effect.
        return _any(name, random)
    least = -(-size // DATA_ALIGNMENT)
    return int(random.choice([least, least + 1, int(random.integers(least, 1 << FIELD[name].width))])) * DATA_ALIGNMENT


def _epilogue(config: AcceleratorConfig, n: int, tokens: int, random: np.random.Generator) -> dict[str, int]:
    """A random valid epilogue of N columns."""
    if not config.has_vector_unit:
        return {"result_pitch": _pitch("result_pitch", FLOAT_BYTES * n, tokens, random)}
    flags = {field.name: int(random.integers(2)) for field in FLAGS}
    flags["rotary"] &= int(n >= HEAD_UNIT)
    flags["silu"] &= int(n % 2 == 0 and not flags["rotary"])
    flags["squares"] &= int(n % PARTIAL_SUMS == 0)
    if flags["silu"]:
        flags |= dict(second=0, pieces=0, squares=0)
    flags["pieces"] &= 1 - flags["second"]
    flags["quiet"] &= flags["second"] | flags["pieces"]
    values = {field.name: _any(field.name, random) for field in EPILOGUE_FIELDS} | flags
    columns = n >> flags["silu"]
    head = heads = 0
    if flags["rotary"]:
        head = HEAD_UNIT * int(random.integers(1, min(n, MAX_HEAD) // HEAD_UNIT, endpoint=True))
        heads = int(random.integers(1, min(n // head, (1 << FIELD["rotary_heads"].width) - 1), endpoint=True))
    second_bytes = FLOAT_BYTES * columns if flags["second"] else PIECE_BYTES * -(-columns // PIECE)
    values |= {"head": head, "rotary_heads": heads}
    if not flags["quiet"]:
        values["result_pitch"] = _pitch("result_pitch", FLOAT_BYTES * columns, tokens, random)
    if flags["second"] or flags["pieces"]:
        values["second_pitch"] = _pitch("second_pitch", second_bytes, tokens, random)
    for name, size, wanted in (("addend", FLOAT_BYTES * n, "add"), ("table", FLOAT_BYTES * head, "rotary")):
        if flags[wanted]:
            shared = int(random.integers(2))
            values[f"{name}_pitch"] = 0 if shared else _pitch(f"{name}_pitch", size, tokens, random)
    return values


def random_linear(layer: LayerLayout, random: np.random.Generator, reuse: Descriptor | None = None) -> Descriptor:
    """A valid descriptor of a layer, anywhere in memory, for a random number of tokens, with a random epilogue.

    reuse : the previous linear layer, whose activations it uses
    """
    config = layer.config
    tokens = int(random.integers(1, config.max_tokens, endpoint=True)) if reuse is None else reuse.tokens
    return Descriptor.from_layer(
        layer,
        tokens,
        **{name: _any(name, random) for name in ("activations", "weights", "results")},
        reuse=reuse is not None,
        interrupt=bool(random.integers(2)),
        wait=int(random.integers(3)),  # pyright: ignore[reportArgumentType]
        **_epilogue(config, layer.n, tokens, random),
    )


def random_vector(config: AcceleratorConfig, random: np.random.Generator, n: int) -> VectorDescriptor:
    """A valid descriptor of an epilogue of N columns, anywhere in memory, for a random number of tokens."""
    tokens, shared = int(random.integers(1, config.max_tokens, endpoint=True)), int(random.integers(2))
    return VectorDescriptor(
        tokens=tokens,
        out_features=n,
        activations=_any("activations", random),
        source_pitch=0 if shared else _pitch("source_pitch", FLOAT_BYTES * n, tokens, random),
        results=_any("results", random),
        interrupt=int(random.integers(2)),
        wait=int(random.integers(3)),
        **_epilogue(config, n, tokens, random),
    )


class Case(NamedTuple):
    """A rule, and two changes of the same descriptor: with the first it is valid, with the second it is not.

    tokens : the number of tokens for which the rule applies: pitches have no effect if it is 1
    """

    rule: str
    good: dict[str, int]
    bad: dict[str, int]
    tokens: int = 1


_SECOND = dict(second=1, second_pitch=4 * 512)
_ROTARY = dict(rotary=1, head=64, rotary_heads=2)
_SILU = dict(silu=1, result_pitch=4 * 256)

_CASES = (
    Case("wait", dict(wait=2), dict(wait=3)),
    Case("pitch of results", dict(result_pitch=4 * 512), dict(result_pitch=4 * 512 - 128), 2),
)
_EPILOGUE_CASES = (
    Case("rotary or silu", _ROTARY, _ROTARY | _SILU),
    Case("silu", _SILU, _ROTARY | _SILU),
    Case("silu or second output", _SECOND, _SECOND | _SILU),
    Case("silu or pieces", dict(pieces=1, second_pitch=128), dict(pieces=1, second_pitch=128) | _SILU),
    Case("silu or squares", dict(squares=1), dict(squares=1) | _SILU),
    Case("columns of squares", dict(squares=1), dict(squares=1, out_features=512 - 8)),
    Case("second or pieces", _SECOND, _SECOND | dict(pieces=1)),
    Case("second output", _SECOND | dict(quiet=1), dict(quiet=1)),
    Case("output of pieces", dict(quiet=1, pieces=1, second_pitch=128), dict(quiet=1)),
    Case("pairs of silu", _SILU | dict(out_features=510), _SILU | dict(out_features=511)),
    Case("most heads", _ROTARY | dict(rotary_heads=8), _ROTARY | dict(rotary_heads=9)),
    Case("least heads", _ROTARY | dict(rotary_heads=1), _ROTARY | dict(rotary_heads=0)),
    Case("last column of the heads", _ROTARY | dict(out_features=128), _ROTARY | dict(out_features=127)),
    Case("smallest head", _ROTARY | dict(head=16), _ROTARY | dict(head=8)),
    Case("no head", _ROTARY | dict(head=16), _ROTARY | dict(head=0)),
    Case("head", _ROTARY | dict(head=32), _ROTARY | dict(head=24)),
    Case("largest head", _ROTARY | dict(head=256), _ROTARY | dict(head=256 + 16, rotary_heads=1)),
    Case("head without rotary", {}, dict(head=16)),
    Case("heads without rotary", {}, dict(rotary_heads=1)),
    Case("no results", _SECOND | dict(quiet=1, result_pitch=0), _SECOND | dict(result_pitch=0), 2),
    Case("results of silu", _SILU, _SILU | dict(result_pitch=4 * 256 - 128), 2),
    Case("pitch of the second output", _SECOND, _SECOND | dict(second_pitch=4 * 512 - 128), 2),
    Case("pitch of pieces", dict(pieces=1, second_pitch=128), dict(pieces=1, second_pitch=0), 2),
    Case(
        "pitch of 17 pieces",
        dict(pieces=1, second_pitch=128, out_features=4096, result_pitch=4 * 4128),
        dict(pieces=1, second_pitch=128, out_features=4097, result_pitch=4 * 4128),
        2,
    ),
    Case("no second output", dict(second_pitch=0), _SECOND | dict(second_pitch=0), 2),
    Case("pitch of the addend", dict(add=1, addend_pitch=4 * 512), dict(add=1, addend_pitch=4 * 512 - 128), 2),
    Case("addend of silu", _SILU | dict(add=1, addend_pitch=4 * 512), _SILU | dict(add=1, addend_pitch=4 * 256), 2),
    Case("one row of the addend", dict(add=1, addend_pitch=0), dict(add=1, addend_pitch=128), 2),
    Case("no addend", dict(addend_pitch=128), dict(add=1, addend_pitch=128), 2),
    Case("pitch of the table", _ROTARY | dict(table_pitch=4 * 64), _ROTARY | dict(table_pitch=4 * 64 - 128), 2),
    Case("one row of the table", _ROTARY | dict(table_pitch=0), _ROTARY | dict(table_pitch=128), 2),
    Case("no table", dict(table_pitch=128), _ROTARY | dict(table_pitch=128), 2),
)
_VECTOR_CASES = (
    Case("pitch of the source", dict(source_pitch=4 * 512), dict(source_pitch=4 * 512 - 128), 2),
    Case("one row of the source", dict(source_pitch=0), dict(source_pitch=128), 2),
    Case("columns", dict(out_features=MAX_N, tokens=1), dict(out_features=MAX_N + 1, tokens=1)),
    Case("no columns", dict(out_features=1), dict(out_features=0)),
)


def _longest(config: AcceleratorConfig) -> tuple[Case, Descriptor, Descriptor]:
    """The largest K, and a larger one: all counts fit each other."""
    size = config.max_group_size // config.tile * config.tile
    longer = replace(config, max_k=config.max_k + size)
    good, bad = (
        Descriptor.from_layer(LayerLayout(longer, k // size * size, 1, size), 1, activations=0, weights=0)
        for k in (config.max_k, config.max_k + size)
    )
    return Case("largest K", {}, {}), good, bad


def cases(config: AcceleratorConfig) -> Iterator[tuple[Case, AnyDescriptor, AnyDescriptor]]:
    """Every rule that applies to this hardware, for each operation: the valid descriptor, and the one that is refused.

    For linear layers, most rules of shapes and weights are not among them: see :func:`mutations`.
    """
    size = config.max_group_size // config.tile * config.tile
    linear = Descriptor.from_layer(
        LayerLayout(config, size, 2 * 4097, size), 1, activations=0, weights=WEIGHT_ALIGNMENT, result_pitch=4 * 512
    )
    linear = replace(linear, out_features=512)
    yield _longest(config)
    vector = VectorDescriptor(tokens=1, out_features=512, activations=0, source_pitch=0, result_pitch=4 * 512)
    for base, more in ((linear, ()), (vector, _VECTOR_CASES)):
        if op_of(base).exists(config):
            for case in (*_CASES, *(_EPILOGUE_CASES if config.has_vector_unit else ()), *more):
                if case.tokens <= config.max_tokens:
                    start = replace(base, tokens=case.tokens)
                    yield case, replace(start, **case.good), replace(start, **case.bad)


def mutations(config: AcceleratorConfig, descriptor: AnyDescriptor, random: np.random.Generator) -> list[list[int]]:
    """Words of descriptors that are wrong in one place, or nearly wrong: every field, every reserved bit."""
    words, fields = [], fields_of(config, descriptor)
    for field in fields:
        value, top = getattr(descriptor, field.name) // field.unit, (1 << field.width) - 1
        steps = {0, 1, top, value + 1, value - 1, value ^ (1 << int(random.integers(field.width)))}
        steps = {step * field.unit for step in steps if 0 <= step <= top}
        words += [replace(descriptor, **{field.name: step}).to_words() for step in sorted(steps)]
    used = {bit for field in fields for bit in range(field.low, field.low + field.width)}
    for bit in sorted(set(range(32 * DESCRIPTOR_WORDS)) - used):
        whole = descriptor.to_words()
        whole[bit // 32] |= 1 << bit % 32
        words.append(whole)
    words += [
        replace(descriptor, tokens=config.max_tokens + 1).to_words(),
        replace(descriptor, out_features=MAX_N + 1).to_words(),
        *([replace(descriptor, tokens=1, result_pitch=0).to_words()] if hasattr(descriptor, "result_pitch") else []),
        [0] * DESCRIPTOR_WORDS,
        [0xFFFF_FFFF] * DESCRIPTOR_WORDS,
    ]
    return words
