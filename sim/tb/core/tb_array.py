# SPDX-License-Identifier: Apache-2.0
"""The systolic array: slices of any number of tokens, with or without gaps, with random values on every idle input."""

import cocotb
import numpy as np

from hw.spec.memory.geometry import StreamLayout
from sim.bench.dut import begin, config, latency, payload, trace
from sim.bench.packing import pack_elements
from sim.bench.streams import rng


async def _multiply(dut, tokens_of_slices, gaps, extreme=False):
    """Run slices of the given numbers of tokens, each after ``gaps[i]`` idle cycles, and check every psum."""
    c, random, stream = config(), rng(len(tokens_of_slices)), StreamLayout(config())
    words, rows = stream.words_per_slice, stream.rows_per_word // stream.slices_per_word
    starts, now = [], 0
    for tokens, gap in zip(tokens_of_slices, gaps):
        starts.append(now + gap)
        now = starts[-1] + max(tokens, words)
    total = now + latency() + c.tile
    x = random.integers(-c.activation_max, c.activation_max, (total, c.tile), endpoint=True)
    arriving = random.integers(0, c.weight_max, (total, rows * c.tile), endpoint=True)
    load, expected, cycles = np.zeros(total, int), [], []
    for start, tokens in zip(starts, tokens_of_slices):
        load[start] = 1
        q = random.integers(0, c.weight_max, (words * rows, c.tile), endpoint=True)
        if extreme:
            q[:] = c.weight_max
            x[start : start + tokens] = random.choice([-c.activation_max, c.activation_max])
        for word in range(words):
            arriving[start + word] = q[word * rows : (word + 1) * rows].reshape(-1)
        cycles.extend(range(start, start + tokens))
        expected.append(x[start : start + tokens] @ q[: c.tile])
    inputs = {
        "activations": payload("activations").pack(element=x),
        "load": load,
        "words": pack_elements(arriving, c.weight_bits),
    }
    await begin(dut)
    record = await trace(dut, inputs, ["psums"])
    expected, cycles = np.concatenate(expected), np.array(cycles)
    for column in range(c.tile):
        seen = record.columns("psums", cycles + latency() + column, column)
        assert np.array_equal(seen, expected[:, column]), f"column {column}"
    return starts


@cocotb.test()
async def test_one_token(dut):
    """At M = 1 a new slice starts every ``words_per_slice`` cycles."""
    starts = await _multiply(dut, [1] * 40, [0] * 40)
    assert starts[-1] == 39 * StreamLayout(config()).words_per_slice


@cocotb.test()
async def test_every_token_count(dut):
    counts = [1, 2, 3, 1, 4, 7, 8, 5, 1, 16, 1, 1, 2]
    await _multiply(dut, counts, [0] * len(counts))


@cocotb.test()
async def test_gaps(dut):
    random = rng()
    counts = random.integers(1, 9, 40).tolist()
    await _multiply(dut, counts, random.integers(0, 4, 40).tolist())


@cocotb.test()
async def test_extremes(dut):
    """All weights and activations at their bounds: the width of the psum is just sufficient."""
    await _multiply(dut, [1, 2, 1, 3], [0, 0, 1, 0], extreme=True)
