# SPDX-License-Identifier: Apache-2.0
"""The DSP48E2 slice of AMD's UltraScale+ parts, configured as one multiply-accumulate of a cascade.

Port and parameter names, widths and the meaning of OPMODE are from AMD's user guide UG579, "UltraScale Architecture
DSP Slice".
"""

from amaranth.hdl import ClockSignal, Const, Instance, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

A_BITS, B_BITS, P_BITS = 30, 18, 48
MULTIPLIER_A_BITS = 27
"""The multiplier takes the low 27 bits of A and all of B, both signed."""

_PRODUCT_AND_CASCADE, _PRODUCT = 0b00_001_01_01, 0b00_000_01_01
"""OPMODE: W = 0, Z = PCIN or 0, Y and X the multiplier's two partial products."""


def has_dsp48e2(platform) -> bool:
    """Whether elaboration is for a part with DSP48E2 slices, by the name of its family in Amaranth's platforms."""
    return getattr(platform, "family", None) == "ultrascaleplus"


class Dsp48e2(wiring.Component):
    """``p = a * b + pcin``: registers A, B, M and P, all enabled and none reset.

    Parameters
    ----------
    cascade : whether ``pcin`` comes from the slice below; otherwise it counts as 0

    For parts other than UltraScale+ it is a behavioural model: the slice's registers and operators that are used here,
    with the slice's widths.

    Members
    -------
    a : signed; the multiplier takes the low 27 bits
    b : signed
    pcin : signed, only from ``pcout`` of the slice below: the slice has no other wire to it
    p : signed, ``latency`` cycles after ``a`` and ``b``, 1 cycle after ``pcin``
    pcout : the value of ``p``, for the slice above
    """

    latency = 3
    """Cycles from ``a`` and ``b`` to ``p``."""

    def __init__(self, *, cascade: bool):
        self.cascade = cascade
        super().__init__(
            {
                "a": In(signed(A_BITS)),
                "b": In(signed(B_BITS)),
                "pcin": In(signed(P_BITS)),
                "p": Out(signed(P_BITS)),
                "pcout": Out(signed(P_BITS)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        if has_dsp48e2(platform):
            m.submodules.slice = self._primitive()
        else:
            self._twin(m)
        return m

    def _primitive(self) -> Instance:
        used = dict.fromkeys(("AREG", "ACASCREG", "BREG", "BCASCREG", "MREG", "PREG"), 1)
        passed_by = ("ADREG", "CREG", "DREG", "INMODEREG", "OPMODEREG", "ALUMODEREG", "CARRYINREG", "CARRYINSELREG")
        registers = used | dict.fromkeys(passed_by, 0)
        enables = dict.fromkeys(("CEA2", "CEB2", "CEM", "CEP"), Const(1))
        # The first A and B registers are not in the path, and the others do not exist.
        idle = ("CEA1", "CEB1", "CEAD", "CEC", "CED", "CEINMODE", "CECTRL", "CEALUMODE", "CECARRYIN")
        resets = ("A", "B", "C", "D", "M", "P", "INMODE", "CTRL", "ALUMODE", "ALLCARRYIN")
        ties = enables | dict.fromkeys((*idle, *(f"RST{name}" for name in resets), "CARRYIN"), Const(0))
        modes = {
            "INMODE": Const(0, 5),
            "OPMODE": Const(_PRODUCT_AND_CASCADE if self.cascade else _PRODUCT, 9),
            "ALUMODE": Const(0, 4),
            "CARRYINSEL": Const(0, 3),
        }
        return Instance(
            "DSP48E2",
            **{f"p_{name}": value for name, value in registers.items()},
            p_USE_MULT="MULTIPLY",
            p_USE_SIMD="ONE48",
            p_AMULTSEL="A",
            p_BMULTSEL="B",
            **{f"i_{name}": value for name, value in (ties | modes).items()},
            i_CLK=ClockSignal(),
            i_A=self.a,
            i_B=self.b,
            i_C=Const(0, P_BITS),
            i_D=Const(0, MULTIPLIER_A_BITS),
            i_PCIN=self.pcin if self.cascade else Const(0, P_BITS),
            o_P=self.p,
            o_PCOUT=self.pcout,
        )

    def _twin(self, m: Module) -> None:
        a = Signal(signed(A_BITS), reset_less=True)
        b = Signal(signed(B_BITS), reset_less=True)
        product = Signal(signed(MULTIPLIER_A_BITS + B_BITS), reset_less=True)
        p = Signal(signed(P_BITS), reset_less=True)
        m.d.sync += [
            a.eq(self.a),
            b.eq(self.b),
            product.eq(a[:MULTIPLIER_A_BITS].as_signed() * b),
            p.eq(product + (self.pcin if self.cascade else 0)),
        ]
        m.d.comb += [self.p.eq(p), self.pcout.eq(p)]
