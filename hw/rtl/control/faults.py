# SPDX-License-Identifier: Apache-2.0
"""Errors that stop the accelerator: keeps the first error, and detects memory that does not answer."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.control.descriptor_check import ERROR_BITS
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.spec.control.program import LENGTH_BITS
from hw.spec.control.registers import ErrorCode

STOPS_AT_ONCE = (
    ErrorCode.READ_BUS,
    ErrorCode.WRITE_BUS,
    ErrorCode.READ_TIMEOUT,
    ErrorCode.WRITE_TIMEOUT,
    ErrorCode.UNDERRUN,
)
"""After these errors no descriptor in flight is completed. After the others, earlier descriptors are completed."""
OF_ACTIVATIONS = (ErrorCode.NON_FINITE, ErrorCode.EXPONENT)
"""Errors of the layer in the activation unit."""
PRECEDENCE = (*STOPS_AT_ONCE, *OF_ACTIVATIONS, ErrorCode.PROGRAM, ErrorCode.CACHE)
"""Order of errors in the same cycle: the most serious one is kept. Refused descriptors have errors of their own."""


def fault_layout() -> data.StructLayout:
    """A source of errors: whether there is an error, and its address if it has one."""
    return data.StructLayout({"raised": 1, "address": ADDRESS_BITS})


class FirstError(wiring.Component):
    """Keeps the first error until the reset. Of several in one cycle it keeps the first in :data:`PRECEDENCE`.

    Parameters
    ----------
    codes : those that the hardware has, see :func:`hw.spec.control.registers.errors_of`

    Members
    -------
    faults : the sources of errors, indexed by their code
    refused : an error code, 0 if there is none; it is the last in precedence
    begun, loading : index of the last descriptor that was begun, and of the layer in the activation unit
    code, address : the first error; 0 if there was none
    failed : ``loading`` at the time of an error of :data:`OF_ACTIVATIONS`, else ``begun``
    stops : it is one of :data:`STOPS_AT_ONCE`; a register, because everything that moves waits for it
    """

    def __init__(self, codes: Sequence[ErrorCode]):
        self.codes = codes
        super().__init__(
            {
                "faults": In(fault_layout()).array(len(codes)),
                "refused": In(ERROR_BITS),
                "begun": In(LENGTH_BITS),
                "loading": In(LENGTH_BITS),
                "code": Out(ERROR_BITS),
                "address": Out(ADDRESS_BITS),
                "failed": Out(LENGTH_BITS),
                "stops": Out(1),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        with m.If(self.code == ErrorCode.NONE):
            m.d.sync += self.code.eq(self.refused)
            with m.If(self.refused != ErrorCode.NONE):
                m.d.sync += self.failed.eq(self.begun)
            m.d.sync += self.stops.eq(Cat(self.faults[code].raised for code in STOPS_AT_ONCE).any())
            for code in reversed([code for code in PRECEDENCE if code in self.codes]):
                fault = self.faults[code]
                with m.If(fault.raised):
                    m.d.sync += [
                        self.code.eq(code),
                        self.address.eq(fault.address),
                        self.failed.eq(self.loading if code in OF_ACTIVATIONS else self.begun),
                    ]
        return m


class Watchdog(Block):
    """Detects ports with transfers under way and no progress for a time.

    All ports share one timer. When it expires, each port that owed a response for the whole period, without progress,
    is reported: after one to two times ``timeout``.

    Parameters
    ----------
    watched : number of ports

    Members
    -------
    timeout : period in cycles; 0 means never
    owes, progress : one bit for each port: a response is due; the port has moved
    late : one bit for each port, for one cycle
    """

    def __init__(self, watched: int):
        self.watched = watched
        super().__init__({"timeout": In(32), "owes": In(watched), "progress": In(watched), "late": Out(watched)})

    def elaborate(self, platform) -> Module:
        m = Module()
        left, silent, ends = Signal(32), Signal(self.watched), Signal()
        m.d.comb += ends.eq(left == 0)
        m.d.sync += [
            # A shorter timeout takes effect in the cycle after it is set.
            left.eq(Mux(ends | (left > self.timeout), self.timeout, left - 1)),
            # With timeout 0 no port is marked silent, so a timeout that is set later starts clean.
            silent.eq(Mux(self.timeout != 0, (silent | Mux(ends, self.owes, 0)) & self.owes & ~self.progress, 0)),
            self.late.eq(Mux(ends & (self.timeout != 0), silent & ~self.progress & self.owes, 0)),
        ]
        return m
