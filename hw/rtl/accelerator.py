# SPDX-License-Identifier: Apache-2.0
"""The accelerator: registers, datapath, and what keeps the two in order. This is what a board gets."""

from amaranth.hdl import Cat, ClockDomain, ClockSignal, Const, DomainRenamer, Module, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.rtl.control.faults import FirstError, Watchdog
from hw.rtl.control.performance import COUNTED, PerformanceCounters
from hw.rtl.control.register_bank import CONTROL_ADDRESS_BITS, RegisterBank
from hw.rtl.control.supervisor import Supervisor
from hw.rtl.datapath import Datapath
from hw.rtl.memory.axi import lite_signature, memory_signature
from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import COMPLETIONS, IDENTIFICATION, QUEUE_DEPTH, VERSION, ErrorCode, config_digest
from hw.spec.memory.access import OUTSTANDING


class Accelerator(wiring.Component):
    """Takes descriptors over its registers and executes them; :mod:`hw.spec.control` describes both.

    Members
    -------
    ctrl : AXI4-Lite, 32 bits, the registers
    hp<p> : AXI4, ``port_width`` bits, memory; all read, and hp0 also writes
    irq : interrupt, level

    Throughput: that of the core, see :class:`hw.rtl.core.core.Core`, as long as memory keeps up. Every output is a
    register or depends on registers alone.
    """

    def __init__(self, config: AcceleratorConfig):
        self.config = config
        width = config.port_width
        ports = {f"hp{p}": Out(memory_signature(width, p)) for p in range(config.ports)}
        super().__init__({"ctrl": In(lite_signature(CONTROL_ADDRESS_BITS)), **ports, "irq": Out(1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        # The datapath has a reset of its own, which leaves the registers alone.
        m.domains.datapath = ClockDomain()
        m.submodules.bank = bank = RegisterBank()
        datapath = Datapath(self.config)
        m.submodules.datapath = DomainRenamer("datapath")(datapath)
        m.submodules.supervisor = supervisor = Supervisor()
        reset = Signal(init=1)
        m.d.sync += reset.eq(supervisor.clear)
        m.d.comb += [ClockSignal("datapath").eq(ClockSignal()), ResetSignal("datapath").eq(reset)]
        for port in range(self.config.ports):
            wiring.connect(m, getattr(datapath, f"hp{port}"), wiring.flipped(getattr(self, f"hp{port}")))
        wiring.connect(m, wiring.flipped(self.ctrl), bank.ctrl)
        m.d.comb += [
            supervisor.reset.eq(bank.control.reset),
            supervisor.quiet.eq(datapath.quiet),
            supervisor.accepted.eq(datapath.descriptors.valid & datapath.descriptors.ready),
            supervisor.complete.eq(datapath.complete),
            datapath.halt.eq(supervisor.halt),
            datapath.descriptors.payload.eq(bank.descriptor),
            datapath.descriptors.valid.eq(bank.control.push & ~supervisor.resetting),
        ]
        error = self._find_faults(m, bank, datapath, supervisor)
        self._count(m, bank, datapath, supervisor)
        self._report(m, bank, datapath, supervisor, error)
        return m

    def _find_faults(self, m: Module, bank: RegisterBank, datapath: Datapath, supervisor: Supervisor) -> FirstError:
        """Every error, with what it knows about its place."""
        ports = range(self.config.ports)
        m.submodules.watchdog = watchdog = Watchdog(self.config.ports + 1)
        memory = [getattr(self, f"hp{port}") for port in ports]
        reads = [port.r.valid | (port.ar.valid & port.ar.ready) for port in memory]
        write = Cat(self.hp0.b.valid, *(c.valid & c.ready for c in (self.hp0.aw, self.hp0.w))).any()
        owed = [getattr(datapath, f"reads_under_way_{port}") != 0 for port in ports]
        sources = (
            *(ErrorCode.READ_BUS, ErrorCode.WRITE_BUS, ErrorCode.READ_TIMEOUT, ErrorCode.WRITE_TIMEOUT),
            *(ErrorCode.UNDERRUN, ErrorCode.NON_FINITE, ErrorCode.EXPONENT),
        )
        first = FirstError(sources)
        m.submodules.first_error = DomainRenamer("datapath")(first)
        m.d.comb += [
            watchdog.timeout.eq(bank.timeout),
            watchdog.owes.eq(Cat(*owed, datapath.writes_under_way != 0)),
            watchdog.progress.eq(Cat(*reads, write)),
            first.refused.eq(datapath.refused),
        ]
        late_reads = Signal(self.config.ports)
        m.d.comb += late_reads.eq(watchdog.late[:-1])
        for code, raised, address in (
            (ErrorCode.READ_BUS, datapath.read_error, datapath.read_address),
            (ErrorCode.WRITE_BUS, datapath.write_error, datapath.write_address),
            (ErrorCode.READ_TIMEOUT, late_reads.any(), self._late_address(m, datapath, late_reads)),
            (ErrorCode.WRITE_TIMEOUT, watchdog.late[-1], datapath.oldest_write),
            (ErrorCode.UNDERRUN, datapath.underrun, Const(0)),
            (ErrorCode.NON_FINITE, datapath.non_finite, datapath.activations_address),
            (ErrorCode.EXPONENT, datapath.out_of_range, datapath.activations_address),
        ):
            source = getattr(first, code.name.lower())
            m.d.comb += [source.raised.eq(raised), source.address.eq(address)]
        m.d.comb += supervisor.code.eq(first.code)
        return first

    def _late_address(self, m: Module, datapath: Datapath, late: Signal) -> Signal:
        address = Signal.like(datapath.oldest_0, name="late_address")
        for port in reversed(range(self.config.ports)):
            with m.If(late[port]):
                m.d.comb += address.eq(getattr(datapath, f"oldest_{port}"))
        return address

    def _count(self, m: Module, bank: RegisterBank, datapath: Datapath, supervisor: Supervisor) -> None:
        m.submodules.counters = counters = PerformanceCounters()
        m.d.comb += [
            counters.clear.eq(bank.control.clear_counters),
            counters.count_busy.eq(supervisor.running),
            counters.count_beats.eq(datapath.beat),
            counters.count_starved_weights.eq(datapath.starved_weights),
            counters.count_starved_activations.eq(datapath.starved_activations),
            counters.count_starved_output.eq(datapath.starved_output),
            counters.complete.eq(datapath.complete),
            counters.restart.eq(supervisor.clear),
            counters.index.eq(bank.completion_cycles_index),
            bank.completion_cycles.eq(counters.completion),
            bank.cycles.eq(counters.cycles),
            bank.completed.eq(counters.completed),
            bank.started.eq(counters.started),
            *(getattr(bank, name).eq(getattr(counters, name)) for name in COUNTED),
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
            bank.writes_under_way.eq(datapath.writes_under_way),
            bank.forget.eq(supervisor.clear),
            bank.set_interrupt_pending.done.eq(datapath.complete & datapath.complete_interrupt),
            bank.set_interrupt_pending.error.eq(failed & ~had_failed),
        ]
        for port in range(self.config.ports):
            field = getattr(bank.reads_under_way, f"port_{port}")
            m.d.comb += field.eq(getattr(datapath, f"reads_under_way_{port}"))
        pending = bank.interrupt_pending.as_value() & bank.interrupt_enable.as_value()
        m.d.sync += self.irq.eq(pending.any())
