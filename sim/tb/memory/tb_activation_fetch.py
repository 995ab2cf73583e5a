# SPDX-License-Identifier: Apache-2.0
"""The activation fetch against a model of the ports' shares, with memories of any speed."""

from collections import deque
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from hw.spec.config import FLOAT_BITS
from hw.spec.control.descriptor import ADDRESS_LIMIT, DATA_ALIGNMENT, activation_beats
from hw.spec.memory.access import CHUNK_BYTES, CHUNKS_AHEAD, PIECE_FLOATS
from hw.spec.memory.operands import FLOAT_BYTES
from sim.bench.dut import begin, config, latency, payload
from sim.bench.monitor import Monitor
from sim.bench.streams import Stall, StreamSink, StreamSource, bursty, cycle, never, randomly, read, rng, until

PORTS, WIDTH = config().ports, config().port_width
BEAT = WIDTH // 8
"""Bytes of a beat."""
ROW_BEATS = config().tile * FLOAT_BITS // WIDTH
MEMORY = 1 << 18
"""Bytes. Every address is taken modulo this number."""

ATTENTION = config().has_attention
OUTPUTS = ("rows", "exponents") if ATTENTION else ("rows",)

Block = tuple[int, int]
"""Address, and length in beats."""


def _chunks(blocks: list[Block]) -> list[Block]:
    """The bursts, cut where an address is a multiple of a chunk. Chunk i belongs to port i modulo PORTS."""
    chunks = []
    for address, beats in blocks:
        end = address + beats * BEAT
        while address < end:
            after = min(end, (address // CHUNK_BYTES + 1) * CHUNK_BYTES)
            chunks.append((address, (after - address) // BEAT))
            address = after
    return chunks


class _Bench:
    """A memory at every port, and the rows that come out."""

    def __init__(self, dut: Any, slow: Stall = never, taker: Stall = never, asked: Stall = never, delay: int = 3):
        self.dut, self.delay = dut, delay
        self.memory = rng(99).bytes(MEMORY)
        self.blocks = StreamSource(dut, "blocks", dut.clk)
        self.bursts = [StreamSink(dut, f"bursts_{port}", dut.clk, asked) for port in range(PORTS)]
        self.beats = [StreamSource(dut, f"port_beats_{port}", dut.clk, slow) for port in range(PORTS)]
        self.outputs = [StreamSink(dut, name, dut.clk, taker) for name in OUTPUTS]
        self.seen: list[list[Block]] = [[] for _ in range(PORTS)]
        """Bursts of each port."""
        self.sent: list[Block] = []
        self.targets: list[int] = []
        """The output of each block."""
        self.turn = 0
        """The port of the first chunk in ``sent``."""
        self.answering = True
        if config().has_vector_unit:
            dut.follow.value = dut.pieces.value = 0
        cocotb.start_soon(self._answer())

    async def _answer(self) -> None:
        """Answers every burst after some cycles; the bursts of a port are in order."""
        edge, now = RisingEdge(self.dut.clk), 0
        owed: deque[tuple[int, int, Block]] = deque()
        while True:
            await edge
            now += 1
            for port, sink in enumerate(self.bursts):
                if sink.received:
                    fields = payload("bursts_0").unpack(sink.received)
                    sink.received.clear()
                    for burst in zip(fields["address"].tolist(), fields["beats"].tolist(), strict=True):
                        self.seen[port].append(burst)
                        owed.append((now + self.delay, port, burst))
                # The data must never wait.
                if self.beats[port].transfers:
                    assert self.beats[port].stalled_by_dut == 0, f"port_beats_{port} had to wait"
            while self.answering and owed and owed[0][0] <= now:
                _, port, (address, beats) = owed.popleft()
                data = self.read(address, beats)
                self.beats[port].send(int.from_bytes(data[i : i + BEAT], "little") for i in range(0, len(data), BEAT))

    def read(self, address: int, beats: int) -> bytes:
        start = address % MEMORY
        return (self.memory + self.memory)[start : start + beats * BEAT]

    def send(self, blocks: list[Block], targets: list[int] | None = None) -> None:
        """targets: the output of each block, if it is not always the first one."""
        self.sent += blocks
        targets = targets or [0] * len(blocks)
        self.targets += targets
        more = {"exponents": targets} if ATTENTION else {}
        self.blocks.send(payload("blocks").pack(address=[a for a, _ in blocks], beats=[b for _, b in blocks], **more))

    async def check(self, cycles: int = 200_000) -> None:
        """Checks all rows in order, and the bursts of each port."""
        row = config().tile * FLOAT_BITS // 8
        for target, output in enumerate(self.outputs):
            blocks = (block for block, chosen in zip(self.sent, self.targets, strict=True) if chosen == target)
            expected = b"".join(self.read(*block) for block in blocks)
            got = await output.take(len(expected) // row, cycles)
            seen = b"".join(value.to_bytes(row, "little") for value in got)
            wrong = np.flatnonzero(np.frombuffer(seen, np.uint8) != np.frombuffer(expected, np.uint8))
            assert not len(wrong), f"row {wrong[0] // row} of {len(got)} of {output.prefix} is wrong"
        for output in self.outputs:
            await output.quiet(16)
        assert read(self.dut.asking) == 0
        chunks = _chunks(self.sent)
        assert self.seen == [chunks[(port - self.turn) % PORTS :: PORTS] for port in range(PORTS)]

    def clear(self) -> None:
        """Forgets what was sent. The ports continue to take turns."""
        self.turn = (self.turn + len(_chunks(self.sent))) % PORTS
        for items in (self.sent, self.targets, *self.seen):
            items.clear()


def _random_blocks(random: np.random.Generator, count: int) -> list[Block]:
    """Blocks of one row, of some rows, and of as many as the config has, at random addresses."""
    c, blocks = config(), []
    most = activation_beats(c, c.max_tokens, c.max_k // c.tile) // ROW_BEATS
    for _ in range(count):
        rows = int(random.choice([1, 2, int(random.integers(1, 100)), int(random.integers(1, 600))]))
        address = DATA_ALIGNMENT * int(random.integers(0, ADDRESS_LIMIT // DATA_ALIGNMENT))
        blocks.append((address, min(rows, most) * ROW_BEATS))
    return blocks


@cocotb.test()
@cocotb.parametrize(run=range(6))
async def random_blocks(dut, run):
    """Blocks of all lengths and alignments, with light and heavy random stalls on every stream."""
    random = rng(run)
    stalls = [
        bursty(rng(run, index), run=20, pause=40)
        if random.random() < 0.3
        else randomly(float(random.choice([0.0, 0.3, 0.8])), rng(run, index))
        for index in range(3)
    ]
    bench = _Bench(dut, *stalls, delay=int(random.choice([1, 20, 200])))
    await begin(dut)
    blocks = _random_blocks(random, 20)
    bench.send(blocks, random.integers(len(OUTPUTS), size=len(blocks)).tolist())
    await bench.check()


@cocotb.test()
async def longest_block(dut):
    """As many activations as possible, and then one more row."""
    bench, c = _Bench(dut), config()
    await begin(dut)
    most = activation_beats(c, c.max_tokens, c.max_k // c.tile)
    bench.send([(ADDRESS_LIMIT - DATA_ALIGNMENT, most), (0, ROW_BEATS)])
    await bench.check()


@cocotb.test()
async def full_speed(dut):
    """A row in every cycle, or a beat of every port, whichever takes longer, over several blocks."""
    bench, c = _Bench(dut), config()
    await begin(dut)
    monitor = Monitor(dut, ("blocks", "port_beats_0", *OUTPUTS), ("bursts_0_valid",))
    most = activation_beats(c, c.max_tokens, c.max_k // c.tile)
    beats = min(most, 40 * CHUNK_BYTES // BEAT) // ROW_BEATS * ROW_BEATS
    # With two outputs they take turns.
    bench.send([(CHUNK_BYTES * 8 * index, beats) for index in range(4)], [n % len(OUTPUTS) for n in range(4)])
    await bench.check()
    assert monitor["bursts_0_valid"][0] - monitor["blocks"][0] == latency()
    assert monitor["rows"][0] - monitor["port_beats_0"][ROW_BEATS - 1] == latency("row_latency")
    rows = sorted(time for name in OUTPUTS for time in monitor[name])
    port_beats = max(sum(beats for _, beats in bursts) for bursts in bench.seen)
    bound = max(len(rows), port_beats)
    # The first chunk comes from one port only.
    assert rows[-1] - rows[0] <= bound + CHUNK_BYTES // BEAT + 8, f"{rows[-1] - rows[0]} cycles, bound {bound}"


@cocotb.test()
async def no_more_than_fits(dut):
    """The fetch asks for no more data than it has space for; ``asking`` shows that it must ask for more."""
    bench = _Bench(dut, taker=lambda: waiting)
    waiting = True
    await begin(dut)
    count = PORTS * CHUNKS_AHEAD
    bench.send([(0, CHUNK_BYTES // BEAT * CHUNKS_AHEAD * PORTS // 2) for _ in range(3)])
    await cycle(dut.clk, 40 + 2 * count + CHUNK_BYTES // BEAT * count)
    assert [len(bursts) for bursts in bench.seen] == [CHUNKS_AHEAD] * PORTS
    assert read(dut.asking) == 1
    waiting = False
    await bench.check()


@cocotb.test()
async def one_block_at_a_time(dut):
    """``asking`` stays high until the last burst is taken, and the next block waits until then."""
    bench = _Bench(dut, asked=lambda: refusing)
    refusing = True
    await begin(dut)
    bench.send([(CHUNK_BYTES - DATA_ALIGNMENT, DATA_ALIGNMENT // BEAT)] * 2)
    await cycle(dut.clk, 50)
    assert bench.blocks.transfers == 1 and read(dut.asking) == 1
    refusing = False
    await until(dut.clk, lambda: bench.blocks.transfers == 2, "the second block", cycles=20)
    await bench.check()


@cocotb.test(skip=not ATTENTION)
async def outputs_are_in_order(dut):
    """Rows wait until the exponents before them are taken, and the other way round."""
    bench = _Bench(dut)
    refused = 1
    for target, output in enumerate(bench.outputs):
        output.stall = lambda target=target: target == refused
    await begin(dut)
    bench.send([(0, 4 * ROW_BEATS)] * 3, [0, 1, 0])
    await cycle(dut.clk, 100)
    assert [output.transfers for output in bench.outputs] == [4, 0]
    refused = 0
    await cycle(dut.clk, 100)
    assert [output.transfers for output in bench.outputs] == [4, 4]
    refused = -1
    await bench.check()


@cocotb.test(skip=not config().has_vector_unit)
@cocotb.parametrize(offset=[0, DATA_ALIGNMENT, CHUNK_BYTES, CHUNK_BYTES + DATA_ALIGNMENT])
async def follows_a_row(dut, offset):
    """A row that is being written is requested as far as it is in memory, and its rest when all of it is."""
    bench, random = _Bench(dut), rng(1)
    await begin(dut)
    for _ in range(6):
        pieces = int(random.integers(1, 8))
        floats = (pieces - 1) * PIECE_FLOATS + config().tile * int(random.integers(1, PIECE_FLOATS // config().tile))
        block = (offset, floats * FLOAT_BYTES // BEAT)
        before, count = sum(map(len, bench.seen)), bench.blocks.transfers
        # ``follow`` may be 1 earlier than the block.
        dut.follow.value, dut.pieces.value = 1, 0
        bench.send([block])
        await until(dut.clk, lambda count=count: bench.blocks.transfers > count, "the block", cycles=200)
        for written in range(pieces):
            dut.pieces.value = written
            await cycle(dut.clk, int(random.integers(80, 200)))
            asked = sum(map(len, bench.seen)) - before
            end = offset + PIECE_FLOATS * FLOAT_BYTES * written
            assert asked == sum(a + b * BEAT <= end for a, b in _chunks([block])), f"{asked} chunks, {written} pieces"
            assert not read(dut.asking)
        # The count may already be that of another row.
        dut.pieces.value, dut.follow.value = 0, 0
        await until(dut.clk, lambda: not read(dut.asking), "the last chunk", cycles=200)
        await bench.check()
        bench.clear()
