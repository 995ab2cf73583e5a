# SPDX-License-Identifier: Apache-2.0
"""Which benches there are, as plain data: one entry per cocotb module and parameter set."""

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["BENCHES", "Bench"]


@dataclass(frozen=True)
class Bench:
    """One cocotb module run against one hardware block at one set of parameters.

    Parameters
    ----------
    module : str
        Cocotb module, such as ``sim.tb.tb_pe``.
    top : str
        Block that ``hw.build --top`` generates; its Verilog module is ``gristmill_{top}``.
    params : dict
        Options of ``hw.build``: ``dict(tile=4, weight_bits=4)`` becomes ``--tile 4 --weight-bits 4``.
    settings : dict
        Anything the bench wants to know that the hardware does not; see `sim.harness.settings`.
    full : bool
        A long sweep: only ``--full`` and ``make test-full`` run it.
    timeout : int
        Wall-clock seconds after which a simulation counts as hung.
    verilog : Path, optional
        Verilog file to use instead of what ``hw.build`` generates; its top module is `top`.
    """

    module: str
    top: str
    params: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    full: bool = False
    timeout: int = 600
    verilog: Path | None = None

    @property
    def parameters(self) -> str:
        """Parameters and settings in the form that tables show."""
        return " ".join(f"{name}={value}" for name, value in {**self.params, **self.settings}.items())

    @property
    def name(self) -> str:
        """Unique name, such as ``tb_pe[tile=4]``."""
        stem = self.module.rsplit(".", 1)[-1]
        return f"{stem}[{self.parameters.replace(' ', ',')}]" if self.parameters else stem


BENCHES: list[Bench] = []
