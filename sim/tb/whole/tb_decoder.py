# SPDX-License-Identifier: Apache-2.0
"""The accelerator with a vector unit: descriptors with epilogues, pushed one by one; the whole memory is compared."""

from dataclasses import replace

import cocotb

from hw.spec.control.descriptor import Wait, result_pitch
from sim.bench.accelerator_driver import AcceleratorDriver, fit, pauses
from sim.bench.dut import config
from sim.bench.epilogues import numbers
from sim.bench.programs import Program, random_program
from sim.bench.streams import rng
from sim.harness import settings

LONG = settings().get("long", False)
"""More and longer random programs."""


async def _run(program: Program) -> None:
    program.expect()
    await program.push()
    await program.finish()


@cocotb.test()
@cocotb.parametrize((("stalls", "hard"), [(False, False), (True, True), *[(False, True), (True, False)] * LONG]))
async def programs(dut, stalls, hard):
    """Random descriptors with all kinds of epilogues and waits."""
    random = rng(1)
    driver = await AcceleratorDriver.create(dut, pauses(3) if stalls else None)
    await _run(random_program(driver, random, 12 if LONG else 3, hard))


@cocotb.test()
@cocotb.parametrize(tokens=sorted({1, config().max_tokens}))
async def chain(dut, tokens):
    """A block as a decoder has it: each descriptor reads what the ones before have written, on chip and in memory."""
    random = rng(1)
    driver = await AcceleratorDriver.create(dut)
    program = Program(driver, random)
    hidden, inner = 64, 96
    x, pitch = program.put(numbers(random, tokens, hidden), result_pitch(hidden))
    program.add(("quiet", "second", "squares"), tokens, hidden, vector=True)
    program.descriptors[-1] = replace(program.descriptors[-1], activations=x, source_pitch=pitch)
    for _ in range(2):
        normed = program.descriptors[-1].second_results
        for parts, k, n in ((("scale", "silu"), hidden, 2 * inner), (("add", "second", "squares"), inner, hidden)):
            layer = fit(k, n, 32)
            assert layer.k == k
            before = program.descriptors[-1]
            work = driver.place(layer, tokens, "moderate")
            fields = program.epilogue(parts, tokens, n) | {"wait": Wait.ACTIVATIONS, "result_pitch": 4 * k}
            source = normed if "silu" in parts else before.results
            out = n // 2 if "silu" in parts else n
            fields |= {"activations": source, "result_pitch": result_pitch(out)}
            if "add" in parts:
                fields |= {"addend": x, "addend_pitch": pitch, "second_pitch": result_pitch(n)}
            program.append(replace(work.descriptor, **fields))
            x, pitch = (work.descriptor.results, result_pitch(out)) if "add" in parts else (x, pitch)
    await _run(program)
