# SPDX-License-Identifier: Apache-2.0
"""The AXI4 write manager with cocotbext-axi's memory, and a check that its bursts follow the rules."""

import logging
from dataclasses import dataclass, replace
from typing import Any, cast

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiResp, AxiWriteBus

from hw.spec.memory.access import BURST_BOUNDARY as BOUNDARY
from hw.spec.memory.access import OUTSTANDING, PIECE_FLOATS
from sim.bench.dut import begin, config, latency, payload, ports
from sim.bench.faulty_memory import FaultyWrite
from sim.bench.monitor import Monitor, consecutive
from sim.bench.streams import Stall, StreamSource, cycle, never, randomly, rng, until

MEMORY = 1 << 20
PIECE = PIECE_FLOATS
"""The maximum number of floats in a piece."""
CACHE = 2
"""The client whose beats have strobes; only hardware with attention has it."""
HAS_CACHE = f"pieces_{CACHE}" in ports()
CLIENTS = range(CACHE + HAS_CACHE)
ORDER = (1, 0, CACHE) if HAS_CACHE else (0, 1)
"""The clients, by priority: with attention the second output is before the results."""


@dataclass
class _Piece:
    address: int
    floats: np.ndarray
    last: int = 0
    interrupt: int = 0
    strobes: np.ndarray | None = None
    """bool [bytes]: the bytes that are written; None: all."""

    @property
    def written(self) -> np.ndarray:
        """bool [bytes]"""
        return np.ones(self.floats.nbytes, bool) if self.strobes is None else self.strobes

    def bursts(self, size: int) -> list[tuple[int, int]]:
        """Address and beats of ``size`` bytes of each burst."""
        beats = -(-self.floats.nbytes // size)
        first = min(beats, (BOUNDARY - self.address % BOUNDARY) // size)
        return [(self.address, first), (self.address + first * size, beats - first)][: 1 + (beats > first)]


def _piece(random: np.random.Generator, address: int, floats: int, last: int = 0, interrupt: int = 0) -> _Piece:
    return _Piece(address, random.integers(0, 1 << 32, floats, np.uint32), last, interrupt)


def _strobed(random: np.random.Generator, piece: _Piece) -> _Piece:
    """The piece in whole beats, some of whose bytes are written; in a few beats none or all of them."""
    size = config().port_width // 8
    count = -(-piece.floats.nbytes // size)
    floats = np.resize(piece.floats, count * size // 4)
    likely = random.choice([0, 0.1, 0.5, 1], (count, 1))
    return replace(piece, floats=floats, strobes=(random.random((count, size)) < likely).reshape(-1))


class _Watcher:
    """Checks everything on the bus in every cycle."""

    def __init__(self, dut: Any):
        self.dut, self.size = dut, config().port_width // 8
        self.offered: list[tuple[int, int]] = []
        """Address and beats of every burst that has been offered on AW."""
        self.taken = 0
        """Number of offered bursts that have been taken."""
        self.sent = 0
        """Bursts whose last beat has been taken."""
        self.acknowledged = 0
        self.completions: list[tuple[int, int]] = []
        """Bursts acknowledged before each completion, and its interrupt flag."""
        self.written: list[tuple[int, int]] = []
        """Bursts acknowledged before each piece that is in memory, and its client."""
        self.errors: list[int] = []
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        edge, dut = RisingEdge(self.dut.clk), self.dut
        address: tuple[int, ...] | None = None
        data: tuple[int, ...] | None = None
        beat = 0
        while True:
            await edge
            if dut.rst.value:
                continue
            if dut.complete.value:
                self.completions.append((self.acknowledged, int(dut.complete_interrupt.value)))
            written = int(dut.written.value)
            self.written += [(self.acknowledged, client) for client in CLIENTS if written >> client & 1]
            if dut.error.value:
                self.errors.append(int(dut.error_address.value))
            address = self._address(address)
            assert int(dut.under_way.value) == len(self.offered) - self.acknowledged
            assert int(dut.under_way.value) <= OUTSTANDING
            if self.acknowledged < len(self.offered):
                assert int(dut.oldest.value) == self.offered[self.acknowledged][0]
            data, beat = self._data(data, beat)
            assert dut.m_axi_axi_bready.value
            self.acknowledged += int(dut.m_axi_axi_bvalid.value)

    def _address(self, waiting: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """AW does not change until it is taken, and every burst follows the rules."""
        dut = self.dut
        if not dut.m_axi_axi_awvalid.value:
            assert waiting is None, "AWVALID was withdrawn"
            return None
        names = ("addr", "len", "size", "burst", "cache", "prot", "id")
        now = tuple(int(getattr(dut, f"m_axi_axi_aw{name}").value) for name in names)
        if waiting is None:
            address, beats = now[0], now[1] + 1
            assert now[2:] == ((self.size - 1).bit_length(), 1, 3, 0, 0)
            assert address % self.size == 0
            assert address // BOUNDARY == (address + beats * self.size - 1) // BOUNDARY, "crosses 4 KiB"
            self.offered.append((address, beats))
        else:
            assert waiting == now, f"AW changed from {waiting} to {now} before it was taken"
        self.taken += int(dut.m_axi_axi_awready.value)
        return None if dut.m_axi_axi_awready.value else now

    def _data(self, waiting: tuple[int, ...] | None, beat: int) -> tuple[tuple[int, ...] | None, int]:
        """W does not change until it is taken, never comes before its burst, and ends with the burst."""
        dut = self.dut
        if not dut.m_axi_axi_wvalid.value:
            assert waiting is None, "WVALID was withdrawn"
            return None, beat
        now = tuple(int(getattr(dut, f"m_axi_axi_w{name}").value) for name in ("data", "strb", "last"))
        assert waiting in (None, now), "W changed before it was taken"
        assert self.sent < len(self.offered), "data before their address"
        assert now[2] == (beat == self.offered[self.sent][1] - 1), f"WLAST in beat {beat} of {self.offered[self.sent]}"
        if not dut.m_axi_axi_wready.value:
            return now, beat
        self.sent += now[2]
        return None, 0 if now[2] else beat + 1


class _Bench:
    """A memory full of noise, and its expected content at the end."""

    def __init__(self, dut: Any, stall: Stall = never, pieces_stall: Stall = never, beats_stall: Stall = never):
        self.dut, self.size = dut, config().port_width // 8
        self.pieces = [StreamSource(dut, f"pieces_{client}", dut.clk, pieces_stall) for client in CLIENTS]
        names = [f"beats_{client}" for client in range(CACHE)] + ["cache_beats"] * HAS_CACHE
        self.beats = [StreamSource(dut, name, dut.clk, beats_stall) for name in names]
        self.faults: dict[int, AxiResp] = {}
        bus = AxiWriteBus.from_prefix(dut, "m_axi_axi")
        self.memory = FaultyWrite(bus, dut.clk, dut.rst, size=MEMORY, faults=self.faults)
        self.memory.log.setLevel(logging.ERROR)
        self.channels = (self.memory.aw_channel, self.memory.w_channel, self.memory.b_channel)
        for channel in self.channels:
            # By default the memory takes no third transfer before it has answered the first.
            channel.queue_occupancy_limit = 32
            channel.set_pause_generator(iter(stall, None))
        self.image = np.frombuffer(rng(99).bytes(MEMORY), np.uint8).copy()
        self.memory.write(0, self.image.tobytes())
        dut.halt.value = 0
        self.watcher = _Watcher(dut)
        self.sent: list[_Piece] = []

    def send(self, pieces: list[_Piece], random: np.random.Generator, client: int = 0) -> None:
        """Queues pieces. The bytes of a last beat after the last float are noise."""
        self.sent += pieces
        fields = {
            "address": [piece.address for piece in pieces],
            "last_float": [len(piece.floats) - 1 for piece in pieces],
            "last": [piece.last for piece in pieces],
            "interrupt": [piece.interrupt for piece in pieces],
        }
        self.pieces[client].send(payload("pieces_0").pack(**fields))
        for piece in pieces:
            data = piece.floats.tobytes()
            data += random.bytes(-len(data) % self.size)
            beats = [int.from_bytes(data[i : i + self.size], "little") for i in range(0, len(data), self.size)]
            if piece.strobes is not None:
                bits = np.packbits(piece.strobes.reshape(-1, self.size), axis=1, bitorder="little")
                strobes = [int.from_bytes(row.tobytes(), "little") for row in bits]
                beats = payload("cache_beats").pack(data=beats, strobe=strobes)
            self.beats[client].send(beats)

    @property
    def bursts(self) -> list[tuple[int, int]]:
        return [burst for piece in self.sent for burst in piece.bursts(self.size)]

    async def quiet(self, cycles: int = 200_000) -> None:
        """Waits until everything is written."""
        count = len(self.bursts)
        await until(self.dut.clk, lambda: self.watcher.acknowledged == count, f"{count} acknowledgements", cycles)
        await cycle(self.dut.clk, 20)

    def check(self) -> None:
        """Checks the bursts, the completions, and the whole memory: other bytes must not change."""
        assert self.watcher.offered == self.bursts
        wanted, count = [], 0
        for piece in self.sent:
            count += len(piece.bursts(self.size))
            if piece.last:
                wanted.append((count, piece.interrupt))
        self.check_memory()
        seen = self.watcher.completions
        assert seen == wanted, f"{seen}, not {wanted}"
        assert self.watcher.errors == []

    def check_memory(self) -> None:
        """Checks the whole memory after all pieces."""
        image = self.image.copy()
        for piece in self.sent:
            at = piece.address % MEMORY
            place = image[at : at + piece.floats.nbytes]
            place[piece.written] = piece.floats.view(np.uint8)[piece.written]
        self._compare(image)

    def check_partly(self) -> None:
        """Checks the memory after the bursts that have been offered so far."""
        left = dict(self.watcher.offered)
        image = self.image.copy()
        for piece in self.sent:
            for start, beats in piece.bursts(self.size):
                if left.get(start) == beats:
                    data = piece.floats.view(np.uint8)[start - piece.address :][: beats * self.size]
                    image[start % MEMORY :][: len(data)] = data
        self._compare(image)

    def _compare(self, image: np.ndarray) -> None:
        memory = np.frombuffer(cast(bytes, self.memory.read(0, MEMORY)), np.uint8)
        wrong = np.flatnonzero(memory != image)
        assert not len(wrong), f"{len(wrong)} bytes are wrong, the first at {wrong[0]:#x}"


def _pieces(random: np.random.Generator, count: int) -> list[_Piece]:
    """Every length and offset around 4 KiB boundaries that could go wrong, and random ones, at random addresses."""
    shapes = [
        (BOUNDARY - before, floats)
        for before in (64, 128, 512, 1024 - 64, 1024, 1024 + 64)
        for floats in (1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 239, 240, 241, 255, 256)
    ]
    shapes += [(0, 256), (2048 - 64, 256), (1024, 1)]
    for _ in range(count):
        shapes.append((64 * int(random.integers(0, BOUNDARY // 64)), int(random.integers(1, PIECE + 1))))
    pages = random.permutation(MEMORY // (2 * BOUNDARY) - 1)
    assert len(shapes) <= len(pages)
    pieces = []
    for (offset, floats), page in zip(shapes, pages, strict=False):
        high = MEMORY * int(random.integers(0, (1 << 40) // MEMORY))
        last, interrupt = random.random() < 0.3, int(random.integers(0, 2))
        pieces.append(_piece(random, high + 2 * BOUNDARY * int(page) + offset, floats, last, interrupt))
    pieces[-1].last = 1
    return pieces


@cocotb.test()
@cocotb.parametrize(speeds=[(0, 0, 0), (0.3, 0.3, 0.3), (0.7, 0, 0), (0, 0.95, 0), (0, 0, 0.7)])
async def boundaries(dut, speeds):
    """Memory, pieces and beats, each with or without random pauses."""
    stalls = (randomly(p, rng(2, number)) if p else never for number, p in enumerate(speeds))
    bench = _Bench(dut, *stalls)
    await begin(dut)
    random = rng(1)
    bench.send(_pieces(random, 20), random)
    await bench.quiet()
    bench.check()


@cocotb.test()
@cocotb.parametrize(floats=[1, 16, 100, 256])
async def full_speed(dut, floats):
    """A beat in every cycle, across bursts and descriptors, for whole pieces and for the shortest ones."""
    bench, random = _Bench(dut), rng(1)
    await begin(dut)
    pulses = ("m_axi_axi_awvalid", "m_axi_axi_wvalid", "m_axi_axi_bvalid", "complete")
    monitor = Monitor(dut, ("pieces_0", "beats_0"), pulses)
    # One row after another; some pieces cross a boundary.
    pieces = [_piece(random, 1088 * i, floats, last=i % 5 == 4, interrupt=1) for i in range(40)]
    bench.send(pieces, random)
    await bench.quiet()
    bench.check()
    data = monitor["m_axi_axi_wvalid"]
    assert monitor["m_axi_axi_awvalid"][0] - monitor["pieces_0"][0] == latency()
    assert data[0] - monitor["m_axi_axi_awvalid"][0] == 1
    assert data[0] - monitor["beats_0"][0] == latency("data_latency")
    assert monitor["complete"][-1] - monitor["m_axi_axi_bvalid"][-1] == latency("complete_latency")
    # Every cycle with valid data was a transfer, and there was no cycle without data between them.
    assert len(data) == sum(beats for _, beats in bench.bursts)
    assert consecutive(data), f"{data[-1] - data[0] + 1} cycles for {len(data)} beats"


@cocotb.test()
async def outstanding(dut):
    """A memory that does not acknowledge gets at most eight bursts."""
    bench, random = _Bench(dut), rng(1)
    answering = [False]
    bench.memory.b_channel.set_pause_generator(iter(lambda: not answering[0], None))
    await begin(dut)
    bench.send([_piece(random, BOUNDARY * i, 20, last=1) for i in range(20)], random)
    await cycle(dut.clk, 600)
    assert len(bench.watcher.offered) == bench.watcher.sent == OUTSTANDING
    assert bench.watcher.completions == []
    answering[0] = True
    await bench.quiet()
    bench.check()


@cocotb.test()
async def address_first(dut):
    """AW is offered before there are data, and so are the next ones; no valid waits for AWREADY or WREADY."""
    bench, random = _Bench(dut, beats_stall=lambda: waiting), rng(1)
    waiting = True
    for channel in bench.channels[:2]:
        channel.set_pause_generator(iter(lambda: waiting, None))
    await begin(dut)
    bench.send([_piece(random, BOUNDARY * i, 200, last=1) for i in range(3)], random)
    await until(dut.clk, lambda: dut.m_axi_axi_awvalid.value, "AWVALID", cycles=20)
    assert bench.watcher.taken == 0
    bench.memory.aw_channel.set_pause_generator(None)
    bench.memory.aw_channel.pause = False
    await until(dut.clk, lambda: bench.watcher.taken == 3, "three addresses", cycles=20)
    assert not dut.m_axi_axi_wvalid.value
    waiting = False
    await bench.quiet()
    bench.check()


@cocotb.test()
@cocotb.parametrize(after=[3, 150, 1000])
async def halt(dut, after):
    """After a halt in the middle, offered bursts are finished and no others start. Later the rest follows."""
    bench, random = _Bench(dut, randomly(0.4, rng(2)), never, randomly(0.3, rng(3))), rng(1)
    await begin(dut)
    bench.send(_pieces(random, 4), random)
    await cycle(dut.clk, after)
    dut.halt.value = 1
    await cycle(dut.clk, 2)
    offered = len(bench.watcher.offered)
    await until(dut.clk, lambda: int(dut.under_way.value) == 0, "quiet", 20_000)
    await cycle(dut.clk, 200)
    assert offered == len(bench.watcher.offered) == bench.watcher.sent == bench.watcher.acknowledged
    assert offered < len(bench.bursts)
    bench.check_partly()
    dut.halt.value = 0
    await bench.quiet()
    bench.check()


@cocotb.test()
@cocotb.parametrize(response=[1, 2, 3])
async def errors(dut, response):
    """SLVERR and DECERR are reported with the burst's address, and the descriptor does not complete."""
    pieces, beats = StreamSource(dut, "pieces_0", dut.clk), StreamSource(dut, "beats_0", dut.clk)
    dut.pieces_1_valid.value = dut.beats_1_valid.value = 0
    if HAS_CACHE:
        dut.pieces_2_valid.value = dut.cache_beats_valid.value = 0
    dut.halt.value = dut.m_axi_axi_bvalid.value = dut.m_axi_axi_bresp.value = dut.m_axi_axi_bid.value = 0
    dut.m_axi_axi_awready.value = dut.m_axi_axi_wready.value = 1
    watcher = _Watcher(dut)
    await begin(dut)
    # Six descriptors with two pieces of one beat each. A 1 marks a bad answer.
    bad = [(0, 0), (1, 0), (0, 1), (0, 0), (1, 1), (0, 0)]
    addresses = [[BOUNDARY * (2 * i + j) + 64 for j in range(2)] for i in range(len(bad))]
    flat, answers = [a for pair in addresses for a in pair], [response * b for pair in bad for b in pair]
    fields = dict(last_float=0, last=[0, 1] * len(bad), interrupt=[i // 2 % 2 for i in range(len(flat))])
    pieces.send(payload("pieces_0").pack(address=flat, **fields))
    beats.send([0] * len(flat))
    for index, answer in enumerate(answers):
        await until(dut.clk, lambda index=index: watcher.sent > index, "data", cycles=100)
        dut.m_axi_axi_bvalid.value = 1
        dut.m_axi_axi_bresp.value = answer
        await RisingEdge(dut.clk)
        dut.m_axi_axi_bvalid.value = 0
        await cycle(dut.clk, index % 3)
    await cycle(dut.clk, 5)
    assert int(dut.under_way.value) == 0
    good = [response == 1 or pair == (0, 0) for pair in bad]
    assert watcher.errors == [a for a, answer in zip(flat, answers, strict=True) if answer >= 2]
    assert watcher.completions == [(2 * i + 2, i % 2) for i, fine in enumerate(good) if fine]


@cocotb.test()
@cocotb.parametrize(speeds=[(0, 0, 0), (0.4, 0.3, 0.5)])
async def all_clients(dut, speeds):
    """The pieces of each client are written in its order, with its data, and complete its descriptors."""
    bench, random = _Bench(dut, *(randomly(p, rng(2, n)) if p else never for n, p in enumerate(speeds))), rng(1)
    await begin(dut)
    pieces = _pieces(random, 20)
    pieces[CACHE :: len(CLIENTS)] = [
        _strobed(random, piece) if HAS_CACHE else piece for piece in pieces[CACHE :: len(CLIENTS)]
    ]
    shares = [pieces[client :: len(CLIENTS)] for client in CLIENTS]
    for client, share in enumerate(shares):
        share[-1].last = 1
        bench.send(share, random, client)
    await bench.quiet()
    bench.check_memory()
    for share in shares:
        bursts = [burst for piece in share for burst in piece.bursts(bench.size)]
        assert [burst for burst in bench.watcher.offered if burst in bursts] == bursts
    # Bursts are acknowledged in the order of their offers, and a descriptor is complete with its last burst.
    ends = {piece.bursts(bench.size)[-1]: piece.interrupt for piece in pieces if piece.last}
    wanted = [(n, ends[burst]) for n, burst in enumerate(bench.watcher.offered, 1) if burst in ends]
    assert bench.watcher.completions == wanted
    ends = {piece.bursts(bench.size)[-1]: client for client, share in enumerate(shares) for piece in share}
    assert bench.watcher.written == [
        (n, ends[burst]) for n, burst in enumerate(bench.watcher.offered, 1) if burst in ends
    ]
    assert bench.watcher.errors == []


@cocotb.test()
async def precedence(dut):
    """A client waits while one before it has pieces."""
    bench, random = _Bench(dut), rng(1)
    dut.halt.value = 1
    await begin(dut)
    for client in CLIENTS:
        pieces = [_piece(random, BOUNDARY * (10 * client + i), 64, last=1) for i in range(6)]
        bench.send([_strobed(random, piece) for piece in pieces] if client == CACHE else pieces, random, client)
    await cycle(dut.clk, 20)
    dut.halt.value = 0
    await bench.quiet()
    clients = [address // BOUNDARY // 10 for address, _ in bench.watcher.offered]
    assert clients == [client for client in ORDER for _ in range(6)]
    bench.check_memory()


@cocotb.test(skip=not HAS_CACHE)
@cocotb.parametrize(beats=[1, 3, 16], stall=[0, 0.5])
async def strobes(dut, beats, stall):
    """Pieces of any number of beats, that begin at any beat; a beat in every cycle if nothing stalls."""
    bench, random = _Bench(dut, *(randomly(stall, rng(2, n)) if stall else never for n in range(3))), rng(1)
    await begin(dut)
    monitor = Monitor(dut, ("cache_beats",), ("m_axi_axi_wvalid",))
    count = beats * bench.size // 4
    at = [16 * BOUNDARY * index + bench.size * int(random.integers(0, BOUNDARY // bench.size)) for index in range(12)]
    bench.send([_strobed(random, _piece(random, address, count)) for address in at], random, CACHE)
    last = _strobed(random, _piece(random, 0, count, last=1, interrupt=1))
    bench.send([last], random, CACHE)
    await bench.quiet()
    bench.check()
    data = monitor["m_axi_axi_wvalid"]
    assert stall or (consecutive(data) and data[0] - monitor["cache_beats"][0] == latency("data_latency"))


@cocotb.test()
@cocotb.parametrize(after=[0, 1, 3])
async def descriptor_with_an_error_does_not_complete(dut, after):
    """After an error, good answers do not complete the descriptor, however many come. The next descriptor completes."""
    bench, random = _Bench(dut), rng(1)
    await begin(dut)
    bench.faults[0] = AxiResp.SLVERR
    addresses = [index * BOUNDARY for index in range(after + 3)]
    good = [_piece(random, address, 16) for address in addresses[1 : after + 1]]
    last = [_piece(random, address, 16, last=1, interrupt=1) for address in addresses[after + 1 :]]
    bench.send([_piece(random, 0, 16), *good, *last], random, 0)
    await bench.quiet()
    assert [address for address, _ in bench.watcher.offered] == addresses
    assert bench.watcher.errors == [0]
    assert bench.watcher.completions == [(len(addresses), 1)]


@cocotb.test()
async def an_error_of_another_client(dut):
    """An error between two bursts of another client's descriptor does not prevent that descriptor's completion."""
    bench, random = _Bench(dut), rng(1)
    dut.halt.value = 1
    await begin(dut)
    faulty = BOUNDARY
    bench.faults[faulty] = AxiResp.SLVERR
    first, other = ORDER[:2]
    # The first client's piece with the error comes after the other one's first piece, its last piece at the end.
    bench.send([_piece(random, 0, 16), _piece(random, 2 * BOUNDARY, 16, last=1, interrupt=1)], random, other)
    await cycle(dut.clk, 20)
    bench.send([_piece(random, faulty, 16)], random, first)
    await cycle(dut.clk, 20)
    dut.halt.value = 0
    await bench.quiet()
    bench.send([_piece(random, 3 * BOUNDARY, 16, last=1)], random, first)
    await bench.quiet()
    assert [address for address, _ in bench.watcher.offered] == [0, faulty, 2 * BOUNDARY, 3 * BOUNDARY]
    assert bench.watcher.errors == [faulty]
    assert bench.watcher.written == [(1, other), (3, other)]
    # The end of the other descriptor does not clear the error.
    assert bench.watcher.completions == [(3, 1)]
