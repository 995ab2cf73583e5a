# SPDX-License-Identifier: Apache-2.0
"""The walker against Python's own nested loops: every flag in every step, and no cycle between two commands."""

import itertools

import cocotb
from cocotb.triggers import RisingEdge

from sim.bench.dut import begin, payload
from sim.bench.streams import StreamSource, never, randomly, rng

LOOPS = ("token", "slice", "group", "tile")
BOUNDS = ("tokens", "group_slices", "groups", "out_tiles")


def _commands(random, count):
    """Random bounds, many of them 1; the first command brings activations."""
    fields = {name: field.width for name, field in payload("command").fields.items()}
    for number in range(count):
        values = {name: int(random.integers(1, 1 << width)) for name, width in fields.items()}
        for name in BOUNDS:
            values[name] = int(random.choice([1, 1, 2, 3, 4]))
        values["reuse"] = int(number > 0 and random.random() < 0.4)
        yield values


def _steps(commands):
    """The expected outputs of every step."""
    bank = 1
    for command in commands:
        bank ^= 1 - command["reuse"]
        bounds = [command[name] for name in BOUNDS]
        for place in itertools.product(*(range(bound) for bound in reversed(bounds))):
            place = place[::-1]
            first = {name: int(place[i] == 0) for i, name in enumerate(LOOPS)}
            last = {name: int(place[i] == bounds[i] - 1) for i, name in enumerate(LOOPS)}
            tile_end = int(all(last[name] for name in LOOPS[:-1]))
            tile_start = int(all(first[name] for name in LOOPS[:-1]))
            yield command, first, last, tile_start, tile_end, tile_end & last["tile"], bank


async def _walk(dut, step_stall, command_stall, count):
    """Step through random commands; returns the cycles in which the walker could not step, after the first."""
    random = rng()
    source = StreamSource(dut, "command", dut.clk, command_stall)
    dut.step.value = 0
    await begin(dut)
    commands = list(_commands(random, count))
    source.send(payload("command").pack(**{name: [c[name] for c in commands] for name in commands[0]}))
    fields, idle, active, stepping = payload("first"), 0, 0, 0
    expected, edge = list(_steps(commands)), RisingEdge(dut.clk)
    done = 0
    for _ in range(100 * len(expected)):
        await edge
        assert int(dut.active.value) == active
        idle += done > 0 and not active
        finished = 0
        if stepping:
            command, first, last, tile_start, tile_end, ends, bank = expected[done]
            got = {name: values[0] for name, values in fields.unpack([int(dut.first.value)]).items()}
            assert got == first, f"step {done}: first is {got}, not {first}"
            got = {name: values[0] for name, values in fields.unpack([int(dut.last.value)]).items()}
            assert got == last, f"step {done}: last is {got}, not {last}"
            assert int(dut.tile_start.value) == tile_start
            assert int(dut.tile_end.value) == tile_end
            assert int(dut.done.value) == ends
            assert int(dut.bank.value) == bank
            assert int(dut.current.value) == payload("command").pack(**command)[0]
            finished, done = ends, done + 1
            if done == len(expected):
                break
        if int(dut.command_valid.value):
            (reuse,) = payload("command").unpack([int(dut.command_payload.value)])["reuse"]
            assert int(dut.next_bank.value) == int(dut.bank.value) ^ 1 - int(reuse)
        ready = int(dut.command_ready.value)
        assert ready == int(not active or (stepping and finished))
        active = int((ready and int(dut.command_valid.value)) or (active and not finished))
        stepping = int(active and not step_stall())
        dut.step.value = stepping
    assert done == len(expected), f"{done} of {len(expected)} steps"
    return idle


@cocotb.test()
async def test_full_throughput(dut):
    assert await _walk(dut, never, never, 100) == 0


@cocotb.test()
async def test_random_stalls(dut):
    await _walk(dut, randomly(0.4, rng(1)), randomly(0.9, rng(2)), 60)
