# SPDX-License-Identifier: Apache-2.0
"""Descriptors of values as layers and as regions of weights; ordinary layers between them pass unchanged."""

from dataclasses import replace

import cocotb

from hw.spec.memory.geometry import LayerLayout
from hw.spec.memory.kv_cache import ValueCache, value_chunk, value_planes
from hw.spec.numerics.attention import CHUNK
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, payload
from sim.bench.layers import random_layer
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, rng
from sim.harness import settings

REGIONS = settings().get("regions", False)
STALLS = cocotb.parametrize(stalls=[(0.0, 0.0), (0.4, 0.0), (0.0, 0.4), (0.3, 0.6)])


def _rules(stalls):
    return [randomly(stall, rng(2, index)) if stall else never for index, stall in enumerate(stalls)]


def _chunk(cache: ValueCache, tokens: int, positions: int) -> LayerCommand:
    """The layer of one chunk with so many positions of ``tile`` columns."""
    c, whole = config(), value_chunk(config())
    groups = -(-positions // cache.group) * value_planes(c)
    part = LayerCommand.from_layer(LayerLayout(c, groups * cache.group, c.tile, cache.group), tokens)
    return replace(part, header_beats=whole.header_beats, spare_records=whole.groups - groups)


@cocotb.test(skip=REGIONS)
@STALLS
async def layers(dut, stalls):
    """One layer for each column tile of each chunk, without a cycle between them."""
    random, c, rules = rng(1), config(), _rules(stalls)
    source, sink = StreamSource(dut, "layers", dut.clk, rules[0]), StreamSink(dut, "commands", dut.clk, rules[1])
    await begin(dut)
    expected = []
    for _ in range(40):
        tokens = int(random.integers(1, c.max_tokens, endpoint=True))
        if random.integers(2):
            command = LayerCommand.from_layer(random_layer(c, random), tokens)
            number = command.to_int(c)
            source.send(payload("layers").pack(command=[number], values=[0], chunks=[3], last_groups=[1]))
            expected.append(number)
            continue
        positions = int(random.choice([1, CHUNK - 1, CHUNK, CHUNK + 1, int(random.integers(1, 1500))]))
        cache = ValueCache(c, 32 * int(random.integers(1, 8, endpoint=True)), positions)
        counts = [min(CHUNK, positions - start) for start in range(0, positions, CHUNK)]
        # The other fields have no meaning.
        noise = LayerCommand.from_layer(random_layer(c, random), tokens)
        number = replace(noise, out_tiles=cache.column_tiles).to_int(c)
        last = -(-counts[-1] // cache.group)
        source.send(payload("layers").pack(command=[number], values=[1], chunks=[len(counts)], last_groups=[last]))
        expected += [_chunk(cache, tokens, count).to_int(c) for count in counts for _ in range(cache.column_tiles)]
    assert await sink.take(len(expected)) == expected
    if not any(stalls):
        assert sink.stalled_by_dut == 0 or source.transfers == 40
    await sink.quiet(8)


@cocotb.test(skip=not REGIONS)
@STALLS
async def regions(dut, stalls):
    """A region for each column tile of each chunk; a layer is one."""
    random, c, rules = rng(3), config(), _rules(stalls)
    source, sink = StreamSource(dut, "tiles", dut.clk, rules[0]), StreamSink(dut, "regions", dut.clk, rules[1])
    await begin(dut)
    expected, whole = [], value_chunk(c).tile_beats
    for _ in range(60):
        tiles, chunks = int(random.choice([1, 1, 2, 256 // c.tile])), int(random.choice([1, 1, 2, 5, 128]))
        address, stride = 4096 * int(random.integers(1 << 27)), 4096 * int(random.integers(1 << 20))
        beats, step = (int(random.integers(1, 1 << width)) for width in (13, payload("tiles").fields["step"].width))
        last_beats = int(random.integers(1, whole, endpoint=True))
        if (tiles, chunks) != (1, 1):
            beats = whole if chunks > 1 else last_beats
        fields = {"address": address, "stride": stride, "beats": beats, "tiles": tiles, "chunks": chunks, "step": step}
        fields["last_beats"] = last_beats
        source.send(payload("tiles").pack(**{name: [value] for name, value in fields.items()}))
        expected += [
            (address + chunk * whole * c.port_width // 8 + tile * step, stride, last_beats if last else beats)
            for chunk, last in enumerate([False] * (chunks - 1) + [chunks > 1])
            for tile in range(tiles)
        ]
    got = payload("regions").unpack(await sink.take(len(expected)))
    assert list(zip(*(got[name].tolist() for name in ("address", "stride", "beats")), strict=True)) == expected
    await cycle(dut.clk, 8)
    assert not sink.received
