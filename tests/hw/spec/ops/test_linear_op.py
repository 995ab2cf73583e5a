# SPDX-License-Identifier: Apache-2.0
"""The linear layer as an operation: from a descriptor and a memory to the results in the memory."""

from dataclasses import replace

import numpy as np
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import Descriptor, weight_bytes
from hw.spec.control.refusal import parse
from hw.spec.memory.geometry import LayerLayout, fit_layer
from hw.spec.memory.packing import pack, stripe
from hw.spec.numerics.float32 import add, mul
from hw.spec.numerics.linear import Activations, NumericsError, Weights, linear, quantize_activations
from hw.spec.ops import LINEAR
from hw.spec.ops.base import State
from hw.spec.presets import preset

ACTIVATIONS, RESULTS, ADDEND, WEIGHTS = 0x1000, 0x8000, 0x10000, 0x20000
CONFIGS = [replace(preset(name), operators="decoder") for name in ("small", "two_ports", "fixed")]
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"tile {config.tile}")


class Array:
    """The memory: an array of bytes."""

    def __init__(self):
        self.bytes = np.zeros(1 << 20, np.uint8)

    def view(self, address: int, size: int) -> np.ndarray:
        assert address >= 0 and address + size <= len(self.bytes)
        return self.bytes[address : address + size]

    def write(self, address: int, values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self.view(address, len(raw))[:] = raw


class Example:
    """A layer with its operands in memory."""

    def __init__(self, config: AcceleratorConfig, tokens: int = 3, **fields: int):
        random = np.random.default_rng(1)
        self.config, self.memory = config, Array()
        self.layer: LayerLayout = fit_layer(config, 128, 3 * config.tile + 2, 64)
        shape = self.layer.n, self.layer.k // self.layer.group_size
        self.weights = Weights(
            random.integers(0, config.weight_max, (self.layer.n, self.layer.k), np.uint8, endpoint=True),
            random.integers(0, config.weight_max, shape, endpoint=True),
            random.integers(-config.scale_max, config.scale_max, shape, endpoint=True),
            random.integers(-20, 0, self.layer.n),
        )
        self.x = random.standard_normal((tokens, self.layer.k)).astype(np.float32)
        self.descriptor = replace(
            Descriptor.from_layer(self.layer, tokens, activations=ACTIVATIONS, weights=WEIGHTS, results=RESULTS),
            **fields,
        )
        assert WEIGHTS + weight_bytes(self.layer) <= len(self.memory.bytes)
        for port, region in enumerate(stripe(config, pack(self.layer, self.weights))):
            self.memory.write(WEIGHTS + port * self.descriptor.weights_stride, region)
        self.memory.write(ACTIVATIONS, self.x)

    @property
    def activations(self) -> Activations:
        return quantize_activations(self.config, self.x)

    @property
    def expected(self) -> np.ndarray:
        return linear(self.config, self.weights, self.activations)

    def run(self, state: State, **fields: int) -> np.ndarray:
        """The results in memory: uint32 [M, N]."""
        words = replace(self.descriptor, **fields).to_words()
        values, _ = parse(words, LINEAR.fields)
        assert not LINEAR.shape_is_wrong(self.config, values, values)
        LINEAR.execute(self.config, values, self.memory, state)
        pitch, n = self.descriptor.result_pitch, self.layer.n
        rows = [self.memory.view(RESULTS + m * pitch, 4 * n) for m in range(len(self.x))]
        return np.stack(rows).view(np.uint32)


@EVERY_CONFIG
def test_execute(config: AcceleratorConfig):
    """It reads weights and activations, and writes what compute and hw.spec.numerics give; nothing else."""
    example, state = Example(config), State()
    before = example.memory.bytes.copy()
    found = example.run(state)
    assert (found == example.expected.view(np.uint32)).all()
    assert (LINEAR.compute(config, example.weights, example.activations) == example.expected).all()
    fields, _ = parse(example.descriptor.to_words(), LINEAR.fields)
    assert LINEAR.layout(config, fields) == example.layer
    for read, packed in zip(LINEAR.read_weights(config, fields, example.memory), example.weights, strict=True):
        assert (read == packed).all()
    pitch = example.descriptor.result_pitch
    for m in range(len(example.x)):
        example.memory.view(RESULTS + m * pitch, 4 * example.layer.n)[:] = 0
    assert (example.memory.bytes == before).all()


@EVERY_CONFIG
def test_reuse(config: AcceleratorConfig):
    """The activations of the last linear layer are used, not those in memory."""
    example, state = Example(config), State()
    example.run(state)
    example.memory.write(ACTIVATIONS, np.full_like(example.x, np.nan))
    assert (example.run(state, reuse=1) == example.expected.view(np.uint32)).all()


@EVERY_CONFIG
def test_epilogue(config: AcceleratorConfig):
    """The epilogue gets the results of the layer."""
    r, state = np.array([0.5, 3, -1.7], np.float32), State()
    example = Example(config, scale=1, add=1, addend=ADDEND)
    row = np.random.default_rng(2).standard_normal(example.layer.n).astype(np.float32)
    example.memory.write(ADDEND, row)
    state.r = r
    expected = add(mul(example.expected, r[:, None]), row)
    assert (example.run(state) == expected.view(np.uint32)).all()
    assert (expected != example.expected).any()


def test_activations_out_of_range():
    example = Example(CONFIGS[0])
    example.memory.write(ACTIVATIONS + 400, np.array([np.inf], np.float32))
    with pytest.raises(NumericsError):
        example.run(State())
