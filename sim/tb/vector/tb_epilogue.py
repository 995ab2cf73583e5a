# SPDX-License-Identifier: Apache-2.0
"""The epilogue against :func:`hw.spec.ops.epilogue.apply_epilogue`, bit for bit."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from hw.spec.memory.transfers import result_transfers
from hw.spec.ops.epilogue import Outputs, apply_epilogue
from sim.bench.dut import begin, config, latency, payload
from sim.bench.epilogues import KINDS, Epilogue, numbers, random_epilogue
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, read, rng

PIECE = 256
LANES = config().vector_lanes
"""Lanes of the vector unit."""
SOURCE, ADDEND, TABLE, FACTOR = range(4)
OPERAND_LATENCY = 2
WAITING = 2
"""Transfers that are accepted before the epilogue takes the first one."""
SPEEDS = [
    (0, 0, 0, 0, 0),
    (0.9, 0, 0, 0, 0),
    (0, 0.5, 0.5, 0.5, 0.5),
    (0, 0, 0.8, 0, 0),
    (0, 0, 0, 0.8, 0),
    (0, 0, 0, 0, 0.9),
]
"""Probabilities of a stall of job, results, both outputs, and the operands."""


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32).astype(np.int64)


@dataclass
class _Layer:
    """A layer's results before the epilogue, its epilogue, and r of the layers before."""

    values: np.ndarray
    epilogue: Epilogue
    r: np.ndarray | None
    vector: bool = False
    outputs: Outputs = field(init=False)

    def __post_init__(self):
        self.outputs = apply_epilogue(self.epilogue.fields, self.values, self.epilogue.operands, self.r)

    @property
    def job(self) -> list[int]:
        fields = self.epilogue.fields
        return payload("job").pack(
            flags=[self.epilogue.flags],
            vector=[int(self.vector)],
            tokens=[fields["tokens"]],
            columns=[fields["out_features"]],
            rotated=[fields["head"] * fields["rotary_heads"]],
            eps=[fields["eps"]],
        )

    def transfers(self, random: np.random.Generator) -> list[int]:
        """The array's results. Columns that do not exist have random values."""
        lanes = config().lanes
        found: dict[str, list[Any]] = {"values": []}
        for transfer in result_transfers(config(), *self.values.shape):
            part = random.integers(0, 1 << 32, lanes)
            columns = transfer.columns
            part[: len(columns)] = _bits(self.values[transfer.token, columns.start : columns.stop])
            found["values"].append(part)
            for name, value in transfer.fields.items():
                found.setdefault(name, []).append(value)
        values = np.array(found.pop("values")).astype(np.uint32).view(np.int32).astype(np.int64)
        return payload("results").pack(values=values, **{name: np.array(given) for name, given in found.items()})


class _Operand:
    """One operand: available at random times, and read as the epilogue asks, chunk by chunk."""

    def __init__(self, dut: Any, index: int, stall: Stall):
        self.dut, self.index, self.stall = dut, index, stall
        self.data = getattr(dut, f"data_{index}")
        self.queue: list[tuple[np.ndarray, bool]] = []
        self.start = 0
        """First column of the current chunk; for the table, of the current read."""

    def send(self, rows: np.ndarray, single: bool) -> None:
        self.queue.append((rows, single))

    def read(self, token: int, column: int) -> list[int]:
        rows, single = self.queue[0]
        row = rows[0 if single else token]
        return [int(value) for value in _bits(row)[self.start + column * LANES :][:LANES]]

    def release(self) -> None:
        self.start += PIECE
        if self.start >= self.queue[0][0].shape[1]:
            self.queue.pop(0)
            self.start = 0


class _Table(_Operand):
    """The rotary table: the row of the token, whose columns follow from the order of the reads."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.counts: dict[int, int] = {}

    def read(self, token: int, column: int) -> list[int]:
        rows, single = self.queue[0]
        at = self.counts.get(token, 0)
        self.counts[token] = at + LANES
        row = np.tile(_bits(rows[0 if single else token]), 2)
        return [int(value) for value in row[at % rows.shape[1] :][:LANES]]

    def release(self) -> None:
        self.queue.pop(0)
        self.counts.clear()


class _Bench:
    def __init__(self, dut: Any, layers: list[_Layer], stalls: tuple[Stall, ...] = (never,) * 5):
        job, results, first, second, operands = stalls
        self.dut, self.layers = dut, layers
        self.job = StreamSource(dut, "job", dut.clk, job)
        self.results = StreamSource(dut, "results", dut.clk, results)
        self.first = StreamSink(dut, "first", dut.clk, first)
        self.second = StreamSink(dut, "second", dut.clk, second)
        kinds = {TABLE: _Table}
        self.operands = [kinds.get(index, _Operand)(dut, index, operands) for index in range(4)]
        dut.available.value = 0
        for layer in layers:
            parts, single = layer.epilogue.operands, layer.epilogue.single
            if layer.vector:
                self.operands[SOURCE].send(layer.values, False)
            if parts.addend is not None:
                self.operands[ADDEND].send(parts.addend, "addend" in single)
            if parts.table is not None:
                self.operands[TABLE].send(parts.table, "table" in single)
            if parts.factor is not None:
                self.operands[FACTOR].send(parts.factor[None], True)
        cocotb.start_soon(self._serve())

    async def _serve(self) -> None:
        """Answers reads after ``OPERAND_LATENCY`` cycles; an operand that is available stays so until the release."""
        dut, edge, late, offered = self.dut, RisingEdge(self.dut.clk), [], [False] * 4
        random = rng(77)
        while True:
            await edge
            if str(dut.rst.value) != "0":
                continue
            reads, releases = read(dut.read), read(dut.release)
            found: dict[int, list[int]] = {}
            for index, operand in enumerate(self.operands):
                if reads >> index & 1:
                    assert offered[index], f"operand {index} is read and not available"
                    found[index] = operand.read(read(dut.token), read(dut.column))
                if releases >> index & 1:
                    operand.release()
                    offered[index] = False
                offered[index] = offered[index] or (bool(operand.queue) and not operand.stall())
            dut.available.value = sum(flag << index for index, flag in enumerate(offered))
            late.append(found)
            if len(late) == OPERAND_LATENCY:
                for index in range(4):
                    words = late[0].get(index, [])
                    words = words + [int(word) for word in random.integers(0, 1 << 32, LANES - len(words))]
                    self.operands[index].data.value = sum(word << 32 * lane for lane, word in enumerate(words))
                late.pop(0)

    def send(self) -> None:
        random = rng(5)
        for layer in self.layers:
            self.job.send(layer.job)
            if not layer.vector:
                self.results.send(layer.transfers(random))

    async def check(self, cycles: int = 1_000_000) -> None:
        """Checks every value of both outputs, and that there is nothing more."""
        for number, layer in enumerate(self.layers):
            fields, outputs = layer.epilogue.fields, layer.outputs
            where = f"layer {number}, {fields}"
            if not fields["quiet"]:
                await self._check(self.first, "first", LANES // 2, _bits(outputs.results), where, cycles)
            if outputs.second is not None:
                await self._check(self.second, "second", 2, _bits(outputs.second), where, cycles)
        await self.first.quiet(1)
        await self.second.quiet(200)

    async def _check(self, sink: StreamSink, name: str, unit: int, rows: np.ndarray, where: str, cycles: int) -> None:
        """Collects the transfers of one layer as a gatherer does."""
        tokens, columns = rows.shape
        for start in range(0, columns, PIECE):
            chunk, width, ended = np.full((tokens, PIECE), -1, np.int64), min(PIECE, columns - start), False
            while not ended:
                (raw,) = await sink.take(1, cycles)
                seen = {key: values[0] for key, values in payload(name).unpack([raw]).items()}
                low = payload(name).fields["values"].offset
                values = [raw >> low + 32 * lane & 0xFFFF_FFFF for lane in range(LANES)]
                keep, at = int(seen["keep"]), int(seen["column"]) * unit
                assert keep & 1 and keep & (keep + 1) == 0, f"{name} of {where}: keep {keep:b}"
                for index in range(keep.bit_length()):
                    chunk[int(seen["token"]), at + index] = values[(at + index) % LANES]
                ended = bool(seen["chunk_end"])
            last = start + width == columns
            assert bool(seen["last"]) == last, f"{name} of {where}: the end of the layer"
            place = int(seen["token"]), at + keep.bit_length()
            assert place == (tokens - 1, width), f"{name} of {where}: the last transfer"
            expected = rows[:, start : start + width]
            wrong = np.argwhere(chunk[:, :width] != expected)
            assert not len(wrong), (
                f"{name} of {where}: token, column {wrong[0] + [0, start]}:"
                f" {chunk[tuple(wrong[0])]:#x}, not {expected[tuple(wrong[0])]:#x}; {len(wrong)} wrong"
            )
            assert (chunk[:, width:] == -1).all(), f"{name} of {where}: columns after the end"


def _layers(random: np.random.Generator, count: int, hard: bool) -> list[_Layer]:
    """Layers of all kinds. The values of r are those of the last layer with squares."""
    most, layers, r = config().max_tokens, [], None
    # r of all tokens, before it is used.
    parts = [("quiet", "second", "squares"), *KINDS]
    parts += [KINDS[int(random.integers(len(KINDS)))] for _ in range(count)]
    for index, kind in enumerate(parts):
        tokens = most if index == 0 else int(random.integers(1, most, endpoint=True))
        columns = int(random.choice([1, 2, 15, 16, 17, 100, 256, 257, 272, 600]))
        if "rotary" in kind or "squares" in kind:
            columns = max(16, columns // 16 * 16)
        if "silu" in kind:
            columns = max(2, columns // 2 * 2)
        if "scale" in kind and r is not None:
            tokens = min(tokens, len(r))
        epilogue = random_epilogue(random, kind, tokens, columns, hard)
        values = numbers(random, tokens, columns, hard=hard)
        layers.append(_Layer(values, epilogue, r, vector=bool(random.random() < 0.3)))
        r = layers[-1].outputs.r if layers[-1].outputs.r is not None else r
    return layers


@cocotb.test()
@cocotb.parametrize((("speeds", "hard"), [(SPEEDS[0], False), *zip(SPEEDS, itertools.cycle([True, False]))]))
async def values(dut, speeds, hard):
    """Layers of all kinds one after another, with or without stalls on each stream."""
    stalls = tuple(randomly(p, rng(2, number)) if p else never for number, p in enumerate(speeds))
    bench = _Bench(dut, _layers(rng(1), 3, hard), stalls)
    await begin(dut)
    bench.send()
    await bench.check()


@cocotb.test()
@cocotb.parametrize(kind=[(), ("scale", "add", "rotary"), ("scale", "silu"), ("add", "second"), ("scale", "pieces")])
async def full_throughput(dut, kind):
    """Without squares a transfer is taken in every cycle, also from one layer to the next."""
    random, most, c, columns = rng(1), config().max_tokens, config(), PIECE + 16
    r, layers = None, []
    for index in range(4):
        parts = ("add", "second", "squares") if index == 0 else kind
        epilogue = random_epilogue(random, parts, most, columns)
        layers.append(_Layer(numbers(random, most, columns), epilogue, r))
        r = layers[0].outputs.r
    bench, monitor = _Bench(dut, layers), Monitor(dut, ("results", "first", "second"))
    await begin(dut)
    bench.send()
    await bench.check()
    per_layer = most * columns // c.lanes
    # r of the first layer may not be there yet. Some transfers are taken into a FIFO before the epilogue waits for it;
    # of single results also the first one of a pair.
    waiting = WAITING * (LANES // c.lanes) + LANES // c.lanes - 1
    later = monitor["results"][per_layer + waiting :]
    assert len(later) == 3 * per_layer - waiting and consecutive(later), "a transfer in every cycle"
    if c.lanes > 1:
        first = monitor["first"][per_layer:]
        assert len(first) == 3 * per_layer and consecutive(first)
        assert first[-1] - later[-1] == latency()


@cocotb.test()
async def squares_take_their_time(dut):
    """With squares a transfer is taken in every ``interval`` cycles."""
    random, most = rng(1), config().max_tokens
    epilogue = random_epilogue(random, ("add", "second", "squares"), most, 512)
    bench, monitor = _Bench(dut, [_Layer(numbers(random, most, 512), epilogue, None)]), Monitor(dut, ("results",))
    await begin(dut)
    bench.send()
    await bench.check()
    taken = np.diff(monitor["results"])[:: max(1, LANES // config().lanes)]
    assert set(taken.tolist()) <= {latency("interval"), 1}
    await cycle(dut.clk, 10)
