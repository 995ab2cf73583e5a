# SPDX-License-Identifier: Apache-2.0
"""The configuration: the values that it refuses, its messages, and its derived widths against brute-force bounds."""

import dataclasses
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from hw.spec.config import MAX_N, RULES, AcceleratorConfig, ConfigError, Limit, choices, default_lanes, signed_bits

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(tile=5), r"^tile is one of 4, 8, 16, 32, not 5$"),
        (dict(tile=0), r"^tile is one of 4, 8, 16, 32, not 0$"),
        (dict(tile="16"), r"^tile is one of 4, 8, 16, 32, not '16'$"),
        (dict(weight_bits=1), r"^weight_bits is one of 2, 3, 4, 5, 6, 7, 8, not 1$"),
        (dict(weight_bits=9), r"^weight_bits is one of 2, 3, 4, 5, 6, 7, 8, not 9$"),
        (dict(activation_bits=7), r"^activation_bits is one of 8, 9, .*, 16, not 7$"),
        (dict(activation_bits=17), r"^activation_bits is one of 8, 9, .*, 16, not 17$"),
        (dict(zero_point="float"), r"^zero_point is one of integer, fixed, not 'float'$"),
        (dict(ports=3), r"^ports is one of 1, 2, 4, not 3$"),
        (dict(ports=True), r"^ports is one of 1, 2, 4, not True$"),
        (dict(port_width=256), r"^port_width is one of 32, 64, 128, not 256$"),
        (dict(max_group_size=48), r"^max_group_size is one of 32, 64, 128, 256, not 48$"),
        (dict(lanes=3), r"^lanes is one of 1, 2, 4, 8, not 3$"),
        (dict(tile=4, lanes=8), r"^lanes is at most the tile \(4\), not 8$"),
        (dict(max_tokens=0), r"^max_tokens is a whole number from 1 to 64, not 0$"),
        (dict(max_tokens=65), r"^max_tokens is a whole number from 1 to 64, not 65$"),
        (dict(max_tokens=True), r"^max_tokens is a whole number from 1 to 64, not True$"),
        (dict(max_tokens=1.5), r"^max_tokens is a whole number from 1 to 64, not 1.5$"),
        (dict(max_k=31), r"^max_k is a whole number from 32 to 32,768, not 31$"),
        (dict(max_k=32784), r"^max_k is a whole number from 32 to 32,768, not 32784$"),
        (dict(max_k=100), r"^max_k is a multiple of the tile \(16\), not 100$"),
        (dict(score_words=96, operators="decoder"), r"^score_words is a multiple of 64, not 96$"),
        (
            dict(weight_bits=8, zero_point="fixed", max_k=32768),
            r"^the sum over max_k=32768 takes 66 bits, and the numerics are defined in 64: lower max_k, ",
        ),
    ],
)
def test_refusal_names_rule_and_value(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        AcceleratorConfig(**values)


def test_is_frozen_and_hashable():
    config = AcceleratorConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tile = 8  # type: ignore[misc]
    assert config == AcceleratorConfig() and hash(config) == hash(AcceleratorConfig())


def test_widths_of_the_design():
    integer = AcceleratorConfig(max_k=8704)
    assert (integer.centred_bits, integer.sum_bits) == (27, 48)
    assert integer.fraction_bits == 0
    fixed = AcceleratorConfig(max_k=8192, zero_point="fixed")
    assert (fixed.centred_bits, fixed.sum_bits) == (39, 60)
    assert fixed.fraction_bits == 11


@pytest.mark.parametrize("bound", [1, 2, 3, 4, 7, 8, 127, 128, 32767, 32768])
def test_signed_bits_is_the_smallest_width(bound: int):
    bits = signed_bits(bound)
    assert bound <= 2 ** (bits - 1) - 1
    assert bound > 2 ** (bits - 2) - 1


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "zero_point", "group"),
    list(product((2, 4, 7), (8, 16), ("integer", "fixed"), (32, 128))),
)
def test_widths_hold_every_extreme(weight_bits: int, activation_bits: int, zero_point: str, group: int):
    """The sums of extreme weights, zero points, activations and scales fit their widths and need all bits of them."""
    k = 1024
    config = AcceleratorConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        zero_point=zero_point,
        max_group_size=group,
        max_k=k,
    )
    x = 2 ** (activation_bits - 1) - 1
    q_values = (0, 2**weight_bits - 1)
    z_values = (0, 2**weight_bits - 1) if zero_point == "integer" else (-(2**15), 2**15 - 1)
    centred = max(abs(q * 2**config.fraction_bits - z) for q in q_values for z in z_values)
    largest = {
        "psum_bits": config.tile * q_values[1] * x,
        "group_bits": group * q_values[1] * x,
        "activation_sum_bits": group * x,
        "centred_bits": group * centred * x,
        "sum_bits": k * centred * x * (2**15 - 1),
    }
    for name, value in largest.items():
        bits = getattr(config, name)
        assert value < 2 ** (bits - 1), name
        assert value >= 2 ** (bits - 2), f"{name} is wider than it need be"


def test_exponent_width_holds_every_sum():
    for zero_point in ("integer", "fixed"):
        config = AcceleratorConfig(zero_point=zero_point)
        lowest, highest = -128 - 128 - 15 - config.fraction_bits, 127 + 127 - 15 - config.fraction_bits
        half = 2 ** (config.exponent_sum_bits - 1)
        assert -half <= lowest
        assert highest < half


def test_dictionary_round_trip():
    config = AcceleratorConfig(tile=8, zero_point="fixed", max_tokens=3)
    assert AcceleratorConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"^a config has the fields .*tile.*, not tile$"):
        AcceleratorConfig.from_dict({"tile": 8})
    with pytest.raises(ConfigError, match=r"not .*colour"):
        AcceleratorConfig.from_dict({**config.to_dict(), "colour": "red"})


def test_options_have_the_tile_s_lanes():
    """What is not given has its default; and ``lanes`` grows with the tile."""
    assert AcceleratorConfig.from_options({}) == AcceleratorConfig()
    for tile in choices("tile"):
        config = AcceleratorConfig(tile=tile, lanes=max(1, tile // 16))
        assert AcceleratorConfig.from_options({"tile": tile, "lanes": None}) == config
        assert default_lanes(tile, "linear") == config.lanes
        config = AcceleratorConfig(operators="decoder", tile=tile, lanes=max(1, tile // 8))
        assert AcceleratorConfig.from_options({"operators": "decoder", "tile": tile}) == config
    assert AcceleratorConfig.from_options({"tile": 32, "lanes": 8}) == AcceleratorConfig(tile=32, lanes=8)
    with pytest.raises(ConfigError, match=r"not .*colour"):
        AcceleratorConfig.from_options({"colour": "red"})


def test_digest_differs_between_configs():
    digests = {AcceleratorConfig(tile=tile, ports=ports).digest for tile in (4, 8, 16, 32) for ports in (1, 2, 4)}
    assert len(digests) == 12
    assert AcceleratorConfig().digest == AcceleratorConfig(tile=16).digest
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)


def test_readme_and_makefile_name_the_choices():
    """They are written by hand, and must agree with the config."""
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    assert f"| tile | {', '.join(map(str, choices('tile')))} |" in readme
    assert f"| weights | {RULES['weight_bits']} bits, " in readme
    assert f"| activations | {RULES['activation_bits']} bits, " in readme
    ports = f"| memory ports | {RULES['ports']}, of {RULES['port_width']} bits |"
    assert ports in readme
    assert f"| results per cycle | {RULES['lanes']}, at most the tile |" in readme
    tokens, k = RULES["max_tokens"], RULES["max_k"]
    assert isinstance(tokens, Limit) and isinstance(k, Limit)
    assert f"| one layer | up to {tokens.high} tokens, K up to {k.high:,}, N up to {MAX_N:,} |" in readme
    assert f"TILE={RULES['tile']} " in makefile


def test_every_parameter_has_a_rule_that_holds_its_default():
    config = AcceleratorConfig()
    assert list(RULES) == list(dataclasses.asdict(config))
    for name, rule in RULES.items():
        assert rule.text and str(rule)
        rule.check(name, getattr(config, name))


def test_hardware_without_attention_keeps_its_digest():
    config = AcceleratorConfig(operators="decoder")
    assert "score_words" not in config.to_dict()
    with_attention = dataclasses.replace(config, score_words=4096)
    assert with_attention.to_dict()["score_words"] == 4096
    assert AcceleratorConfig.from_dict(with_attention.to_dict()) == with_attention
    assert with_attention.digest != config.digest
    with pytest.raises(ConfigError, match="score_words is 0 without the vector unit"):
        dataclasses.replace(with_attention, operators="linear")


def test_config_needs_no_package():
    """hw.spec.config and hw.spec.presets are usable with Python's own library alone."""
    code = "import hw.spec.config, hw.spec.presets, sys; assert not {'numpy', 'amaranth'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
