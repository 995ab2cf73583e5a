# SPDX-License-Identifier: Apache-2.0
"""Appends to KV caches, through the write manager into a memory full of noise: exactly the bytes of the definition."""

import logging
from dataclasses import dataclass
from typing import Any, cast

import cocotb
import numpy as np
from cocotbext.axi import AxiWriteBus

from hw.spec.config import ConfigError
from hw.spec.memory.access import BURST_BOUNDARY as PAGE
from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.kv_cache import Bytes, KeyCache, ValueCache
from hw.spec.memory.transfers import row_transfers
from hw.spec.numerics.attention import CHUNK, cache_keys, cache_values
from hw.spec.numerics.block_float import BLOCK, BlockFloat
from hw.spec.timing.append import bundles
from sim.bench.dut import begin, config, latency, payload
from sim.bench.faulty_memory import FaultyWrite
from sim.bench.monitor import Monitor
from sim.bench.streams import StreamSource, cycle, never, randomly, read, rng, until

CONFIG = config()
LANES = CONFIG.vector_lanes
MEMORY = 1 << 23
HIGH = 0x12 << 32
"""Addresses have bits above those of the memory."""
SIZES = (32, 64, 96, 128, 256)


@dataclass
class Append:
    """An append of rows, uint32 [tokens, head], to a cache at ``address``, with its table at ``table``."""

    cache: KeyCache | ValueCache
    rows: np.ndarray
    slot: int
    address: int
    stride: int
    table: int = 0

    @property
    def payload(self) -> list[int]:
        tokens, columns = self.rows.shape
        fields = {
            "keys": isinstance(self.cache, KeyCache),
            "planes": self.cache.planes,
            "tokens": tokens,
            "columns": columns,
            "slot": self.slot,
            "slots": self.cache.positions,
            "address": HIGH + self.address,
            "stride": self.stride,
            "exponents": HIGH + self.table,
        }
        return payload("job").pack(**{name: [int(value)] for name, value in fields.items()})

    def transfers(self, random: np.random.Generator) -> list[int]:
        fields: dict[str, list[Any]] = {name: [] for name in ("token", "column", "chunk_end", "last", "keep")}
        values = []
        for transfer in row_transfers(LANES, *self.rows.shape):
            values.append(self.rows[transfer.token, transfer.columns.start : transfer.columns.stop])
            # The place counts half transfers.
            found = transfer.fields | {"column": 2 * transfer.column}
            for name, items in fields.items():
                items.append(found[name])
        bits = np.array(values).astype(np.uint32).view(np.int32).astype(np.int64)
        return payload("rows").pack(values=bits, **{name: np.array(items) for name, items in fields.items()})

    def blocks(self) -> list[BlockFloat]:
        rows = self.rows.view(np.float32)
        if isinstance(self.cache, KeyCache):
            numbers = cache_keys(rows, np.zeros(rows.shape[1], np.float32), self.cache.bits)
        else:
            numbers = cache_values(rows)
        return [BlockFloat(*(part[index] for part in numbers)) for index in range(len(rows))]

    def bytes(self, index: int) -> list[tuple[int, Bytes]]:
        """What one of the rows writes: parts of the memory, and their addresses."""
        slot, one = (self.slot + index) % self.cache.positions, self.blocks()[index]
        written = [(self.address, self.cache.append(slot, one, self.stride))]
        if isinstance(self.cache, ValueCache):
            written.append((self.table, self.cache.append_exponents(slot, one)))
        return written

    def write(self, memory: np.ndarray) -> None:
        for index in range(len(self.rows)):
            for address, some in self.bytes(index):
                memory[address + some.offsets] = some.values

    @property
    def bundles(self) -> list[int]:
        """Numbers of rows that are written together."""
        return bundles(CONFIG, self.slot, len(self.rows), self.cache.positions)

    @property
    def beats(self) -> list[int]:
        """Beats on the port for each bundle."""
        cache, port = self.cache, CONFIG.port_width // 8
        if isinstance(cache, KeyCache):
            body = cache.layer.k * CONFIG.weight_bits // 8
            return [1 + cache.layer.groups + body // max(1, port // CONFIG.tile)] * len(self.bundles)
        row = CONFIG.tile * CONFIG.weight_bits // 8
        mantissas = cache.head_size // CONFIG.tile * cache.planes * (row // min(row, port))
        return [rows * mantissas + cache.head_size // BLOCK for rows in self.bundles]


def numbers(random: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Groups of different magnitudes, and many ties."""
    tops = np.repeat(random.integers(100, 130, (rows, size // BLOCK)), BLOCK, axis=1)
    exponents = tops - random.integers(0, 12, (rows, size))
    bits = random.integers(0, 1 << 23, (rows, size)) & np.where(random.random((rows, size)) < 0.5, 0x7F0000, 0x7FFFFF)
    return (bits | exponents << 23 | random.integers(0, 2, (rows, size)) << 31).astype(np.uint32)


def cache_of(kind: int, size: int, slots: int) -> KeyCache | ValueCache | None:
    """A cache of keys of 8 or 16 bits, or of values; None if this hardware has no such cache."""
    try:
        cache = ValueCache(CONFIG, size, slots) if kind == 0 else KeyCache(CONFIG, size, slots, 8 * kind)
        return cache if cache.layer.k else None
    except ConfigError:
        return None


class Places:
    """Gives each cache a place of its own in the memory; odd distances, so that pieces cross 4 KiB at any beat."""

    def __init__(self, random: np.random.Generator):
        self.random, self.at = random, PAGE

    def append(self, kind: int, size: int, slots: int, slot: int, tokens: int) -> Append | None:
        cache = cache_of(kind, size, slots)
        if cache is None:
            return None
        stride = (ceil_div(cache.region_bytes, PAGE) + int(self.random.integers(0, 3))) * PAGE
        table = cache.exponent_bytes if isinstance(cache, ValueCache) else 0
        end = self.at + CONFIG.ports * stride + ceil_div(table, PAGE) * PAGE + 128
        if end > MEMORY - PAGE:
            return None
        one = Append(
            cache,
            numbers(self.random, tokens, size),
            slot,
            self.at,
            stride,
            self.at + CONFIG.ports * stride + 128 if table else 0,
        )
        self.at = ceil_div(end, PAGE) * PAGE
        return one

    def any(self) -> Append | None:
        """Any shape; the cache often begins again at its first slot."""
        random = self.random
        slots = int(random.choice([1, 7, 250, 300, 513, 1000]))
        tokens = int(random.integers(1, min(CONFIG.max_tokens, slots) + 1))
        near = [0, slots - 1, max(0, slots - 2), min(CHUNK - 1, slots - 1), int(random.integers(0, slots))]
        size = int(random.choice(SIZES))
        return self.append(int(random.integers(0, 3)), size, slots, int(random.choice(near)), tokens)

    def several(self, count: int) -> list[Append]:
        return [one for one in (self.any() for _ in range(count)) if one]


class Bench:
    """The memory, and all sources."""

    def __init__(self, dut: Any, stalls: tuple[float, float, float] = (0, 0, 0), first: int = 0, end: int = MEMORY):
        self.dut, self.random = dut, rng(7)
        rules = [randomly(stall, rng(8, index)) if stall else never for index, stall in enumerate(stalls)]
        self.job, self.rows = (StreamSource(dut, name, dut.clk, rules[at]) for at, name in enumerate(("job", "rows")))
        self.memory = FaultyWrite(AxiWriteBus.from_prefix(dut, "m_axi_axi"), dut.clk, dut.rst, size=MEMORY, faults={})
        self.memory.log.setLevel(logging.ERROR)
        for channel in (self.memory.aw_channel, self.memory.w_channel, self.memory.b_channel):
            channel.queue_occupancy_limit = 32
            channel.set_pause_generator(iter(rules[2], None))
        self.image = np.frombuffer(rng(99).bytes(MEMORY), np.uint8).copy()
        self.memory.write(0, self.image.tobytes())
        dut.first.value, dut.end.value = (HIGH + first) // PAGE, (HIGH + end) // PAGE
        self.monitor = Monitor(
            dut, ("rows",), ("complete", "m_axi_axi_awvalid", "m_axi_axi_wvalid", "m_axi_axi_bvalid")
        )

    def send(self, *appends: Append) -> None:
        for one in appends:
            self.job.send(one.payload)
            self.rows.send(one.transfers(self.random))

    async def run(self, appends: list[Append]) -> None:
        """Sends appends after the reset, and compares the memory."""
        await begin(self.dut)
        self.send(*appends)
        await self.complete(len(appends))
        self.check(appends)

    async def complete(self, count: int) -> None:
        done = lambda: len(self.monitor["complete"]) == count  # noqa: E731
        await until(self.dut.clk, done, f"{count} jobs", 400_000)
        await cycle(self.dut.clk, 40)
        assert len(self.monitor["complete"]) == count

    @property
    def now(self) -> np.ndarray:
        return np.frombuffer(cast(bytes, self.memory.read(0, MEMORY)), np.uint8)

    def check(self, appends: list[Append]) -> None:
        image = self.image.copy()
        for one in appends:
            one.write(image)
        wrong = np.flatnonzero(self.now != image)
        if len(wrong):
            at = int(wrong[0])
            inside = [f"{one.cache}, slot {one.slot}, {at - one.address} from {one.address:#x}" for one in appends]
            raise AssertionError(
                f"{len(wrong)} bytes differ, the first at {at:#x}: {self.now[at]:#x}, not {image[at]:#x}"
                f" (before {self.image[at]:#x}); {inside}"
            )
        assert not read(self.dut.outside) and not read(self.dut.non_finite)


@cocotb.test()
@cocotb.parametrize(stalls=[(0, 0, 0), (0.5, 0, 0.6), (0, 0.7, 0)])
async def test_random(dut, stalls):
    """Job, rows and memory, each with or without random pauses."""
    bench = Bench(dut, stalls)
    await bench.run(Places(bench.random).several(14))


@cocotb.test()
async def test_every_head(dut):
    """Each head size of keys of both widths, and of values."""
    bench = Bench(dut)
    places = Places(bench.random)
    shapes = [(kind, size) for kind in range(3) for size in SIZES]
    appends = [places.append(kind, size, 70, 65, min(2, CONFIG.max_tokens)) for kind, size in shapes]
    await bench.run([one for one in appends if one])


@cocotb.test()
@cocotb.parametrize(kind=[0, 1, 2])
async def test_around_the_last_slot(dut, kind):
    """The slot after the last one is slot 0, also in the middle of an output tile, and of a chunk."""
    bench, tile = Bench(dut), CONFIG.tile
    places = Places(bench.random)
    appends = [
        places.append(kind, 64, slots, slots - 1, min(CONFIG.max_tokens, slots))
        for slots in (2, tile, tile + 1, 3 * tile + 2, CHUNK, 2 * CHUNK, 2 * CHUNK + 3)
    ]
    await bench.run([one for one in appends if one])


@cocotb.test()
@cocotb.parametrize(kind=[0, 1, 2])
async def test_throughput(dut, kind):
    """A beat in each cycle, if the rows are fast enough; and the latency of a single row."""
    bench = Bench(dut)
    places, tokens = Places(bench.random), CONFIG.max_tokens
    single, several = (places.append(kind, 64, 300, 5, count) for count in (1, tokens))
    assert single and several
    await begin(dut)
    bench.send(single)
    await bench.complete(1)
    first = bench.monitor["m_axi_axi_awvalid"][0] - bench.monitor["rows"][-1]
    rows = 64 // LANES
    assert first == latency() + rows + latency("write_latency"), first - rows - latency("write_latency")
    data = bench.monitor["m_axi_axi_wvalid"]
    assert len(data) == sum(single.beats)
    data.clear()
    bench.send(several)
    await bench.complete(2)
    beats, counts = several.beats, several.bundles
    assert len(data) == sum(beats)
    # The second bundle ends later after the first than the others do, because all parts are empty before.
    took = data[-1] - data[sum(beats[:2]) - 1]
    least = sum(
        max(number + latency("head_gap"), count * (rows + latency("row_gap")))
        for number, count in list(zip(beats, counts, strict=True))[2:]
    )
    dut._log.info(f"{several.cache}: bundles of {counts} rows, {beats} beats, {took} cycles, not {least}")
    assert took <= least
    bench.check([single, several])


@cocotb.test()
@cocotb.parametrize(kind=[0, 1])
async def test_single_rows(dut, kind):
    """Appends of one row each, as in decoding, follow each other."""
    bench = Bench(dut)
    places = Places(bench.random)
    appends = [one for one in (places.append(kind, 64, 70, slot, 1) for slot in range(8)) if one]
    await begin(dut)
    bench.send(*appends)
    await bench.complete(len(appends))
    data = bench.monitor["m_axi_axi_wvalid"]
    (beats,) = appends[0].beats
    took = (data[-1] - data[0] + 1 - beats) / (len(appends) - 1)
    least = max(beats + latency("job_gap"), 64 // LANES + latency("row_gap") + 1)
    assert took <= least, f"{took} cycles, not {least}"
    bench.check(appends)


async def quiet(bench: Bench) -> None:
    """All bursts are acknowledged, and nothing else comes."""
    await cycle(bench.dut.clk, 1500)
    count = len(bench.monitor["m_axi_axi_bvalid"])
    await cycle(bench.dut.clk, 500)
    assert len(bench.monitor["m_axi_axi_bvalid"]) == count


@cocotb.test()
@cocotb.parametrize(edge=["below", "above", "closed"], kind=[0, 1])
async def test_outside(dut, edge, kind):
    """A job outside the bounds stops everything; what was sent before is written, and nothing after it."""
    bench = Bench(dut, (0, 0, 0.3))
    places = Places(bench.random)
    appends = [one for one in (places.append(kind, 64, 300, 4, min(3, CONFIG.max_tokens)) for _ in range(4)) if one]
    good, bad, after = appends[1:3], appends[3 if edge == "above" else 0], appends[2]
    dut.first.value, dut.end.value = (HIGH + appends[1].address) // PAGE, (HIGH + appends[3].address) // PAGE
    if edge == "closed":
        # The values of the registers after a reset: nothing is inside.
        dut.first.value, dut.end.value, good = 0, 0, []
    await begin(dut)
    bench.send(*good, bad, after)
    await until(dut.clk, lambda: read(dut.outside) == 1, "outside", 20_000)
    await quiet(bench)
    address = read(dut.outside_address) - HIGH
    some = np.concatenate([base + part.offsets for base, part in bad.bytes(0)])
    assert address in some // (CONFIG.port_width // 8) * (CONFIG.port_width // 8)
    assert len(bench.monitor["complete"]) == len(good)
    image = bench.image.copy()
    for one in good:
        one.write(image)
    assert np.array_equal(bench.now, image)
    assert read(dut.outside) == 1 and read(dut.outside_address) == HIGH + address


@cocotb.test()
@cocotb.parametrize(kind=[0, 1], cut=[0.3, 0.6, 1])
async def test_partly_outside(dut, kind, cut):
    """The end cuts a cache at a page: bytes after it stay, and those before it are written by whole pieces only."""
    bench = Bench(dut)
    one = Places(bench.random).append(kind, 256, 300, 4, 1)
    assert one
    pages = sorted({int(base + at) // PAGE * PAGE for base, part in one.bytes(0) for at in part.offsets})
    end = pages[min(int(len(pages) * cut), len(pages) - 1)]
    dut.end.value = (HIGH + end) // PAGE
    await begin(dut)
    bench.send(one)
    await until(dut.clk, lambda: read(dut.outside) == 1, "outside", 20_000)
    await quiet(bench)
    image = bench.image.copy()
    one.write(image)
    now = bench.now
    assert np.array_equal(now[end:], bench.image[end:])
    changed = now[:end] != bench.image[:end]
    assert np.array_equal(now[:end][changed], image[:end][changed])
    assert not bench.monitor["complete"]
    dut.rst.value = 1
    await cycle(dut.clk, 5)
    assert read(dut.outside) == 0


@cocotb.test(skip=CONFIG.tile > CONFIG.beat_bytes)
async def test_end_in_a_piece(dut):
    """A piece that begins before the end and ends after it is not written; all pieces before it are."""
    bench, piece = Bench(dut), 1024
    last_port, columns = CONFIG.ports - 1, CONFIG.tile - 1
    one = Places(bench.random).append(1, 256, 300, 0, 1)
    assert one
    for slot in range(columns, 300, CONFIG.tile):
        one.slot = slot
        ((_, some),) = one.bytes(0)
        body = some.offsets[-one.cache.layer.k * CONFIG.weight_bits // 8 :]
        start = int(body[body >= last_port * one.stride].min()) // (CONFIG.port_width // 8) * (CONFIG.port_width // 8)
        end = ceil_div(start, PAGE) * PAGE
        if end < body.max() and (end - start) % piece:
            break
    else:
        raise AssertionError("a key's mantissas on one port cross 4 KiB in some slot")
    dut.end.value = (HIGH + one.address + end) // PAGE
    await begin(dut)
    bench.send(one)
    await until(dut.clk, lambda: read(dut.outside) == 1, "outside", 20_000)
    await quiet(bench)
    start += (end - start) // piece * piece
    assert read(dut.outside_address) == HIGH + one.address + start
    image = bench.image.copy()
    kept = image[one.address + start :].copy()
    one.write(image)
    image[one.address + start :] = kept
    assert np.array_equal(bench.now, image)


@cocotb.test()
@cocotb.parametrize(value=[0x7F800000, 0x7FC00000], kind=[0, 2])
async def test_non_finite(dut, value, kind):
    """Nothing is written of a head with such a number, nor of later ones."""
    bench = Bench(dut)
    places, tokens = Places(bench.random), min(3, CONFIG.max_tokens)
    good, bad, after = (places.append(kind, 64, 300, 4, count) for count in (1, tokens, 1))
    assert good and bad and after
    await begin(dut)
    bench.send(good)
    await bench.complete(1)
    bad.rows[tokens - 1, 41] = value
    bench.send(bad, after)
    await until(dut.clk, lambda: read(dut.non_finite) == 1, "non_finite", 20_000)
    await quiet(bench)
    image = bench.image.copy()
    good.write(image)
    before = image.copy()
    bad.rows[tokens - 1] = 0
    whole = Append(bad.cache, bad.rows[: tokens - 1], bad.slot, bad.address, bad.stride, bad.table)
    if tokens > 1:
        whole.write(image)
    changed = bench.now != before
    assert np.array_equal(bench.now[changed], image[changed]), "only bytes of earlier rows"
    assert len(bench.monitor["complete"]) == 1
    assert len(bench.rows._queue) == 0, "rows are still taken"
