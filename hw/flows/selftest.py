# SPDX-License-Identifier: Apache-2.0
"""The vectors of a board's self-test: the streams of a small layer, with the results of the numpy definition."""

from typing import cast

import numpy as np
from amaranth.lib import wiring

from hw.boards.selftest import SelfTest, Vectors
from hw.rtl.common.results import result_payload
from hw.rtl.core.core import Core
from hw.spec.config import EXPONENT_BITS, FIXED_ZERO_POINT_BITS, AcceleratorConfig
from hw.spec.memory.geometry import fit_layer
from hw.spec.memory.packing import pack
from hw.spec.memory.transfers import result_transfers
from hw.spec.numerics.linear import Activations, Weights, linear
from hw.spec.ops.command import LayerCommand

_GROUP_SIZE = 32
_GROUPS = 4
_SEED = 2024
SIM_DIVISOR, SIM_PAUSE = 4, 16
"""Small values, so that the UART does not take most of the simulated time."""


def selftest_vectors(config: AcceleratorConfig, seed: int = _SEED) -> Vectors:
    """Vectors of one random layer for ``max_tokens`` tokens: three output tiles, the last one not full, four groups.

    Weights, zero points, scales and activations use their full ranges; exponents are around 0.

    Raises
    ------
    ConfigError : the config's ``max_k`` is less than a group
    """
    tokens, n = config.max_tokens, 3 * config.tile - 1
    layer = fit_layer(config, min(_GROUPS * _GROUP_SIZE, config.max_k // _GROUP_SIZE * _GROUP_SIZE), n, _GROUP_SIZE)
    random = np.random.default_rng(seed)
    half = 1 << (FIXED_ZERO_POINT_BITS - 1)
    low, high = (-half, half - 1) if config.zero_point_signed else (0, config.weight_max)
    weights = Weights(
        random.integers(0, config.weight_max, (n, layer.k), endpoint=True).astype(np.uint8),
        random.integers(low, high, (n, layer.groups), endpoint=True),
        random.integers(-config.scale_max, config.scale_max, (n, layer.groups), endpoint=True),
        random.integers(-20, 20, n),
    )
    activations = Activations(
        random.integers(-config.activation_max, config.activation_max, (tokens, layer.k), endpoint=True),
        random.integers(-20, 20, tokens),
    )
    beats = pack(layer, weights)
    return Vectors(
        LayerCommand.from_layer(layer, tokens).to_int(config),
        tuple(int.from_bytes(beat.tobytes(), "little") for beat in beats),
        _activation_payloads(config, activations),
        _result_payloads(config, linear(config, weights, activations)),
    )


def _activation_payloads(config: AcceleratorConfig, activations: Activations) -> tuple[int, ...]:
    """Slice by slice, with all tokens of a slice in a row: mantissas from the lowest bit, then the token's exponent."""
    tokens, k = activations.mantissas.shape
    bits, payloads = config.activation_bits, []
    for first in range(0, k, config.tile):
        for token in range(tokens):
            payload = (int(activations.exponents[token]) % (1 << EXPONENT_BITS)) << (config.tile * bits)
            for place in range(config.tile):
                payload |= (int(activations.mantissas[token, first + place]) % (1 << bits)) << (place * bits)
            payloads.append(payload)
    return tuple(payloads)


def _result_payloads(config: AcceleratorConfig, y: np.ndarray) -> tuple[int, ...]:
    """The transfers of :mod:`hw.spec.memory.transfers` in order; values of lanes without a column are 0."""
    bits, layout = y.view(np.uint32), result_payload(config, config.lanes)
    payloads = []
    for transfer in result_transfers(config, *y.shape):
        values = bits[transfer.token, transfer.columns.start : transfer.columns.stop].tolist()
        payloads.append(layout.const({"values": values, **transfer.fields}).as_bits())
    return tuple(payloads)


def selftest_title(config: AcceleratorConfig) -> str:
    """The beginning of the self-test's line."""
    return f"gristmill tile {config.tile} config {config.digest[:8]}"


def selftest(config: AcceleratorConfig, divisor: int = SIM_DIVISOR, pause: int = SIM_PAUSE) -> SelfTest:
    """The self-test of a core of this config; the default UART and pause are for simulation.

    Raises ConfigError like :func:`selftest_vectors`.
    """
    core = cast(wiring.Component, Core(config))
    return SelfTest(core, selftest_vectors(config), selftest_title(config), divisor, pause)
