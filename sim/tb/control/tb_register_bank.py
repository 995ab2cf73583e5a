# SPDX-License-Identifier: Apache-2.0
"""The control port, with cocotbext-axi and with pins driven directly. The register map gives the expected values."""

import logging
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import Combine, RisingEdge, Timer, ValueChange, with_timeout
from cocotbext.axi import AxiLiteBus, AxiLiteMaster

from hw.spec.control.registers import WINDOW_BYTES, Access, Register, registers_of
from sim.bench.dut import begin, config, latency, payload
from sim.bench.streams import Stall, bursty, cycle, never, read, rng

OKAY, SLVERR, DECERR = 0, 2, 3
PREFIX = "s_axi_ctrl_"
SPACE = 1 << 12
REGISTERS = registers_of(config())
BY_NAME = {register.name: register for register in REGISTERS}
KNOWN = {offset for register in REGISTERS for offset in range(register.offset, register.end, 4)}
UNKNOWN = sorted(set(range(0, SPACE, 4)) - KNOWN)
HELD = [r for r in REGISTERS if r.access is Access.READ_WRITE]
RUNS = [r for r in REGISTERS if r.access is Access.READ and r.words > 1]
WIDE = [r for r in REGISTERS if r.wide and r.access is Access.READ]
SHOWN = [r for r in REGISTERS if r.access is Access.READ and r not in RUNS]


def _of(access: Access) -> list[Register]:
    return [r for r in REGISTERS if r.access is access]


def _random(random: np.random.Generator, bits: int) -> int:
    return int.from_bytes(random.bytes(16), "little") & ((1 << bits) - 1)


def _to_pins(register: Register, value: int) -> int:
    """A register's value as its member holds it: only the fields, without gaps."""
    if not register.fields:
        return value
    return payload(register.name).pack(**{field.name: [field.get(value)] for field in register.fields})[0]


def _used(register: Register) -> int:
    """Bits of the register that exist."""
    return sum(field.mask for field in register.fields) or (1 << (64 if register.wide else 32)) - 1


class _Bench:
    """Both sides of the bank: the values of the hardware on its members, and the bus."""

    def __init__(self, dut: Any, *, master: bool = True):
        self.dut, self.random = dut, rng(1)
        self.values: dict[str, int] = {}
        self.memories = {run.name: [_random(self.random, 32) for _ in range(run.words)] for run in RUNS}
        self.strobes: list[tuple[str, int]] = []
        """All commands so far: register and fields."""
        dut.forget.value = 0
        for register in _of(Access.CLEAR):
            getattr(dut, f"set_{register.name}").value = 0
        for register in SHOWN:
            self.show(register)
        for run in RUNS:
            cocotb.start_soon(self._memory(run))
        for channel in "br":
            cocotb.start_soon(self._watch(channel))
        cocotb.start_soon(self._commands())
        if master:
            self.axi: Any = AxiLiteMaster(AxiLiteBus.from_prefix(dut, PREFIX[:-1]), dut.clk, dut.rst)
            for half in (self.axi.write_if, self.axi.read_if):
                half.log.setLevel(logging.WARNING)
        else:
            for pin in ("awvalid", "wvalid", "arvalid", "bready", "rready"):
                self.pin(pin).value = 0

    def pin(self, name: str) -> Any:
        return getattr(self.dut, PREFIX + name)

    def pause(self, stalls: list[Stall]) -> None:
        """Pauses on AW, W, B, AR, R."""
        write, read_ = self.axi.write_if, self.axi.read_if
        channels = (write.aw_channel, write.w_channel, write.b_channel, read_.ar_channel, read_.r_channel)
        for channel, stall in zip(channels, stalls, strict=True):
            channel.set_pause_generator(iter(stall, None))

    def show(self, register: Register) -> None:
        """Puts a new random value on the member of a READ register."""
        value = _random(self.random, 64) & _used(register)
        self.values[register.name] = value
        getattr(self.dut, register.name).value = _to_pins(register, value)

    def held(self) -> dict[str, int]:
        """The value of every register that software can change."""
        return {r.name: read(getattr(self.dut, r.name)) for r in [*HELD, *_of(Access.CLEAR)]}

    async def get(self, offset: int) -> int:
        answer: Any = await with_timeout(self.axi.read(offset, 4), 10_000, "ns")
        assert answer.resp == OKAY, f"read of {offset:#x}: {answer.resp}"
        return int.from_bytes(answer.data, "little")

    async def put(self, offset: int, value: int) -> None:
        answer: Any = await with_timeout(self.axi.write(offset, value.to_bytes(4, "little")), 10_000, "ns")
        assert answer.resp == OKAY, f"write of {offset:#x}: {answer.resp}"

    async def drive(self, channel: str, wait: int = 0, **values: int) -> None:
        """One transfer to the hardware on AW, W or AR, after ``wait`` cycles."""
        await cycle(self.dut.clk, wait)
        for name, value in values.items():
            self.pin(channel + name).value = value
        await self._transfer(channel, "valid", "ready")

    async def take(self, channel: str, wait: int = 0) -> tuple[int, int]:
        """(response, data) of one transfer from the hardware on B or R, after ``wait`` cycles without ready."""
        await cycle(self.dut.clk, wait)
        answer = await self._transfer(channel, "ready", "valid")
        assert answer is not None
        return answer

    async def _transfer(self, channel: str, ours: str, theirs: str) -> tuple[int, int]:
        self.pin(channel + ours).value = 1
        for _ in range(100):
            await RisingEdge(self.dut.clk)
            if read(self.pin(channel + theirs)):
                seen = self._answer(channel) if channel in "br" else (0, 0)
                self.pin(channel + ours).value = 0
                return seen
        raise TimeoutError(f"no {theirs} on {channel}")

    def _answer(self, channel: str) -> tuple[int, int]:
        return read(self.pin(f"{channel}resp")), read(self.pin("rdata")) if channel == "r" else 0

    async def write(self, offset: int, value: int, strobes: int = 15, aw: int = 0, w: int = 0, b: int = 0) -> int:
        """A write by driving the pins; returns the response."""
        address = cocotb.start_soon(self.drive("aw", aw, addr=offset))
        data = cocotb.start_soon(self.drive("w", w, data=value, strb=strobes))
        answer = await self.take("b", b)
        assert address.done() and data.done(), "answered before it was asked"
        return answer[0]

    async def read(self, offset: int, r: int = 0) -> tuple[int, int]:
        """A read by driving the pins: (response, data)."""
        cocotb.start_soon(self.drive("ar", addr=offset))
        return await self.take("r", r)

    async def _memory(self, run: Register) -> None:
        """The hardware's side of a memory (a run of registers): asynchronous reads."""
        index, member = getattr(self.dut, f"{run.name}_index"), getattr(self.dut, run.name)
        member.value = self.memories[run.name][0]
        while True:
            await ValueChange(index)
            if str(index.value).isdigit():
                member.value = self.memories[run.name][read(index)]

    async def _watch(self, channel: str) -> None:
        """Checks in every test: an answer does not change until it is taken, and every request gets one answer."""
        before, owed = None, 0
        requests = {"b": ("aw", "w"), "r": ("ar",)}[channel]
        counts = dict.fromkeys(requests, 0)
        while True:
            await RisingEdge(self.dut.clk)
            if self.dut.rst.value:
                before, owed, counts = None, 0, dict.fromkeys(requests, 0)
                continue
            now = self._answer(channel) if read(self.pin(f"{channel}valid")) else None
            assert before in (None, now), f"{channel} was {before} and became {now} before it was taken"
            assert now is None or owed < min(counts.values()), f"{channel} answers nothing"
            taken = now is not None and read(self.pin(f"{channel}ready"))
            before, owed = None if taken else now, owed + bool(taken)
            for name in requests:
                counts[name] += read(self.pin(f"{name}valid")) & read(self.pin(f"{name}ready"))

    async def _commands(self) -> None:
        while True:
            await RisingEdge(self.dut.clk)
            for register in _of(Access.COMMAND):
                if not self.dut.rst.value and (fields := read(getattr(self.dut, register.name))):
                    self.strobes.append((register.name, fields))


async def _begin(dut: Any, **options: bool) -> _Bench:
    bench = _Bench(dut, **options)
    await begin(dut)
    return bench


@cocotb.test()
async def hardware_values(dut):
    """Every word that the hardware shows reads as the value on its member, with 0 where there is no field."""
    bench = await _begin(dut)
    for _ in range(2):
        for register in SHOWN:
            bench.show(register)
            await cycle(dut.clk)
            value = await bench.get(register.offset)
            if register.wide:
                value |= await bench.get(register.offset + 4) << 32
            assert value == bench.values[register.name], register.name
    for run in RUNS:
        got = [await bench.get(offset) for offset in range(run.offset, run.end, 4)]
        assert got == bench.memories[run.name]


@cocotb.test()
async def software_values(dut):
    """A word that software writes appears at the member, reads back and changes no other; reset restores its value."""
    bench = await _begin(dut)
    expected = {register.name: _to_pins(register, register.reset) for register in HELD}
    expected |= {register.name: 0 for register in _of(Access.CLEAR)}
    assert bench.held() == expected
    words = [(register, index) for register in HELD for index in range(register.words)]
    for position in [*range(len(words)), *bench.random.permutation(len(words))]:
        register, index = words[position]
        value = _random(bench.random, 32)
        await bench.put(register.offset + 4 * index, value)
        kept = value & _used(register)
        expected[register.name] &= ~(0xFFFF_FFFF << 32 * index)
        expected[register.name] |= _to_pins(register, kept) << 32 * index
        assert bench.held() == expected
        assert await bench.get(register.offset + 4 * index) == kept


@cocotb.test()
async def commands(dut):
    """A command lasts one cycle, whatever the bus does, and reads as 0."""
    bench = await _begin(dut)
    for register in _of(Access.COMMAND):
        for value in [*(field.mask for field in register.fields), _used(register), 0, 0xFFFF_FFFF & ~_used(register)]:
            bench.strobes.clear()
            await bench.put(register.offset, value)
            await cycle(dut.clk, 8)
            fields = _to_pins(register, value & _used(register))
            assert bench.strobes == [(register.name, fields)] * bool(fields)
            assert await bench.get(register.offset) == 0


@cocotb.test()
async def pending(dut):
    """Causes stay until software writes 1 to them, or until the hardware clears all of them."""
    bench = await _begin(dut, master=False)
    for register in _of(Access.CLEAR):
        member = getattr(dut, register.name)
        for field in register.fields:
            await _pulse(dut, f"set_{register.name}", _to_pins(register, field.mask))
            await cycle(dut.clk, 3)
            assert await bench.read(register.offset) == (OKAY, field.mask)
            assert await bench.write(register.offset, 0xFFFF_FFFF & ~field.mask) == OKAY
            assert await bench.read(register.offset) == (OKAY, field.mask)
            assert await bench.write(register.offset, field.mask) == OKAY
            assert await bench.read(register.offset) == (OKAY, 0)
        await _pulse(dut, f"set_{register.name}", _to_pins(register, _used(register)))
        assert await bench.write(register.offset, register.fields[0].mask) == OKAY
        assert read(member) == _to_pins(register, _used(register) & ~register.fields[0].mask)
        await _pulse(dut, "forget")
        assert read(member) == 0


@cocotb.test()
async def set_while_clearing(dut):
    """A cause that is set in the cycle of the write that clears it, or later, is kept; an earlier one is cleared."""
    bench = await _begin(dut, master=False)
    for register in _of(Access.CLEAR):
        everything = _to_pins(register, _used(register))
        for late in range(5):
            clearing = cocotb.start_soon(bench.write(register.offset, _used(register)))
            await cycle(dut.clk, late)
            await _pulse(dut, f"set_{register.name}", everything)
            assert await clearing == OKAY
            await cycle(dut.clk)
            lost = late + 1 < latency("write_latency")
            assert read(getattr(dut, register.name)) == (0 if lost else everything), f"{late} cycles late"
            await _pulse(dut, "forget")


async def _pulse(dut: Any, name: str, value: int = 1) -> None:
    """Sets the value for one cycle, then waits one cycle for its effect."""
    getattr(dut, name).value = value
    await cycle(dut.clk)
    getattr(dut, name).value = 0
    await cycle(dut.clk)


@cocotb.test()
async def responses(dut):
    """Accesses without a register, writes to read-only words and partial writes are refused and have no effect."""
    bench = await _begin(dut, master=False)
    before = bench.held()
    for offset in sorted({*UNKNOWN[:: len(UNKNOWN) // 32], UNKNOWN[0], WINDOW_BYTES, SPACE - 4} & set(UNKNOWN)):
        assert await bench.read(offset) == (DECERR, 0), hex(offset)
        for strobes in (15, 3, 0):
            assert await bench.write(offset, 0xFFFF_FFFF, strobes) == DECERR, hex(offset)
    for register in REGISTERS:
        for offset in {register.offset, register.end - 4}:
            for strobes in range(15):
                wanted = SLVERR if strobes else OKAY
                assert await bench.write(offset, 0xFFFF_FFFF, strobes) == wanted, f"{register.name}, {strobes:04b}"
            if register.access is Access.READ:
                assert await bench.write(offset, 0xFFFF_FFFF) == SLVERR, register.name
    await cycle(dut.clk, 4)
    assert bench.held() == before and bench.strobes == []
    for register in HELD:
        for low in range(4):
            value = _random(bench.random, 32) & _used(register)
            assert await bench.write(register.offset + low, value) == OKAY
            assert await bench.read(register.offset + 3 - low) == (OKAY, value)


@cocotb.test()
async def frozen(dut):
    """The high word is the one of the moment when the low word was read, and belongs to the same register."""
    bench = await _begin(dut, master=False)
    assert WIDE
    order = [WIDE[index] for index in bench.random.permutation(len(WIDE))]
    for _ in range(2):
        seen = {}
        for register in order:
            bench.show(register)
            await cycle(dut.clk)
            seen[register.name] = bench.values[register.name]
            assert await bench.read(register.offset) == (OKAY, seen[register.name] & 0xFFFF_FFFF)
            bench.show(register)
        for register in reversed(order):
            await bench.write(register.offset, 0)
            for _ in range(2):
                assert await bench.read(register.offset + 4) == (OKAY, seen[register.name] >> 32), register.name
                bench.show(register)


@cocotb.test()
@cocotb.parametrize(pauses=["none", "some"])
async def concurrent(dut, pauses):
    """Concurrent reads and writes, in bursts, with random pauses on all five channels, do not disturb each other."""
    bench = await _begin(dut)
    bench.pause([never if pauses == "none" else bursty(rng(10 + index), 3, 3) for index in range(5)])
    words = [offset for register in HELD for offset in range(register.offset, register.end, 4)]
    masks = {offset: _used(register) for register in HELD for offset in range(register.offset, register.end, 4)}
    written = {offset: _random(bench.random, 32) & masks[offset] for offset in words}
    for offset, value in written.items():
        await bench.put(offset, value)

    async def writes(mine: list[int]) -> None:
        random = rng(20, *mine)
        for _ in range(100):
            offset = int(random.choice(mine))
            value = _random(random, 32)
            await bench.put(offset, value)
            written[offset] = value & masks[offset]

    async def reads(quiet: list[int], seed: int) -> None:
        random = rng(30, seed)
        for _ in range(100):
            if random.random() < 0.5:
                offset = int(random.choice(quiet))
                assert await bench.get(offset) == written[offset], hex(offset)
            else:
                register = SHOWN[random.integers(len(SHOWN))]
                assert await bench.get(register.offset) == bench.values[register.name] & 0xFFFF_FFFF, register.name

    half = len(words) // 2
    await Combine(*(cocotb.start_soon(task) for task in (
        writes(words[:half]), writes(words[:half]), reads(words[half:], 1), reads(words[half:], 2))))  # fmt: skip
    for offset in words:
        assert await bench.get(offset) == written[offset]


@cocotb.test()
@cocotb.parametrize(aw=[0, 1, 2, 13], w=[0, 1, 2, 13])
async def orders(dut, aw, w):
    """AW long before W, W long before AW, and answers that wait long; the member has the value when B is valid."""
    bench = await _begin(dut, master=False)
    register = BY_NAME["descriptor"]
    for index, wait in enumerate((0, 1, 2, 17)):
        value = _random(bench.random, 32)
        at = register.offset + 4 * index
        assert await bench.write(at, value, aw=aw, w=w, b=wait) == OKAY
        assert await bench.read(at, r=wait) == (OKAY, value)
    # The AW and W of the next write are taken while the answer to the first one waits. The second write waits for that.
    first, second = register.offset, register.offset + 4
    await Combine(
        cocotb.start_soon(bench.drive("aw", aw, addr=first)), cocotb.start_soon(bench.drive("w", w, data=1, strb=15))
    )
    before = read(dut.descriptor) >> 32
    await Combine(
        cocotb.start_soon(bench.drive("aw", aw, addr=second)), cocotb.start_soon(bench.drive("w", w, data=2, strb=15))
    )
    await cycle(dut.clk, 9)
    assert read(bench.pin("bvalid")) == 1
    assert read(dut.descriptor) == before << 32 | 1
    for _ in range(2):
        assert await bench.take("b") == (OKAY, 0)
    assert read(dut.descriptor) & (1 << 64) - 1 == 2 << 32 | 1


@cocotb.test()
async def no_path_through(dut):
    """Inputs that change in the middle of a cycle change no AXI output in the same cycle."""
    bench = await _begin(dut, master=False)
    inputs = ("awaddr", "awvalid", "wdata", "wstrb", "wvalid", "bready", "araddr", "arvalid", "rready")
    outputs = ("awready", "wready", "bvalid", "bresp", "arready", "rvalid", "rdata", "rresp")
    seen = set()
    for _ in range(400):
        await RisingEdge(dut.clk)
        await Timer(1, "ns")
        for round_ in range(2):
            before = [read(bench.pin(name)) for name in outputs]
            for name in inputs:
                handle = bench.pin(name)
                handle.value = _random(bench.random, len(handle))
            if round_:
                # Mostly the address of a register, so that all cases occur.
                bench.pin("awaddr").value = int(bench.random.choice(list(KNOWN)))
                bench.pin("araddr").value = int(bench.random.choice(list(KNOWN)))
            await Timer(500, "ps")
            assert [read(bench.pin(name)) for name in outputs] == before
        seen.add((before[2], before[5]))
    assert len(seen) == 4, "B and R were not valid in all combinations"


@cocotb.test()
async def latencies(dut):
    """The cycles from the last request to the answer, and from one access to the next, are as stated."""
    bench = await _begin(dut, master=False)
    for name, value in dict(awaddr=BY_NAME["timeout"].offset, wdata=7, wstrb=15, araddr=0).items():
        bench.pin(name).value = value
    for name in ("awvalid", "wvalid", "arvalid", "bready", "rready"):
        bench.pin(name).value = 1
    times: dict[str, list[int]] = {name: [] for name in ("aw", "b", "ar", "r")}
    for now in range(40):
        await RisingEdge(dut.clk)
        for name, transfers in times.items():
            if read(bench.pin(f"{name}valid")) & read(bench.pin(f"{name}ready")):
                transfers.append(now)
    for request, answer, stated in (("aw", "b", "write"), ("ar", "r", "read")):
        delays = {after - before for before, after in zip(times[request], times[answer])}
        periods = set(np.diff(times[answer]).tolist())
        assert delays == {latency(f"{stated}_latency")}, f"{stated}: {delays}"
        assert periods == {latency(f"{stated}_period")}, f"{stated}: {periods}"
