# SPDX-License-Identifier: Apache-2.0
"""The accelerator: registers, datapath, and supervision of both. This is the top for a board."""

from amaranth.hdl import Cat, ClockDomain, ClockSignal, DomainRenamer, Module, ResetSignal, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.common.block import Block
from hw.rtl.common.clock_gate import SETTLING, gate
from hw.rtl.control.dispatcher import TABLE_DEPTH
from hw.rtl.control.faults import FirstError, Watchdog, fault_layout
from hw.rtl.control.performance import PerformanceCounters
from hw.rtl.control.register_bank import CONTROL_ADDRESS_BITS, RegisterBank
from hw.rtl.control.supervisor import Supervisor
from hw.rtl.datapath import Datapath
from hw.rtl.memory.axi import lite_signature, read_signature, write_signature
from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import (
    BY_NAME,
    COMPLETIONS,
    EVENTS,
    IDENTIFICATION,
    QUEUE_DEPTH,
    VERSION,
    ErrorCode,
    config_digest,
    errors_of,
)
from hw.spec.memory.access import OUTSTANDING
from hw.spec.memory.kv_cache import check_cache


class Accelerator(Block):
    """Takes descriptors over its registers and executes them; :mod:`hw.spec.control` describes both.

    Members
    -------
    ctrl : AXI4-Lite, 32 bits, the registers
    reads, write : AXI4, ``port_width`` bits, memory: the read halves of all ports hp0, hp1 ..., the write half of hp0
    irq : interrupt, level

    Throughput: that of the core, see :class:`hw.rtl.core.core.Core`, if memory is fast enough. Every output is a
    register or depends only on registers.

    Raises
    ------
    ConfigError : a config with attention, of which no hardware can have a KV cache
    """

    container = True

    def __init__(self, config: AcceleratorConfig):
        if config.has_attention:
            check_cache(config)
        self.config = config
        super().__init__(
            {
                "ctrl": In(lite_signature(CONTROL_ADDRESS_BITS)),
                "reads": Out(read_signature(config.port_width)).array(config.ports),
                "write": Out(write_signature(config.port_width)),
                "irq": Out(1),
            }
        )

    def properties(self) -> dict[str, int]:
        """See :class:`hw.rtl.common.block.Block`."""
        return {"most_in_flight": Datapath.most_in_flight, "table_depth": TABLE_DEPTH}

    def elaborate(self, platform) -> Module:
        m = Module()
        # The datapath has a reset of its own, which does not affect the registers.
        m.domains.datapath = ClockDomain()
        bank = RegisterBank(self.config)
        events = [bank.forget, bank.set_interrupt_pending]
        (m.submodules.bank,) = gate(m, platform, bank, name="bank", cycles=SETTLING, events=events)
        datapath = Datapath(self.config)
        m.submodules.datapath = DomainRenamer("datapath")(datapath)
        m.submodules.supervisor = supervisor = Supervisor(datapath.most_in_flight)
        reset = Signal(init=1)
        m.d.sync += reset.eq(supervisor.clear)
        m.d.comb += [ClockSignal("datapath").eq(ClockSignal()), ResetSignal("datapath").eq(reset)]
        for inside, outside in zip((*datapath.reads, datapath.write), (*self.reads, self.write), strict=True):
            wiring.connect(m, inside, wiring.flipped(outside))
        wiring.connect(m, wiring.flipped(self.ctrl), bank.ctrl)
        m.d.comb += [
            supervisor.reset.eq(bank.control.reset),
            supervisor.quiet.eq(datapath.quiet),
            supervisor.accepted.eq(datapath.accepted),
            supervisor.complete.eq(datapath.complete),
            datapath.halt.eq(supervisor.halt),
            datapath.descriptors.payload.eq(bank.descriptor),
            datapath.descriptors.valid.eq(bank.control.push & ~supervisor.resetting),
        ]
        error = self._find_faults(m, bank, datapath, supervisor)
        if self.config.has_programs:
            self._run_programs(m, bank, datapath, supervisor, error)
        if self.config.has_attention:
            m.d.comb += [datapath.cache_first.eq(bank.cache_first), datapath.cache_end.eq(bank.cache_end)]
        self._count(m, bank, datapath, supervisor)
        self._report(m, bank, datapath, supervisor, error)
        return m

    def _run_programs(
        self, m: Module, bank: RegisterBank, datapath: Datapath, supervisor: Supervisor, error: FirstError
    ) -> None:
        """Connects the registers for programs."""
        m.d.comb += [
            datapath.start.eq(bank.control.start & ~supervisor.resetting),
            datapath.address.eq(bank.program_address),
            datapath.length.eq(bank.program_length.descriptors),
            supervisor.fetching.eq(datapath.fetching),
            bank.status.fetching.eq(datapath.fetching),
            error.begun.eq(datapath.begun),
            error.loading.eq(datapath.loading),
            bank.failed.index.eq(error.failed),
        ]

    def _find_faults(self, m: Module, bank: RegisterBank, datapath: Datapath, supervisor: Supervisor) -> FirstError:
        """Every error, with its address if it has one."""
        codes = errors_of(self.config)
        first = FirstError(codes)
        m.submodules.first_error = DomainRenamer("datapath")(first)
        late_read, late_write = self._watch(m, bank, datapath)
        m.d.comb += [
            first.refused.eq(datapath.refused),
            *(first.faults[code].eq(datapath.faults[code]) for code in codes),
            first.faults[ErrorCode.READ_TIMEOUT].eq(late_read),
            first.faults[ErrorCode.WRITE_TIMEOUT].eq(late_write),
            supervisor.stops.eq(first.stops),
        ]
        return first

    def _watch(self, m: Module, bank: RegisterBank, datapath: Datapath) -> tuple[data.View, data.View]:
        """Read and write bursts that memory has not answered in time."""
        m.submodules.watchdog = watchdog = Watchdog(self.config.ports + 1)
        reads = [port.r.valid | (port.ar.valid & port.ar.ready) for port in self.reads]
        write = Cat(self.write.b.valid, *(c.valid & c.ready for c in (self.write.aw, self.write.w))).any()
        late_read, late_write = Signal(fault_layout()), Signal(fault_layout())
        m.d.comb += [
            watchdog.timeout.eq(bank.timeout),
            watchdog.owes.eq(Cat(port.bursts != 0 for port in (*datapath.reads_owed, datapath.write_owed))),
            watchdog.progress.eq(Cat(*reads, write)),
            late_read.raised.eq(watchdog.late[:-1].any()),
            late_write.raised.eq(watchdog.late[-1]),
            late_write.address.eq(datapath.write_owed.oldest),
        ]
        # If several ports are late, the first one is reported.
        for late, owed in reversed(list(zip(watchdog.late, datapath.reads_owed))):
            with m.If(late):
                m.d.comb += late_read.address.eq(owed.oldest)
        return late_read, late_write

    def _count(self, m: Module, bank: RegisterBank, datapath: Datapath, supervisor: Supervisor) -> None:
        m.submodules.counters = counters = PerformanceCounters()
        m.d.comb += [
            counters.clear.eq(bank.control.clear_counters),
            counters.events.eq(datapath.events),
            counters.events.busy.eq(supervisor.running),
            counters.complete.eq(datapath.complete),
            counters.restart.eq(supervisor.clear),
            counters.index.eq(bank.completion_cycles_index),
            bank.completion_cycles.eq(counters.completion),
            bank.cycles.eq(counters.cycles),
            bank.completed.eq(counters.completed),
            bank.started.eq(counters.started),
            *(bank.register(event).eq(counters.counts[event]) for event in EVENTS),
        ]

    def _report(
        self, m: Module, bank: RegisterBank, datapath: Datapath, supervisor: Supervisor, error: FirstError
    ) -> None:
        failed, had_failed = Signal(), Signal()
        m.d.sync += had_failed.eq(failed)
        m.d.comb += [
            failed.eq(error.code != ErrorCode.NONE),
            bank.identification.eq(IDENTIFICATION),
            bank.version.eq(VERSION),
            bank.config_digest.eq(config_digest(self.config)),
            bank.capabilities.queue_depth.eq(QUEUE_DEPTH),
            bank.capabilities.completions.eq(COMPLETIONS),
            bank.capabilities.ports.eq(self.config.ports),
            bank.capabilities.outstanding.eq(OUTSTANDING),
            bank.status.running.eq(supervisor.running),
            bank.status.resetting.eq(supervisor.resetting),
            bank.status.error.eq(failed),
            bank.status.queued.eq(datapath.queued),
            bank.error_code.eq(error.code),
            bank.error_address.eq(error.address),
            bank.writes_under_way.eq(datapath.write_owed.bursts),
            bank.forget.eq(supervisor.clear),
            bank.set_interrupt_pending.done.eq(datapath.complete & datapath.complete_interrupt),
            bank.set_interrupt_pending.error.eq(failed & ~had_failed),
        ]
        for field, owed in zip(BY_NAME["reads_under_way"].fields, datapath.reads_owed):
            m.d.comb += bank.reads_under_way[field.name].eq(owed.bursts)
        pending = bank.interrupt_pending.as_value() & bank.interrupt_enable.as_value()
        m.d.sync += self.irq.eq(pending.any())
