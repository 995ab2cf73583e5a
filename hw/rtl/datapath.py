# SPDX-License-Identifier: Apache-2.0
"""The datapath: everything between the descriptor queue and the memory ports."""

from amaranth.hdl import Cat, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.fifo import StreamFifo
from hw.rtl.control.descriptor_check import ERROR_BITS, DescriptorCheck, descriptor_layout
from hw.rtl.control.dispatcher import Dispatcher
from hw.rtl.core.activation_unit import ActivationUnit
from hw.rtl.core.core import Core
from hw.rtl.memory.activation_fetch import ActivationFetch
from hw.rtl.memory.axi import ADDRESS_BITS, memory_signature
from hw.rtl.memory.burst_cutter import max_burst_beats
from hw.rtl.memory.gatherer import Gatherer
from hw.rtl.memory.read_manager import ReadManager, read_clients
from hw.rtl.memory.weight_fetch import WeightFetch
from hw.rtl.memory.write_manager import WriteManager
from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import QUEUE_DEPTH
from hw.spec.memory.access import OUTSTANDING, WEIGHT_BURSTS_AHEAD


class Datapath(wiring.Component):
    """Executes descriptors: reads activations and weights, computes, writes results.

    Members
    -------
    descriptors : what to do
    hp<p> : memory ports; all read, and the first one also writes
    halt : move nothing more but what the bus is owed
    quiet : the bus is owed nothing
    queued : descriptors not yet looked at
    complete : a descriptor's results are in memory; one cycle
    complete_interrupt : with it: the descriptor asked for an interrupt
    refused : error code of the descriptor that ended the work, or 0
    non_finite, out_of_range : the activations at ``activations_address`` ended the work
    read_error, write_error, read_address, write_address : a bus error, one cycle, and its burst
    underrun : see :class:`hw.rtl.core.core.Core`
    beat : a beat of weights entered the core
    starved_weights, starved_activations, starved_output : nothing moved in the core, and why
    reads_under_way_<p>, writes_under_way : bursts not yet answered
    oldest_<p>, oldest_write : the address of the oldest of them
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        count = Out(range(OUTSTANDING + 1))
        flags = (
            *("quiet", "complete", "complete_interrupt", "non_finite", "out_of_range", "read_error", "write_error"),
            *("underrun", "beat", "starved_weights", "starved_activations", "starved_output"),
        )
        ports = {}
        for port in range(config.ports):
            ports |= {
                f"hp{port}": Out(memory_signature(config.port_width, port)),
                f"reads_under_way_{port}": count,
                f"oldest_{port}": Out(ADDRESS_BITS),
            }
        super().__init__(
            {
                "descriptors": In(stream.Signature(descriptor_layout())),
                **ports,
                "halt": In(1),
                **dict.fromkeys(flags, Out(1)),
                "queued": Out(range(QUEUE_DEPTH + 1)),
                "refused": Out(ERROR_BITS),
                "activations_address": Out(ADDRESS_BITS),
                "read_address": Out(ADDRESS_BITS),
                "write_address": Out(ADDRESS_BITS),
                "writes_under_way": count,
                "oldest_write": Out(ADDRESS_BITS),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        m.submodules.queue = queue = StreamFifo(descriptor_layout(), QUEUE_DEPTH)
        m.submodules.check = check = DescriptorCheck(config)
        m.submodules.dispatcher = dispatcher = Dispatcher(config)
        m.submodules.unit = unit = ActivationUnit(config)
        m.submodules.core = core = Core(config)
        wiring.connect(m, wiring.flipped(self.descriptors), queue.i)
        wiring.connect(m, queue.o, check.descriptors)
        wiring.connect(m, check.work, dispatcher.work)
        wiring.connect(m, dispatcher.core, core.command)
        wiring.connect(m, unit.slices, core.activations)
        layer = dispatcher.unit
        m.d.comb += [
            unit.command.payload.eq(layer.payload.command),
            unit.command.valid.eq(layer.valid),
            layer.ready.eq(unit.command.ready),
        ]
        # Where the layer in the unit comes from, for the error register.
        with m.If(layer.valid & layer.ready & ~layer.payload.command.reuse):
            m.d.sync += self.activations_address.eq(layer.payload.address)
        m.d.comb += [
            self.queued.eq(queue.level),
            self.refused.eq(check.error),
            self.non_finite.eq(unit.non_finite),
            self.out_of_range.eq(unit.out_of_range),
            self.underrun.eq(core.underrun),
        ]
        readers = self._read(m, dispatcher, unit, core)
        writer = self._write(m, dispatcher, core)
        offered = [reader.under_way != 0 for reader in readers]
        m.d.comb += self.quiet.eq(~Cat(*offered, writer.under_way != 0).any())
        self._watch(m, core)
        return m

    def _read(self, m: Module, dispatcher: Dispatcher, unit: ActivationUnit, core: Core) -> list[ReadManager]:
        """Activations in turn from all ports, weights from all ports in step."""
        config, clients = self.config, read_clients(self.config)
        m.submodules.activation_fetch = activations = ActivationFetch(config)
        ahead = WEIGHT_BURSTS_AHEAD * max_burst_beats(config.port_width)
        m.submodules.weight_fetch = weights = WeightFetch(config, ahead)
        wiring.connect(m, dispatcher.blocks, activations.blocks)
        wiring.connect(m, dispatcher.regions, weights.regions)
        wiring.connect(m, activations.rows, unit.rows)
        wiring.connect(m, weights.beats, core.weights)
        m.d.comb += [
            dispatcher.asking.eq(activations.asking),
            # After a fault nothing enters the core: what memory gave may be wrong.
            weights.halt.eq(self.halt),
        ]
        readers = []
        for port in range(config.ports):
            m.submodules[f"reader_{port}"] = reader = ReadManager(config.port_width, clients, OUTSTANDING)
            outside = getattr(self, f"hp{port}")
            wiring.connect(m, reader.axi.ar, wiring.flipped(outside.ar))
            wiring.connect(m, wiring.flipped(outside.r), reader.axi.r)
            for client, fetch in (("activations", activations), ("weights", weights)):
                wiring.connect(m, getattr(fetch, f"bursts_{port}"), getattr(reader, f"{client}_bursts"))
                wiring.connect(m, getattr(reader, f"{client}_beats"), getattr(fetch, f"beats_{port}"))
            m.d.comb += [
                reader.halt.eq(self.halt),
                getattr(self, f"reads_under_way_{port}").eq(reader.under_way),
                getattr(self, f"oldest_{port}").eq(reader.oldest),
            ]
            with m.If(reader.error):
                m.d.comb += [self.read_error.eq(1), self.read_address.eq(reader.error_address)]
            readers.append(reader)
        return readers

    def _write(self, m: Module, dispatcher: Dispatcher, core: Core) -> WriteManager:
        config = self.config
        m.submodules.gatherer = gatherer = Gatherer(config)
        m.submodules.writer = writer = WriteManager(config.port_width, OUTSTANDING)
        wiring.connect(m, dispatcher.jobs, gatherer.job)
        wiring.connect(m, core.results, gatherer.results)
        wiring.connect(m, gatherer.pieces, writer.pieces)
        wiring.connect(m, gatherer.beats, writer.beats)
        for channel in ("aw", "w"):
            wiring.connect(m, getattr(writer.axi, channel), wiring.flipped(getattr(self.hp0, channel)))
        wiring.connect(m, wiring.flipped(self.hp0.b), writer.axi.b)
        m.d.comb += [
            writer.halt.eq(self.halt),
            self.complete.eq(writer.complete & ~self.halt),
            self.complete_interrupt.eq(writer.complete_interrupt),
            self.write_error.eq(writer.error),
            self.write_address.eq(writer.error_address),
            self.writes_under_way.eq(writer.under_way),
            self.oldest_write.eq(writer.oldest),
        ]
        return writer

    def _watch(self, m: Module, core: Core) -> None:
        """What the counters count, a cycle late. One cause a cycle: the one that is farthest down the stream."""
        moves = core.weights.valid & core.weights.ready
        waits = ~moves & ~core.works
        wants_beat = core.weights.ready & ~core.weights.valid
        m.d.sync += [
            self.beat.eq(moves),
            self.starved_output.eq(waits & core.waits_output),
            self.starved_activations.eq(waits & core.waits_activations & ~core.waits_output),
            self.starved_weights.eq(waits & wants_beat & ~core.waits_activations & ~core.waits_output),
        ]
