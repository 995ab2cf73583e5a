# SPDX-License-Identifier: Apache-2.0
"""Buffers in a device's memory, and the layout of a layer's weights and results in them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hw.spec.control.descriptor import BANK_SPAN
from sw.devices import make_config
from sw.devices.arena import MEMORY_BASE, MEMORY_BYTES, Arena, anonymous_memory
from sw.devices.base import PAGE, Buffer, DeviceError, image_beats, result_bytes, weight_bytes, weight_image
from sw.devices.pack import prepare
from tests.sw.fixtures.linears import random_linear


def small(pages=8, base=MEMORY_BASE):
    return Arena(np.zeros(pages * PAGE, np.uint8), base)


def test_alloc():
    """Buffers are page-aligned, do not overlap, are within the memory, and hold their own bytes."""
    arena = small(base=0x4000_0000)
    buffers = [arena.alloc(size) for size in (1, PAGE, PAGE + 1, 10)]
    assert all(buffer.address % PAGE == 0 for buffer in buffers)
    assert all(a.address + a.size <= b.address for a, b in pairwise(buffers))
    assert buffers[0].address == 0x4000_0000
    for index, buffer in enumerate(buffers):
        arena.view(buffer)[:] = index + 1
    for index, buffer in enumerate(buffers):
        assert arena.view(buffer).tolist() == [index + 1] * buffer.size
    assert np.count_nonzero(arena.memory) == sum(buffer.size for buffer in buffers)
    assert arena.memory[buffers[2].address - arena.base] == 3


def test_memory_is_reused():
    arena = small()
    first, second, third = arena.alloc(2 * PAGE), arena.alloc(PAGE + 1), arena.alloc(PAGE)
    arena.free(second)
    # The gap of two pages holds this, and not the one after.
    assert arena.alloc(2 * PAGE) == replace(second, size=2 * PAGE)
    assert arena.alloc(3 * PAGE).address == third.address + PAGE
    with pytest.raises(DeviceError, match=r"^the device's memory \(32,768 bytes\) has no room for 1 more$"):
        arena.alloc(1)
    arena.free(first)
    assert arena.alloc(1).address == arena.base


def test_all_of_it():
    """The last byte can be allocated, but no byte after it."""
    arena = small(pages=3)
    with pytest.raises(DeviceError, match="has no room for 12,289 more"):
        arena.alloc(3 * PAGE + 1)
    whole = arena.alloc(3 * PAGE)
    assert len(arena.view(whole)) == 3 * PAGE
    arena.free(whole)
    arena.alloc(PAGE)
    with pytest.raises(DeviceError, match="has no room for 8,193 more"):
        arena.alloc(2 * PAGE + 1)


@pytest.mark.parametrize("size", [0, -1])
def test_nothing(size):
    with pytest.raises(DeviceError, match=f"^a buffer has at least 1 byte, not {size}$"):
        small().alloc(size)


def test_what_is_not_allocated():
    """A freed buffer, a buffer of another size, and an address inside a buffer are refused."""
    arena = small()
    kept, freed = arena.alloc(100), arena.alloc(200)
    arena.free(freed)
    inside = Buffer(kept.address + 4, 96)
    for wrong in (freed, replace(kept, size=99), inside, Buffer(0, 1)):
        message = f"^no buffer of {wrong.size} bytes is allocated at address {wrong.address:#x}$"
        with pytest.raises(DeviceError, match=message):
            arena.free(wrong)
        with pytest.raises(DeviceError, match=message):
            arena.view(wrong)
    assert len(arena.view(kept)) == 100


def test_many_buffers():
    """Buffers are allocated and freed at random: no two overlap, and in the end all memory is free again."""
    rng, arena, held = np.random.default_rng(1), small(pages=64), {}
    for step in range(1, 500):
        if held and rng.random() < 0.45:
            buffer, value = held.popitem() if rng.random() < 0.5 else next(iter(held.items()))
            assert (arena.view(buffer) == value).all()
            held.pop(buffer, None)
            arena.free(buffer)
        else:
            try:
                buffer = arena.alloc(int(rng.integers(1, 6 * PAGE)))
            except DeviceError:
                continue
            arena.view(buffer)[:] = step % 256
            held[buffer] = step % 256
    for buffer, value in held.items():
        assert (arena.view(buffer) == value).all()
        arena.free(buffer)
    arena.alloc(64 * PAGE)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says what a process holds")
def test_memory_is_used_when_it_is_written():
    """The address space of a simulated device takes no memory, and freed buffers return their memory."""
    size, before = 64 << 20, resident()
    arena = Arena(anonymous_memory(MEMORY_BYTES))
    buffer = arena.alloc(size)
    assert resident() - before < size // 4
    arena.view(buffer)[:] = 1
    assert resident() - before > size // 2
    arena.free(buffer)
    assert resident() - before < size // 4


@pytest.mark.parametrize(("ports", "n"), [(1, 40), (2, 40), (4, 40), (4, 4000)])
def test_weights_are_striped(ports, n):
    """Each port's bytes of every beat are in a page-aligned range of their own, spread over the memory's banks."""
    config = make_config(tile=16, ports=ports)
    prepared = prepare(config, random_linear(np.random.default_rng(12), n, 320, 64))
    image, width = weight_image(prepared.layout, prepared.beats), config.port_width // 8
    stride = (len(image) - -(-prepared.layout.beats * width // PAGE) * PAGE) // max(1, ports - 1)
    assert len(image) == weight_bytes(prepared.layout)
    assert stride % PAGE == 0
    assert sorted(port * stride % BANK_SPAN for port in range(ports)) == [
        port * BANK_SPAN // ports for port in range(ports)
    ]
    for port in range(ports):
        region = image[port * stride :][: prepared.layout.beats * width].reshape(-1, width)
        assert np.array_equal(region, prepared.beats[:, width * port : width * (port + 1)])
    assert np.array_equal(image_beats(prepared.layout, image), prepared.beats)


def test_result_rows_are_aligned():
    """A burst never holds results of two tokens."""
    config = make_config(tile=8)
    for n, pitch in ((1, 128), (32, 128), (33, 256), (1152, 4608)):
        layout = prepare(config, random_linear(np.random.default_rng(1), n, 32, 32)).layout
        assert result_bytes(layout, 3) == 3 * pitch
