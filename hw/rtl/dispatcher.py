# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: gives each unit its share of a checked descriptor."""

from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.config import AcceleratorConfig
from .activation_fetch import fetch_layout
from .axi import ADDRESS_BITS
from .burst_cutter import region_layout
from .descriptor_check import work_layout
from .fifo import StreamFifo
from .gatherer import gather_layout
from .walker import command_layout


def unit_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A layer, and where its activations are."""
    return data.StructLayout({"command": command_layout(config), "address": ADDRESS_BITS})


class Dispatcher(wiring.Component):
    """Every unit has a FIFO of its own, so that fetching, computing and writing may each be at another layer.

    A layer's weights are only asked for once all of its activations are: memory answers in order, and the layer cannot
    start without its activations.

    Members
    -------
    work : checked descriptors
    core : the layer, for the core
    unit : the same and its activations' address, for the activation unit
    blocks : its activations, unless it reuses those of the layer before
    asking : the last block has not been asked for completely
    regions_<p> : port p's weights
    jobs : its results

    Latency 1 cycle, throughput 1 layer per cycle while no FIFO is full.
    """

    latency = StreamFifo.latency
    _LAYERS_AHEAD = 4

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        self.outputs = {
            "core": command_layout(config),
            "unit": unit_layout(config),
            "blocks": fetch_layout(config),
            "jobs": gather_layout(config),
            **{f"regions_{port}": region_layout() for port in range(config.ports)},
        }
        outputs = {name: Out(stream.Signature(layout)) for name, layout in self.outputs.items()}
        super().__init__({"work": In(stream.Signature(work_layout(config))), **outputs, "asking": In(1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        work = self.work.payload
        taken = []
        sent = {name: Signal(name=f"{name}_sent") for name in self.outputs}
        fetched = Signal()
        m.d.comb += fetched.eq((sent["blocks"] | work.command.reuse) & ~self.blocks.valid & ~self.asking)
        for name, layout in self.outputs.items():
            m.submodules[f"{name}_fifo"] = fifo = StreamFifo(layout, self._LAYERS_AHEAD)
            wanted = ~work.command.reuse if name == "blocks" else Const(1)
            may = fetched if name.startswith("regions") else Const(1)
            taken.append(self._share(m, fifo, sent[name], wanted, may))
            wiring.connect(m, fifo.o, wiring.flipped(getattr(self, name)))
            m.d.comb += [fifo.i.payload[field].eq(value) for field, value in self._payload(name).items()]
        m.d.comb += self.work.ready.eq(Cat(taken).all())
        return m

    def _share(self, m: Module, fifo: StreamFifo, sent: Signal, wanted: Value, may: Value) -> Value:
        """One unit takes its share of a layer once, whenever it can; returns whether it has or does now."""
        m.d.comb += fifo.i.valid.eq(self.work.valid & wanted & may & ~sent)
        with m.If(self.work.valid & self.work.ready):
            m.d.sync += sent.eq(0)
        with m.Elif(fifo.i.valid & fifo.i.ready):
            m.d.sync += sent.eq(1)
        return ~wanted | sent | (may & fifo.i.ready)

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
        port = int(name.rsplit("_", 1)[1])
        return {"address": work.weights + work.weights_stride * port, "beats": work.weight_beats}
