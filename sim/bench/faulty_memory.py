# SPDX-License-Identifier: Apache-2.0
"""cocotbext-axi's memories with error responses at some addresses, and with a latency. By themselves they only support
SLVERR, and answer 2 cycles after the request."""

from collections.abc import Callable, Mapping
from typing import Any

import cocotb
from cocotb.queue import Queue
from cocotb.triggers import ClockCycles
from cocotbext.axi import AxiRamRead, AxiRamWrite, AxiResp

__all__ = ["LEAST_LATENCY", "FaultyRead", "FaultyWrite", "later"]

LEAST_LATENCY = 2
"""Cycles from AR to the first R, and from the last W to B."""


class _Late:
    """A queue whose items leave some cycles after they were put in."""

    def __init__(self, clock: Any, cycles: int, now: Callable[[], int]):
        self._clock, self._cycles, self._now = clock, cycles, now
        self._waiting: Queue[tuple[int, Any]] = Queue()

    async def put(self, item: Any) -> None:
        await self._waiting.put((self._now() + self._cycles, item))

    async def get(self) -> Any:
        due, item = await self._waiting.get()
        if due > self._now():
            await ClockCycles(self._clock, due - self._now())
        return item


def later(memory: "FaultyRead | FaultyWrite", latency: int, now: Callable[[], int]) -> None:
    """Make a memory answer ``latency`` cycles after each request; requests do not wait for each other.

    now : number of cycles so far
    """
    queue = _Late(memory.clock, latency - LEAST_LATENCY, now)

    async def move(take: Callable[[], Any], give: Callable[[Any], Any]) -> None:
        while True:
            await give(await take())

    if isinstance(memory, FaultyRead):
        cocotb.start_soon(move(memory.ar_channel.recv, queue.put))
        memory.ar_channel.recv = queue.get
    else:
        cocotb.start_soon(move(queue.get, memory.b_channel.send))
        memory.b_channel.send = queue.put


class _Fault(Exception):
    """Makes the memory model answer with an error."""


class _Faults:
    """The accesses that fail, and the response of the current burst."""

    def __init__(self, table: Mapping[int, AxiResp], channel: Any):
        self._table, self._send, self._response = table, channel.send, AxiResp.SLVERR
        channel.send = self._answer

    def check(self, address: int) -> None:
        """Raises _Fault if the address is in the table; the memory model then answers with an error."""
        if address in self._table:
            self._response = self._table[address]
            raise _Fault(f"fault at {address:#x}")

    async def _answer(self, transfer: Any) -> None:
        field = "rresp" if hasattr(transfer, "rresp") else "bresp"
        if getattr(transfer, field) != AxiResp.OKAY:
            setattr(transfer, field, self._response)
        await self._send(transfer)


class FaultyRead(AxiRamRead):
    """A memory's read half. Beats at the addresses in ``faults`` get the response from this table."""

    def __init__(self, *arguments: Any, faults: Mapping[int, AxiResp], **options: Any):
        super().__init__(*arguments, **options)
        self._faults = _Faults(faults, self.r_channel)

    async def _read(self, address: int, length: int) -> Any:
        self._faults.check(address)
        return await super()._read(address, length)


class FaultyWrite(AxiRamWrite):
    """A memory's write half. Bursts with a beat at an address in ``faults`` get the response from this table."""

    def __init__(self, *arguments: Any, faults: Mapping[int, AxiResp], **options: Any):
        super().__init__(*arguments, **options)
        self._faults = _Faults(faults, self.b_channel)

    async def _write(self, address: int, data: bytes) -> None:
        self._faults.check(address)
        await super()._write(address, data)
