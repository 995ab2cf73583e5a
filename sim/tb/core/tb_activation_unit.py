# SPDX-License-Identifier: Apache-2.0
"""The activation unit: from float32 values, the mantissas and exponents of the numpy definition, bit for bit."""

from collections.abc import Callable

import cocotb
import numpy as np

from hw.spec.memory.geometry import LayerLayout, fit_layer
from hw.spec.numerics.linear import quantize_activations
from hw.spec.ops.command import LayerCommand
from sim.bench.dut import begin, config, latency, payload
from sim.bench.streams import StreamSink, StreamSource, bursty, cycle, never, randomly, rng, until


def _layer(random: np.random.Generator, groups: int | None = None) -> LayerLayout:
    c = config()
    count = groups or int(random.integers(1, 4))
    return fit_layer(c, 32 * count, c.tile, 32)


def _bits(x: np.ndarray) -> list[int]:
    """The bits of float32 [M, K], token after token, slice by slice."""
    raw = np.ascontiguousarray(x, np.float32).view(np.uint8).reshape(-1, 4 * config().tile)
    return [int.from_bytes(row.tobytes(), "little") for row in raw]


def _expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mantissas [slices * M, tile], exponents [slices * M]) in the order in which the core takes them."""
    c = config()
    activations = quantize_activations(c, x)
    m, k = x.shape
    rows = activations.mantissas.reshape(m, k // c.tile, c.tile).transpose(1, 0, 2).reshape(-1, c.tile)
    return rows, np.tile(activations.exponents, k // c.tile)


class _Bench:
    def __init__(self, dut, stalls: Callable = never, command_stall: Callable = never, sink_stall: Callable = never):
        self.dut = dut
        self.command = StreamSource(dut, "command", dut.clk, command_stall)
        self.rows = StreamSource(dut, "rows", dut.clk, stalls)
        self.slices = StreamSink(dut, "slices", dut.clk, sink_stall)

    def send(self, layer: LayerLayout, x: np.ndarray) -> None:
        self.command.send([LayerCommand.from_layer(layer, len(x)).to_int(config())])
        self.rows.send(_bits(x))

    async def check(self, x: np.ndarray) -> None:
        mantissas, exponents = _expected(x)
        taken = await self.slices.take(len(mantissas), cycles=200_000)
        got = payload("slices").unpack(taken, mantissas=config().tile)
        np.testing.assert_array_equal(got["mantissas"], mantissas)
        np.testing.assert_array_equal(got["exponent"], exponents)


def _random_x(random: np.random.Generator, m: int, k: int) -> np.ndarray:
    """Every kind of token: usual values, outliers, zeros, tiny next to huge values, mantissas that just round up."""
    x = random.standard_normal((m, k)).astype(np.float32)
    for row in x:
        kind = random.integers(6)
        if kind == 1:
            row *= np.float32(2.0) ** random.integers(-100, 100)
        elif kind == 2:
            row[:] = 0
        elif kind == 3:
            row *= np.exp2(random.integers(-60, 60, k)).astype(np.float32)
        elif kind == 4:
            # Halves and values next to them, so that every case of rounding occurs.
            row[:] = random.integers(-(1 << 17), 1 << 17, k) / np.float32(4)
        elif kind == 5:
            # Values around the smallest one whose rounding carries into one more bit.
            bits = config().activation_bits
            below = 2.0**-bits + random.choice([-(2.0**-24), 0, 2.0**-24, 2.0 ** -(bits + 1), 2.0**-bits])
            row[random.integers(k)] = np.float32(random.choice([-1, 1]) * (1 - below) * 2.0 ** random.integers(4, 20))
    return x


async def _run(dut, stalls=never, command_stall=never, sink_stall=never, count=40) -> None:
    random, bench = rng(1), _Bench(dut, stalls, command_stall, sink_stall)
    await begin(dut)
    layers = []
    for _ in range(count):
        layer = _layer(random)
        x = _random_x(random, int(random.integers(1, config().max_tokens, endpoint=True)), layer.k)
        layers.append(x)
        bench.send(layer, x)
    for x in layers:
        await bench.check(x)
    await bench.slices.quiet(64)
    assert not int(dut.non_finite.value) and not int(dut.out_of_range.value)


@cocotb.test()
async def stalls(dut):
    """Random pauses on every stream."""
    await _run(dut, randomly(0.4, rng(2)), randomly(0.5, rng(3)), randomly(0.4, rng(4)))


@cocotb.test()
async def bursts(dut):
    """Long pauses of the memory and of the core."""
    await _run(dut, bursty(rng(2), run=16, pause=8), never, bursty(rng(3), run=3, pause=40))


@cocotb.test()
async def full_speed(dut):
    """Without pauses, the unit takes and gives a slice per cycle, with the latency that the manifest states."""
    c, random, bench = config(), rng(1), _Bench(dut)
    await begin(dut)
    layer = _layer(random, groups=3)
    x = _random_x(random, c.max_tokens, layer.k)
    bench.send(layer, x)
    slices = x.size // c.tile
    now = first_in = last_in = first_out = last_out = 0
    while bench.slices.transfers < slices:
        before = bench.rows.transfers, bench.slices.transfers
        await cycle(dut.clk, 1)
        now += 1
        if bench.rows.transfers != before[0]:
            first_in, last_in = first_in or now, now
        if bench.slices.transfers != before[1]:
            first_out, last_out = first_out or now, now
        assert now < 8 * slices + 100, "no progress"
    await bench.check(x)
    assert last_in - first_in == slices - 1
    assert last_out - first_out == slices - 1
    assert first_out - last_in == latency(), (first_out, last_in)


@cocotb.test()
async def reuse_takes_no_activations(dut):
    """A command that reuses activations takes none, and does not disturb the next command."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    layer = _layer(random)
    first, second = _random_x(random, 1, layer.k), _random_x(random, 1, layer.k)
    bench.send(layer, first)
    bench.command.send([LayerCommand.from_layer(layer, 1, reuse=True).to_int(config())])
    bench.send(layer, second)
    await bench.check(first)
    await bench.check(second)
    await bench.slices.quiet(64)


async def _refuse(dut, value: float, flag: str) -> None:
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    layer = _layer(random)
    x = random.standard_normal((2 if config().max_tokens > 1 else 1, layer.k)).astype(np.float32)
    if flag == "out_of_range":
        x[-1] = 0
    x[-1, random.integers(layer.k)] = value
    bench.send(layer, x)
    await until(dut.clk, lambda: bool(int(getattr(dut, flag).value)), flag, cycles=10_000)
    # The layer does not move.
    await bench.slices.quiet(128)
    other = "out_of_range" if flag == "non_finite" else "non_finite"
    assert int(getattr(dut, flag).value) and not int(getattr(dut, other).value)


@cocotb.test()
@cocotb.parametrize(value=[float("inf"), float("-inf"), float("nan")])
async def non_finite(dut, value):
    """A single element that is not a finite number is detected."""
    await _refuse(dut, value, "non_finite")


@cocotb.test()
@cocotb.parametrize(value=[1e-40, 2.0**-120])
async def out_of_range(dut, value):
    """A token whose exponent does not fit its field is detected."""
    await _refuse(dut, value, "out_of_range")
