# SPDX-License-Identifier: Apache-2.0
"""The header reader: row exponents of every output tile and one record per group, exact and in time."""

import cocotb
import numpy as np

from hw.spec.config import EXPONENT_BITS, SCALE_BITS
from hw.spec.memory.geometry import LayerLayout, StreamLayout
from hw.spec.memory.packing import pack
from hw.spec.ops.command import LayerCommand, max_header_beats
from sim.bench.dut import begin, config, latency
from sim.bench.layers import random_layer, weights_of
from sim.bench.monitor import Monitor
from sim.bench.packing import pack_elements
from sim.bench.streams import StreamSink, StreamSource, cycle, never, randomly, rng


class _Headers:
    """Layers with random scales and zero points: commands, header beats, and what must come of them."""

    def __init__(self, layers):
        c, random = config(), rng(len(layers))
        self.commands = [LayerCommand.from_layer(layer, 1).to_int(c) for layer in layers]
        self.beats, self.exponents, self.records = [], [], []
        for layer in layers:
            weights = weights_of(layer, random)
            stream = pack(layer, weights).reshape(layer.out_tiles, layer.tile_beats, c.beat_bytes)
            for header in stream[:, : layer.header_beats].reshape(-1, c.beat_bytes):
                self.beats.append(int.from_bytes(header.tobytes(), "little"))
            rows = ((0, layer.out_tiles * c.tile - layer.n), (0, 0))
            exponents = np.pad(weights.exponents[:, None], rows).reshape(-1, c.tile)
            scales, zeros = np.pad(weights.scale_mantissas, rows), np.pad(weights.zero_points, rows)
            self.exponents += pack_elements(exponents, EXPONENT_BITS)
            for tile in range(layer.out_tiles):
                part = slice(tile * c.tile, (tile + 1) * c.tile)
                low = pack_elements(scales[part].T, SCALE_BITS)
                high = pack_elements(zeros[part].T, c.zero_point_bits)
                self.records += [a | b << (SCALE_BITS * c.tile) for a, b in zip(low, high)]


async def _read(dut, headers, command=never, beats=never, exponents=never, records=never):
    sources = StreamSource(dut, "command", dut.clk, command), StreamSource(dut, "beats", dut.clk, beats)
    sinks = StreamSink(dut, "exponents", dut.clk, exponents), StreamSink(dut, "records", dut.clk, records)
    await begin(dut)
    monitor = Monitor(dut, ("beats", "exponents", "records"), ("tile_ready",))
    sources[0].send(headers.commands)
    sources[1].send(headers.beats)
    for sink, expected in zip(sinks, (headers.exponents, headers.records)):
        assert await sink.take(len(expected)) == expected
    for sink in sinks:
        await sink.quiet(20)
    assert len(monitor["beats"]) == len(headers.beats), "beats are left over"
    assert len(monitor["tile_ready"]) == len(headers.exponents)
    for ready, taken in zip(monitor["tile_ready"], monitor["exponents"]):
        assert ready < taken, f"exponents left in cycle {taken}, announced in cycle {ready}"
    return monitor


def _longest() -> LayerLayout:
    """The layer with the most groups, two output tiles of it."""
    c = config()
    size = next(s for s in (32, 64, 128, 256) if s % c.tile == 0)
    return LayerLayout(c, c.max_k // size * size, c.tile + 1, size)


@cocotb.test()
async def room_for_one_header_and_a_half(dut):
    """Before anything is read, the ring takes the longest header and half of the next one; then it takes no more."""
    for name in ("exponents", "records"):
        StreamSink(dut, name, dut.clk, never)
    # Without a command the reader reads nothing.
    _, beats = (StreamSource(dut, name, dut.clk, never) for name in ("command", "beats"))
    await begin(dut)
    monitor = Monitor(dut, ("beats",))
    least = max_header_beats(config()) * 3 // 2
    beats.send([0] * (4 * least))
    await cycle(dut.clk, 4 * least + 20)
    assert least <= len(monitor["beats"]) == latency("ring_depth") < 4 * least


@cocotb.test()
async def test_full_throughput(dut):
    """From a full ring, a record in every ``record_cycles``, exponents once a tile."""
    stream, blocked = StreamLayout(config()), [True]
    headers = _Headers([_longest()] * 3)

    async def release():
        await cycle(dut.clk, 300)
        blocked[0] = False

    task = cocotb.start_soon(release())
    monitor = await _read(dut, headers, records=lambda: blocked[0])
    await task
    took = monitor["records"][-1] - monitor["records"][0] + 1
    # The ring may have to wait for the beats themselves: they come once a cycle from the moment of release on.
    bound = len(headers.records) * stream.record_cycles + len(headers.exponents) * stream.exponents_cycles
    assert took <= bound + 2, f"{len(headers.records)} records took {took} cycles, more than {bound}"


@cocotb.test()
async def test_latency(dut):
    """The first exponents come ``latency`` cycles after the beat that completes them."""
    stream = StreamLayout(config())
    monitor = await _read(dut, _Headers([_longest()]))
    last_beat = -(-stream.exponents_units // stream.beat_units) - 1
    assert monitor["exponents"][0] - monitor["beats"][last_beat] == latency()


@cocotb.test()
async def test_random_layers(dut):
    random = rng()
    await _read(dut, _Headers([random_layer(config(), random) for _ in range(30)]))


@cocotb.test()
@cocotb.parametrize(speeds=[(0.5, 0.5, 0.5, 0.5), (0.0, 0.0, 0.9, 0.2), (0.9, 0.3, 0.0, 0.9), (0.0, 0.8, 0.1, 0.1)])
async def test_random_stalls(dut, speeds):
    random = rng()
    stalls = [randomly(p, rng(n)) for n, p in enumerate(speeds)]
    await _read(dut, _Headers([random_layer(config(), random) for _ in range(15)]), *stalls)
