# SPDX-License-Identifier: Apache-2.0
"""The supervisor: halts the datapath after a fault, and resets it."""

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Supervisor(wiring.Component):
    """Halts the datapath after faults, and resets it when software requests it and no bus transfer is under way.

    Parameters
    ----------
    most_in_flight : maximum number of descriptors in queue and datapath together

    Members
    -------
    stops : there is an error after which no data may move
    reset : software requests a reset
    quiet : no bus transfer is under way
    accepted, complete : a descriptor entered the queue; a descriptor's results are in memory
    fetching : not all descriptors of a program have entered the queue
    halt : the datapath must move no data, except to finish bus transfers under way
    clear : reset the datapath and clear the error; high for a few cycles
    resetting : high from the command to the end of the reset
    running : descriptors are queued or in flight, or a program is fetched
    """

    _CLEAR_CYCLES = 4

    def __init__(self, most_in_flight: int):
        self.most_in_flight = most_in_flight
        super().__init__(
            {
                **dict.fromkeys(("stops", "reset", "quiet", "accepted", "complete", "fetching"), In(1)),
                **dict.fromkeys(("halt", "clear", "resetting", "running"), Out(1)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        in_flight = Signal(range(self.most_in_flight + 1))
        left = Signal(range(self._CLEAR_CYCLES + 1))
        m.d.comb += [
            self.halt.eq(self.stops | self.resetting),
            self.running.eq((in_flight != 0) | self.fetching),
            # It ends one cycle before ``resetting``, because the datapath's reset has a delay of one cycle.
            self.clear.eq(left > 1),
        ]
        with m.If(left != 0):
            m.d.sync += [left.eq(left - 1), in_flight.eq(0)]
            with m.If(left == 1):
                m.d.sync += self.resetting.eq(0)
        with m.Else():
            m.d.sync += in_flight.eq(in_flight + self.accepted - self.complete)
            with m.If(self.reset):
                m.d.sync += self.resetting.eq(1)
            with m.If(self.resetting & self.quiet):
                m.d.sync += left.eq(self._CLEAR_CYCLES)
        return m
