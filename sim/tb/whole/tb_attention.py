# SPDX-License-Identifier: Apache-2.0
"""The accelerator runs programs with attention: exact results, exact caches, and nothing else written."""

from dataclasses import replace

import cocotb
import numpy as np

from hw.spec.control.descriptor import ADDRESS_LIMIT
from hw.spec.control.registers import ErrorCode
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops import Wait
from sim.bench.accelerator_driver import MEMORY, AcceleratorDriver, fit, pauses
from sim.bench.attention.programs import AttentionProgram, allow_caches
from sim.bench.dut import config
from sim.bench.streams import rng
from sim.harness import settings

LONG = settings().get("long", False)
"""More and longer programs."""
BASE = ADDRESS_LIMIT - MEMORY
ROWS = min(config().max_tokens, 7)


async def _driver(dut, stalls: bool, salt: int) -> AcceleratorDriver:
    driver = await AcceleratorDriver.create(dut, pauses(20, salt) if stalls else None, BASE)
    await allow_caches(driver)
    return driver


@cocotb.test()
@cocotb.parametrize(stalls=[False, True])
async def decoding(dut, stalls):
    """Some KV heads: a block of positions, then single ones; each time scores, softmax and values of all of them."""
    driver = await _driver(dut, stalls, 1)
    program = AttentionProgram(driver, rng(31))
    heads = [program.head(64, 96, 8) for _ in range(3)]
    for step, count in enumerate((config().max_tokens, 1, 1)):
        for head in heads:
            program.append_positions(head, count, centre=step == 1)
        program.attention(heads, ROWS if step else count, causal=int(not step))
    await program.run()


@cocotb.test()
@cocotb.parametrize((("size", "bits"), [(32, 8), (64, 16), (96, 8), (128, 16)]))
async def heads(dut, size, bits):
    """Sizes of heads, and bits of keys, between linear layers and rows from memory."""
    driver = await _driver(dut, True, 2 + size)
    program = AttentionProgram(driver, rng(32, size))
    head = program.head(size, 70, bits)
    for count in (3, 1):
        program.append_positions(head, min(count, config().max_tokens))
        program.add((), 2, 40)
        program.attention([head], min(2, config().max_tokens))
        program.add(("squares",), 1, 32, vector=True, wait=Wait.ACTIVATIONS)
        program.add(("scale",), 1, 20)
    await program.run()


@cocotb.test()
async def several_chunks(dut):
    """More positions than a chunk: a last chunk of one group, of some, and a full one."""
    driver, c = await _driver(dut, False, 3), config()
    program, rows = AttentionProgram(driver, rng(33)), 2
    head = program.head(32, 2 * CHUNK + 70, 8)
    most = min(head.slots, c.score_words // rows // 64 * 64)
    for total in (CHUNK, CHUNK + 1, CHUNK + 65, 2 * CHUNK, most):
        while head.written < min(total, most):
            program.append_positions(head, min(c.max_tokens, total - head.written))
        program.attention([head], rows)
    await program.run()


@cocotb.test()
async def windows(dut):
    """A cache that begins again at its first slot, with sliding windows."""
    driver, c = await _driver(dut, True, 4), config()
    program = AttentionProgram(driver, rng(34))
    window = 20
    head = program.head(32, window + c.max_tokens, 8)
    for step in range(12):
        count = 1 if step % 3 else c.max_tokens
        program.append_positions(head, count)
        program.attention([head], count, window=window, causal=1)
    await program.run()


@cocotb.test()
async def results_become_activations(dut):
    """The next layer reads the outputs of attention, and waits for them."""
    driver, c = await _driver(dut, False, 5), config()
    program = AttentionProgram(driver, rng(35))
    head = program.head(64, 64, 8)
    program.append_positions(head, 5)
    program.scores(head, 1, 1)
    results = program.values(head, 1, 1)
    work = driver.place(fit(64, 2 * c.tile, 32), 1)
    program.append(replace(work.descriptor, activations=results, wait=Wait.ACTIVATIONS))
    await program.run()


@cocotb.test()
@cocotb.parametrize(bad=[0, 1, 3])
async def numbers_that_are_not_finite(dut, bad):
    """An append with an infinity in its last row stops the accelerator, and is named; those before it are complete."""
    driver = await _driver(dut, False, 7)
    program = AttentionProgram(driver, rng(38))
    head = program.head(32, 32, 8)
    for _ in range(2):
        program.append_positions(head, 3)
    made = program.descriptors[bad]
    row = made.activations + 2 * made.activation_pitch + 4 * 31
    driver.write(row, np.array([np.inf], np.float32).tobytes())
    program.store()
    await program.start()
    await driver.failed(ErrorCode.NON_FINITE, made.activations, bad)
    await driver.calm()


@cocotb.test()
@cocotb.parametrize(what=["below", "above", "closed"])
async def guarded(dut, what):
    """An append outside of the allowed addresses writes nothing, and stops the accelerator."""
    driver = await _driver(dut, False, 6)
    program = AttentionProgram(driver, rng(36))
    first, second = program.head(32, 32, 8), program.head(32, 32, 8)
    place = second.places[0]
    limits = {"below": (place // 4096 + 1, 1 << 28), "above": (0, place // 4096), "closed": (0, 0)}[what]
    for name, value in zip(("cache_first", "cache_end"), limits, strict=True):
        await driver.set(name, value)
    program.append_positions(second if what != "closed" else first, 1)
    program.store()
    await program.start()
    await driver.failed(ErrorCode.CACHE)
    await driver.calm()
    assert np.array_equal(np.frombuffer(bytes(driver.memory), np.uint8), driver.image)
    await driver.reset()
    await allow_caches(driver)
    driver.forget()
    again = AttentionProgram(driver, rng(37))
    head = again.head(32, 32, 8)
    again.append_positions(head, 2)
    again.attention([head], 1)
    await again.run()
