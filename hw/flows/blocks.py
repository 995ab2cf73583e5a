# SPDX-License-Identifier: Apache-2.0
"""Every block that can be generated alone, and the manifest's description of a block."""

from collections.abc import Callable
from itertools import product

from amaranth.hdl import Shape, ShapeCastable
from amaranth.lib import data, stream, wiring

from hw.flows.selftest import selftest
from hw.rtl.accelerator import Accelerator
from hw.rtl.arithmetic.exp import Exp
from hw.rtl.arithmetic.float_adder import FloatAdder
from hw.rtl.arithmetic.float_multiplier import FloatMultiplier
from hw.rtl.arithmetic.reciprocal import Reciprocal
from hw.rtl.arithmetic.sigma import Sigma
from hw.rtl.arithmetic.silu import Silu
from hw.rtl.attention.cache_path import CachePath
from hw.rtl.attention.cache_writer import CacheWriter
from hw.rtl.attention.chunk_sums import ChunkSums
from hw.rtl.attention.head_float import HeadFloat
from hw.rtl.attention.probabilities import Probabilities
from hw.rtl.attention.score_banks import ScoreBanks
from hw.rtl.attention.unit_float import UnitFloat
from hw.rtl.attention.value_rows import ValueRows
from hw.rtl.attention.value_walk import ValueLayers, ValueRegions
from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.walker import TOKEN_LOOPS, CommandFork, Walker
from hw.rtl.control.descriptor_check import DescriptorCheck
from hw.rtl.control.dispatcher import Dispatcher
from hw.rtl.control.faults import FirstError, Watchdog
from hw.rtl.control.program_fetch import ProgramFetch
from hw.rtl.control.register_bank import RegisterBank
from hw.rtl.core.activation_buffer import ActivationBuffer
from hw.rtl.core.activation_unit import ActivationUnit
from hw.rtl.core.array import SystolicArray
from hw.rtl.core.column import Columns
from hw.rtl.core.column_control import ColumnControl
from hw.rtl.core.core import Core
from hw.rtl.core.drain import Drain
from hw.rtl.core.float_out import FloatOut
from hw.rtl.core.header import HeaderReader
from hw.rtl.core.pe import ProcessingElement
from hw.rtl.core.sequencer import Sequencer
from hw.rtl.core.weights import WeightSplitter, WordAssembler
from hw.rtl.memory.activation_fetch import ActivationFetch
from hw.rtl.memory.axi import is_axi
from hw.rtl.memory.burst_cutter import BurstCutter
from hw.rtl.memory.burst_splitter import BurstSplitter
from hw.rtl.memory.completion import Completion
from hw.rtl.memory.gatherer import Gatherer
from hw.rtl.memory.operand_fetch import OperandFetch
from hw.rtl.memory.progress import Progress
from hw.rtl.memory.read_manager import ReadManager, read_fifo_depths
from hw.rtl.memory.row_blocks import RowBlocks
from hw.rtl.memory.row_pieces import RowPieces
from hw.rtl.memory.weight_fetch import WeightFetch
from hw.rtl.memory.write_manager import WriteClient, WriteManager, write_clients
from hw.rtl.vector.epilogue import Epilogue
from hw.rtl.vector.merge import MergePairs
from hw.rtl.vector.pair import PairUnit
from hw.rtl.vector.partial_sums import PartialSums
from hw.rtl.vector.piece_maximum import PieceMaximum
from hw.rtl.vector.rows import RowWalker
from hw.rtl.vector.scales import TokenScales
from hw.rtl.vector.take import TakeTransfers
from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.control.registers import errors_of
from hw.spec.manifest import Field, Port
from hw.spec.memory.access import EARLY_BURST_BEATS
from hw.spec.memory.geometry import StreamLayout

VECTOR_LANES = (1, 2, 4, 8)
"""Numbers per cycle of the vector unit's blocks that take several: a part of the names of these blocks."""

BLOCKS: dict[str, Callable[[AcceleratorConfig], wiring.Component]] = {
    "accelerator": Accelerator,
    "core": Core,
    "pe": ProcessingElement,
    "array": SystolicArray,
    "columns": Columns,
    "float_out": FloatOut,
    "float_adder": lambda config: FloatAdder(),
    "float_multiplier": lambda config: FloatMultiplier(),
    "epilogue": Epilogue,
    "pair": lambda config: PairUnit(),
    "piece_maximum": PieceMaximum,
    "merge": MergePairs,
    "rows": lambda config: RowWalker(config, config.vector_lanes),
    "take": lambda config: TakeTransfers(config, PartialSums.interval_of(config)),
    "partial_sums": PartialSums,
    "scales": TokenScales,
    "completion": lambda config: Completion(clients=2, depth=16),
    "progress": lambda config: Progress(clients=2),
    "reciprocal": lambda config: Reciprocal(),
    "exp": lambda config: Exp(),
    "sigma": lambda config: Sigma(),
    "silu": lambda config: Silu(),
    **{f"head_float_{lanes}": lambda config, lanes=lanes: HeadFloat(lanes) for lanes in VECTOR_LANES},
    "unit_float": lambda config: UnitFloat(),
    "cache_writer": CacheWriter,
    "cache_path": CachePath,
    "score_banks": ScoreBanks,
    "value_rows": ValueRows,
    "value_layers": ValueLayers,
    "value_regions": ValueRegions,
    "probabilities": Probabilities,
    "chunk_sums": ChunkSums,
    "activations": ActivationBuffer,
    "activation_unit": ActivationUnit,
    "splitter": WeightSplitter,
    "assembler": WordAssembler,
    "header": HeaderReader,
    "sequencer": lambda config: Sequencer(config, StreamLayout(config).word_fifo_depth),
    "column_control": ColumnControl,
    "drain": lambda config: Drain(config, chain_latency=config.tile),
    "fifo": lambda config: StreamFifo(StreamLayout(config).word_bits, StreamLayout(config).word_fifo_depth),
    "read_manager": lambda config: ReadManager(config.port_width, read_fifo_depths(config)),
    "patient_reader": lambda config: ReadManager(config.port_width, [0, 0, read_fifo_depths(config)[-1]], patient=[1]),
    "burst_cutter": lambda config: BurstCutter(config.port_width),
    "burst_splitter": lambda config: BurstSplitter(config.port_width, EARLY_BURST_BEATS),
    "weight_fetch": lambda config: WeightFetch(config, read_fifo_depths(config)[-1]),
    "dispatcher": Dispatcher,
    "gatherer": Gatherer,
    "write_manager": lambda config: WriteManager(config.port_width, max(WriteClient.CACHE, write_clients(config))),
    "operand_fetch": lambda config: OperandFetch(config.port_width, config.max_tokens, lanes=2),
    "operand_fetch_8": lambda config: OperandFetch(config.port_width, config.max_tokens, lanes=8),
    "source_fetch_8": lambda config: OperandFetch(config.port_width, config.max_tokens, lanes=8, chunks=1),
    "table_fetch": lambda config: OperandFetch(config.port_width, config.max_tokens, lanes=2, chunks=1, periodic=True),
    "table_fetch_8": lambda config: OperandFetch(
        config.port_width, config.max_tokens, lanes=8, chunks=1, periodic=True
    ),
    "program_fetch": lambda config: ProgramFetch(config.port_width),
    "register_bank": RegisterBank,
    "activation_fetch": ActivationFetch,
    "row_blocks": RowBlocks,
    "row_pieces": RowPieces,
    "descriptor_check": DescriptorCheck,
    "first_error": lambda config: FirstError(errors_of(config)),
    "watchdog": lambda config: Watchdog(config.ports + 1),
    "fork": lambda config: CommandFork(config, users=3),
    "selftest": selftest,
    "walker": lambda config: Walker(config, TOKEN_LOOPS),
}


def check_block(block: str) -> None:
    """Raises ConfigError if there is no such block."""
    if block not in BLOCKS:
        raise ConfigError(f"block is one of {', '.join(BLOCKS)}, not {block!r}")


def _fields(shape) -> dict[str, Field]:
    if not isinstance(shape, data.StructLayout):
        return {}
    fields = {}
    for name, part in shape:
        inner, elements = part.shape, 1
        if isinstance(inner, data.ArrayLayout):
            inner, elements = inner.elem_shape, inner.length
        fields[str(name)] = Field(part.offset, part.width, Shape.cast(inner).signed, elements)
    return fields


def _port(direction: wiring.Flow, shape) -> Port:
    raw = Shape.cast(shape)
    if isinstance(shape, data.ArrayLayout):
        elem = Shape.cast(shape.elem_shape)
        fields = {"element": Field(0, raw.width, elem.signed, shape.length)}
    elif isinstance(shape, ShapeCastable):
        fields = _fields(shape)
    else:
        fields = {"value": Field(0, raw.width, raw.signed)}
    return Port("in" if direction == wiring.In else "out", raw.width, fields)


def describe_ports(component: wiring.Component) -> tuple[dict[str, Port], dict[str, Port]]:
    """The component's ports that are not streams, and its streams, in the form of the manifest."""
    ports, streams = {}, {}
    for name, member in component.signature.members.items():
        if is_axi(member):
            # AXI ports have the specification's names and need no description.
            continue
        # Elements of an array have the same names as in hw.flows.lower.
        indices = product(*map(range, member.dimensions))
        names = ["_".join([name, *map(str, index)]) for index in indices]
        if member.is_signature:
            if not isinstance(member.signature, stream.Signature):
                raise TypeError(f"port {name} is neither a signal nor a stream")
            streams |= dict.fromkeys(names, _port(member.flow, member.signature.members["payload"].shape))
        else:
            ports |= dict.fromkeys(names, _port(member.flow, member.shape))
    return ports, streams


def describe_properties(component: wiring.Component) -> dict[str, int]:
    """The component's latencies and sizes."""
    return component.properties() if isinstance(component, Block) else {}
