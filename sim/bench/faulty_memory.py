# SPDX-License-Identifier: Apache-2.0
"""cocotbext-axi's memories, answering some addresses with an error of choice; by themselves they only know SLVERR."""

from collections.abc import Mapping
from typing import Any

from cocotbext.axi import AxiRamRead, AxiRamWrite, AxiResp

__all__ = ["FaultyRead", "FaultyWrite"]


class _Fault(Exception):
    """Makes the memory model answer with an error."""


class _Faults:
    """Which accesses fail, and the response of the burst that is being answered."""

    def __init__(self, table: Mapping[int, AxiResp], channel: Any):
        self._table, self._send, self._response = table, channel.send, AxiResp.SLVERR
        channel.send = self._answer

    def check(self, address: int) -> None:
        """Raises what makes the memory model answer with an error, if the address is in the table."""
        if address in self._table:
            self._response = self._table[address]
            raise _Fault(f"fault at {address:#x}")

    async def _answer(self, transfer: Any) -> None:
        field = "rresp" if hasattr(transfer, "rresp") else "bresp"
        if getattr(transfer, field) != AxiResp.OKAY:
            setattr(transfer, field, self._response)
        await self._send(transfer)


class FaultyRead(AxiRamRead):
    """A memory's read half. Beats at the addresses in ``faults`` are answered with the response there."""

    def __init__(self, *arguments: Any, faults: Mapping[int, AxiResp], **options: Any):
        super().__init__(*arguments, **options)
        self._faults = _Faults(faults, self.r_channel)

    async def _read(self, address: int, length: int) -> Any:
        self._faults.check(address)
        return await super()._read(address, length)


class FaultyWrite(AxiRamWrite):
    """A memory's write half. Bursts with a beat at one of the addresses in ``faults`` get the response there."""

    def __init__(self, *arguments: Any, faults: Mapping[int, AxiResp], **options: Any):
        super().__init__(*arguments, **options)
        self._faults = _Faults(faults, self.b_channel)

    async def _write(self, address: int, data: bytes) -> None:
        self._faults.check(address)
        await super()._write(address, data)
