# SPDX-License-Identifier: Apache-2.0
"""The environment of the accelerator: a memory on all of its ports, software at its registers, expected results.

The memory is full of noise, and :meth:`AcceleratorDriver.check` compares all of it: every result bit for bit, and that
nothing else was written. Every burst on the bus is also compared with the bursts that the layers' operands need.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cocotbext.axi import AxiLiteBus, AxiLiteMaster, AxiReadBus, AxiResp, AxiWriteBus

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.control.descriptor import (
    ADDRESS_LIMIT,
    DATA_ALIGNMENT,
    FLOAT_BYTES,
    WEIGHT_ALIGNMENT,
    Descriptor,
    region_bytes,
)
from hw.spec.control.registers import BY_NAME, ErrorCode, offset
from hw.spec.memory.access import BURST_BOUNDARY, IDEAL_READ_LATENCY, IDEAL_WRITE_LATENCY, PIECE_FLOATS
from hw.spec.memory.geometry import LayerLayout, fit_layer
from hw.spec.memory.packing import pack, stripe
from hw.spec.numerics.linear import Activations, NumericsError, quantize_activations
from hw.spec.ops import LINEAR, Wait
from sim.bench.axi_monitor import AxiMonitor, Burst, LiteMonitor
from sim.bench.dut import begin, config
from sim.bench.faulty_memory import FaultyRead, FaultyWrite, later
from sim.bench.layers import Job, weights_of
from sim.bench.streams import Stall, bursty, cycle, randomly, read, rng, until
from sim.harness import settings

__all__ = ["MEMORY", "AcceleratorDriver", "Work", "fit", "floats", "pauses"]

MEMORY = settings().get("memory", 1 << 21)
"""Size in bytes, a power of two. Addresses are used modulo it, so layers may be anywhere in the address space."""
PATIENCE = 20_000
"""A test fails after this number of cycles without any transfer on a memory port."""
CALM = 3_000
"""Cycles without a transfer after which no layer of these tests can be in flight."""
PIECE_BYTES = FLOAT_BYTES * PIECE_FLOATS
CONTROL = ("aw", "w", "b", "ar", "r")
"""Channels of the control port. Pauses name them ``ctrl_<channel>``, and the memory's ``hp<port>_<channel>``."""


def floats(
    config: AcceleratorConfig, tokens: int, k: int, random: np.random.Generator, kind: str = "random"
) -> np.ndarray:
    """Activations for a layer, float32 [M, K], with the kinds of :func:`sim.bench.layers.weights_of`."""
    most = config.activation_max
    if kind.endswith("bound"):
        x = np.full((tokens, k), most, np.float64)
        x[1::2] *= -1
    elif kind == "minimum":
        x = np.full((tokens, k), -most * 2.0**-128)
    elif kind == "maximum":
        x = np.full((tokens, k), np.finfo(np.float32).max, np.float64)
    else:
        x = random.standard_normal((tokens, k)) * 2.0 ** random.integers(-20, 20, (tokens, 1))
        for token, choice in enumerate(random.integers(0, 8, tokens)):
            if choice == 0:
                x[token] *= 2.0 ** random.integers(-40, 1, k)
            elif choice == 1:
                # Ties between two mantissas.
                x[token] = random.integers(-most, most, k) + 0.5
            elif choice == 2:
                x[token] = -0.0
            elif choice == 3:
                x[token, random.integers(0, k)] = 2.0 ** random.integers(-100, 100)
        if kind == "zero_rows":
            x[::2] = 0
    return x.astype(np.float32)


def fit(k: int, n: int, group_size: int) -> LayerLayout:
    """A layer, or the nearest one that fits the config: with larger groups, and with K at most max_k."""
    c = config()
    k = min(k, c.max_k)
    for size in (group_size, 2 * group_size, 4 * group_size, k):
        try:
            return fit_layer(c, k, n, size)
        except ConfigError:
            continue
    raise AssertionError(f"no layer of K {k} and groups of {group_size} or more fits")


def pauses(*salt: int) -> dict[str, Stall]:
    """Stall generators for all channels, light and heavy ones mixed, for :class:`AcceleratorDriver`."""
    random, stalls = rng(97, *salt), {}
    names = [f"hp{port}_{name}" for port in range(config().ports) for name in ("ar", "r")]
    names += [f"hp0_{name}" for name in ("aw", "w", "b")] + [f"ctrl_{name}" for name in CONTROL]
    for index, name in enumerate(names):
        p = float(random.choice([0.0, 0.2, 0.5, 0.8]))
        source = rng(96, index, *salt)
        stalls[name] = bursty(source, run=20, pause=40) if random.random() < 0.2 else randomly(p, source)
    return stalls


@dataclass(frozen=True)
class Work:
    """One layer in memory, and its descriptor."""

    job: Job
    x: np.ndarray
    """The activations: float32 [M, K]."""
    descriptor: Descriptor

    @property
    def expected(self) -> np.ndarray:
        """float32 [M, N]."""
        return LINEAR.compute(self.job.layer.config, self.job.weights, self.job.activations)

    @property
    def rows(self) -> list[tuple[int, bytes]]:
        """Address and bytes of every row of results."""
        pitch, first = self.descriptor.result_pitch, self.descriptor.results
        return [(first + index * pitch, row.tobytes()) for index, row in enumerate(self.expected)]

    @property
    def writes(self) -> list[tuple[Burst, int]]:
        """Every write burst, in order, and its bytes: every row of every 256 columns, cut at 4 KiB boundaries."""
        size, row_bytes, bursts = self.job.layer.config.port_width // 8, 4 * self.job.layer.n, []
        for start in range(0, row_bytes, PIECE_BYTES):
            for token in range(self.job.tokens):
                address = self.descriptor.results + token * self.descriptor.result_pitch + start
                left = min(PIECE_BYTES, row_bytes - start)
                while left:
                    part = min(left, BURST_BOUNDARY - address % BURST_BOUNDARY)
                    bursts.append((Burst(address, -(-part // size)), part))
                    address, left = address + part, left - part
        return bursts


class AcceleratorDriver:
    """An accelerator after reset.

    Parameters
    ----------
    pauses : stall generators of channels, such as ``hp0_r`` or ``ctrl_aw``; other channels never pause
    base : base of all addresses, a multiple of MEMORY
    """

    def __init__(self, dut: Any, pauses: Mapping[str, Stall], base: int):
        assert base % MEMORY == 0 and base + MEMORY <= ADDRESS_LIMIT
        self.dut, self.config, self.base = dut, config(), base
        self.image = np.frombuffer(rng(99).bytes(MEMORY), np.uint8).copy()
        """The expected contents of the memory."""
        self.memory = bytearray(self.image.tobytes())
        self._random = rng(98)
        self._free = 0
        self._window: list[int | None] = [None] * BY_NAME["descriptor"].words
        self.channels: dict[str, Any] = {}
        self.memories: list[FaultyRead | FaultyWrite] = []
        """Each port's read half, then the write half."""
        self.read_faults: list[dict[int, AxiResp]] = [{} for _ in range(self.config.ports)]
        """Faults of each port's memory when it is read: address -> response."""
        self.write_faults: dict[int, AxiResp] = {}
        """Faults of the memory when it is written: address -> response."""
        self.monitors = [
            AxiMonitor(dut, f"m_axi_hp{port}", self.config.port_width) for port in range(self.config.ports)
        ]
        self.control = LiteMonitor(dut, "s_axi_ctrl")
        self._connect()
        for name, stall in pauses.items():
            self.pause(name, stall)

    @classmethod
    async def create(cls, dut: Any, pauses: Mapping[str, Stall] | None = None, base: int = 0) -> "AcceleratorDriver":
        """Start the clock and reset the accelerator."""
        driver = cls(dut, pauses or {}, base)
        await begin(dut)
        return driver

    def _connect(self) -> None:
        dut = self.dut
        for port in range(self.config.ports):
            prefix = f"m_axi_hp{port}"
            bus, faults = AxiReadBus.from_prefix(dut, prefix), self.read_faults[port]
            reads = FaultyRead(bus, dut.clk, dut.rst, mem=self.memory, faults=faults)
            self._attach(reads, {f"hp{port}_ar": reads.ar_channel}, {f"hp{port}_r": reads.r_channel})
        bus = AxiWriteBus.from_prefix(dut, "m_axi_hp0")
        writes = FaultyWrite(bus, dut.clk, dut.rst, mem=self.memory, faults=self.write_faults)
        self._attach(writes, {"hp0_aw": writes.aw_channel, "hp0_w": writes.w_channel}, {"hp0_b": writes.b_channel})
        self._axi: Any = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi_ctrl"), dut.clk, dut.rst)
        write, read = self._axi.write_if, self._axi.read_if
        for half in (write, read):
            half.log.setLevel(logging.WARNING)
        control = (write.aw_channel, write.w_channel, write.b_channel, read.ar_channel, read.r_channel)
        self.channels |= {f"ctrl_{name}": channel for name, channel in zip(CONTROL, control, strict=True)}

    def _attach(self, memory: Any, takes: Mapping[str, Any], answers: Mapping[str, Any]) -> None:
        """Registers a half of a memory port, and its channels by their names."""
        self.memories.append(memory)
        memory.log.setLevel(logging.ERROR)
        self.channels |= {**takes, **answers}
        for channel in takes.values():
            # By default it accepts no third transfer before it has answered the first.
            channel.queue_occupancy_limit = 32

    # Time

    def ideal(self) -> None:
        """Give the memory the latencies of the simulated memory ``ideal``."""
        for memory in self.memories:
            latency = IDEAL_READ_LATENCY if isinstance(memory, FaultyRead) else IDEAL_WRITE_LATENCY
            later(memory, latency, lambda: self.now)

    def pause(self, name: str, stall: Stall | None) -> None:
        """Start to pause a channel by a stall generator; None: no pauses."""
        channel = self.channels[name]
        channel.set_pause_generator(None if stall is None else iter(stall, None))
        if stall is None:
            channel.pause = False

    @property
    def now(self) -> int:
        """Number of cycles so far."""
        return self.control.now

    async def until(self, condition, what: str) -> None:
        """Wait until `condition` holds; raises TimeoutError if no memory port moves any more."""
        start = self.now

        def given_up() -> bool:
            return self.now - max(start, *(monitor.moved for monitor in self.monitors)) > PATIENCE

        await until(self.dut.clk, lambda: condition() or given_up(), what, 10_000_000)
        if not condition():
            raise TimeoutError(f"Nothing has moved for {PATIENCE} cycles; waited for {what}")

    async def calm(self) -> None:
        """Wait until no memory port has moved for so long that no layer can be in flight."""
        moved = lambda: max(monitor.moved for monitor in self.monitors)  # noqa: E731
        await until(self.dut.clk, lambda: self.now - moved() > CALM, "nothing to happen", 200_000)

    @property
    def offered(self) -> list[tuple[int, int]]:
        """Number of bursts on AR and AW of every port."""
        return [(len(monitor.reads), len(monitor.writes)) for monitor in self.monitors]

    # Registers

    async def access(self, address: int, value: int | None = None) -> tuple[int, int]:
        """Write or read a word: (response, data)."""
        if value is None:
            answer = await self._axi.read(address, 4)
            return int(answer.resp), int.from_bytes(answer.data, "little")
        answer = await self._axi.write(address, value.to_bytes(4, "little"))
        return int(answer.resp), 0

    async def get(self, name: str, word: int = 0) -> int:
        """A register's value, or one word of a run."""
        register = BY_NAME[name]
        response, value = await self.access(offset(name, word))
        if register.wide:
            high = await self.access(offset(name, 1))
            response, value = response | high[0], value | high[1] << 32
        assert response == 0, f"reading {name} was answered with {response}"
        return value

    async def field(self, name: str, field: str) -> int:
        """One field of a register."""
        return BY_NAME[name].field(field).get(await self.get(name))

    async def set(self, name: str, value: int | str, word: int = 0) -> None:
        """Write a number to a register, or ones to one of its fields."""
        bits = BY_NAME[name].field(value).mask if isinstance(value, str) else value
        response, _ = await self.access(offset(name, word), bits)
        assert response == 0, f"writing {name} was answered with {response}"

    async def push(self, item: Work | Sequence[int]) -> None:
        """Queue a descriptor. Words that are already in the window are not written again."""
        words = item.descriptor.to_words() if isinstance(item, Work) else item
        for index, word in enumerate(words):
            if self._window[index] != word:
                await self.set("descriptor", word, index)
                self._window[index] = word
        await self.set("control", "push")

    async def start_program(self, address: int, length: int) -> None:
        """Write the registers of a program, and start it."""
        for word in range(2):
            await self.set("program_address", address >> 32 * word & 0xFFFF_FFFF, word)
        await self.set("program_length", length)
        await self.set("control", "start")

    async def reset(self) -> None:
        """Reset by the register, and check that nothing remains."""
        await self.set("control", "reset")
        await self.has_reset()

    async def has_reset(self) -> None:
        """Wait for the end of a reset, and check that nothing is under way and that all state is cleared."""
        for _ in range(PATIENCE):
            if not await self.field("status", "resetting"):
                break
        assert all(monitor.quiet for monitor in self.monitors), "the reset ended while a bus transfer was under way"
        names = ("status", "completed", "error_code", "error_address", "interrupt_pending")
        for name in (*names, *(("failed",) if self.config.has_programs else ())):
            assert await self.get(name) == 0, f"{name} is not 0 after a reset"
        for name in ("reads_under_way", "writes_under_way"):
            assert await self.get(name) == 0, f"{name} is not 0 after a reset"

    async def failed(self, code: ErrorCode, address: int | None = None, index: int | None = None) -> None:
        """Wait for an error, and check its code, and its address and the descriptor's index if they are known."""
        await self.set("interrupt_enable", "error")
        await until(self.dut.clk, lambda: read(self.dut.irq) == 1, f"error {code.name}", 200_000)
        found = ErrorCode(await self.get("error_code"))
        assert found == code, f"error {found.name}, not {code.name}"
        assert await self.field("status", "error")
        place = await self.get("error_address")
        assert address in (None, place), f"error address {place:#x}, not {address:#x}"
        if index is not None:
            found_index = await self.get("failed")
            assert found_index == index, f"descriptor {found_index} failed, not {index}"

    # Layers

    def place(
        self,
        layer: LayerLayout,
        tokens: int,
        kind: str = "random",
        *,
        reuse: Work | None = None,
        reads: Work | None = None,
        wait: Wait = Wait.NOTHING,
        x: np.ndarray | None = None,
        aligned: bool = False,
        interrupt: bool = False,
    ) -> Work:
        """Put a layer's operands into free memory.

        Regions of weights have the least possible stride, the driver's stride, or one in between. Blocks of activations
        and results start shortly before a 4 KiB boundary, results do not start at a multiple of 1 KiB, and rows of
        results may have gaps. With `aligned` all this is omitted. `x` may have values that cannot be quantized. With
        `reads` the activations are the results of another layer: see :meth:`feeds`.
        """
        random = self._random
        if reuse is not None:
            x, activations = reuse.x, reuse.job.activations
        else:
            x = reads.expected if reads is not None else x
            x = floats(self.config, tokens, layer.k, random, kind) if x is None else x
            try:
                activations = quantize_activations(self.config, x)
            except NumericsError:
                # The accelerator refuses them, too.
                activations = Activations(np.zeros(x.shape, np.int64), np.zeros(tokens, np.int64))
        job = Job(layer, weights_of(layer, random, kind), activations, reuse is not None)
        descriptor = Descriptor.from_layer(
            layer, tokens, activations=0, weights=0, results=0, reuse=job.reuse, interrupt=interrupt, wait=wait
        )
        if not aligned:
            least = region_bytes(layer)
            strides = (least, least + WEIGHT_ALIGNMENT * int(random.integers(1, 8)), descriptor.weights_stride)
            pitch = descriptor.result_pitch + DATA_ALIGNMENT * int(random.integers(0, 4))
            descriptor = replace(descriptor, weights_stride=int(random.choice(strides)), result_pitch=pitch)
        ports = stripe(self.config, pack(layer, job.weights))
        weights = self.take((len(ports) - 1) * descriptor.weights_stride + len(ports[0]), WEIGHT_ALIGNMENT)
        for port, data in enumerate(ports):
            self.write(weights + port * descriptor.weights_stride, np.asarray(data).tobytes())
        if reads is not None:
            address = reads.descriptor.results
        elif reuse is None:
            address = self.take(x.nbytes, BURST_BOUNDARY if aligned else 0)
            self.write(address, x.tobytes())
        else:
            # This address is not read.
            address = self.base + DATA_ALIGNMENT * int(random.integers(0, MEMORY // DATA_ALIGNMENT))
        results = self.take(tokens * descriptor.result_pitch, BURST_BOUNDARY if aligned else 0)
        return Work(job, x, replace(descriptor, activations=address, weights=weights, results=results))

    def feeds(self, work: Work) -> bool:
        """Whether the results of a layer can be the activations of a layer whose K is its N."""
        n, pitch = work.job.layer.n, work.descriptor.result_pitch
        contiguous = work.job.tokens == 1 or pitch == FLOAT_BYTES * n
        if not contiguous or fit(n, 1, 32).k != n:
            return False
        try:
            quantize_activations(self.config, work.expected)
        except NumericsError:
            return False
        return True

    def take(self, size: int, alignment: int = 0) -> int:
        """Free memory with guard bytes around it; alignment 0: shortly before a 4 KiB boundary."""
        page = -(-(self._free + DATA_ALIGNMENT) // BURST_BOUNDARY) * BURST_BOUNDARY
        skip = 0 if alignment else BURST_BOUNDARY - DATA_ALIGNMENT * int(self._random.integers(1, 20))
        start, self._free = page + skip, page + skip + size
        assert self._free <= MEMORY, "the test needs more memory than there is"
        return self.base + start

    def forget(self, *, window: bool = False) -> None:
        """Let new layers overwrite earlier ones; `window`: also forget the descriptor window, after the rst pin."""
        self._free = 0
        if window:
            self._window = [None] * len(self._window)

    def write(self, address: int, data: bytes) -> None:
        """Write to memory without the bus."""
        start = address % MEMORY
        self.memory[start : start + len(data)] = data
        self.image[start : start + len(data)] = np.frombuffer(data, np.uint8)

    # Whole runs

    async def run(self, works: Sequence[Work], room: int = 16) -> None:
        """Push layers, at most `room` in the queue and in flight at a time, wait for them, and check everything."""
        await self.start(works, room)
        await self.finish(works)

    async def start(self, works: Sequence[Work], room: int = 16) -> None:
        """Push layers when there is room."""
        self._first = await self.get("completed")
        self._marks = self.offered
        for index, item in enumerate(works):
            while index >= room and index - await self.completed() >= room:
                await cycle(self.dut.clk, 20)
            await self.push(item)

    async def completed(self) -> int:
        """Number of complete layers since ``start``."""
        return await self.get("completed") - self._first

    async def finish(self, works: Sequence[Work], status: int = 0) -> None:
        """Wait until these layers are complete; then check them and the status."""
        # The last acknowledgement sets ``completed``; polling it would take more time than the simulation.
        bursts = sum(len(item.writes) for item in works) + self._marks[0][1]
        hp0 = self.monitors[0]
        await self.until(lambda: hp0.acknowledged >= bursts, f"{len(works)} layers")
        await cycle(self.dut.clk, 4)
        assert await self.completed() == len(works)
        assert await self.get("status") == status
        self.check(works)
        self.check_bursts(works)

    def check(self, done: Sequence[Work], partly: Sequence[Work] = ()) -> None:
        """Compare all of the memory. For layers in `partly` each float may be written or not."""
        for item in done:
            for address, row in item.rows:
                start = address % MEMORY
                self.image[start : start + len(row)] = np.frombuffer(row, np.uint8)
        memory = np.frombuffer(bytes(self.memory), np.uint8)
        for item in partly:
            for address, row in item.rows:
                there = slice(address % MEMORY, address % MEMORY + len(row))
                old, new = self.image[there].view(np.uint32), np.frombuffer(row, np.uint32)
                seen = memory[there].view(np.uint32)
                self.image[there] = np.where(seen == new, new, old).view(np.uint8)
        wrong = np.flatnonzero(memory != self.image)
        assert not len(wrong), f"{len(wrong)} bytes are wrong, the first at {self.base + wrong[0]:#x}"

    def check_bursts(self, works: Sequence[Work]) -> None:
        """Check the write bursts in order, and that weights and activations were read once, and nothing else."""
        monitor, (_, mark) = self.monitors[0], self._marks[0]
        seen = list(zip(monitor.writes[mark:], monitor.written[mark:], strict=True))
        wanted = [burst for item in works for burst in item.writes]
        assert seen == wanted, f"{len(seen)} write bursts, not {len(wanted)}, or others: {set(seen) ^ set(wanted)}"
        size, total = self.config.port_width // 8, np.zeros(MEMORY // (self.config.port_width // 8), np.int64)
        for port, (monitor, (mark, _)) in enumerate(zip(self.monitors, self._marks)):
            for address, beats in monitor.reads[mark:]:
                first = (address - self.base) // size
                assert 0 <= first < len(total), f"read of {address:#x}"
                total[first : first + beats] += 1
            for item in works:
                weights = item.descriptor.weights + port * item.descriptor.weights_stride - self.base
                total[weights // size :][: item.job.layer.beats] -= 1
        for item in works:
            if not item.job.reuse:
                total[(item.descriptor.activations - self.base) // size :][: item.x.nbytes // size] -= 1
        wrong = np.flatnonzero(total)
        assert not len(wrong), f"{self.base + wrong[0] * size:#x} was read {total[wrong[0]]} times too often"
