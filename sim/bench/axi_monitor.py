# SPDX-License-Identifier: Apache-2.0
"""Assertions on the hardware's AXI ports: the rules of the bus are checked in every cycle of a test.

With one memory a broken rule often gives right results, but with another memory it fails. Rules and names are from Arm
IHI 0022. An :class:`AxiMonitor` checks an AXI4 manager with reads, writes or both; a :class:`LiteMonitor` checks an
AXI4-Lite subordinate. They need a few accesses to the simulator per cycle: addresses are read only while they are
valid, responses only while some are due, and data only while it waits.
"""

from collections import deque
from typing import Any, NamedTuple

import cocotb
from cocotb.triggers import RisingEdge

from hw.spec.memory.access import BURST_BOUNDARY as BOUNDARY
from sim.bench.dut import config

__all__ = ["AxiMonitor", "Burst", "LiteMonitor"]

FLOAT_BYTES = 4
_ADDRESS_FIELDS = ("addr", "len", "size", "burst", "cache", "prot", "id")
_INCR, _CACHE, _PROT, _ID = 1, 3, 0, 0


class Burst(NamedTuple):
    """A burst on an address channel."""

    address: int
    beats: int


class _Channel:
    """One channel's valid, ready and payload, and the rule of every channel: a valid payload is stable until taken."""

    def __init__(self, dut: Any, prefix: str, channel: str, fields: tuple[str, ...]):
        self.name = f"{prefix}_{channel}".upper()
        self.valid = getattr(dut, f"{prefix}_{channel}valid")
        self.ready = getattr(dut, f"{prefix}_{channel}ready")
        self.fields = tuple(getattr(dut, f"{prefix}_{channel}{field}") for field in fields)
        self.waiting: tuple[int, ...] | None = None
        """Payload of the transfer that is valid and not taken."""
        self.fresh = False
        """Whether the valid transfer is new in this cycle."""
        self.taken = False
        """Whether the transfer is taken in this cycle."""

    def look(self) -> bool:
        """Whether there is a valid transfer; checks that the previous one was not withdrawn."""
        if not self.valid.value:
            assert self.waiting is None, f"{self.name}VALID was withdrawn"
            self.taken = False
            return False
        self.fresh, self.taken = self.waiting is None, bool(self.ready.value)
        if not (self.fresh and self.taken):
            now = tuple(int(field.value) for field in self.fields)
            assert self.waiting in (None, now), f"{self.name} changed from {self.waiting} to {now} before it was taken"
            self.waiting = None if self.taken else now
        return True


class _Watched:
    """Runs a check in every cycle; the rst pin restarts it."""

    def __init__(self, dut: Any):
        self.dut = dut
        self.now = 0
        """Number of cycles so far."""
        self._clear()
        cocotb.start_soon(self._run())

    def _clear(self) -> None:
        raise NotImplementedError

    def _cycle(self) -> None:
        raise NotImplementedError

    async def _run(self) -> None:
        edge, rst = RisingEdge(self.dut.clk), self.dut.rst
        while True:
            await edge
            self.now += 1
            # In the first cycles rst has no value.
            if str(rst.value) == "0":
                self._cycle()
            else:
                self._clear()


class AxiMonitor(_Watched):
    """The rules for an AXI4 manager, and a record of its transfers.

    Parameters
    ----------
    prefix : prefix of the port's signals, such as ``m_axi_hp0``; a port without AW or without AR only reads or writes
    width : bits of the port
    outstanding : maximum number of bursts under way in each direction
    """

    def __init__(self, dut: Any, prefix: str, width: int, outstanding: int = 8):
        self.size, self.outstanding = width // 8, outstanding
        self.reads: list[Burst] = []
        """Every burst on AR."""
        self.writes: list[Burst] = []
        """Every burst on AW."""
        self.written: list[int] = []
        """Bytes written by each burst whose data is complete."""
        self.acknowledged = 0
        """Number of bursts acknowledged on B."""
        self.beats = 0
        """Number of beats taken on R."""
        self.read_at = self.wrote_at = 0
        """Cycle of the last progress: a transfer, or a new valid address while nothing else was under way."""
        self._reading, self._writing = hasattr(dut, f"{prefix}_arvalid"), hasattr(dut, f"{prefix}_awvalid")
        if self._reading:
            self._ar = _Channel(dut, prefix, "ar", _ADDRESS_FIELDS)
            self._r = _Channel(dut, prefix, "r", ("last",))
        if self._writing:
            self._aw = _Channel(dut, prefix, "aw", _ADDRESS_FIELDS)
            self._w = _Channel(dut, prefix, "w", ("strb", "last", "data"))
            self._b = _Channel(dut, prefix, "b", ())
        super().__init__(dut)

    @property
    def reads_under_way(self) -> int:
        """Bursts on AR that are not completely answered."""
        return len(self._owed_reads)

    @property
    def writes_under_way(self) -> int:
        """Bursts on AW that are not acknowledged."""
        return len(self._owed_data) + self._unacknowledged

    @property
    def moved(self) -> int:
        """Cycle of the last progress in either direction."""
        return max(self.read_at, self.wrote_at)

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way."""
        return not self.reads_under_way and not self.writes_under_way

    def _clear(self) -> None:
        # Bursts under way are never answered, so all counts restart together.
        for bursts in (self.reads, self.writes, self.written):
            bursts.clear()
        self.acknowledged = self.beats = 0
        self._owed_reads: deque[int] = deque()  # beats still to come of each burst
        self._owed_data: deque[int] = deque()
        self._unacknowledged = 0
        self._bytes = 0
        for name in ("_ar", "_r", "_aw", "_w", "_b"):
            if hasattr(self, name):
                getattr(self, name).waiting = None

    def _cycle(self) -> None:
        if self._reading:
            # A burst that appears in this cycle is not answered in it: outputs depend only on registers.
            if self._owed_reads and self._r.look() and self._r.taken:
                self._receive()
            if self._ar.look():
                if self._ar.taken or not self._owed_reads:
                    self.read_at = self.now
                self._address(self._ar, self.reads, self._owed_reads, self.reads_under_way)
        if self._writing:
            if self._unacknowledged and self._b.look() and self._b.taken:
                self._unacknowledged -= 1
                self.acknowledged += 1
                self.wrote_at = self.now
            if self._aw.look():
                if self._aw.taken or not self.writes_under_way:
                    self.wrote_at = self.now
                self._address(self._aw, self.writes, self._owed_data, self.writes_under_way)
            if self._w.look():
                self._data()

    def _address(self, channel: _Channel, bursts: list[Burst], owed: deque[int], under_way: int) -> None:
        """Checks the rules for a burst in its first valid cycle."""
        if not channel.fresh:
            return
        address, length, *constant = (int(field.value) for field in channel.fields)
        beats, name = length + 1, channel.name
        expected = [(self.size - 1).bit_length(), _INCR, _CACHE, _PROT, _ID]
        assert constant == expected, f"{name} has size, burst, cache, prot and id {constant}, not {expected}"
        assert address % self.size == 0, f"{name}ADDR {address:#x} is not a multiple of {self.size}"
        end = address + beats * self.size - 1
        assert address // BOUNDARY == end // BOUNDARY, f"{name}: {beats} beats from {address:#x} cross 4 KiB"
        assert under_way < self.outstanding, f"{name} has {under_way + 1} bursts under way"
        bursts.append(Burst(address, beats))
        owed.append(beats)

    def _receive(self) -> None:
        self.read_at = self.now
        self.beats += 1
        self._owed_reads[0] -= 1
        last = bool(self._r.fields[0].value)
        assert last == (self._owed_reads[0] == 0), "RLAST is wrong: the memory's fault"
        if last:
            self._owed_reads.popleft()

    def _data(self) -> None:
        """Checks that data comes after its address and ends with WLAST, and that only its last beat is partial."""
        channel = self._w
        assert self._owed_data, f"{channel.name}: data before its address"
        if not channel.taken:
            return
        self.wrote_at = self.now
        strobes, last = int(channel.fields[0].value), bool(channel.fields[1].value)
        left = self._owed_data[0]
        assert last == (left == 1), f"WLAST is {last} with {left} beats to come"
        count = strobes.bit_count()
        assert count, "no byte of a beat is written"
        # Appends to a KV cache write any bytes.
        if not config().has_attention:
            assert strobes == (1 << count) - 1 and count % FLOAT_BYTES == 0, f"WSTRB is {strobes:#x}"
            assert last or count == self.size, f"WSTRB is {strobes:#x} in a beat that is not the burst's last"
        self._bytes += count
        self._owed_data[0] -= 1
        if last:
            self.written.append(self._bytes)
            self._bytes = 0
            self._owed_data.popleft()
            self._unacknowledged += 1


class LiteMonitor(_Watched):
    """The rules for an AXI4-Lite subordinate: a response stays until it is taken, and each has a request before it."""

    def __init__(self, dut: Any, prefix: str):
        self._requests = {
            name: (getattr(dut, f"{prefix}_{name}valid"), getattr(dut, f"{prefix}_{name}ready"))
            for name in ("aw", "w", "ar")
        }
        self._b = _Channel(dut, prefix, "b", ("resp",))
        self._r = _Channel(dut, prefix, "r", ("resp", "data"))
        super().__init__(dut)

    def _clear(self) -> None:
        self._asked = dict.fromkeys(self._requests, 0)
        self._b.waiting = self._r.waiting = None

    def _cycle(self) -> None:
        asked = self._asked
        if self._b.look():
            assert asked["aw"] and asked["w"], "BVALID without a write"
            if self._b.taken:
                asked["aw"] -= 1
                asked["w"] -= 1
        if self._r.look():
            assert asked["ar"], "RVALID without a read"
            asked["ar"] -= self._r.taken
        for name, (valid, ready) in self._requests.items():
            if valid.value and ready.value:
                asked[name] += 1
