# SPDX-License-Identifier: Apache-2.0
"""The cycles that pass between a layer and the layer that depends on it, with the latencies of the memory ``ideal``.

One block of a decoder runs with a single token: o, gate and up, down. Each layer but the first waits for the results of
the one before. Two numbers are measured, both exactly:

- the gap at the input of the core: the cycles in which it takes no beat of weights. The counters give them; they are
  cleared in the middle of a layer and read in the middle of the next one;
- the beats of the next layer that the core takes before it begins that layer, and holds: from the last beat of a layer
  until the array uses the first word of the next one, this number of cycles passes in addition to the gap. Such beats
  are counted while memory acknowledges no write, so that the next layer cannot begin.
"""

from dataclasses import replace

import cocotb
import numpy as np

from hw.spec.control.descriptor import Descriptor, Wait, result_pitch
from hw.spec.memory.access import BURST_BOUNDARY
from sim.bench.accelerator_driver import AcceleratorDriver, fit
from sim.bench.epilogues import numbers
from sim.bench.programs import Program
from sim.bench.streams import rng
from sim.harness import settings

HIDDEN, INNER, GROUP_SIZE = settings().get("hidden", 256), settings().get("inner", 512), 128
"""The shapes of the block."""
LIMIT = settings().get("limit", 300)
"""Longest permitted gap in cycles."""
STARVED = ("starved_activations", "starved_output")
"""Registers that count the cycles in which the core takes no beat, without those in which memory has none: the memory
of the bench pauses between two bursts."""


class _Block:
    """The program of one block, and the beats of its layers."""

    def __init__(self, driver: AcceleratorDriver):
        self.driver, self.program, self.beats = driver, Program(driver, rng(1)), []
        self._before = driver.monitors[0].beats
        program = self.program
        program.add(("quiet", "second", "squares"), 1, HIDDEN, vector=True)
        residual = ("add", "second", "squares")
        self._layer(HIDDEN, HIDDEN, residual)
        self._layer(HIDDEN, 2 * INNER, ("scale", "silu"))
        self._layer(INNER, HIDDEN, residual)

    def _layer(self, k: int, n: int, parts: tuple[str, ...]) -> None:
        """A layer that reads what the one before has written; the first layer has activations of its own."""
        layer, out = fit(k, n, GROUP_SIZE), n // 2 if "silu" in parts else n
        assert layer.k == k, "the shapes fit without padding"
        x = numbers(self.program.random, 1, k)
        work = self.driver.place(layer, 1, "moderate", x=x, aligned=True)
        fields = self.program.epilogue(parts, 1, n) | {"result_pitch": result_pitch(out)}
        if "second" in parts:
            fields["second_results"] = self.driver.take(result_pitch(n), BURST_BOUNDARY)
        before = self.program.descriptors[-1]
        if isinstance(before, Descriptor):
            source = before.second_results if before.second else before.results
            fields |= {"wait": Wait.ACTIVATIONS, "activations": source}
        self.program.append(replace(work.descriptor, **fields))
        self.beats.append(layer.beats)

    async def beat(self, number: int) -> None:
        """Waits until the first port has received this number of beats since the block was made."""
        hp0 = self.driver.monitors[0]
        await self.driver.until(lambda: hp0.beats - self._before >= number, f"beat {number}")

    async def idle(self) -> int:
        """Cycles without a beat of weights since the last call."""
        count = sum([await self.driver.get(name) for name in STARVED])
        await self.driver.set("control", "clear_counters")
        return count


async def _held(driver: AcceleratorDriver) -> int:
    """Beats of gate and up that the core holds before it begins this layer. Ends with a reset and free memory."""
    block = _Block(driver)
    await driver.set("control", "clear_counters")
    await block.program.push()
    while await driver.completed() < 1:
        pass
    driver.pause("hp0_b", lambda: True)
    await driver.calm()
    held = await driver.get("beats") - block.beats[0]
    driver.pause("hp0_b", None)
    await driver.reset()
    driver.forget()
    driver.image[:] = np.frombuffer(bytes(driver.memory), np.uint8)
    return held


@cocotb.test()
async def gap(dut):
    """The gaps after o, and after gate and up; and the memory at the end."""
    driver = await AcceleratorDriver.create(dut)
    driver.ideal()
    held = await _held(driver)
    block, gaps = _Block(driver), {}
    block.program.expect()
    await block.program.push()
    passed = 0
    for name, beats, following in zip(("o", "gate_up"), block.beats, block.beats[1:]):
        await block.beat(passed + beats // 2)
        await block.idle()
        passed += beats
        await block.beat(passed + following // 2)
        gaps[name] = await block.idle()
    await block.program.finish()
    dut._log.info("cycles without a beat: %s; the core holds %d beats of the next layer", gaps, held)
    assert held > 0
    for name, cycles in gaps.items():
        assert cycles <= LIMIT, f"after {name} there are {cycles} cycles without weights, more than {LIMIT}"
