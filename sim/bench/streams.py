# SPDX-License-Identifier: Apache-2.0
"""Clock, reset, and ready/valid streams for cocotb benches.

A stream is three flat ports, ``{prefix}_payload``, ``{prefix}_valid`` and ``{prefix}_ready``. A transfer happens on
every rising clock edge at which valid and ready are both high. A source and a sink check the rules of the handshake in
every cycle of every test, because a broken rule often gives right results as long as nothing stalls.

Each stream costs one wake-up and at most four accesses to the simulator per cycle, for any width of the payload.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge

__all__ = [
    "ProtocolError",
    "StreamSink",
    "StreamSource",
    "bursty",
    "cycle",
    "never",
    "randomly",
    "rng",
    "start",
    "until",
]

Stall = Callable[[], bool]

# The conditions that the running test waits for; they are printed after the runner's timeout.
_waiting: dict[int, str] = {}


class ProtocolError(AssertionError):
    """The hardware broke a rule of the ready/valid handshake."""


def never() -> bool:
    """Stall generator: no stalls, the fastest that the handshake allows."""
    return False


def randomly(p: float, rng: np.random.Generator) -> Stall:
    """Stall generator: every cycle stalls with probability `p`."""
    if not 0 <= p < 1:
        raise ValueError(f"Probability of a stall must be in [0, 1), not {p}")
    # Numbers are drawn in blocks, because one numpy call per cycle would take more time than the simulator.
    block: list[bool] = []

    def stall() -> bool:
        if not block:
            block.extend((rng.random(1024) < p).tolist())
        return block.pop()

    return stall


def bursty(rng: np.random.Generator, run: int = 16, pause: int = 8) -> Stall:
    """Stall generator: runs of about `run` cycles without stalls between stalls of about `pause` cycles."""
    if run < 1 or pause < 1:
        raise ValueError(f"Runs and pauses must be at least one cycle, not {run} and {pause}")
    stalled, left = False, 0

    def stall() -> bool:
        nonlocal stalled, left
        while left == 0:
            stalled = not stalled
            left = int(rng.geometric(1 / (pause if stalled else run)))
        left -= 1
        return stalled

    return stall


def rng(*salt: int) -> np.random.Generator:
    """Random numbers of the running test: they depend on the base seed of the run and on the name of the test."""
    return np.random.default_rng([cocotb.RANDOM_SEED, *salt])


def read(handle: Any) -> int:
    """Value of a signal as an unsigned integer; X and Z are an error that names the signal."""
    bits = str(handle.value)
    try:
        return int(bits, 2)
    except ValueError:
        shown = bits if len(bits) <= 64 else f"{bits[:64]}..."
        raise ProtocolError(f"{handle._path} is not a number: {shown}") from None


async def cycle(clk: Any, count: int = 1) -> None:
    """Wait for `count` rising edges of `clk`."""
    edge = RisingEdge(clk)
    for _ in range(count):
        await edge


async def until(clk: Any, condition: Callable[[], bool], what: str | Callable[[], str], cycles: int = 100_000) -> int:
    """Wait until `condition` holds at a rising clock edge; returns the number of edges.

    After `cycles` edges it raises `TimeoutError` with `what` it waited for.
    """
    describe = what if callable(what) else lambda: what
    key = id(condition)
    _waiting[key] = ""
    edge = RisingEdge(clk)
    try:
        for count in range(cycles):
            if condition():
                return count
            if count & 0xFF == 0:
                _waiting[key] = f"{describe()} (for {count} cycles so far)"
            await edge
    finally:
        _waiting.pop(key, None)
    raise TimeoutError(f"Waited {cycles} cycles for {describe()}")


async def start(dut: Any, period: int = 4, reset_cycles: int = 4) -> None:
    """Start ``dut.clk`` with a period of `period` ns and set ``dut.rst`` for `reset_cycles` cycles.

    Create sources and sinks before this call, so that their ports have values when the reset ends.
    """
    _waiting.clear()
    signal.signal(signal.SIGUSR1, _report_waiting)
    dut.rst.value = 1
    Clock(dut.clk, period, unit="ns").start()
    await cycle(dut.clk, reset_cycles)
    dut.rst.value = 0
    await cycle(dut.clk)


def _report_waiting(*_: object) -> None:
    """Handles the runner's signal: prints what the test waits for."""
    for what in _waiting.values() or ["nothing that sim.bench.streams tracks"]:
        print(f"WAITING FOR {what}", flush=True)


class _Stream:
    def __init__(self, dut: Any, prefix: str, clk: Any, stall: Stall):
        self.prefix = prefix
        self.clk = clk
        self.stall = stall
        self.valid = getattr(dut, f"{prefix}_valid")
        self.ready = getattr(dut, f"{prefix}_ready")
        self.payload = getattr(dut, f"{prefix}_payload")
        self.width = len(self.payload)
        self.transfers = 0
        """Number of transfers so far."""
        self.stalled_by_dut = 0
        """Cycles in which this side was ready for a transfer and the hardware was not."""
        self._rst = getattr(dut, "rst", None)
        self._task = cocotb.start_soon(self._run())

    async def _after_reset(self) -> None:
        edge = RisingEdge(self.clk)
        await edge
        while self._rst is not None and str(self._rst.value) != "0":
            await edge

    async def _run(self) -> None:
        raise NotImplementedError


class StreamSource(_Stream):
    """Drives a stream into the hardware. `stall` decides before each transfer whether to wait for a cycle."""

    def __init__(self, dut: Any, prefix: str, clk: Any, stall: Stall = never):
        self._queue: deque[int] = deque()
        self._sent = 0
        super().__init__(dut, prefix, clk, stall)
        self.valid.value = 0
        self.payload.value = 0

    def send(self, payloads: int | Iterable[int]) -> None:
        """Queue payloads; returns at once."""
        items = [payloads] if isinstance(payloads, int) else [int(p) for p in payloads]
        for item in items:
            if not 0 <= item < 1 << self.width:
                raise ValueError(f"Payload {item:#x} does not fit the {self.width} bits of {self.prefix}_payload")
        self._queue.extend(items)
        self._sent += len(items)

    async def drained(self, cycles: int = 100_000) -> int:
        """Wait until the hardware has taken everything that was queued."""
        what = lambda: f"{self.prefix} to take payload {self.transfers + 1} of {self._sent}"  # noqa: E731
        return await until(self.clk, lambda: self.transfers == self._sent, what, cycles)

    async def _run(self) -> None:
        edge, queue, valid, ready, payload = RisingEdge(self.clk), self._queue, self.valid, self.ready, self.payload
        offered = shown = False
        await self._after_reset()
        while True:
            if offered:
                if read(ready):
                    self.transfers += 1
                    offered = False
                else:
                    self.stalled_by_dut += 1
            if not offered and queue and not self.stall():
                payload.value = queue.popleft()
                offered = True
            if offered != shown:
                valid.value = int(offered)
                shown = offered
            await edge


class StreamSink(_Stream):
    """Receives a stream from the hardware. `stall` decides in each cycle whether ready is low.

    Raises `ProtocolError` if valid falls, or the payload changes, before the transfer.
    """

    def __init__(self, dut: Any, prefix: str, clk: Any, stall: Stall = never):
        self.received: list[int] = []
        """Payloads in order of arrival; `take` removes them."""
        self._taken = 0
        super().__init__(dut, prefix, clk, stall)
        self.ready.value = 0

    async def take(self, count: int, cycles: int = 100_000) -> list[int]:
        """Wait for the next `count` payloads and return them."""
        what = lambda: f"{self.prefix} to give payload {len(self.received) + 1} of {count}"  # noqa: E731
        await until(self.clk, lambda: len(self.received) >= count, what, cycles)
        taken, self.received[:] = self.received[:count], self.received[count:]
        return taken

    async def quiet(self, cycles: int = 64) -> None:
        """Check that there is no further transfer for `cycles` cycles, and that every payload was taken."""
        await cycle(self.clk, cycles)
        if self.received:
            raise AssertionError(f"{self.prefix} gave {len(self.received)} payloads more than were asked for")

    async def _run(self) -> None:
        edge, valid, ready, payload = RisingEdge(self.clk), self.valid, self.ready, self.payload
        willing = False
        held: int | None = None  # payload that was valid but not taken one cycle ago
        await self._after_reset()
        while True:
            if read(valid):
                value = read(payload)
                if held is not None and value != held:
                    raise ProtocolError(
                        f"{self.prefix}_payload changed from {held:#x} to {value:#x} before its transfer"
                    )
                held = value
                if willing:
                    self.received.append(value)
                    self.transfers += 1
                    held = None
            elif held is not None:
                raise ProtocolError(f"{self.prefix}_valid fell before its transfer")
            elif willing:
                self.stalled_by_dut += 1
            now = not self.stall()
            if now != willing:
                ready.value = int(now)
                willing = now
            await edge
