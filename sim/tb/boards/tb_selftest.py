# SPDX-License-Identifier: Apache-2.0
"""The boards' self-test: its lines are read from the UART, and a corrupted expected value must turn pass into FAIL."""

import re
from dataclasses import fields
from typing import Any

import cocotb
from cocotb.triggers import ClockCycles, FallingEdge, First, RisingEdge

from hw.spec.config import AcceleratorConfig
from hw.spec.cycles import core_cycles
from hw.spec.memory.geometry import fit_layer
from hw.spec.memory.transfers import result_transfers
from sim.bench import streams
from sim.harness import settings

DIVISOR = 4
"""Clock cycles of a bit on the simulated UART."""
_LINE_CYCLES = 40_000
_LINE = re.compile(r"gristmill tile (\d+) config ([0-9a-f]{8}): (\d+) results, (\d+) wrong, (\d+) cycles: (pass|FAIL)")
_TOLERANCE = 3
"""Cycles that the self-test may count above the performance model: two of them are the delay from the ROMs."""


def config() -> AcceleratorConfig:
    """Parameters of the core under test."""
    values = settings()
    names = {item.name for item in fields(AcceleratorConfig)}
    return AcceleratorConfig(**{name: value for name, value in values.items() if name in names})


async def read_byte(dut: Any) -> int:
    """One frame from the UART: each bit is sampled in its middle, and the start and stop bits are checked."""
    await FallingEdge(dut.tx)
    await ClockCycles(dut.clk, DIVISOR // 2)
    bits = [int(dut.tx.value)]
    for _ in range(9):
        await ClockCycles(dut.clk, DIVISOR)
        bits.append(int(dut.tx.value))
    assert (bits[0], bits[9]) == (0, 1), f"start and stop bit are {bits[0]} and {bits[9]}"
    return sum(bit << place for place, bit in enumerate(bits[1:9]))


async def read_line(dut: Any) -> str:
    """The next complete line, without the line end."""

    async def read() -> str:
        text = ""
        while not text.endswith("\r\n"):
            text += chr(await read_byte(dut))
        return text[:-2]

    task = cocotb.start_soon(read())
    await First(task, ClockCycles(dut.clk, _LINE_CYCLES))
    assert task.done(), f"no whole line within {_LINE_CYCLES} cycles"
    return task.result()


def parse(line: str) -> tuple[int, int, int, str]:
    """Results, wrong results, cycles and verdict of a line. Its tile and config must be those under test."""
    match = _LINE.fullmatch(line)
    assert match, f"not the self-test's line: {line!r}"
    assert (int(match[1]), match[2]) == (config().tile, config().digest[:8]), line
    numbers = results, wrong, cycles = [int(text) for text in match.groups()[2:5]]
    assert match.groups()[2:5] == tuple(map(str, numbers)), f"leading zeros: {line!r}"
    return results, wrong, cycles, match[6]


async def begin(dut: Any) -> tuple[int, int]:
    """Start; returns the number of results of a run, and its cycles by the performance model."""
    dut.corrupt.value = 0
    dut.hold.value = 0
    c = config()
    tokens, layer = c.max_tokens, fit_layer(c, 128, 3 * c.tile - 1, 32)
    await streams.start(dut)
    return len(result_transfers(c, tokens, layer.n)), core_cycles(layer, tokens)


def lights(dut: Any) -> tuple[int, int, int]:
    """The LEDs: passed, failed, failed_ever."""
    return int(dut.passed.value), int(dut.failed.value), int(dut.failed_ever.value)


@cocotb.test()
async def test_pass(dut):
    """Every result comes and is correct, in the cycles of the model, and again in the next run."""
    count, cycles = await begin(dut)
    assert lights(dut) == (0, 0, 0)
    first = await read_line(dut)
    dut._log.info("UART: %s", first)
    results, wrong, taken, verdict = parse(first)
    assert (results, wrong, verdict) == (count, 0, "pass"), first
    assert 0 < taken - cycles <= _TOLERANCE, f"{taken} cycles, the model says {cycles}"
    assert lights(dut) == (1, 0, 0)
    beat = int(dut.beat.value)
    assert await read_line(dut) == first
    assert int(dut.beat.value) != beat


@cocotb.test()
async def test_corrupt(dut):
    """A corrupted expected value fails the run and is counted once. In the next run only one LED still shows it."""
    count, _ = await begin(dut)
    dut.corrupt.value = 1
    line = await read_line(dut)
    dut._log.info("UART: %s", line)
    results, wrong, _, verdict = parse(line)
    assert (results, wrong, verdict) == (count, 1, "FAIL"), line
    assert lights(dut) == (0, 1, 1)
    dut.corrupt.value = 0
    assert parse(await read_line(dut))[1::2] == (0, "pass")
    assert lights(dut) == (1, 0, 1)


@cocotb.test()
async def test_reset_in_between(dut):
    """A reset in the middle of a run leaves no trace."""
    count, _ = await begin(dut)
    await RisingEdge(dut.running)
    await streams.cycle(dut.clk, 100)
    await streams.start(dut)
    assert parse(await read_line(dut))[::3] == (count, "pass")


@cocotb.test()
async def test_hold(dut):
    """`hold` is a reset: nothing runs while it is set, and a run that it ends leaves no trace."""
    count, _ = await begin(dut)
    dut.corrupt.value = 1
    assert parse(await read_line(dut))[3] == "FAIL"
    await RisingEdge(dut.running)
    await streams.cycle(dut.clk, 100)
    dut.corrupt.value = 0
    dut.hold.value = 1
    await streams.cycle(dut.clk, 2)
    for _ in range(300):
        await streams.cycle(dut.clk, 1)
        assert not dut.running.value and dut.tx.value and lights(dut) == (0, 0, 0)
    dut.hold.value = 0
    assert parse(await read_line(dut))[::3] == (count, "pass")
    assert lights(dut) == (1, 0, 0)
