# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: gives each unit its share of a checked descriptor."""

from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.fifo import StreamFifo
from hw.rtl.common.walker import command_layout
from hw.rtl.control.descriptor_check import work_layout
from hw.rtl.memory.activation_fetch import fetch_layout
from hw.rtl.memory.axi import ADDRESS_BITS
from hw.rtl.memory.gatherer import gather_layout
from hw.rtl.memory.weight_fetch import weights_layout
from hw.spec.config import AcceleratorConfig


def unit_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A layer, and where its activations are."""
    return data.StructLayout({"command": command_layout(config), "address": ADDRESS_BITS})


class Dispatcher(wiring.Component):
    """Gives every unit its share as soon as the unit wants it. The next descriptor comes when all shares are gone.

    The core, the activation unit and the gatherer each have some layers in advance, so that fetching, computing and
    writing may each be at another layer. A layer's weights are only asked for once all of its activations are: memory
    answers in order, and the layer cannot start without its activations.

    Members
    -------
    work : checked descriptors
    core : the layer, for the core
    unit : the same and its activations' address, for the activation unit
    blocks : its activations, unless it reuses those of the layer before
    asking : the last block has not been asked for completely
    regions : its weights
    jobs : its results

    Latency 0 cycles for ``core``, ``blocks`` and ``regions``, 1 for the others; throughput 1 layer in 4 cycles, in 2
    if it reuses activations.
    """

    _LAYERS_AHEAD = {"unit": 2, "jobs": 4}

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.outputs = {
            "core": command_layout(config),
            "unit": unit_layout(config),
            "blocks": fetch_layout(config),
            "jobs": gather_layout(config),
            "regions": weights_layout(),
        }
        outputs = {name: Out(stream.Signature(layout)) for name, layout in self.outputs.items()}
        super().__init__({"work": In(stream.Signature(work_layout(config))), **outputs, "asking": In(1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        reuse = self.work.payload.command.reuse
        sent = {name: Signal(name=f"{name}_sent") for name in self.outputs}
        taken, done, fetched = [], Signal(), Signal()
        m.d.comb += [
            self.work.ready.eq(done),
            fetched.eq((sent["blocks"] | reuse) & ~self.asking),
        ]
        for name, layout in self.outputs.items():
            share = wiring.flipped(getattr(self, name))
            if name in self._LAYERS_AHEAD:
                m.submodules[f"{name}_fifo"] = fifo = StreamFifo(layout, self._LAYERS_AHEAD[name])
                wiring.connect(m, fifo.o, share)
                share = fifo.i
            wanted = ~reuse if name == "blocks" else Const(1)
            may = fetched if name == "regions" else Const(1)
            m.d.comb += [
                share.valid.eq(self.work.valid & wanted & may & ~sent[name]),
                *(share.payload[field].eq(value) for field, value in self._payload(name).items()),
            ]
            with m.If(share.valid & share.ready):
                m.d.sync += sent[name].eq(1)
            taken.append(~wanted | sent[name])
        m.d.comb += done.eq(self.work.valid & Cat(taken).all())
        with m.If(done):
            m.d.sync += [flag.eq(0) for flag in sent.values()]
        return m

    def _payload(self, name: str) -> dict[str, Value]:
        work = self.work.payload
        if name == "core":
            return {field: work.command[field] for field, _ in command_layout(self.config)}
        if name == "unit":
            return {"command": work.command, "address": work.activations}
        if name == "blocks":
            return {"address": work.activations, "beats": work.activation_beats}
        if name == "jobs":
            return {
                "tokens": work.command.tokens,
                "out_tiles": work.command.out_tiles,
                "last_columns": work.command.last_columns,
                "address": work.results,
                "pitch": work.result_pitch,
                "interrupt": work.interrupt,
            }
        return {"address": work.weights, "stride": work.weights_stride, "beats": work.weight_beats}
