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




# The smallest hardware that still has every feature: it builds in seconds on both simulators.
_SMALL = dict(tile=4, ports=1, port_width=64, max_tokens=5, max_k=1024)
_TILE_8 = dict(tile=8, weight_bits=8, activation_bits=12, zero_point="fixed", ports=2, port_width=128, max_k=1024)


_NARROW = dict(tile=16, weight_bits=8, ports=1, port_width=32, max_k=1024)
_TILE_16 = dict(tile=16, ports=4, port_width=128, max_tokens=16, max_k=1024)
_TILE_32 = dict(tile=32, ports=4, port_width=128, max_tokens=16, max_k=1024)


def _bench(
    block: str, params: dict[str, object], full: bool = False, tb: str | None = None, **settings: object
) -> Bench:
    return Bench(f"sim.tb.tb_{tb or block}", block, params, settings, full)


BENCHES: list[Bench] = [
    _bench("pe", _SMALL),
    _bench("array", _SMALL),
    _bench("float_out", _SMALL),
    _bench("float_out", _TILE_8),
    *(_bench(block, _SMALL) for block in ("fifo", "fork", "walker", "splitter", "header")),
    *(_bench(block, _SMALL) for block in ("columns", "activations", "sequencer", "column_control", "drain")),
    _bench("assembler", _NARROW),
    _bench("header", _NARROW),
    _bench("core", _SMALL),
    _bench("core", _TILE_8),
    _bench("core", _TILE_16),
    _bench("core", _TILE_16, tb="core_speed"),
    _bench("core", _TILE_32, tb="core_speed"),
]
