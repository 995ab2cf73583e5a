# SPDX-License-Identifier: Apache-2.0
"""Targets of the generated hardware: families of parts, and the parts of boards."""

from dataclasses import dataclass

from hw.spec.config import DEFAULT_OPERATORS


@dataclass(frozen=True)
class Target:
    """A target of elaboration, used like one of Amaranth's platforms.

    Parameters
    ----------
    family : the family's name in Amaranth's platforms, or None for a simulator
    """

    family: str | None


_FAMILIES = ("ultrascaleplus", "ecp5")
_WITHOUT_VECTOR_UNIT = ("ecp5",)
SIMULATION = "simulation"
TARGETS: dict[str, Target | None] = {
    "generic": None,
    **{family: Target(family) for family in _FAMILIES},
    SIMULATION: Target(None),
}
"""Targets by their names for ``hw.build --target``. ``generic`` is plain Verilog for any part and simulator.
``simulation`` is for the simulated device: blocks without work have a clock that stops, which is faster."""


def default_operators(target: str) -> str:
    """``operators`` of hardware for a target that is described without it.

    ECP5 parts have no processor beside the fabric that makes programs, and few multipliers, so it is linear there.
    """
    return "linear" if target in _WITHOUT_VECTOR_UNIT else DEFAULT_OPERATORS


DEFAULT_OPERATORS_TEXT = f"{DEFAULT_OPERATORS}; linear for target {', '.join(_WITHOUT_VECTOR_UNIT)}"
"""The same as a text for the help of command lines."""


@dataclass(frozen=True)
class Part:
    """A part and its resources.

    Parameters
    ----------
    name : the vendor's ordering code
    target : the name in TARGETS of the target that uses its primitives
    resources : count by kind; URAM288 is 288 kbit and BRAM36 is 36 kbit
    """

    name: str
    target: str
    resources: dict[str, int]


BOARDS = {
    # AMD DS987 (K26 SOM) and DS891 (Zynq UltraScale+ overview); SRLs are made of LUTs that can be memory.
    "kv260": Part(
        "xck26-sfvc784-2LV-c",
        "ultrascaleplus",
        {"LUT": 117_120, "FF": 234_240, "DSP48E2": 1_248, "BRAM36": 144, "URAM288": 64},
    ),
}
