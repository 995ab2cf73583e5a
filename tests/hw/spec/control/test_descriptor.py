# SPDX-License-Identifier: Apache-2.0
"""The descriptor: the places and widths of its fields, for every layer of every config, and clear refusals."""

import re
from dataclasses import fields, replace
from itertools import product

import pytest

from hw.spec.config import MAX_N, AcceleratorConfig, ConfigError
from hw.spec.control.descriptor import (
    ADDRESS_LIMIT,
    BANK_SPAN,
    DATA_ALIGNMENT,
    DESCRIPTOR_WORDS,
    FIELDS,
    WEIGHT_ALIGNMENT,
    Descriptor,
    activation_beats,
    region_bytes,
    result_pitch,
    weight_bytes,
    weights_stride,
)
from hw.spec.memory.geometry import LayerLayout, StreamLayout
from hw.spec.ops import Wait
from hw.spec.ops.command import max_header_beats

WIDTHS = {field.name: field.width for field in FIELDS}


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


def unpack(words: list[int]) -> dict[str, int]:
    """The fields of a descriptor, extracted bit by bit; a 1 in any other bit is an error."""
    assert len(words) == DESCRIPTOR_WORDS and all(0 <= word < 1 << 32 for word in words)
    whole = sum(word << 32 * index for index, word in enumerate(words))
    found = {}
    for field in FIELDS:
        mask = ((1 << field.width) - 1) << field.low
        found[field.name], whole = (whole & mask) >> field.low, whole & ~mask
    assert whole == 0
    return found


def descriptor(layer: LayerLayout, tokens: int = 1, **options: bool) -> Descriptor:
    top = ADDRESS_LIMIT - WEIGHT_ALIGNMENT
    return Descriptor.from_layer(layer, tokens, activations=top, weights=top, results=top, **options)


def test_fields_fit_and_do_not_overlap():
    end = 0
    for field in FIELDS:
        assert field.low >= end and field.width > 0 and field.text, field.name
        end = field.low + field.width
        # A driver in C writes a field with one shift and one mask, or an address as two words.
        assert field.low // 32 == (end - 1) // 32 or (field.low % 32, field.width) == (0, 64), field.name
    assert end <= 32 * DESCRIPTOR_WORDS


def test_fields_are_the_attributes():
    assert {field.name for field in fields(Descriptor)} == set(WIDTHS)


def test_round_trip():
    for index, field in enumerate(FIELDS):
        values = {other.name: 0 for other in FIELDS} | {field.name: (1 << field.width) - 1}
        assert unpack(Descriptor(**values).to_words()) == values
        values = {other.name: (0x9E37_79B9_7F4A_7C15 * (index + at + 1)) % (1 << other.width)
                  for at, other in enumerate(FIELDS)}  # fmt: skip
        assert unpack(Descriptor(**values).to_words()) == values


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_too_large_values_are_refused(field):
    good = descriptor(LayerLayout(AcceleratorConfig(), k=128, n=16, group_size=128))
    for value in (1 << field.width, -1):
        message = f"descriptor field {field.name} holds {field.width} bits, not {value}"
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            replace(good, **{field.name: value}).to_words()


def test_from_layer():
    layer = LayerLayout(AcceleratorConfig(), k=896, n=1150, group_size=128)
    made = Descriptor.from_layer(
        layer, 3, activations=64, weights=4096, results=128, reuse=True, interrupt=True, wait=Wait.WEIGHTS
    )
    assert unpack(made.to_words()) == dict(
        opcode=1, reuse=1, interrupt=1, wait=2, tokens=3, groups=7, group_slices=8, out_features=1150,
        # A header of 5 beats and 56 slices of two words.
        header_beats=5, body_words=112, activations=64, results=128, weights=4096,
        weights_stride=weights_stride(layer), result_pitch=4608,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=re.escape("M is 1 to max_tokens (16), not 17")):
        descriptor(layer, 17)


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
    assert all(value < 1 << WIDTHS[name] for name, value in reached.items())


def test_weights_of_a_port_are_below_4_gib():
    """The limit of weights_stride: a larger layer is refused, not truncated."""
    refused = 0
    for config in CONFIGS:
        layer = largest(config, smallest_group(config))
        if weights_stride(layer) >> WIDTHS["weights_stride"]:
            refused += 1
            with pytest.raises(ConfigError, match=r"^descriptor field weights_stride holds 32 bits, not \d+$"):
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
    assert result_pitch(MAX_N) < 1 << WIDTHS["result_pitch"]


def test_address_space():
    """No operand that starts below the limit ends beyond the address space of the ports."""
    furthest = max(4 << WIDTHS["weights_stride"], 64 << WIDTHS["result_pitch"], 4 * 64 * 32768)
    assert ADDRESS_LIMIT + furthest <= 1 << 40
    assert ADDRESS_LIMIT.bit_length() <= WIDTHS["activations"]
