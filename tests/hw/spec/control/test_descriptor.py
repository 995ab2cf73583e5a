# SPDX-License-Identifier: Apache-2.0
"""The descriptor: the places and widths of its fields, for every layer of every config, and clear refusals."""

import re
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest

from hw.spec.config import MAX_N, AcceleratorConfig, ConfigError
from hw.spec.control.descriptor import (
    ADDRESS_BITS,
    ADDRESS_LIMIT,
    BANK_SPAN,
    DATA_ALIGNMENT,
    DESCRIPTOR_WORDS,
    FIELDS,
    WEIGHT_ALIGNMENT,
    Descriptor,
    DescriptorField,
    VectorDescriptor,
    Wait,
    activation_beats,
    region_bytes,
    result_pitch,
    weight_bytes,
    weights_stride,
)
from hw.spec.control.refusal import parse
from hw.spec.memory.geometry import LayerLayout, StreamLayout
from hw.spec.ops import OPS
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.base import DescriptorWords
from hw.spec.ops.command import max_header_beats
from hw.spec.ops.scores import ScoresDescriptor
from hw.spec.ops.values import ValuesDescriptor

BY_NAME = {field.name: field for field in FIELDS}
LIMITS = {name: field.limit for name, field in BY_NAME.items()}
KINDS = (Descriptor, VectorDescriptor, AppendDescriptor, ScoresDescriptor, ValuesDescriptor)
OPERATIONS = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def configs() -> list[AcceleratorConfig]:
    """Every tile, weight width, kind of zero point and port, each with the largest possible limits."""
    found = []
    for tile, bits, zero_point, ports, width in product(
        (4, 8, 16, 32), (2, 3, 4, 5, 7, 8), ("integer", "fixed"), (1, 2, 4), (32, 64, 128)
    ):
        for max_k, group in ((32768, 256), (16384, 256), (8192, 128), (8192, 32)):
            try:
                config = AcceleratorConfig(
                    tile=tile, weight_bits=bits, zero_point=zero_point, ports=ports, port_width=width,
                    max_tokens=64, max_k=max_k, max_group_size=group,
                )  # fmt: skip
                max_header_beats(config)
            except ConfigError:
                continue
            found.append(config)
    return found


CONFIGS = configs()


def smallest_group(config: AcceleratorConfig) -> int:
    return StreamLayout(config).min_group_slices * config.tile


def largest(config: AcceleratorConfig, size: int, n: int = MAX_N) -> LayerLayout:
    return LayerLayout(config, k=config.max_k // size * size, n=n, group_size=size)


def unpack(words: list[int], kind: type[DescriptorWords] = Descriptor) -> dict[str, int]:
    """The fields of a descriptor, extracted bit by bit; a 1 in any other bit is an error."""
    assert len(words) == DESCRIPTOR_WORDS and all(0 <= word < 1 << 32 for word in words)
    whole = sum(word << 32 * index for index, word in enumerate(words))
    found = {}
    for field in kind.op_fields:
        mask = ((1 << field.width) - 1) << field.low
        found[field.name], whole = ((whole & mask) >> field.low) * field.unit, whole & ~mask
    assert whole == 0
    return found


def descriptor(layer: LayerLayout, tokens: int = 1, **options: int) -> Descriptor:
    top = ADDRESS_LIMIT - WEIGHT_ALIGNMENT
    return Descriptor.from_layer(layer, tokens, activations=top, weights=top, results=top, **options)  # pyright: ignore


@OPERATIONS
def test_fields_fit_and_do_not_overlap(kind: type[DescriptorWords]):
    end = 0
    for field in kind.op_fields:
        assert field.low >= end and field.width > 0 and field.text, field.name
        end = field.low + field.width
        # A driver in C writes a field with one shift and one mask.
        assert field.low // 32 == (end - 1) // 32, field.name
        assert field.unit & (field.unit - 1) == 0 and field.limit == field.unit << field.width
    assert end <= 32 * DESCRIPTOR_WORDS


def test_a_name_has_one_place():
    """A field that several operations have is at the same place, with the same unit."""
    for op in OPS.values():
        for field in op.fields:
            other = BY_NAME[field.name]
            assert (field.low, field.width, field.unit) == (other.low, other.width, other.unit), field.name


@OPERATIONS
def test_fields_are_the_attributes(kind: Any):
    assert {field.name for field in fields(kind)} == {field.name for field in kind.op_fields}


@OPERATIONS
def test_round_trip(kind: Any):
    names = {field.name: field for field in kind.op_fields}
    for index, (name, field) in enumerate(names.items()):
        values = dict.fromkeys(names, 0) | {name: field.limit - field.unit}
        assert unpack(kind(**values).to_words(), kind) == values
        values = {other.name: (0x9E37_79B9_7F4A_7C15 * (index + at + 1)) % (1 << other.width) * other.unit
                  for at, other in enumerate(kind.op_fields)}  # fmt: skip
        words = kind(**values).to_words()
        assert unpack(words, kind) == values
        assert parse(words, kind.op_fields) == (values, True)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_values_that_do_not_fit_are_refused(field: DescriptorField):
    kind: Any = next(kind for kind in KINDS if field.name in (other.name for other in kind.op_fields))
    good = kind(**{other.name: 0 for other in kind.op_fields})
    for value in (field.unit << field.width, -field.unit):
        message = f"descriptor field {field.name} is at least 0 and less than {field.limit}, not {value}"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            replace(good, **{field.name: value}).to_words()
    if field.unit > 1:
        for value in (1, field.unit + field.unit // 2, -1):
            message = f"descriptor field {field.name} is a multiple of {field.unit}, not {value}"
            with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
                replace(good, **{field.name: value}).to_words()


def test_from_layer():
    layer = LayerLayout(AcceleratorConfig(), k=896, n=1150, group_size=128)
    made = Descriptor.from_layer(
        layer, 3, activations=128, weights=4096, results=256, reuse=True, interrupt=True, wait=Wait.WEIGHTS
    )
    expected = dict.fromkeys((field.name for field in made.op_fields), 0) | dict(
        opcode=1, reuse=1, interrupt=1, wait=2, tokens=3, groups=7, group_slices=8, out_features=1150,
        # A header of 5 beats and 56 slices of two words.
        header_beats=5, body_words=112, activations=128, results=256, weights=4096,
        weights_stride=weights_stride(layer), result_pitch=4608,
    )  # fmt: skip
    assert unpack(made.to_words(), Descriptor) == expected
    with pytest.raises(ConfigError, match=re.escape("M is 1 to max_tokens (16), not 17")):
        descriptor(layer, 17)


def test_from_layer_with_an_epilogue():
    """The pitch of the results is that of the columns that they have, unless it is given."""
    layer = LayerLayout(AcceleratorConfig(), k=128, n=1150, group_size=128)
    made = descriptor(layer, silu=1, second=1, factor=1 << 20)
    assert (made.silu, made.second, made.factor, made.result_pitch) == (1, 1, 1 << 20, 2304)
    assert descriptor(layer, silu=1, result_pitch=1 << 14).result_pitch == 1 << 14


def test_widest_layers_fit():
    """Shapes, longest headers and longest bodies of every config fit their fields, for all relevant groups."""
    assert len(CONFIGS) > 1000
    reached = dict.fromkeys(("groups", "header_beats", "body_words"), 0)
    for config in CONFIGS:
        for size in {smallest_group(config), config.max_group_size // config.tile * config.tile}:
            layer = largest(config, size)
            # A stride over 4 GiB does not fit the field; see the next test.
            made = replace(descriptor(layer, config.max_tokens), weights_stride=0)
            values = unpack(made.to_words())
            assert values["tokens"] == config.max_tokens
            assert values["groups"] * values["group_slices"] * config.tile == layer.k
            for name in reached:
                reached[name] = max(reached[name], values[name])
    # The sweep reaches the extremes: tile 4, groups of one slice, 8-bit weights on one narrow port.
    assert reached["groups"] == 8192
    assert reached["body_words"] == 32768
    assert all(value < LIMITS[name] for name, value in reached.items())


def test_weights_of_a_port_are_below_4_gib():
    """The limit of weights_stride: a larger layer is refused, not truncated."""
    refused = 0
    for config in CONFIGS:
        layer = largest(config, smallest_group(config))
        if weights_stride(layer) >= LIMITS["weights_stride"]:
            refused += 1
            message = r"^descriptor field weights_stride is at least 0 and less than 4294967296, not \d+$"
            with pytest.raises(ConfigError, match=message):
                descriptor(layer).to_words()
        else:
            descriptor(layer).to_words()
        # The largest layers of real models: Qwen2.5's vocabulary.
        descriptor(LayerLayout(config, k=1024, n=151_936, group_size=max(32, smallest_group(config)))).to_words()
    assert refused < len(CONFIGS)


def test_regions_and_rows():
    for config in CONFIGS[::7]:
        for n in (1, config.tile + 1, 1000):
            layer = largest(config, smallest_group(config), n)
            region, used = region_bytes(layer), layer.beats * config.port_width // 8
            assert region % WEIGHT_ALIGNMENT == 0 and used <= region < used + WEIGHT_ALIGNMENT
            stride = weights_stride(layer)
            assert stride % WEIGHT_ALIGNMENT == 0 and region <= stride < region + 2 * BANK_SPAN
            starts = [port * stride % BANK_SPAN for port in range(config.ports)]
            assert sorted(starts) == [port * BANK_SPAN // config.ports for port in range(config.ports)]
            assert weight_bytes(layer) == (config.ports - 1) * stride + region
            beats = activation_beats(config, 3, layer.slices)
            assert beats * config.port_width == 3 * layer.k * 32
    for n in (1, 15, 16, 17, 1000, MAX_N):
        assert result_pitch(n) % DATA_ALIGNMENT == 0 and 4 * n <= result_pitch(n) < 4 * n + DATA_ALIGNMENT
    assert result_pitch(MAX_N) < min(limit for name, limit in LIMITS.items() if name.endswith("_pitch"))


def test_address_space():
    """No operand ends beyond the address space of the ports."""
    pitches = max(limit for name, limit in LIMITS.items() if name.endswith("_pitch"))
    furthest = max(4 * LIMITS["weights_stride"], 64 * pitches, 4 * 64 * 32768)
    assert ADDRESS_LIMIT + furthest <= 1 << ADDRESS_BITS
    addresses = ("activations", "results", "weights", "addend", "factor", "second_results", "table")
    assert {LIMITS[name] for name in addresses} == {ADDRESS_LIMIT}
