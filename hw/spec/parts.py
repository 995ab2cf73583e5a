# SPDX-License-Identifier: Apache-2.0
"""What the hardware is generated for: families of parts, the parts of boards, and the boards of the self-test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What blocks are elaborated for, in the place of one of Amaranth's platforms.

    Parameters
    ----------
    family : as Amaranth's platforms name theirs
    """

    family: str


_FAMILIES = ("ultrascaleplus", "ecp5")
TARGETS: dict[str, Target | None] = {"generic": None, **{family: Target(family) for family in _FAMILIES}}
"""By the name that ``python -m hw.build --target`` takes. ``generic`` is plain Verilog for any part and simulator."""


@dataclass(frozen=True)
class Part:
    """A part as its vendor orders it, and how much of each resource it has.

    Parameters
    ----------
    name : ordering code
    target : the name in TARGETS that uses its primitives
    resources : count by kind; URAM288 is 288 kbit and BRAM36 is 36 kbit
    """

    name: str
    target: str
    resources: dict[str, int]


BOARDS = {
    # AMD DS987 (K26 SOM) and DS891 (Zynq UltraScale+ overview); SRLs take LUTs of the kind that can be memory.
    "kv260": Part(
        "xck26-sfvc784-2LV-c",
        "ultrascaleplus",
        {"LUT": 117_120, "FF": 234_240, "DSP48E2": 1_248, "BRAM36": 144, "URAM288": 64},
    ),
}
