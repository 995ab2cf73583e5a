# SPDX-License-Identifier: Apache-2.0
"""What the hardware is generated for: any part, or a family whose primitives it uses or whose shape it takes."""

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
