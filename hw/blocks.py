# SPDX-License-Identifier: Apache-2.0
"""Every block that can be generated on its own, and what a manifest says about one."""

from collections.abc import Callable
from itertools import product

from amaranth.hdl import Shape, ShapeCastable
from amaranth.lib import data, stream, wiring

from .rtl.accelerator import Accelerator
from .rtl.activation_fetch import ActivationFetch
from .rtl.activation_unit import ActivationUnit
from .rtl.activations import ActivationBuffer
from .rtl.array import SystolicArray
from .rtl.axi import is_axi
from .rtl.block import Block
from .rtl.burst_cutter import BurstCutter
from .rtl.column import Columns
from .rtl.column_control import ColumnControl
from .rtl.core import Core
from .rtl.descriptor_check import DescriptorCheck
from .rtl.dispatcher import Dispatcher
from .rtl.drain import Drain
from .rtl.faults import Watchdog
from .rtl.fifo import StreamFifo
from .rtl.float_out import FloatOut
from .rtl.gatherer import Gatherer
from .rtl.header import HeaderReader
from .rtl.pe import ProcessingElement
from .rtl.read_manager import ReadClient, ReadManager, read_fifo_depths
from .rtl.register_bank import RegisterBank
from .rtl.sequencer import Sequencer
from .rtl.walker import TOKEN_LOOPS, CommandFork, Walker
from .rtl.weight_fetch import WeightFetch
from .rtl.weights import WeightSplitter, WordAssembler
from .rtl.write_manager import WriteManager
from .selftest import selftest
from .spec.config import AcceleratorConfig
from .spec.layout import StreamLayout
from .spec.manifest import Field, Port

BLOCKS: dict[str, Callable[[AcceleratorConfig], wiring.Component]] = {
    "accelerator": Accelerator,
    "core": Core,
    "pe": ProcessingElement,
    "array": SystolicArray,
    "columns": Columns,
    "float_out": FloatOut,
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
    "burst_cutter": lambda config: BurstCutter(config.port_width),
    "weight_fetch": lambda config: WeightFetch(config, read_fifo_depths(config)[ReadClient.WEIGHTS]),
    "dispatcher": Dispatcher,
    "gatherer": Gatherer,
    "write_manager": lambda config: WriteManager(config.port_width, clients=2),
    "register_bank": lambda config: RegisterBank(),
    "activation_fetch": ActivationFetch,
    "descriptor_check": DescriptorCheck,
    "watchdog": lambda config: Watchdog(config.ports + 1),
    "fork": lambda config: CommandFork(config, users=3),
    "selftest": selftest,
    "walker": lambda config: Walker(config, TOKEN_LOOPS),
}


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
    """The component's ports outside and inside streams, as the manifest lists them."""
    ports, streams = {}, {}
    for name, member in component.signature.members.items():
        if is_axi(member):
            # Its ports have the specification's names and need no description.
            continue
        # Elements of an array are named as hw.lower names their ports.
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
    """The figures that a component states about itself."""
    return component.properties() if isinstance(component, Block) else {}
