# SPDX-License-Identifier: Apache-2.0
"""The datapath: everything between the descriptor queue and the memory ports."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.attention.cache.places import PAGE_BITS
from hw.rtl.attention.probabilities import Probabilities
from hw.rtl.attention.value_walk import ValueLayers, ValueRegions
from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import SETTLING, gate
from hw.rtl.control.descriptor_check import DESCRIPTOR_BITS, ERROR_BITS, DescriptorCheck
from hw.rtl.control.descriptor_queue import DescriptorQueue
from hw.rtl.control.dispatcher import Dispatcher
from hw.rtl.control.faults import fault_layout
from hw.rtl.control.performance import event_layout
from hw.rtl.core.activation_unit import ActivationUnit
from hw.rtl.core.core import Core
from hw.rtl.memory.activation_fetch import ActivationFetch
from hw.rtl.memory.axi import ADDRESS_BITS, owed_layout, read_signature, write_signature
from hw.rtl.memory.gatherer import Gatherer
from hw.rtl.memory.read_manager import (
    ReadManager,
    operands_of,
    patient_clients,
    read_fifo_depths,
    weights_ahead,
)
from hw.rtl.memory.row_pieces import RowPieces
from hw.rtl.memory.weight_fetch import WeightFetch
from hw.rtl.memory.write_manager import WriteClient, WriteManager
from hw.rtl.result_path import ResultPath
from hw.rtl.vector.layouts import Operand
from hw.spec.config import AcceleratorConfig
from hw.spec.control.program import LENGTH_BITS
from hw.spec.control.registers import QUEUE_DEPTH, ErrorCode, errors_of
from hw.spec.memory.access import EARLY_BURSTS, OUTSTANDING


class Datapath(Block):
    """Executes descriptors: reads activations and weights, computes, writes results.

    Members
    -------
    descriptors : descriptors to execute, from the window
    accepted : a descriptor enters the queue
    reads : the read halves of the memory ports
    write : the write half of the first memory port
    halt : move no data, except to finish bus transfers under way
    quiet : no bus transfer is under way
    queued : number of descriptors in the queue
    complete : a descriptor's results are in memory; one cycle
    complete_interrupt : valid with ``complete``: the descriptor requested an interrupt
    refused : error code of the descriptor that stopped the datapath, or 0
    faults : indexed by :class:`hw.spec.control.registers.ErrorCode`: bus errors, for one cycle with their bursts'
        addresses; activations that stopped the datapath, with their address; an underrun
        (:class:`hw.rtl.core.core.Core`)
    events : events for the counters, without ``busy``: a beat of weights entered the core, or nothing moved, with the
        cause
    reads_owed, write_owed : bursts under way of each read port and of the write port

    and in hardware that runs programs

    start, address, length : fetch and execute a program
    fetching : not all of its descriptors are in the queue
    begun, loading : index of the last descriptor that has left the queue, and of the layer in the activation unit; see
        :class:`hw.rtl.control.descriptor_queue.DescriptorQueue`

    and with attention

    cache_first, cache_end : the addresses to which appends may write, see
        :class:`hw.rtl.attention.cache_writer.CacheWriter`
    """

    container = True
    most_in_flight = QUEUE_DEPTH + sum(
        stage.most_in_flight for stage in (DescriptorCheck, Dispatcher, Gatherer, WriteManager)
    )
    """Maximum number of descriptors in the queue and in the stages after it, up to their last acknowledgement."""

    def __init__(self, config: AcceleratorConfig):
        self.config, self.path = config, ResultPath(config)
        attention = {}
        if config.has_attention:
            self.probabilities = Probabilities(config)
            attention = dict.fromkeys(("cache_first", "cache_end"), In(PAGE_BITS))
        programs = {}
        if config.has_programs:
            programs = {
                "start": In(1),
                "address": In(64),
                "length": In(LENGTH_BITS),
                "fetching": Out(1),
                "begun": Out(LENGTH_BITS),
                "loading": Out(LENGTH_BITS),
            }
        super().__init__(
            {
                "descriptors": In(stream.Signature(DESCRIPTOR_BITS)),
                "accepted": Out(1),
                "reads": Out(read_signature(config.port_width)).array(config.ports),
                "write": Out(write_signature(config.port_width)),
                "halt": In(1),
                "quiet": Out(1),
                "queued": Out(range(QUEUE_DEPTH + 1)),
                "complete": Out(1),
                "complete_interrupt": Out(1),
                "refused": Out(ERROR_BITS),
                "faults": Out(fault_layout()).array(len(errors_of(config))),
                "events": Out(event_layout()),
                "reads_owed": Out(owed_layout(OUTSTANDING)).array(config.ports),
                "write_owed": Out(owed_layout(OUTSTANDING)),
                **programs,
                **attention,
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        queue = DescriptorQueue(config)
        starts, halt = ([queue.start], [queue.halt]) if config.has_programs else ([], [])
        (m.submodules.queue,) = gate(m, platform, queue, name="queue", cycles=SETTLING, events=starts, watch=halt)
        check, dispatcher, unit = DescriptorCheck(config), Dispatcher(config), ActivationUnit(config)
        # Together, because the dispatcher's table takes a descriptor in the cycle before the check's ``valid``.
        m.submodules.check, m.submodules.dispatcher = gate(
            m,
            platform,
            check,
            dispatcher,
            name="dispatcher",
            cycles=SETTLING + check.latency,
            events=[dispatcher.complete],
            watch=[dispatcher.asking, *([dispatcher.whole] if config.has_vector_unit else [])],
        )
        (m.submodules.unit,) = gate(m, platform, unit, name="unit", cycles=SETTLING + unit.latency)
        m.submodules.core = core = Core(config)
        wiring.connect(m, wiring.flipped(self.descriptors), queue.window)
        wiring.connect(m, queue.descriptors, check.descriptors)
        wiring.connect(m, check.work, dispatcher.work)
        if config.has_attention:
            activations_address = self._layers(m, dispatcher, unit, core)
        else:
            activations_address = self._layer(m, dispatcher, unit, core)
        owed = (*self.reads_owed, self.write_owed)
        m.d.comb += [
            self.accepted.eq(queue.accepted),
            self.queued.eq(queue.level),
            self.refused.eq(check.error),
            self.faults[ErrorCode.NON_FINITE].raised.eq(
                unit.non_finite | self.path.non_finite if config.has_attention else unit.non_finite
            ),
            self.faults[ErrorCode.EXPONENT].raised.eq(unit.out_of_range),
            self.faults[ErrorCode.UNDERRUN].raised.eq(core.underrun),
            *(self.faults[code].address.eq(activations_address) for code in (ErrorCode.NON_FINITE, ErrorCode.EXPONENT)),
            self.quiet.eq(~Cat(port.bursts != 0 for port in owed).any()),
        ]
        if config.has_programs:
            self._programs(m, queue, check)
        self._read(m, queue, dispatcher, unit, core, platform)
        self._write(m, dispatcher, core)
        if config.has_attention:
            self._attend(m, dispatcher, unit)
        self._watch(m, core)
        return m

    def _layer(self, m: Module, dispatcher: Dispatcher, unit: ActivationUnit, core: Core) -> Signal:
        """Gives unit and core their layers. Returns the address of the unit's activations, for the error register."""
        wiring.connect(m, dispatcher.core, core.command)
        wiring.connect(m, unit.slices, core.activations)
        layer, address = dispatcher.unit, Signal(ADDRESS_BITS, name="activations_address")
        m.d.comb += [
            unit.command.payload.eq(layer.payload.command),
            unit.command.valid.eq(layer.valid),
            layer.ready.eq(unit.command.ready),
        ]
        with m.If(layer.valid & layer.ready & ~layer.payload.command.reuse):
            m.d.sync += address.eq(layer.payload.address)
            if self.config.has_programs:
                m.d.sync += self.loading.eq(layer.payload.index)
        return address

    def _layers(self, m: Module, dispatcher: Dispatcher, unit: ActivationUnit, core: Core) -> Signal:
        """The same with attention: values are a layer for each chunk of each column tile, for unit and core.

        An error may be of the layer before the one that the unit has taken last.
        """
        m.submodules.core_layers = core_layers = ValueLayers(self.config)
        m.submodules.unit_layers = unit_layers = ValueLayers(self.config, unit=True)
        wiring.connect(m, dispatcher.core, core_layers.layers)
        wiring.connect(m, core_layers.commands, core.command)
        wiring.connect(m, unit_layers.commands, unit.command)
        wiring.connect(m, unit.slices, core.activations)
        layer, given = dispatcher.unit, unit_layers.layers
        m.d.comb += [
            *(given.payload[name].eq(layer.payload[name]) for name, _ in given.payload.shape()),
            given.valid.eq(layer.valid),
            layer.ready.eq(given.ready),
        ]
        taken = Cat(layer.payload.address, layer.payload.index)
        last, before = Signal(len(taken), name="last_taken"), Signal(len(taken), name="taken_before")
        commands, address = unit_layers.commands, Signal(ADDRESS_BITS, name="activations_address")
        with m.If(commands.valid & commands.ready & ~commands.payload.reuse):
            m.d.sync += [last.eq(taken), before.eq(last)]
        failed = Cat(self.path.failed_rows, self.path.failed_index)
        m.d.comb += Cat(address, self.loading).eq(
            Mux(self.path.non_finite & ~unit.non_finite, failed, Mux(unit.earlier, before, last))
        )
        return address

    def _programs(self, m: Module, queue: DescriptorQueue, check: DescriptorCheck) -> None:
        m.d.comb += [
            queue.start.eq(self.start),
            queue.address.eq(self.address),
            queue.length.eq(self.length),
            queue.halt.eq(self.halt),
            self.fetching.eq(queue.fetching),
            self.begun.eq(queue.begun),
            check.index.eq(queue.begun),
            self.faults[ErrorCode.PROGRAM].raised.eq(queue.refused),
        ]

    def _read(
        self, m: Module, queue: DescriptorQueue, dispatcher: Dispatcher, unit: ActivationUnit, core: Core, platform
    ) -> None:
        """Connects the fetch units: activations come from all ports in turn, weights from all ports in step."""
        config = self.config
        activations = ActivationFetch(config)
        (m.submodules.activation_fetch,) = gate(
            m,
            platform,
            activations,
            name="activation_fetch",
            cycles=SETTLING,
            watch=[activations.follow, activations.pieces] if config.has_vector_unit else [],
        )
        m.submodules.weight_fetch = weights = WeightFetch(config, weights_ahead(config.port_width))
        # The weights that are fetched are of a layer that waits; many bursts are under way on some port.
        early, many = Signal(), Signal()
        m.d.comb += early.eq(dispatcher.waiting & dispatcher.early)
        m.d.sync += many.eq(Cat(port.bursts >= EARLY_BURSTS for port in self.reads_owed).any())
        asking = activations.asking
        if config.has_attention:
            asking |= self._read_attention(m, dispatcher, activations, weights)
        else:
            wiring.connect(m, dispatcher.blocks, activations.blocks)
            wiring.connect(m, dispatcher.regions, weights.regions)
        wiring.connect(m, activations.rows, unit.rows)
        wiring.connect(m, weights.beats, core.weights)
        m.d.comb += [
            dispatcher.asking.eq(asking),
            # After a fault no data enters the core, because data from memory may be wrong.
            weights.halt.eq(self.halt),
            weights.split.eq(early),
            weights.hold.eq(early & many),
        ]
        if config.has_vector_unit:
            m.d.comb += activations.pieces.eq(Array(self.path.pieces)[dispatcher.followed])
            if not config.has_attention:
                m.d.comb += activations.follow.eq(dispatcher.follow)
        fault = self.faults[ErrorCode.READ_BUS]
        for port in range(config.ports):
            clients = [(fetch.bursts[port], fetch.port_beats[port]) for fetch in (activations, weights)]
            operands = operands_of(config, port)
            clients[1:1] = [(self.path.bursts[operand], self.path.beats[operand]) for operand in operands]
            if config.has_programs and port == 0:
                clients.insert(-1, (queue.bursts, queue.beats))
            depths = read_fifo_depths(config, port)
            patient = patient_clients(config, port)
            m.submodules[f"reader_{port}"] = reader = ReadManager(config.port_width, depths, OUTSTANDING, patient)
            wiring.connect(m, reader.axi, wiring.flipped(self.reads[port]))
            for client, (bursts, beats) in enumerate(clients):
                wiring.connect(m, bursts, reader.bursts[client])
                wiring.connect(m, reader.beats[client], beats)
            m.d.comb += [
                reader.halt.eq(self.halt),
                self.reads_owed[port].bursts.eq(reader.under_way),
                self.reads_owed[port].oldest.eq(reader.oldest),
            ]
            with m.If(reader.error):
                m.d.comb += [fault.raised.eq(1), fault.address.eq(reader.error_address)]

    def _read_attention(
        self, m: Module, dispatcher: Dispatcher, activations: ActivationFetch, weights: WeightFetch
    ) -> Value:
        """Rows and weights that are apart in memory, and the exponents of values. Returns whether rows are left."""
        m.submodules.row_pieces = rows = RowPieces(self.config)
        m.submodules.value_regions = regions = ValueRegions(self.config)
        wiring.connect(m, dispatcher.blocks, rows.jobs)
        wiring.connect(m, rows.blocks, activations.blocks)
        wiring.connect(m, dispatcher.regions, regions.tiles)
        wiring.connect(m, regions.regions, weights.regions)
        wiring.connect(m, activations.exponents, self.probabilities.exponents)
        m.d.comb += [
            rows.follow.eq(dispatcher.follow),
            rows.pieces.eq(Array(self.path.pieces)[dispatcher.followed]),
            activations.follow.eq(rows.follow_row),
        ]
        if self.config.reads_by_pieces:
            m.d.comb += rows.tail.eq(dispatcher.follow_tail)
        return rows.asking

    def _attend(self, m: Module, dispatcher: Dispatcher, unit: ActivationUnit) -> None:
        """Connects attention: scores on chip, their softmax, and appends to the cache."""
        path, probabilities = self.path, self.probabilities
        m.submodules.probabilities = probabilities
        wiring.connect(m, dispatcher.sums, path.sums)
        wiring.connect(m, dispatcher.append_job, path.append_job)
        wiring.connect(m, dispatcher.scores_job, probabilities.scores_job)
        wiring.connect(m, dispatcher.values_job, probabilities.values_job)
        wiring.connect(m, path.scores, probabilities.scores)
        wiring.connect(m, probabilities.rows, unit.values)
        m.d.comb += [
            path.stored.eq(probabilities.stored),
            probabilities.row.eq(path.row),
            path.inverse.eq(probabilities.inverse),
            path.inverted.eq(probabilities.inverted),
            probabilities.release.eq(path.release),
            path.cache_first.eq(self.cache_first),
            path.cache_end.eq(self.cache_end),
            self.faults[ErrorCode.CACHE].raised.eq(path.outside),
            self.faults[ErrorCode.CACHE].address.eq(path.outside_address),
        ]

    def _write(self, m: Module, dispatcher: Dispatcher, core: Core) -> None:
        path, fault = self.path, self.faults[ErrorCode.WRITE_BUS]
        m.submodules.path = path
        wiring.connect(m, core.results, path.results)
        wiring.connect(m, dispatcher.results_job, path.jobs[WriteClient.RESULTS])
        if self.config.has_vector_unit:
            wiring.connect(m, dispatcher.second_job, path.jobs[WriteClient.SECOND])
            wiring.connect(m, dispatcher.epilogue, path.epilogue)
            wiring.connect(m, dispatcher.expected, path.expected)
            m.d.comb += dispatcher.whole.eq(path.whole)
            for operand in Operand:
                wiring.connect(m, getattr(dispatcher, operand.name.lower()), path.operands[operand])
        wiring.connect(m, path.axi, wiring.flipped(self.write))
        m.d.comb += [
            path.halt.eq(self.halt),
            self.complete.eq(path.complete & ~self.halt),
            dispatcher.complete.eq(self.complete),
            self.complete_interrupt.eq(path.complete_interrupt),
            fault.raised.eq(path.error),
            fault.address.eq(path.error_address),
            self.write_owed.eq(path.owed),
        ]

    def _watch(self, m: Module, core: Core) -> None:
        """Events for the counters, one cycle late. Each cycle has at most one cause: the one nearest to the results."""
        moves = core.weights.valid & core.weights.ready
        waits = ~moves & ~core.works
        wants_beat = core.weights.ready & ~core.weights.valid
        m.d.sync += [
            self.events.beats.eq(moves),
            self.events.starved_output.eq(waits & core.waits_output),
            self.events.starved_activations.eq(waits & core.waits_activations & ~core.waits_output),
            self.events.starved_weights.eq(waits & wants_beat & ~core.waits_activations & ~core.waits_output),
        ]
