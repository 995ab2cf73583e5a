# SPDX-License-Identifier: Apache-2.0
"""The check against hw.spec.control.refusal: valid descriptors pass, with the values derived from them; others fail."""

from dataclasses import replace
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.config import MAX_N
from hw.spec.control.descriptor import ADDRESS_LIMIT, DESCRIPTOR_WORDS, FIELDS, Descriptor, activation_beats
from hw.spec.control.refusal import refusal
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import LayerLayout
from hw.spec.ops import Wait
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, latency, payload
from sim.bench.layers import random_layer
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, rng, until


def _number(words: list[int]) -> int:
    return sum(word << 32 * index for index, word in enumerate(words))


def _descriptor(layer: LayerLayout, random, reuse: Descriptor | None = None) -> Descriptor:
    tokens = int(random.integers(1, config().max_tokens, endpoint=True)) if reuse is None else reuse.tokens
    pages = random.integers(0, ADDRESS_LIMIT >> 12, 3)
    return Descriptor.from_layer(
        layer,
        tokens,
        activations=int(pages[0]) << 12 | int(random.integers(32)) << 7,
        weights=int(pages[1]) << 12,
        results=int(pages[2]) << 12 | int(random.integers(32)) << 7,
        reuse=reuse is not None,
        interrupt=bool(random.integers(2)),
        wait=Wait(random.integers(len(Wait))),
    )


def _limits() -> list[LayerLayout]:
    """The largest and the smallest layers."""
    c = config()
    size, least = c.max_group_size, LayerLayout(c, c.max_k // c.max_group_size * c.max_group_size, 1, c.max_group_size)
    smallest = least.stream.min_group_slices * c.tile
    groups = c.max_k // smallest
    return [
        LayerLayout(c, least.k, 1, size),
        LayerLayout(c, size, MAX_N, size),
        LayerLayout(c, groups * smallest, c.tile + 1, smallest),
        LayerLayout(c, smallest, c.tile, smallest),
    ]


class _Bench:
    def __init__(self, dut: Any, stall: Stall = never):
        self.dut = dut
        self.source = StreamSource(dut, "descriptors", dut.clk, stall)
        self.work = StreamSink(dut, "work", dut.clk, stall)
        self._early = cocotb.start_soon(self._payload_comes_early())

    async def _payload_comes_early(self) -> None:
        """The payload is there in the cycle before its valid."""
        edge, was_valid, before = RisingEdge(self.dut.clk), True, None
        while True:
            await edge
            valid, payload_now = str(self.dut.work_valid.value) == "1", str(self.dut.work_payload.value)
            assert was_valid or not valid or payload_now == before, "the payload changed with valid"
            was_valid, before = valid, payload_now

    async def accept(self, layer: LayerLayout, descriptor: Descriptor) -> None:
        self.source.send(_number(descriptor.to_words()))
        (raw,) = await self.work.take(1, cycles=200)
        fields = {name: int(values[0]) for name, values in payload("work").unpack([raw]).items()}
        expected = {
            name: getattr(descriptor, name)
            for name in ("activations", "results", "weights", "weights_stride", "result_pitch", "interrupt", "wait")
        }
        expected["weight_beats"] = layer.beats
        expected["activation_beats"] = activation_beats(config(), descriptor.tokens, layer.slices)
        expected["command"] = LayerCommand.from_layer(layer, descriptor.tokens, bool(descriptor.reuse)).to_int(config())
        assert fields == expected


async def _accept_many(dut: Any, stall: Stall) -> None:
    random, bench = rng(1), _Bench(dut, stall)
    await begin(dut)
    for layer in [*_limits(), *(random_layer(config(), random, max_k=config().max_k, max_tiles=40) for _ in range(20))]:
        descriptor = _descriptor(layer, random)
        assert refusal(config(), descriptor.to_words()) == ErrorCode.NONE
        await bench.accept(layer, descriptor)
        if random.integers(2):
            await bench.accept(layer, _descriptor(layer, random, reuse=descriptor))
    assert int(dut.error.value) == ErrorCode.NONE


@cocotb.test()
async def good_ones(dut):
    """Random and extreme layers, with and without reuse: the work equals that of hw.spec."""
    await _accept_many(dut, never)


@cocotb.test()
async def good_ones_with_stalls(dut):
    """The same test with pauses."""
    await _accept_many(dut, randomly(0.5, rng(2)))


@cocotb.test()
async def time(dut):
    """The latency is the one that the block states."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    bench.source.send(_number(_descriptor(_limits()[0], random).to_words()))
    await until(dut.clk, lambda: bench.source.transfers == 1, "the descriptor", cycles=50)
    # The source records a transfer one edge after it happens.
    assert await until(dut.clk, lambda: bool(int(dut.work_valid.value)), "work", cycles=50) == latency() - 1


def _mutations(descriptor: Descriptor, random) -> list[list[int]]:
    """Descriptors that are wrong in one place, or nearly wrong."""
    words = []
    for field in FIELDS:
        value, top = getattr(descriptor, field.name), (1 << field.width) - 1
        steps = {0, 1, top, value + 1, value - 1, value ^ (1 << int(random.integers(field.width)))}
        words += [replace(descriptor, **{field.name: step}).to_words() for step in steps if 0 <= step <= top]
    used = {bit for field in FIELDS for bit in range(field.low, field.low + field.width)}
    for bit in set(range(32 * DESCRIPTOR_WORDS)) - used:
        whole = descriptor.to_words()
        whole[bit // 32] |= 1 << bit % 32
        words.append(whole)
    c = config()
    words += [
        replace(descriptor, tokens=c.max_tokens + 1).to_words(),
        replace(descriptor, out_features=MAX_N + 1).to_words(),
        replace(descriptor, activations=ADDRESS_LIMIT - 128).to_words(),
        replace(descriptor, activations=ADDRESS_LIMIT).to_words(),
        replace(descriptor, results=ADDRESS_LIMIT, weights=ADDRESS_LIMIT).to_words(),
        replace(descriptor, weights_stride=descriptor.weights_stride - 4096).to_words(),
        replace(descriptor, tokens=1, result_pitch=0).to_words(),
        [0] * DESCRIPTOR_WORDS,
        [0xFFFF_FFFF] * DESCRIPTOR_WORDS,
    ]
    return words


@cocotb.test()
async def bad_ones(dut):
    """Every field one away from its valid value, at its limits, and with a bit flipped; every reserved bit."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    edge, codes = RisingEdge(dut.clk), set()
    for layer in [*_limits(), random_layer(config(), random)]:
        descriptor = _descriptor(layer, random)
        for words in _mutations(descriptor, random):
            expected = refusal(config(), words)
            codes.add(expected)
            bench.source.send(_number(words))
            for _ in range(20):
                await edge
                if int(dut.error.value) or bench.work.received:
                    break
            got = int(dut.error.value), len(bench.work.received)
            shown = [f"{word:#x}" for word in words]
            assert got == (expected, int(expected == ErrorCode.NONE)), f"{got}, not {expected.name}: {shown}"
            bench.work.received.clear()
            # After an invalid descriptor, the block ignores all others until the reset.
            if expected:
                bench.source.send(_number(descriptor.to_words()))
                await cycle(dut.clk, 12)
                assert int(dut.error.value) == expected and not bench.work.received
            dut.rst.value = 1
            bench.source._queue.clear()
            bench.source._task.cancel()
            bench.work._task.cancel()
            bench._early.cancel()
            await cycle(dut.clk, 2)
            bench = _Bench(dut)
            dut.rst.value = 0
            await cycle(dut.clk, 2)
    assert codes == {ErrorCode.NONE, ErrorCode.OPCODE, ErrorCode.SHAPE, ErrorCode.ALIGNMENT}
