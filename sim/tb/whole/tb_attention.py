# SPDX-License-Identifier: Apache-2.0
"""The accelerator runs programs with attention: exact results, exact caches, and nothing else written."""

from dataclasses import replace

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from hw.spec.control.descriptor import ADDRESS_LIMIT
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.operands import result_pitch
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops import Wait
from hw.spec.ops.values import ValuesDescriptor
from sim.bench.accelerator_driver import MEMORY, AcceleratorDriver, fit, pauses
from sim.bench.attention.programs import AttentionProgram, allow_caches
from sim.bench.axi_monitor import Burst
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


class _Hazards:
    """Watches the reads of some rows: each byte is read only after the acknowledgement of the burst that writes it."""

    def __init__(self, driver: AcceleratorDriver, address: int, size: int):
        self.driver, self.address = driver, address
        self.written = np.zeros(size, bool)
        self.early = 0
        """Reads before the last acknowledgement."""
        cocotb.start_soon(self._watch())

    def _part(self, burst: Burst) -> slice:
        first, size = burst.address - self.address, burst.beats * config().port_width // 8
        return slice(max(0, first), max(0, first + size))

    async def _watch(self) -> None:
        writes = self.driver.monitors[0]
        seen, done = [len(monitor.reads) for monitor in self.driver.monitors], writes.acknowledged
        while True:
            await RisingEdge(self.driver.dut.clk)
            for port, monitor in enumerate(self.driver.monitors):
                for burst in monitor.reads[seen[port] :]:
                    part = self.written[self._part(burst)]
                    assert part.all(), f"hp{port} reads {burst} before it is written"
                    self.early += len(part) > 0 and not self.written.all()
                seen[port] = len(monitor.reads)
            # Acknowledgements count from the next cycle on: an address depends only on registers.
            for burst in writes.writes[done : writes.acknowledged]:
                self.written[self._part(burst)] = True
            done = writes.acknowledged


@cocotb.test(skip=not config().reads_by_pieces)
@cocotb.parametrize(what=["results", "silu", "second"], stalls=[False, True], apart=[False, True])
async def rows_are_followed(dut, what, stalls, apart):
    """Activations of several tokens that the layer before writes, in rows of more than a piece.

    apart : there is a gap between the rows that are written, so they are not those that are read
    """
    driver, c = await _driver(dut, stalls, 8), config()
    program, k, tokens = AttentionProgram(driver, rng(39)), 288, c.max_tokens
    parts = {"results": (), "silu": ("silu",), "second": ("add", "second", "squares")}[what]
    pitch = result_pitch(k) + 128 * apart
    name = "second_pitch" if what == "second" else "result_pitch"
    for count in (tokens, tokens - 1):
        program.add((), count, 20)
        if what == "silu":
            program.add(parts, count, 2 * k, vector=True)
        else:
            # Numbers that the next layer can take.
            moderate = driver.place(fit(96, k, 32), count, "moderate").descriptor
            program.append(replace(moderate, **program.epilogue(parts, count, k)))
            program.scaled_tokens = count
        # Its rows have room for the gaps.
        rows = driver.take(count * pitch)
        driver.write(rows, bytes(count * pitch))
        place = {"second_results" if what == "second" else "results": rows, name: pitch}
        program.descriptors[-1] = replace(program.descriptors[-1], **place)
        watched = _Hazards(driver, rows, count * pitch)
        if apart:
            watched.written.reshape(count, pitch)[:, k * 4 :] = True
        work = driver.place(fit(k, 2 * c.tile, 32), count)
        made = replace(work.descriptor, activations=rows, wait=Wait.ACTIVATIONS)
        program.append(replace(made, **program.epilogue(("scale",) if what == "second" else (), count, 2 * c.tile)))
        await program.run()
        assert watched.early > 0 or apart
        driver.forget()
        program = AttentionProgram(driver, rng(40))


@cocotb.test(skip=not config().reads_by_pieces)
@cocotb.parametrize(stalls=[False, True], size=[32, 96, 128])
async def the_last_head_is_followed(dut, stalls, size):
    """The next layer reads what all heads before the last one have written, while the last one is computed."""
    driver, c = await _driver(dut, stalls, 9), config()
    program, count = AttentionProgram(driver, rng(41)), 384 // size
    heads = [program.head(size, 70, 8) for _ in range(2)]
    for head in heads:
        program.append_positions(head, c.max_tokens)
    pitch = result_pitch(size * count)
    rows = driver.take(ROWS * pitch)
    program.attention([heads[index % 2] for index in range(count)], ROWS)
    order = [index for index, made in enumerate(program.descriptors) if isinstance(made, ValuesDescriptor)]
    for number, index in enumerate(order):
        made = program.descriptors[index]
        program.descriptors[index] = replace(made, results=rows + 4 * size * number, result_pitch=pitch)
    watched = _Hazards(driver, rows, ROWS * pitch)
    work = driver.place(fit(size * count, 2 * c.tile, 32), ROWS)
    program.append(replace(work.descriptor, activations=rows, wait=Wait.ACTIVATIONS))
    await program.run()
    assert watched.early > 0


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
