# SPDX-License-Identifier: Apache-2.0
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
"""The transmitter of a UART: 8 data bits, no parity, 1 stop bit."""

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

FRAME_BITS = 10
"""Start bit, 8 data bits, stop bit."""


def uart_divisor(clock_hz: float, baud: int) -> int:
    """Clock cycles of one bit.

    Raises
    ------
    ValueError : the error of the nearest whole number is more than 2 %, which is too much for a receiver
    """
    divisor = max(1, round(clock_hz / baud))
    if abs(clock_hz / divisor - baud) > 0.02 * baud:
        raise ValueError(f"a clock of {clock_hz:,.0f} Hz makes no {baud} baud within 2 %")
    return divisor


class UartTransmitter(wiring.Component):
    """Sends bytes, lowest bit first. One byte in ``FRAME_BITS * divisor`` cycles.

    Parameters
    ----------
    divisor : clock cycles of one bit, 1 or more

    Members
    -------
    bytes : bytes to send
    tx : the line, high when idle
    """

    def __init__(self, divisor: int):
        if divisor < 1:
            raise ValueError(f"divisor is 1 or more, not {divisor}")
        self.divisor = divisor
        super().__init__({"bytes": In(stream.Signature(8)), "tx": Out(1, init=1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        frame = Signal(FRAME_BITS, init=-1)
        left = Signal(range(FRAME_BITS + 1))
        timer = Signal(range(self.divisor))
        m.d.comb += [self.bytes.ready.eq(left == 0), self.tx.eq(frame[0])]
        with m.If(self.bytes.valid & self.bytes.ready):
            m.d.sync += [
                frame.eq(Cat(Const(0, 1), self.bytes.payload, Const(1, 1))),
                left.eq(FRAME_BITS),
                timer.eq(self.divisor - 1),
            ]
        with m.Elif(left != 0):
            m.d.sync += timer.eq(timer - 1)
            with m.If(timer == 0):
                m.d.sync += [frame.eq(Cat(frame[1:], Const(1, 1))), left.eq(left - 1), timer.eq(self.divisor - 1)]
        return m
