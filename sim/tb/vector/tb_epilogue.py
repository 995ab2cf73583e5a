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
from sim.bench.epilogues import KINDS, Epilogue, InverseBanks, numbers, random_epilogue
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSink, StreamSource, cycle, never, randomly, read, rng

PIECE = 256
LANES = config().vector_lanes
"""Lanes of the vector unit."""
SOURCE, ADDEND, TABLE, FACTOR = range(4)
MEMORY, SCORES, CACHE = range(3)
TARGETS = ("first", "scores", "cached") if config().has_attention else ("first",)
"""The outputs of the results."""
ATTENTION: tuple[tuple[int, bool, tuple[str, ...]], ...] = (
    (SCORES, False, ("scale",)),
    (SCORES, False, ("scale", "add")),
    (SCORES, False, ()),
    (CACHE, False, ()),
    (CACHE, False, ("add",)),
    (MEMORY, True, ("scale",)),
    (MEMORY, True, ("scale", "add")),
    (MEMORY, True, ("scale", "add", "second", "squares")),
)
"""Epilogues of attention: their target, whether their rows are scaled by 1/S, and their parts."""
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
RUNS = [(SPEEDS[0], False), *zip(SPEEDS, itertools.cycle([True, False]))]
if config().has_attention:
    # The others are for hardware without it, whose layers take half of the time.
    RUNS = RUNS[::3]


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32).astype(np.int64)


@dataclass
class _Layer:
    """A layer's results before the epilogue, its epilogue, and r of the layers before.

    With attention r may be something else: the constant of scores, or with ``bank`` 1/S of the rows in this bank.
    """

    values: np.ndarray
    epilogue: Epilogue
    r: np.ndarray | None
    vector: bool = False
    target: int = MEMORY
    bank: int | None = None
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
            **(self._attention if config().has_attention else {}),
        )

    @property
    def _attention(self) -> dict[str, list[int]]:
        """The constant and the bank have any value if they are not used."""
        factor = _bits(self.r)[0] if self.target == SCORES and self.r is not None else 0x4048F5C3
        return {
            "target": [self.target],
            "factor": [int(factor)],
            "inverse": [int(self.bank is not None)],
            "bank": [1 if self.bank is None else self.bank],
        }

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
        self.outputs = [StreamSink(dut, name, dut.clk, first) for name in TARGETS]
        self.left = Monitor(dut, TARGETS)
        self.counts: list[tuple[str, int]] = []
        """For each layer with results: where they leave, and the number of transfers."""
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
        self.banks = None
        if config().has_attention:
            self.banks = InverseBanks(dut, operands)
            for layer in layers:
                if layer.bank is not None and layer.r is not None:
                    self.banks.send(layer.bank, layer.r)
            cocotb.start_soon(self.banks.run())

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
                name, sink = TARGETS[layer.target], self.outputs[layer.target]
                count = await self._check(sink, name, LANES // 2, _bits(outputs.results), where, cycles)
                self.counts.append((name, count))
            if outputs.second is not None:
                await self._check(self.second, "second", 2, _bits(outputs.second), where, cycles)
        for sink in self.outputs:
            await sink.quiet(1)
        await self.second.quiet(200)
        order = self.order()
        assert order == sorted(set(order)), "results leave in the order of the layers, whatever their targets are"
        if self.banks is not None:
            assert not any(self.banks.queues), "every bank is released"

    def order(self) -> list[int]:
        """The cycles in which results have left, in the order of the layers."""
        times = {name: iter(self.left[name]) for name in TARGETS}
        return [next(times[name]) for name, count in self.counts for _ in range(count)]

    async def _check(self, sink: StreamSink, name: str, unit: int, rows: np.ndarray, where: str, cycles: int) -> int:
        """Collects the transfers of one layer as a gatherer does. Returns their number."""
        (tokens, columns), count = rows.shape, 0
        for start in range(0, columns, PIECE):
            chunk, width, ended = np.full((tokens, PIECE), -1, np.int64), min(PIECE, columns - start), False
            while not ended:
                (raw,) = await sink.take(1, cycles)
                count += 1
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
        return count


def _layers(random: np.random.Generator, count: int, hard: bool) -> list[_Layer]:
    """Layers of all kinds. The values of r are those of the last layer with squares."""
    most, layers, r = config().max_tokens, [], None
    # r of all tokens, before it is used.
    parts = [(MEMORY, False, kind) for kind in (("quiet", "second", "squares"), *KINDS)]
    parts += [(MEMORY, False, KINDS[int(random.integers(len(KINDS)))]) for _ in range(count)]
    if config().has_attention:
        later = [*parts[1:], *ATTENTION]
        parts[1:] = [later[index] for index in random.permutation(len(later))]
    for index, (target, inverse, kind) in enumerate(parts):
        tokens = most if index == 0 else int(random.integers(1, most, endpoint=True))
        columns = int(random.choice([1, 2, 15, 16, 17, 100, 256, 257, 272, 600]))
        if "rotary" in kind or "squares" in kind:
            columns = max(16, columns // 16 * 16)
        if "silu" in kind:
            columns = max(2, columns // 2 * 2)
        factors, bank = r, int(random.integers(2)) if inverse else None
        if inverse:
            factors = numbers(random, tokens, hard=hard)
        elif target == SCORES:
            factors = np.repeat(numbers(random, 1, hard=hard), tokens)
        elif "scale" in kind and r is not None:
            tokens = min(tokens, len(r))
        epilogue = random_epilogue(random, kind, tokens, columns, hard)
        values = numbers(random, tokens, columns, hard=hard)
        layers.append(_Layer(values, epilogue, factors, bool(random.random() < 0.3), target, bank))
        r = layers[-1].outputs.r if layers[-1].outputs.r is not None else r
    return layers


@cocotb.test()
@cocotb.parametrize((("speeds", "hard"), RUNS))
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


@cocotb.test(skip=not config().has_attention)
async def attention_does_not_wait_for_r(dut):
    """Scores, values and rows for the cache follow each other without a cycle between them while r is computed."""
    random, most, columns = rng(1), config().max_tokens, 2 * PIECE
    kinds = [(SCORES, False), (MEMORY, True), (CACHE, False), (MEMORY, True), (SCORES, False)]
    first = random_epilogue(random, ("add", "second", "squares"), most, columns)
    layers = [_Layer(numbers(random, most, columns), first, None)]
    for index, (target, inverse) in enumerate(kinds):
        parts = ("add",) if target == CACHE else ("scale",)
        factors = numbers(random, most) if inverse else np.repeat(numbers(random, 1), most)
        bank = index // 2 if inverse else None
        epilogue = random_epilogue(random, parts, most, columns)
        layers.append(_Layer(numbers(random, most, columns), epilogue, factors, target=target, bank=bank))
    bench, monitor = _Bench(dut, layers), Monitor(dut, ("results",))
    await begin(dut)
    bench.send()
    await bench.check()
    per_layer = most * columns // config().lanes
    taken, order = np.array(monitor["results"]), bench.order()[most * columns // LANES :]
    # The first layer ends with the transfers that it left waiting.
    late = taken[per_layer + WAITING * (LANES // config().lanes) + LANES // config().lanes - 1 :].tolist()
    assert np.diff(taken).max() <= latency("interval"), "no wait for r"
    assert consecutive(late)
    assert np.diff(order).max() <= max(latency("interval"), LANES // config().lanes)
    if config().lanes > 1:
        assert consecutive(order), "a transfer in every cycle, whatever the targets are"


@cocotb.test(skip=not config().has_attention)
@cocotb.parametrize(blocked=[SCORES, CACHE])
async def a_target_blocks_the_others(dut, blocked):
    """Results behind those of a target that takes nothing wait; they are right afterwards."""
    random, open_now = rng(1), [False]
    layers = []
    for target in (blocked, MEMORY, SCORES + CACHE - blocked):
        epilogue = random_epilogue(random, (), 1, 40)
        layers.append(_Layer(numbers(random, 1, 40), epilogue, None, target=target))
    bench = _Bench(dut, layers)
    bench.outputs[blocked].stall = lambda: not open_now[0]
    await begin(dut)
    bench.send()
    await cycle(dut.clk, 400)
    assert not any(bench.left[name] for name in TARGETS)
    open_now[0] = True
    await bench.check()


@cocotb.test(skip=not config().has_attention)
async def values_wait_for_the_inverses(dut):
    """Rows wait until 1/S of their bank is known, also if it is not any more since the job before released the bank."""
    random, known = rng(1), [False]
    layers = []
    for bank in (1, 1, 0, 1):
        epilogue = random_epilogue(random, ("scale",), 1, 40)
        layers.append(_Layer(numbers(random, 1, 40), epilogue, numbers(random, 1), bank=bank))
    bench = _Bench(dut, layers)
    assert bench.banks is not None
    bench.banks.stall = lambda: not known[0] or random.random() < 0.9
    await begin(dut)
    bench.send()
    await cycle(dut.clk, 400)
    assert not bench.left["first"]
    known[0] = True
    await bench.check()


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
