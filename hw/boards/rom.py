# SPDX-License-Identifier: Apache-2.0
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
"""Constant tables in block RAM, and streams that send a table from its beginning."""

from collections.abc import Sequence

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out


class Rom(wiring.Component):
    """A table that is read through a register; latency 1 cycle.

    It is a switch and not a memory with initial contents, because generated Verilog has no such memories. yosys makes
    it a memory again.

    Parameters
    ----------
    width : bits of an entry
    entries : unsigned integers, 1 or more; data at addresses after the last entry is undefined

    Members
    -------
    address : index of the entry
    enable : ``data`` is updated in the next cycle
    data : the entry
    """

    def __init__(self, width: int, entries: Sequence[int]):
        for entry in entries:
            if not 0 <= entry < 1 << width:
                raise ValueError(f"a ROM of {width} bits does not hold {entry:#x}")
        self.entries = tuple(entries)
        # At least two addresses, so that the address has at least one bit.
        super().__init__({"address": In(range(max(2, len(entries)))), "enable": In(1), "data": Out(width)})

    def elaborate(self, platform) -> Module:
        m = Module()
        # Bits that are the same in all entries have no register: yosys has problems with constant registers.
        stored = [bit for bit in range(len(self.data)) if len({entry >> bit & 1 for entry in self.entries}) > 1]
        entry, register = Signal(len(stored)), Signal(len(stored), reset_less=True)
        with m.Switch(self.address):
            for address, value in enumerate(self.entries):
                with m.Case(address):
                    m.d.comb += entry.eq(sum((value >> bit & 1) << place for place, bit in enumerate(stored)))
        with m.If(self.enable):
            m.d.sync += register.eq(entry)
        m.d.comb += self.data.eq(self.entries[0])
        for place, bit in enumerate(stored):
            m.d.comb += self.data[bit].eq(register[place])
        return m


class RomSource(wiring.Component):
    """Sends a table as a stream, one transfer per cycle.

    Parameters: those of :class:`Rom`

    Members
    -------
    start : send the table from its beginning; one cycle, and only while no table is being sent
    o : the stream
    """

    def __init__(self, width: int, entries: Sequence[int]):
        self.rom = Rom(width, entries)
        super().__init__({"start": In(1), "o": Out(stream.Signature(width))})

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.rom = rom = self.rom
        more, fetch = Signal(), Signal()
        m.d.comb += [
            fetch.eq(more & (~self.o.valid | self.o.ready)),
            rom.enable.eq(fetch),
            self.o.payload.eq(rom.data),
        ]
        m.d.sync += self.o.valid.eq(fetch | (self.o.valid & ~self.o.ready))
        with m.If(self.start):
            m.d.sync += [rom.address.eq(0), more.eq(1), self.o.valid.eq(0)]
        with m.Elif(fetch):
            m.d.sync += [rom.address.eq(rom.address + 1), more.eq(rom.address != len(rom.entries) - 1)]
        return m
