# SPDX-License-Identifier: Apache-2.0
"""The core's throughput: a beat or a token slice every cycle, whichever is the limit, and no gap between layers.

Cycles count from the moment when all streams are offered to the last result, so they include latency and the first
activations. The results are checked too.
"""

import cocotb

from hw.spec.cycles import core_cycles, tile_cycles
from hw.spec.memory.geometry import StreamLayout
from sim.bench.core_driver import CoreDriver
from sim.bench.dut import config
from sim.bench.layers import job
from sim.bench.streams import rng

K, N, GROUP_SIZE = 896, 1152, 128
TOLERANCE = 4
"""The permitted error of the performance model for a whole layer, in cycles."""

ARRAY_LIMITED = StreamLayout(config()).array_factor > 1
"""A beat holds more slices than the array takes in a cycle, so some cycles must be without a beat."""


async def _measure(dut, tokens, limit):
    """Runs one layer; returns its cycles divided by the bound ``max(beats, M * slices * out_tiles)``."""
    core = await CoreDriver.create(dut)
    item = job(config(), rng(), K, N, GROUP_SIZE, tokens)
    slices = item.layer.k // config().tile * item.layer.out_tiles
    bound = max(item.layer.beats, tokens * slices)
    cycles, predicted = await core.check([item]), core_cycles(item.layer, tokens)
    dut._log.info(
        "M %d: %d cycles, %d beats, bound %d, predicted %d", tokens, cycles, item.layer.beats, bound, predicted
    )
    assert abs(cycles - predicted) <= TOLERANCE, f"M {tokens} took {cycles} cycles, hw.spec.cycles says {predicted}"
    assert cycles <= limit * bound, f"M {tokens} took {cycles} cycles, {cycles / bound:.3f} of {bound}"


@cocotb.test()
async def test_one_token(dut):
    await _measure(dut, 1, 1.03)


@cocotb.test()
async def test_two_tokens(dut):
    await _measure(dut, 2, 1.05)


@cocotb.test()
async def test_all_tokens(dut):
    await _measure(dut, config().max_tokens, 1.05)


@cocotb.test(skip=ARRAY_LIMITED)
async def test_no_idle_beat_between_layers(dut):
    """At M = 1 the core takes a beat in every cycle, from the first beat of the first layer to the last of the last."""
    core, random = await CoreDriver.create(dut), rng()
    await core.check([job(config(), random, K, 128, GROUP_SIZE, 1) for _ in range(8)])
    assert core.idle_beats == 0, f"{core.idle_beats} cycles without a beat"


@cocotb.test(skip=ARRAY_LIMITED)
async def test_no_idle_beat_between_shapes(dut):
    """The same with layers of different shapes; short layers, too, if the output of their results is fast enough."""
    core, random = await CoreDriver.create(dut), rng()
    shapes = [(896, 96), (1024, 32), (512, 64), (768, 33), (1024, 1), (896, 128)]
    await core.check([job(config(), random, k, n, GROUP_SIZE, 1) for k, n in shapes])
    assert core.idle_beats == 0, f"{core.idle_beats} cycles without a beat"


@cocotb.test()
async def test_no_idle_slice_between_layers(dut):
    """If the array is the limit (K well above tile**2; else the drain is), it takes a token slice in every cycle."""
    core, random, count = await CoreDriver.create(dut), rng(), 10
    jobs = [job(config(), random, 1024, 2 * config().tile, GROUP_SIZE, config().max_tokens) for _ in range(count)]
    layer, tokens = jobs[0].layer, jobs[0].tokens
    expected = core_cycles(layer, tokens) + (count - 1) * layer.out_tiles * tile_cycles(layer, tokens)
    cycles = await core.check(jobs)
    assert abs(cycles - expected) <= TOLERANCE, f"{count} layers took {cycles} cycles, not {expected}"
