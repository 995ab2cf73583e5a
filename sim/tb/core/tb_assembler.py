# SPDX-License-Identifier: Apache-2.0
"""The word assembler: several narrow beats become one word, with the first beat lowest; a wide beat is one word."""

import cocotb
from cocotb.triggers import Timer

from hw.spec.memory.geometry import StreamLayout
from sim.bench.dut import begin, config, latency
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, never, randomly, rng

PER_WORD = StreamLayout(config()).beats_per_word


@cocotb.test(skip=PER_WORD > 1)
async def test_straight_through(dut):
    """If a beat is a word, everything passes in the same cycle, in both directions."""
    random, bits = rng(), config().beat_bits
    assert latency() == 0
    for _ in range(200):
        beat, valid, ready = int.from_bytes(random.bytes(bits // 8), "little"), *random.integers(0, 2, 2).tolist()
        dut.beats_payload.value, dut.beats_valid.value, dut.words_ready.value = beat, valid, ready
        await Timer(1, "ns")
        seen = int(dut.words_payload.value), int(dut.words_valid.value), int(dut.beats_ready.value)
        assert seen == (beat, valid, ready)


async def _assemble(dut, into, out_of, words=100):
    source, sink = StreamSource(dut, "beats", dut.clk, into), StreamSink(dut, "words", dut.clk, out_of)
    await begin(dut)
    monitor = Monitor(dut, ("beats", "words"))
    random, bits, per_word = rng(), config().beat_bits, PER_WORD
    beats = [int.from_bytes(random.bytes(bits // 8), "little") for _ in range(words * per_word)]
    expected = [
        sum(beat << (bits * place) for place, beat in enumerate(beats[first : first + per_word]))
        for first in range(0, len(beats), per_word)
    ]
    source.send(beats)
    assert await sink.take(words) == expected
    await sink.quiet()
    return source, monitor


@cocotb.test(skip=PER_WORD == 1)
async def test_full_throughput(dut):
    source, monitor = await _assemble(dut, never, never)
    assert source.stalled_by_dut == 0
    assert consecutive(monitor["beats"])
    assert monitor["words"] == [t + latency() for t in monitor["beats"][PER_WORD - 1 :: PER_WORD]]


@cocotb.test(skip=PER_WORD == 1)
@cocotb.parametrize(speeds=[(0.5, 0.5), (0.0, 0.9), (0.8, 0.0)])
async def test_random_stalls(dut, speeds):
    await _assemble(dut, randomly(speeds[0], rng(1)), randomly(speeds[1], rng(2)))
