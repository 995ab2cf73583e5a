# SPDX-License-Identifier: Apache-2.0
"""The operation VECTOR: its rows, and what it shares with linear layers; RMSNorm and a residual as descriptors."""

from dataclasses import replace

import numpy as np
import pytest

from hw.spec.control.descriptor import Opcode, VectorDescriptor, Wait, result_pitch
from hw.spec.control.refusal import parse
from hw.spec.numerics.float32 import add, mul
from hw.spec.numerics.vector import rms_norm
from hw.spec.ops import LINEAR, VECTOR, op_of
from hw.spec.ops.base import State
from hw.spec.ops.epilogue import float_bits
from hw.spec.presets import preset

CONFIG = replace(preset("small"), operators="decoder")
SOURCE, RESULTS, SECOND, FACTOR, ADDEND = 0x1000, 0x8000, 0x10000, 0x18000, 0x20000


class Array:
    """The memory: an array of bytes."""

    def __init__(self):
        self.bytes = np.random.default_rng(1).standard_normal(1 << 16).astype(np.float32).view(np.uint8)

    def view(self, address: int, size: int) -> np.ndarray:
        assert address >= 0 and address + size <= len(self.bytes)
        return self.bytes[address : address + size]

    def floats(self, address: int, count: int) -> np.ndarray:
        return self.view(address, 4 * count).view(np.float32)

    def rows(self, address: int, pitch: int, tokens: int, columns: int) -> np.ndarray:
        return np.stack([self.floats(address + m * pitch, columns) for m in range(tokens)])


def run(descriptor: VectorDescriptor, memory: Array, state: State) -> None:
    """What the accelerator does with the descriptor's words."""
    fields, clean = parse(descriptor.to_words(), VECTOR.fields)
    assert clean and not VECTOR.shape_is_wrong(CONFIG, fields, None)
    assert fields == {field.name: getattr(descriptor, field.name) for field in VECTOR.fields}
    VECTOR.execute(CONFIG, fields, memory, state)


def bits(values: np.ndarray) -> list:
    return np.asarray(values, np.float32).view(np.uint32).tolist()


@pytest.mark.parametrize("pitch", [0, 0x280, 0x500])
def test_rows(pitch: int):
    """The rows are read with their pitch, or one row for all tokens; without an epilogue they are copied."""
    memory = Array()
    source = memory.rows(SOURCE, pitch, 3, 160).copy()
    descriptor = VectorDescriptor(
        tokens=3, out_features=160, activations=SOURCE, source_pitch=pitch, results=RESULTS, result_pitch=0x300
    )
    run(descriptor, memory, State())
    assert bits(memory.rows(RESULTS, 0x300, 3, 160)) == bits(source)


def test_in_place():
    """Results may replace the rows: all rows are read first."""
    memory = Array()
    source, addend = memory.rows(SOURCE, 0x200, 2, 128).copy(), memory.floats(ADDEND, 128).copy()
    descriptor = VectorDescriptor(
        tokens=2, out_features=128, activations=SOURCE, source_pitch=0x200, results=SOURCE, result_pitch=0x200,
        add=1, addend=ADDEND,
    )  # fmt: skip
    run(descriptor, memory, State())
    assert bits(memory.rows(SOURCE, 0x200, 2, 128)) == bits(add(source, addend))


def test_norm_in_two_steps():
    """x * weight and r are those of RMSNorm: r scales what follows."""
    memory, state, n, eps = Array(), State(), 96, 1e-6
    pitch = result_pitch(n)
    x, weight = memory.rows(SOURCE, pitch, 4, n).copy(), memory.floats(FACTOR, n).copy()
    first = VectorDescriptor(
        tokens=4, out_features=n, activations=SOURCE, source_pitch=pitch, quiet=1, second=1, factor=FACTOR,
        second_results=SECOND, second_pitch=pitch, squares=1, eps=float_bits(eps),
    )  # fmt: skip
    run(first, memory, state)
    assert bits(memory.rows(SECOND, pitch, 4, n)) == bits(mul(x, weight))
    second = VectorDescriptor(
        tokens=4, out_features=n, activations=SECOND, source_pitch=pitch, scale=1, results=RESULTS, result_pitch=pitch,
        wait=Wait.ACTIVATIONS,
    )  # fmt: skip
    run(second, memory, state)
    assert bits(memory.rows(RESULTS, pitch, 4, n)) == bits(rms_norm(x, weight, eps))


def test_only_hardware_with_the_vector_unit_has_it():
    words = VectorDescriptor(tokens=1, out_features=1, activations=0, source_pitch=0).to_words()
    linear = preset("small")
    assert words[0] & 0xFF == Opcode.VECTOR
    assert op_of(CONFIG, words) is VECTOR and op_of(linear, words) is None
    assert VECTOR.fields_of(CONFIG) == VECTOR.fields and LINEAR.fields_of(CONFIG) == LINEAR.fields
    present = {field.name for field in LINEAR.fields_of(linear)}
    assert {"result_pitch", "results", "wait"} <= present and not {"scale", "eps", "quiet", "head"} & present
