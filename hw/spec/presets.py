# SPDX-License-Identifier: Apache-2.0
"""Configs with names, for tests, benches and boards."""

from typing import Any

from hw.spec.config import AcceleratorConfig, ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    # The smallest hardware that still has every feature: it builds in seconds on both simulators.
    "small": dict(tile=4, ports=1, port_width=64, max_tokens=5, max_k=1024),
    # Several slices in a word, a single token, few bits.
    "wide": dict(
        tile=4, weight_bits=2, activation_bits=8, ports=4, port_width=128, max_tokens=1, max_k=1024, max_group_size=256
    ),
    # Several beats in a word, and transfers of results that are longer than a beat.
    "narrow": dict(tile=16, weight_bits=8, ports=1, port_width=32, max_tokens=3, max_k=1024, lanes=4),
    # The widest sums, weights that do not fill a byte, and pairs of results.
    "fixed": dict(
        tile=8, weight_bits=7, zero_point="fixed", ports=2, port_width=128, max_tokens=9, max_k=2048, lanes=2
    ),
    # Two ports, the fewest that take turns, and a row of activations in several beats.
    "two_ports": dict(tile=8, zero_point="fixed", ports=2, port_width=32, max_tokens=6, max_k=1024),
    # The figures in the documentation are for these two.
    "tile16": dict(tile=16, ports=4, port_width=128, max_tokens=16, max_k=1024),
    "tile32": dict(tile=32, ports=4, port_width=128, max_tokens=16, max_k=1024, lanes=2),
    # The designs of `make bitstream BOARD=ulx3s`: one slice in a beat, limits for the self-test's small layer.
    "ulx3s4": dict(tile=4, activation_bits=8, ports=1, port_width=64, max_tokens=4, max_k=128, max_group_size=32),
    "ulx3s8": dict(tile=8, activation_bits=8, ports=2, port_width=128, max_tokens=4, max_k=128, max_group_size=32),
}
"""Parameters by name; all others have their defaults."""

SELFTEST_BOARDS = {"ulx3s": {4: "ulx3s4", 8: "ulx3s8"}}
"""Boards that have a self-testing core: preset by tile."""


def preset(name: str) -> AcceleratorConfig:
    """The config of this name; raises ConfigError if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"preset is one of {', '.join(PRESETS)}, not {name!r}")
    return AcceleratorConfig(**PRESETS[name])
