# SPDX-License-Identifier: Apache-2.0
"""The list of all benches, as plain data: one entry per cocotb module and parameter set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hw.spec.presets import PRESETS

__all__ = ["BENCHES", "Bench"]


@dataclass(frozen=True)
class Bench:
    """One cocotb module run against one hardware block at one set of parameters.

    Parameters
    ----------
    module : str
        Cocotb module, such as ``sim.tb.core.tb_pe``.
    top : str
        Block that ``hw.build --top`` generates; its Verilog module is ``gristmill_{top}``.
    params : dict
        Options of ``hw.build``: ``dict(tile=4, weight_bits=4)`` becomes ``--tile 4 --weight-bits 4``.
        Without ``operators`` they are those of ``AcceleratorConfig``.
    settings : dict
        Settings of the bench that are not parameters of the hardware; see `sim.harness.settings`.
    full : bool
        A long sweep: only ``--full`` and ``make test-full`` run it.
    timeout : int
        Wall-clock seconds after which a simulation counts as hung.
    verilog : Path, optional
        Verilog file to use instead of what ``hw.build`` generates; its top module is `top`.
    trace : Path, optional
        Waveform (VCD) to write; Verilator only. See `sim.wave`.
    """

    module: str
    top: str
    params: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    full: bool = False
    timeout: int = 600
    verilog: Path | None = None
    trace: Path | None = None

    @property
    def parameters(self) -> str:
        """Parameters and settings in the form of the tables."""
        return " ".join(f"{name}={value}" for name, value in {**self.params, **self.settings}.items())

    @property
    def name(self) -> str:
        """Unique name, such as ``core/tb_pe[tile=4]``: the room comes first, so that ``-k core/`` selects all of it."""
        return f"{self.place}[{self.parameters.replace(' ', ',')}]" if self.parameters else self.place

    @property
    def place(self) -> str:
        """Room and cocotb module, such as ``core/tb_pe``."""
        return "/".join(self.module.split(".")[-2:])


_SMALL, _WIDE, _NARROW, _FIXED = (PRESETS[name] for name in ("small", "wide", "narrow", "fixed"))
_TWO_PORTS, _TILE_16, _TILE_32 = (PRESETS[name] for name in ("two_ports", "tile16", "tile32"))
_SMALL_DECODER, _TWO_PORTS_DECODER, _DECODER = (
    dict(params, operators="decoder") for params in (_SMALL, _TWO_PORTS, _TILE_16)
)
_ATTENTION = dict(_DECODER, lanes=2, score_words=8192)
_SMALL_ATTENTION = dict(_SMALL_DECODER, lanes=4, score_words=2048)
_WITH_ATTENTION = dict(operators="decoder", score_words=2048)
# The largest layer of Qwen2.5-0.5B fits.
_BLOCK = dict(_DECODER, lanes=2, max_k=4864)
_ULX3S, _ULX3S_8 = (dict(target="ecp5", **PRESETS[name]) for name in ("ulx3s4", "ulx3s8"))
# As many lanes as columns, and the most lanes.
_LANES_4, _LANES_8 = dict(_SMALL, lanes=4), dict(_TILE_32, lanes=8)

# Every value of every parameter occurs here, also in combinations that the quick list does not have.
_SWEEP = [
    dict(tile=4, ports=1, port_width=64, max_k=64, max_group_size=32, max_tokens=3),
    dict(tile=8, ports=4, port_width=128, max_k=32, max_group_size=256, max_tokens=1),
    dict(
        tile=4,
        weight_bits=3,
        activation_bits=9,
        ports=2,
        port_width=32,
        max_tokens=64,
        max_k=896,
        max_group_size=128,
        lanes=2,
    ),
    dict(tile=4, weight_bits=8, activation_bits=16, zero_point="fixed", ports=1, port_width=32, max_tokens=2),
    dict(tile=4, weight_bits=5, activation_bits=10, ports=4, port_width=64, max_tokens=7, max_k=4096, lanes=4),
    dict(tile=8, weight_bits=4, activation_bits=16, ports=4, port_width=128, max_tokens=32, max_k=32768),
    dict(tile=8, weight_bits=6, activation_bits=11, zero_point="fixed", ports=4, port_width=32, max_tokens=1, lanes=8),
    dict(tile=8, weight_bits=2, activation_bits=13, ports=1, port_width=128, max_tokens=64, max_k=1024, lanes=4),
    dict(tile=16, weight_bits=4, activation_bits=16, zero_point="fixed", ports=4, port_width=128, max_tokens=16),
    dict(tile=16, weight_bits=8, activation_bits=8, ports=2, port_width=64, max_tokens=5, lanes=8),
    dict(tile=16, weight_bits=5, activation_bits=14, ports=4, port_width=128, max_tokens=1, max_group_size=256),
    dict(tile=16, weight_bits=3, activation_bits=12, ports=2, port_width=128, max_tokens=64, max_k=2048, lanes=2),
    dict(
        tile=32, weight_bits=4, activation_bits=16, zero_point="fixed", ports=4, port_width=128, max_tokens=64, lanes=8
    ),
    dict(tile=32, weight_bits=8, activation_bits=15, ports=4, port_width=32, max_tokens=3, max_k=1024),
    dict(tile=32, weight_bits=7, activation_bits=16, ports=4, port_width=128, max_tokens=17, max_k=2048, lanes=4),
]


# Cocotb module without ``tb_`` -> its room, the folder of the module.
_ROOMS = {path.stem.removeprefix("tb_"): path.parent.name for path in Path(__file__).parent.glob("tb/*/tb_*.py")}


def _bench(block: str, params: Mapping[str, object], tb: str = "", full: bool = False, **settings: object) -> Bench:
    name = tb or block
    module = f"sim.tb.{_ROOMS[name]}.tb_{name}"
    return Bench(module, block, dict(params), settings, full, timeout=3600 if full else 600)


# The first one also runs on Icarus in `make test`. Builds take most of the time, so each block has only a few of them.
BENCHES: list[Bench] = [
    *(_bench(block, _SMALL) for block in ("pe", "array", "float_out", "fifo", "fork", "walker", "splitter", "header")),
    *(_bench(block, _SMALL) for block in ("columns", "activations", "sequencer", "column_control", "drain")),
    _bench("assembler", _NARROW),
    *(_bench("activation_unit", params) for params in (_SMALL, _NARROW, _SMALL_ATTENTION, _ATTENTION)),
    *(_bench(block, _SMALL) for block in ("burst_cutter", "burst_splitter", "read_manager", "dispatcher")),
    *(_bench("weight_fetch", params) for params in (_SMALL, _TILE_16)),
    *(_bench("gatherer", params) for params in (_SMALL, _LANES_4)),
    _bench("patient_reader", _SMALL, tb="patient"),
    _bench("operand_fetch", _SMALL),
    _bench("table_fetch", _SMALL, tb="operand_fetch", periodic=True),
    _bench("write_manager", dict(_SMALL, **_WITH_ATTENTION)),
    _bench("register_bank", _SMALL_DECODER),
    _bench("program_fetch", _SMALL),
    *(_bench(block, _SMALL) for block in ("float_adder", "float_multiplier", "reciprocal", "exp", "sigma", "silu")),
    _bench("head_float_4", _SMALL, tb="head_float"),
    _bench("epilogue", _SMALL_ATTENTION),
    _bench("piece_maximum", dict(_SMALL_DECODER, lanes=4)),
    _bench("unit_float", _SMALL),
    # Words of several parts: the rows of values read a bank between those of the softmax.
    *(_bench(block, dict(_TWO_PORTS_DECODER, score_words=4096)) for block in ("score_banks", "probabilities")),
    _bench("value_rows", _SMALL_ATTENTION),
    _bench("value_layers", _SMALL_ATTENTION, tb="value_walk"),
    _bench("value_regions", _SMALL_ATTENTION, tb="value_walk", regions=True),
    _bench("chunk_sums", dict(_TWO_PORTS_DECODER, lanes=2, score_words=2048)),
    *(
        _bench("cache_path", dict(params, **_WITH_ATTENTION), tb="cache_writer")
        for params in (dict(_SMALL, ports=2, port_width=128), dict(_TILE_16, lanes=2))
    ),
    *(_bench(block, _SMALL_DECODER) for block in ("merge", "rows")),
    _bench("scales", dict(_SMALL_DECODER, lanes=4)),
    *(_bench(block, _SMALL) for block in ("pair", "completion", "progress")),
    *(_bench("descriptor_check", params) for params in (_SMALL_ATTENTION, dict(_WIDE, operators="decoder"))),
    _bench("header", _TILE_32),
    _bench("drain", _LANES_4),
    _bench("core", _SMALL_ATTENTION),
    _bench("core", _WIDE),
    _bench("core", _FIXED),
    _bench("core", _TILE_16),
    _bench("core", _TILE_16, tb="core_speed"),
    *(_bench("activation_fetch", params) for params in (_SMALL_DECODER, _TWO_PORTS, _TILE_16, _ATTENTION)),
    *(_bench(block, _SMALL_ATTENTION) for block in ("row_blocks", "row_pieces")),
    _bench("first_error", _SMALL),
    _bench("watchdog", _TWO_PORTS),
    *(_bench("selftest", params) for params in (_ULX3S, _ULX3S_8)),
    _bench("accelerator", _SMALL_DECODER, tb="decoder"),
    *(_bench("accelerator", _SMALL_ATTENTION, tb=tb) for tb in ("program", "attention")),
    _bench("accelerator", _SMALL_DECODER, tb="gap", limit=560),
    _bench("accelerator", _TWO_PORTS),
    _bench("accelerator", _TWO_PORTS, tb="accelerator_faults"),
    _bench("accelerator", _TILE_16, full=True),
    _bench("accelerator", _SMALL_DECODER, tb="program", full=True),
    _bench("accelerator", dict(_TWO_PORTS_DECODER, lanes=2, score_words=4096), tb="attention", full=True),
    *(_bench("core", params, full=True) for params in (_SMALL, _NARROW, _TILE_32)),
    _bench("core", _ATTENTION, full=True),
    *(_bench(block, _FIXED, full=True) for block in ("array", "columns", "float_out")),
    _bench("activation_unit", _TILE_32, full=True),
    *(_bench("sequencer", params, full=True) for params in (_NARROW, _WIDE)),
    _bench("scales", _SMALL_DECODER, full=True),
    *(_bench(f"head_float_{lanes}", _SMALL, tb="head_float", full=True) for lanes in (1, 8)),
    *(_bench(block, _ATTENTION, full=True) for block in ("score_banks", "value_rows", "probabilities")),
    *(_bench(block, _SMALL_ATTENTION, full=True) for block in ("score_banks", "probabilities")),
    # All transfers of a token are the same sums; one lane; many lanes and tokens.
    *(
        _bench("chunk_sums", dict(params, score_words=2048), full=True)
        for params in (dict(_SMALL_DECODER, lanes=4), _SMALL_DECODER, dict(_TILE_16, operators="decoder", lanes=4))
    ),
    *(
        _bench("cache_path", dict(params, **_WITH_ATTENTION), tb="cache_writer", full=True)
        for params in (
            _SMALL,
            _TWO_PORTS,
            _NARROW,
            dict(_TILE_32, lanes=8),
            dict(_TILE_32, weight_bits=8, ports=1, port_width=64, max_tokens=5),
            dict(_TILE_16, weight_bits=8, ports=2, port_width=64),
            dict(_TILE_16, zero_point="fixed", port_width=32, max_group_size=32),
            dict(_TILE_32, ports=2, max_k=512, max_group_size=256),
            dict(_SMALL, weight_bits=8, ports=4, port_width=32, lanes=4),
        )
    ),
    _bench("activation_fetch", _SMALL, full=True),
    *(_bench(block, _ATTENTION, full=True) for block in ("row_blocks", "row_pieces")),
    _bench("accelerator", _SMALL, full=True),
    _bench("accelerator", _SMALL, tb="accelerator_faults", full=True),
    _bench("program_fetch", _TILE_16, full=True),
    *(_bench("descriptor_check", params, full=True, long=True) for params in (_SMALL, _NARROW, _TILE_16, _DECODER)),
    *(_bench("register_bank", params, full=True) for params in (_SMALL, dict(_SMALL, **_WITH_ATTENTION))),
    _bench("first_error", dict(_SMALL, **_WITH_ATTENTION), full=True),
    *(_bench("epilogue", dict(_SMALL_DECODER, lanes=lanes), full=True) for lanes in (1, 2, 4)),
    _bench("epilogue", dict(_DECODER, lanes=8), full=True),
    *(
        _bench("epilogue", dict(params, score_words=2048), full=True)
        for params in (_SMALL_DECODER, dict(_TWO_PORTS_DECODER, lanes=2), dict(_DECODER, lanes=4))
    ),
    *(
        _bench("accelerator", params, tb=tb, full=True, long=True)
        for params in (dict(_SMALL_DECODER, lanes=4), dict(_TWO_PORTS_DECODER, lanes=8))
        for tb in ("decoder", "program")
    ),
    # Long programs with four ports need more memory than the default.
    *(_bench("accelerator", _BLOCK, tb=tb, full=True, long=True, memory=1 << 24) for tb in ("decoder", "program")),
    _bench("accelerator", dict(_TILE_32, operators="decoder", lanes=4), tb="decoder", full=True, memory=1 << 24),
    _bench("accelerator", _BLOCK, tb="gap", full=True, memory=1 << 24, hidden=896, inner=4864),
    _bench("core", _TILE_32, tb="core_speed", full=True),
    *(_bench("read_manager", params, full=True) for params in (_NARROW, _TILE_16)),
    *(
        _bench("write_manager", params, full=True)
        for params in (_SMALL, _NARROW, _TILE_16, *(dict(params, **_WITH_ATTENTION) for params in (_NARROW, _TILE_16)))
    ),
    *(_bench("gatherer", params, full=True) for params in (_NARROW, _LANES_8, _TILE_16, dict(_TILE_32, port_width=32))),
    _bench("selftest", dict(_ULX3S, lanes=4), full=True),
    *(_bench("drain", params, full=True) for params in (_LANES_8, _FIXED, _TILE_16)),
    *(_bench("core", params, tb="core_speed", full=True) for params in (dict(_TILE_16, lanes=4), _LANES_8)),
    *(_bench("operand_fetch", params, full=True) for params in (_WIDE, _NARROW, dict(_TILE_16, max_tokens=64))),
    *(_bench("operand_fetch_8", params, tb="operand_fetch", full=True, lanes=8) for params in (_NARROW, _TILE_16)),
    _bench("source_fetch_8", _TILE_16, tb="operand_fetch", full=True, lanes=8, chunks=1),
    _bench("table_fetch", _TILE_16, tb="operand_fetch", full=True, periodic=True),
    *(
        _bench("table_fetch_8", params, tb="operand_fetch", full=True, lanes=8, periodic=True)
        for params in (_NARROW, _TILE_16)
    ),
    *(_bench("core", params, full=True, long=True) for params in _SWEEP),
    *(
        _bench("accelerator", params, tb=tb, full=True, long=True)
        for params in (_SMALL, _WIDE, _NARROW, _TWO_PORTS, _TILE_16)
        for tb in ("accelerator", "accelerator_faults")
    ),
    *(
        _bench(block, params, full=True)
        for params in (_NARROW, _WIDE, _TILE_16, _TILE_32)
        for block in ("array", "columns", "float_out", "activations", "splitter", "header", "column_control")
        if (block, params) != ("header", _TILE_32)
    ),
]
