# SPDX-License-Identifier: Apache-2.0
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
"""The ULX3S 85F: a self-test at a PLL's frequency, with its outcome on LEDs and on the USB serial port."""

from typing import NamedTuple

from amaranth.hdl import ClockDomain, ClockSignal, Instance, Module, Signal
from amaranth.lib import cdc, io, wiring
from amaranth_boards.ulx3s import ULX3S_85F_Platform

INPUT_HZ = 25_000_000
BAUD = 115_200
_VCO_RANGE = 400e6, 800e6
_VCO_BEST = 600e6
_LOWEST_PFD = 3.125e6
_DIVIDERS = range(1, 129)
"""Ranges of the ECP5's EHXPLLL (FPGA-DS-02012, sysCLOCK PLL timing); _VCO_BEST is as in Project Trellis' ecppll."""


class Pll(NamedTuple):
    """Dividers of an EHXPLLL with feedback from its first output: ``output_hz = 25 MHz * feedback / reference``."""

    reference: int
    feedback: int
    output: int

    @property
    def output_hz(self) -> float:
        """Output frequency."""
        return INPUT_HZ * self.feedback / self.reference


def pll_for(hz: int) -> Pll:
    """The dividers for the lowest possible frequency that is at least ``hz``.

    Raises
    ------
    ValueError : outside 25 to 400 MHz
    """
    if not INPUT_HZ <= hz <= 400_000_000:
        raise ValueError(f"the clock is from 25 to 400 MHz, not {hz / 1e6:g}")
    found = []
    for reference in _DIVIDERS:
        if INPUT_HZ / reference < _LOWEST_PFD:
            break
        feedback = -(-hz * reference // INPUT_HZ)
        made = INPUT_HZ * feedback / reference
        outputs = [div for div in _DIVIDERS if _VCO_RANGE[0] <= made * div <= _VCO_RANGE[1]]
        if feedback in _DIVIDERS and outputs:
            best = min(outputs, key=lambda div: abs(made * div - _VCO_BEST))
            found.append((made, reference, Pll(reference, feedback, best)))
    return min(found)[2]


class Ulx3sTop(wiring.Component):
    """The design on the FPGA: ``test`` in a clock domain from the PLL, and its pins.

    LEDs, lowest first: the last run passed; the last run failed; a run has failed since power-up; toggles with each
    run; a run is under way; off; off; the PLL is locked. Button FIRE 1 corrupts an expected value while it is held.

    Parameters
    ----------
    test : a :class:`hw.boards.selftest.SelfTest`
    pll : the PLL of its clock
    """

    def __init__(self, test: wiring.Component, pll: Pll):
        self.test, self.pll = test, pll
        super().__init__({})

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.test = test = self.test
        locked = self._clock(m, platform)
        m.submodules.lock_sync = cdc.FFSynchronizer(~locked, test.hold, init=1, stages=3)
        lights = (test.passed, test.failed, test.failed_ever, test.beat, test.running, 0, 0, locked)
        for index, light in enumerate(lights):
            m.submodules[f"led_{index}"] = led = io.Buffer("o", platform.request("led", index, dir="-"))
            m.d.comb += led.o.eq(light)
        m.submodules.button = button = io.Buffer("i", platform.request("button_fire", 0, dir="-"))
        m.submodules.button_sync = cdc.FFSynchronizer(button.i[0], test.corrupt)
        serial = platform.request("uart", 0, dir=dict.fromkeys(("tx", "rx", "rts", "dtr"), "-"))
        m.submodules.tx = tx = io.Buffer("o", serial.tx)
        m.d.comb += tx.o.eq(test.tx)
        return m

    def _clock(self, m: Module, platform) -> Signal:
        """Domain ``sync`` from the 25 MHz oscillator; returns whether the PLL has locked."""
        m.domains.sync = ClockDomain(reset_less=True)
        m.submodules.oscillator = oscillator = io.Buffer("i", platform.request("clk25", 0, dir="-"))
        clock, locked = Signal(), Signal()
        m.submodules.pll = Instance(
            "EHXPLLL",
            a_FREQUENCY_PIN_CLKI=f"{INPUT_HZ / 1e6:g}",
            a_FREQUENCY_PIN_CLKOP=f"{self.pll.output_hz / 1e6:.6f}",
            a_ICP_CURRENT="12",
            a_LPF_RESISTOR="8",
            a_MFG_ENABLE_FILTEROPAMP="1",
            a_MFG_GMCREF_SEL="2",
            p_CLKI_DIV=self.pll.reference,
            p_CLKFB_DIV=self.pll.feedback,
            p_CLKOP_DIV=self.pll.output,
            p_CLKOP_ENABLE="ENABLED",
            p_CLKOP_CPHASE=self.pll.output // 2,
            p_CLKOP_FPHASE=0,
            p_FEEDBK_PATH="CLKOP",
            i_CLKI=oscillator.i[0],
            i_CLKFB=clock,
            i_RST=0,
            i_STDBY=0,
            i_PHASESEL0=0,
            i_PHASESEL1=0,
            i_PHASEDIR=1,
            i_PHASESTEP=1,
            i_PHASELOADREG=1,
            i_PLLWAKESYNC=0,
            i_ENCLKOP=0,
            o_CLKOP=clock,
            o_LOCK=locked,
        )
        m.d.comb += ClockSignal().eq(clock)
        return locked


def platform() -> ULX3S_85F_Platform:
    """The board, for the open tool chain."""
    return ULX3S_85F_Platform(toolchain="Trellis")
