# SPDX-License-Identifier: Apache-2.0
"""The weight splitter: each output tile's header to one side and its body to the other, in the same cycle."""

import cocotb

from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config
from sim.bench.layers import random_layer
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, never, randomly, rng


async def _split(dut, layers, command=never, beats=never, header=never, body=never):
    c, random = config(), rng()
    sources = StreamSource(dut, "command", dut.clk, command), StreamSource(dut, "beats", dut.clk, beats)
    sinks = StreamSink(dut, "header", dut.clk, header), StreamSink(dut, "body", dut.clk, body)
    await begin(dut)
    monitor = Monitor(dut, ("beats", "header", "body"))
    expected = [], []
    for layer in layers:
        sources[0].send(LayerCommand.from_layer(layer, 1).to_int(c))
        for _ in range(layer.out_tiles):
            parts = layer.header_beats, layer.tile_beats - layer.header_beats
            for part, count in zip(expected, parts):
                payloads = [int.from_bytes(random.bytes(c.beat_bytes), "little") for _ in range(count)]
                sources[1].send(payloads)
                part.extend(payloads)
    for sink, part in zip(sinks, expected):
        assert await sink.take(len(part)) == part
    for sink in sinks:
        await sink.quiet(8)
    assert sorted(monitor["header"] + monitor["body"]) == monitor["beats"], "a beat does not pass in its own cycle"
    return monitor


@cocotb.test()
async def test_full_throughput(dut):
    """A beat every cycle, across tiles and layers; the shortest layers among them."""
    c, random = config(), rng()
    layers = [random_layer(c, random) for _ in range(20)]
    layers[3:3] = [random_layer(c, random, max_k=c.tile, max_tiles=1) for _ in range(5)]
    monitor = await _split(dut, layers)
    assert consecutive(monitor["beats"])


@cocotb.test()
async def test_random_stalls(dut):
    c, random = config(), rng()
    layers = [random_layer(c, random) for _ in range(12)]
    await _split(dut, layers, *(randomly(p, rng(n)) for n, p in enumerate((0.8, 0.2, 0.5, 0.3))))
