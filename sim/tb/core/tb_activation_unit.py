# SPDX-License-Identifier: Apache-2.0
"""The activation unit: from float32 values, the mantissas and exponents of the numpy definition, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass

import cocotb
import numpy as np

from hw.spec.config import ATTENTION_K
from hw.spec.memory.access import PIECE_FLOATS
from hw.spec.memory.geometry import LayerLayout, fit_layer
from hw.spec.numerics.block_float import quantize
from hw.spec.numerics.float32 import EXPONENT_MIN, flush
from hw.spec.numerics.linear import quantize_activations
from hw.spec.ops.command import LayerCommand, is_short
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import StreamSink, StreamSource, bursty, cycle, never, randomly, read, rng, until

ATTENTION = config().has_attention


def _layer(random: np.random.Generator, groups: int | None = None, size: int = 32) -> LayerLayout:
    c = config()
    count = groups or int(random.integers(1, 4))
    return fit_layer(c, size * count, c.tile, size)


def _bits(x: np.ndarray, by_pieces: bool = False) -> list[int]:
    """The bits of float32 [M, K], token after token, slice by slice; or piece by piece in this order."""
    step = PIECE_FLOATS if by_pieces else x.shape[1]
    parts = [x[:, first : first + step] for first in range(0, x.shape[1], step)]
    raw = [np.ascontiguousarray(part, np.float32).view(np.uint8).reshape(-1, 4 * config().tile) for part in parts]
    return [int.from_bytes(row.tobytes(), "little") for row in np.concatenate(raw)]


@dataclass
class _Layer:
    """A layer's activations, float32 [M, K]. values: they come from the second input. by_pieces: if M is 2 or more."""

    layout: LayerLayout
    x: np.ndarray
    planes: int = 1
    values: bool = False
    by_pieces: bool = False

    @property
    def bits(self) -> list[int]:
        """The rows in their order."""
        return _bits(self.x, self.by_pieces)

    @property
    def rows(self) -> int:
        """Token slices in."""
        return self.x.size // config().tile

    @property
    def short(self) -> bool:
        return is_short(config(), len(self.x), self.layout.slices)

    def command(self, reuse: bool = False) -> list[int]:
        fields = LayerCommand.from_layer(self.layout, len(self.x), reuse=reuse).fields(config())
        if ATTENTION:
            fields |= dict(planes=self.planes, values=int(self.values), short=int(self.short))
        if config().reads_by_pieces:
            fields |= dict(by_pieces=int(self.by_pieces), last_slice=self.layout.slices - 1)
        return payload("command").pack(**fields)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(mantissas [slices * M, tile], exponents [slices * M]) in the order in which the core takes them."""
        c, (m, k) = config(), self.x.shape
        if self.values:
            mantissas, exponents = quantize(self.x, c.activation_bits, block=k)
            exponents = exponents[:, 0]
        else:
            mantissas, exponents = quantize_activations(c, self.x)
        groups = mantissas.reshape(m, self.layout.groups, 1, self.layout.group_slices, c.tile)
        rows = np.repeat(groups, self.planes, axis=2).transpose(1, 2, 3, 0, 4).reshape(-1, c.tile)
        return rows, np.tile(exponents, len(rows) // m)


class _Bench:
    def __init__(self, dut, stalls: Callable = never, command_stall: Callable = never, sink_stall: Callable = never):
        self.dut = dut
        self.command = StreamSource(dut, "command", dut.clk, command_stall)
        self.rows = StreamSource(dut, "rows", dut.clk, stalls)
        self.values = StreamSource(dut, "values", dut.clk, stalls) if ATTENTION else self.rows
        self.slices = StreamSink(dut, "slices", dut.clk, sink_stall)

    def send(self, layer: _Layer) -> None:
        self.command.send(layer.command())
        (self.values if layer.values else self.rows).send(layer.bits)

    async def check(self, layer: _Layer) -> None:
        mantissas, exponents = layer.expected()
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
        layers.append(_Layer(layer, x))
        bench.send(layers[-1])
    for layer in layers:
        await bench.check(layer)
    await bench.slices.quiet(64)
    assert not int(dut.non_finite.value) and not int(dut.out_of_range.value)


@cocotb.test(skip=not config().reads_by_pieces)
@cocotb.parametrize(stall=[0.0, 0.4, 0.7])
async def by_pieces(dut, stall):
    """Rows piece by piece, with all lengths of the last piece, between layers in the other order; all rows in order."""
    c, random = config(), rng(1)
    rules = [randomly(stall, rng(2, index)) if stall else never for index in range(3)]
    bench, layers, most = _Bench(dut, *rules), [], c.max_k // 32
    await begin(dut)
    lengths = [1, 2, 8, 9, most, *(int(random.integers(1, most + 1)) for _ in range(10))]
    for index, groups in enumerate(lengths):
        tokens = int(random.choice([2, c.max_tokens, int(random.integers(2, c.max_tokens + 1))]))
        layer = _Layer(_layer(random, groups), _random_x(random, tokens, 32 * groups), by_pieces=index % 4 != 3)
        # The largest number is in any piece.
        layer.x[random.integers(tokens), random.integers(32 * groups)] *= 64
        layers.append(layer)
        bench.send(layer)
    for layer in layers:
        await bench.check(layer)
    await bench.slices.quiet(64)
    assert not read(dut.non_finite) and not read(dut.out_of_range)


@cocotb.test(skip=not config().reads_by_pieces)
@cocotb.parametrize(column=[0, -1], token=[0, -1])
async def error_in_a_piece(dut, column, token):
    """An element that is not finite is found in the first and in the last piece."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    layout = _layer(random, 9)
    x = _random_x(random, config().max_tokens, layout.k)
    x[token, column] = np.nan
    bench.send(_Layer(layout, x, by_pieces=True))
    await until(dut.clk, lambda: bool(read(dut.non_finite)), "non_finite", cycles=10_000)
    await bench.slices.quiet(128)


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
    bench.send(_Layer(layer, x))
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
    await bench.check(_Layer(layer, x))
    assert last_in - first_in == slices - 1
    assert last_out - first_out == slices - 1
    assert first_out - last_in == latency(), (first_out, last_in)


@cocotb.test()
async def reuse_takes_no_activations(dut):
    """A command that reuses activations takes none, and does not disturb the next command."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    layer = _layer(random)
    first, second = (_Layer(layer, _random_x(random, 1, layer.k)) for _ in range(2))
    bench.send(first)
    bench.command.send(first.command(reuse=True))
    bench.send(second)
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
    bench.send(_Layer(layer, x))
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


def _values_x(random: np.random.Generator, m: int, k: int) -> np.ndarray:
    """Products of probabilities and powers of two: 0, or normal numbers that are not negative. Some rows are tiny."""
    powers = random.integers(-126, 121, (m, 1)) - random.integers(0, 40, (m, k))
    x = np.ldexp(random.random((m, k)).astype(np.float32), powers).astype(np.float32)
    x[:, :: int(random.integers(2, 9))] = 0
    smallest = random.integers(0, m, 2)
    # Below the lowest exponent, around the place where it is reached, and zeros only.
    limit = -(1 << 7) + config().activation_bits - 1
    x[smallest[0]] = np.ldexp(random.random(k) + 0.5, random.integers(EXPONENT_MIN, limit + 2, k)).astype(np.float32)
    x[smallest[1]] *= random.integers(2)
    return flush(x)


def _attention_layer(random: np.random.Generator, short: bool) -> _Layer:
    """A layer that is short, from a single row to half of the store, or one that is not, up to all of it."""
    c = config()
    size = int(random.choice([32, 64]))
    while True:
        tokens = int(random.integers(1, c.max_tokens + 1))
        groups = int(random.choice([1, int(random.integers(1, c.max_k // size + 1)), c.max_k // size]))
        layout = _layer(random, groups, size)
        if is_short(c, tokens, layout.slices) == short:
            break
        if not short and random.random() < 0.2:
            return _Layer(_layer(random, c.max_k // size, size), _random_x(random, c.max_tokens, c.max_k))
    planes, values = int(random.choice([1, 2, 4])), bool(random.integers(2))
    return _Layer(layout, (_values_x if values else _random_x)(random, tokens, layout.k), planes, values)


@cocotb.test(skip=not ATTENTION)
@cocotb.parametrize(stall=[0.0, 0.4, 0.7], short=[0.5, 0.9])
async def short_and_long_layers(dut, stall, short):
    """Layers of all lengths, planes and inputs one after the other, some of which reuse activations."""
    random = rng(1)
    rules = [randomly(stall, rng(2, index)) if stall else never for index in range(3)]
    bench = _Bench(dut, *rules)
    await begin(dut)
    layers = [_attention_layer(random, random.random() < short) for _ in range(16)]
    for layer in layers:
        bench.send(layer)
        if random.random() < 0.2:
            bench.command.send(layer.command(reuse=True))
    for layer in layers:
        await bench.check(layer)
    await bench.slices.quiet(64)
    assert not read(dut.non_finite) and not read(dut.out_of_range)


@cocotb.test(skip=not ATTENTION)
async def smallest_layers(dut):
    """Layers with fewer rows than the pipeline has stages."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    layers = [
        _Layer(_layer(random, 1), _random_x(random, int(random.integers(1, 3)), 32), int(random.choice([1, 2])))
        for _ in range(40)
    ]
    for layer in layers:
        bench.send(layer)
    for layer in layers:
        await bench.check(layer)


@cocotb.test(skip=not ATTENTION)
@cocotb.parametrize(planes=[1, 2, 4])
async def overlap(dut, planes):
    """A sequence of the largest layers of attention: one is loaded while the other is sent."""
    c, random, bench = config(), rng(1), _Bench(dut)
    layout = _layer(random, ATTENTION_K // 32)
    layers = [_Layer(layout, _random_x(random, c.max_tokens, ATTENTION_K), planes, bool(n % 2)) for n in range(6)]
    for layer in layers:
        layer.x = np.abs(layer.x)
    assert all(layer.short for layer in layers)
    await begin(dut)
    monitor = Monitor(dut, ("rows", "slices"))
    for layer in layers:
        bench.send(layer)
    for layer in layers:
        await bench.check(layer)
    slices, load, send = monitor["slices"], layers[0].rows, layers[0].rows * planes
    assert consecutive(monitor["rows"][:load]) and slices[0] - monitor["rows"][load - 1] == latency()
    turnaround = latency("turnaround")
    if planes > 1:
        # The sum over the layers of the longer of the two times, and the first load.
        assert send - load >= turnaround
        assert slices[-1] - monitor["rows"][0] == load - 1 + latency() + len(layers) * max(load, send) - 1
        assert consecutive(slices)
    else:
        starts = slices[::send]
        assert {after - before for before, after in zip(starts, starts[2:], strict=False)} == {load + send + turnaround}


@cocotb.test(skip=not ATTENTION)
@cocotb.parametrize(values=[False, True], single=[False, True], token=[0, -1])
async def error_between_layers(dut, values, single, token):
    """The layer before an error is sent, this one and the next ones are not; ``earlier`` names it."""
    random, bench, wrong = rng(1), _Bench(dut), 2
    flag, value = ("non_finite", np.nan) if values else ("out_of_range", np.float32(1e-40))
    await begin(dut)
    layers = []
    for number in range(5):
        layout = _layer(random, 1 if single else 3)
        x = _values_x(random, 1 if single else config().max_tokens, layout.k)
        layers.append(_Layer(layout, x, 2, values or number != wrong))
    layers[wrong].x[token] = 0
    layers[wrong].x[token, random.integers(layers[wrong].layout.k)] = value
    for layer in layers:
        bench.send(layer)
    for layer in layers[:wrong]:
        await bench.check(layer)
    await until(dut.clk, lambda: bool(read(getattr(dut, flag))), flag, cycles=10_000)
    await bench.slices.quiet(512)
    assert bench.command.transfers - 1 - read(dut.earlier) == wrong
    assert read(dut.non_finite) + read(dut.out_of_range) == 1


@cocotb.test(skip=not ATTENTION)
@cocotb.parametrize(wait=range(12))
async def error_as_a_layer_begins(dut, wait):
    """The next command comes before, with, or after the error; ``earlier`` names the layer in each case."""
    random, bench = rng(1), _Bench(dut)
    await begin(dut)
    layers = [_Layer(_layer(random, 1), _random_x(random, 1, 32)) for _ in range(2)]
    layers[0].x[0, -1] = np.inf
    bench.send(layers[0])
    await until(dut.clk, lambda: bench.rows.transfers == layers[0].rows, "the layer")
    await cycle(dut.clk, wait)
    bench.send(layers[1])
    await bench.slices.quiet(64)
    assert read(dut.non_finite) and bench.command.transfers - 1 - read(dut.earlier) == 0
