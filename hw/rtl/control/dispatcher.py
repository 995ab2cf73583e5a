# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: sends each unit the fields of a checked descriptor that it needs (its share)."""

from collections.abc import Callable
from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.walker import command_layout
from hw.rtl.control.descriptor_check import work_layout
from hw.rtl.memory.activation_fetch import fetch_layout
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.gatherer import gather_layout
from hw.rtl.memory.weight_fetch import weights_layout
from hw.spec.config import AcceleratorConfig
from hw.spec.ops.command import command_fields


def unit_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A layer, and the address of its activations."""
    return data.StructLayout({"command": command_layout(config), "address": ADDRESS_BITS})


_JOBS_AHEAD = 4
"""Number of layers whose jobs wait for the gatherer."""


@dataclass(frozen=True)
class Share:
    """The fields of a layer for one unit.

    name : name of the dispatcher's output
    layout : layout of the output's payload
    ahead : depth of the FIFO before the unit, a power of two; 0 if there is none
    wanted : function from the checked descriptor to whether the unit needs this layer
    fields : function from the checked descriptor to the payload
    last : send the share only after all of the layer's activations are requested
    """

    name: str
    layout: data.StructLayout
    ahead: int
    wanted: Callable[[data.View], Value]
    fields: Callable[[data.View], dict[str, Value]]
    last: bool = False


def shares(config: AcceleratorConfig) -> tuple[Share, ...]:
    """The share of each unit."""

    def always(work: data.View) -> Value:
        return Const(1)

    return (
        Share(
            "core", command_layout(config), 0, always, lambda work: {n: work.command[n] for n in command_fields(config)}
        ),
        Share(
            "unit", unit_layout(config), 2, always, lambda work: {"command": work.command, "address": work.activations}
        ),
        Share(
            "blocks",
            fetch_layout(config),
            0,
            lambda work: ~work.command.reuse,
            lambda work: {"address": work.activations, "beats": work.activation_beats},
        ),
        Share(
            "jobs",
            gather_layout(),
            _JOBS_AHEAD,
            always,
            lambda work: {"address": work.results, "pitch": work.result_pitch, "interrupt": work.interrupt},
        ),
        Share(
            "regions",
            weights_layout(),
            0,
            always,
            lambda work: {"address": work.weights, "stride": work.weights_stride, "beats": work.weight_beats},
            last=True,
        ),
    )


class Dispatcher(Block):
    """Sends every unit its share as soon as the unit is ready. The next descriptor follows when all shares are sent.

    The core, the activation unit and the gatherer each have some layers in advance, so fetching, computing and
    writing can each work on another layer. A layer's weights are requested only after all of its activations: memory
    answers in order, and the layer cannot start without its activations.

    Members
    -------
    work : checked descriptors
    core : the layer, for the core
    unit : the layer and its activations' address, for the activation unit
    blocks : the layer's activations, unless it reuses those of the previous layer
    asking : the last block is not completely requested
    regions : the layer's weights
    jobs : the layer's results

    Latency 0 cycles for ``core``, ``blocks`` and ``regions``, 1 for the others; throughput 1 layer in 4 cycles, in 2
    if it reuses activations.
    """

    most_in_flight = _JOBS_AHEAD
    """Maximum number of descriptors in this block whose shares are all sent; their jobs wait in the FIFO."""

    def __init__(self, config: AcceleratorConfig):
        self.config, self.shares = config, shares(config)
        outputs = {share.name: Out(stream.Signature(share.layout)) for share in self.shares}
        super().__init__({"work": In(stream.Signature(work_layout(config))), **outputs, "asking": In(1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        work, fetched, done = self.work.payload, Signal(), Signal()
        sent = {share.name: Signal(name=f"{share.name}_sent") for share in self.shares}
        taken = []
        m.d.comb += [
            self.work.ready.eq(done),
            fetched.eq((sent["blocks"] | work.command.reuse) & ~self.asking),
        ]
        for share in self.shares:
            output, wanted, flag = self._output(m, share), share.wanted(work), sent[share.name]
            m.d.comb += [
                output.valid.eq(self.work.valid & wanted & (fetched if share.last else Const(1)) & ~flag),
                *(output.payload[field].eq(value) for field, value in share.fields(work).items()),
            ]
            with m.If(output.valid & output.ready):
                m.d.sync += flag.eq(1)
            taken.append(~wanted | flag)
        m.d.comb += done.eq(self.work.valid & Cat(taken).all())
        with m.If(done):
            m.d.sync += [flag.eq(0) for flag in sent.values()]
        return m

    def _output(self, m: Module, share: Share):
        """The stream for a share: the dispatcher's output, or the input of the FIFO before it."""
        output = wiring.flipped(getattr(self, share.name))
        if not share.ahead:
            return output
        m.submodules[f"{share.name}_fifo"] = fifo = StreamFifo(share.layout, share.ahead)
        wiring.connect(m, fifo.o, output)
        return fifo.i
