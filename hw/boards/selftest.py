# SPDX-License-Identifier: Apache-2.0
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
"""A core with a self-test: vectors from ROMs, comparison of every result, outcome on LEDs and as a line of text."""

from typing import NamedTuple

from amaranth.hdl import Cat, Const, Module, ResetInserter, Signal
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from hw.boards.report_line import DIGIT_BITS, DecimalCounter, LineWriter, Number
from hw.boards.rom import Rom, RomSource
from hw.boards.uart import UartTransmitter

TIMEOUT_BITS = 16
"""A run ends after ``2**(TIMEOUT_BITS - 1)`` cycles, even if results are missing."""
_SETTLE = 64
"""Cycles after a run in which a surplus result is detected; the decimal counters need fewer cycles."""
_RESET = 8
_DIGITS = {"results": 5, "wrong": 5, "cycles": 5}


class Vectors(NamedTuple):
    """One layer for the core, as the payloads of its streams."""

    command: int
    weights: tuple[int, ...]
    activations: tuple[int, ...]
    results: tuple[int, ...]
    """One transfer of results in each payload; values of lanes without a column are 0."""


class SelfTest(wiring.Component):
    """Runs the vectors through the core repeatedly, and reports the outcome after each run.

    The line is ``{title}: 44 results, 0 wrong, 456 cycles: pass``, with ``FAIL`` unless the number of results is right
    and all are right bit for bit. A result is one transfer, of up to ``lanes`` floats. Cycles are counted from the
    first cycle with a valid command to the last result. The core is reset before each run, so that a run that hangs
    does not affect the next one.

    Parameters
    ----------
    core : the core under test, with the members of :class:`hw.rtl.core.core.Core`
    vectors : the layer that it computes
    title : the beginning of the line
    divisor : clock cycles of one bit on the UART
    pause : cycles between the end of a line and the next run

    Members
    -------
    hold : reset of everything, for boards whose clock domain has no reset: two resets in the path to each register
        would be too slow for the core's frequency
    corrupt : if it is high at the start of a run, the lowest bit of the first expected value is flipped: the test
        must then fail, with one wrong result
    tx : UART, 8N1
    running : a run is under way
    passed, failed : outcome of the last run; both are low before the first run has ended
    failed_ever : a run has failed since the reset
    beat : toggles with each run
    """

    def __init__(self, core: wiring.Component, vectors: Vectors, title: str, divisor: int, pause: int):
        if not vectors.results or pause < 1:
            raise ValueError(f"there is a result and pause is 1 or more, not {len(vectors.results)} and {pause}")
        self.core, self.vectors, self.pause = core, vectors, pause
        numbers, parts, low = {}, [title, ": "], 0
        for index, (name, digits) in enumerate(_DIGITS.items()):
            numbers[name] = DecimalCounter(digits)
            parts += [", "] * (index > 0) + [Number(low, digits), f" {name}"]
            low += digits
        self.numbers = numbers
        self.writer = LineWriter([*parts, ": ", ("pass", "FAIL"), "\r\n"], low)
        self.uart = UartTransmitter(divisor)
        names = ("tx", "running", "passed", "failed", "failed_ever", "beat")
        super().__init__({"hold": In(1), "corrupt": In(1), **dict.fromkeys(names, Out(1))})

    def elaborate(self, platform) -> Module:
        m = Module()
        restart, start = Signal(init=1), Signal()
        around = self._around(restart, start)
        # A separate register, because the core's reset has long routes across the FPGA.
        core_reset = Signal(init=1)
        around.d.sync += core_reset.eq(restart)
        m.submodules.core = ResetInserter(core_reset)(self.core)
        m.submodules.around = ResetInserter(self.hold)(around)
        return m

    def _around(self, restart: Signal, start: Signal) -> Module:
        """Everything but the core."""
        m = Module()
        core, vectors = self.core, self.vectors
        streams = (("weights", core.weights, vectors.weights), ("activations", core.activations, vectors.activations))
        for name, stream, words in streams:
            width = len(Cat(stream.payload))
            m.submodules[name] = source = RomSource(width, words)
            # It separates the ROMs from the logic of the core's ready.
            fifo = SyncFIFOBuffered(width=width, depth=4)
            m.submodules[f"{name}_fifo"] = ResetInserter(restart)(fifo)
            wiring.connect(m, source.o, fifo.w_stream)
            m.d.comb += [
                source.start.eq(start),
                Cat(stream.payload).eq(fifo.r_stream.payload),
                stream.valid.eq(fifo.r_stream.valid),
                fifo.r_stream.ready.eq(stream.ready),
            ]
        m.d.comb += Cat(core.command.payload).eq(vectors.command)
        with m.If(start):
            m.d.sync += core.command.valid.eq(1)
        with m.Elif(core.command.ready):
            m.d.sync += core.command.valid.eq(0)
        good = self._compare(m, start)
        self._sequence(m, restart, start, good)
        return m

    def _compare(self, m: Module, start: Signal) -> Signal:
        """Compare and count the results, in pipeline stages of one cycle: two stages for result and expected value (the
        output of a block RAM is late in its cycle), differences, count. Returns whether all results are right."""
        results, expected = self.core.results, self.vectors.results
        width = len(Cat(results.payload))
        m.submodules.expected = rom = Rom(width, expected)
        index = Signal(range(len(expected) + 1))
        early, early_valid = Signal(width, reset_less=True), Signal()
        got, got_valid = Signal(width, reset_less=True), Signal()
        wanted = Signal(width, reset_less=True)
        complete, too_many, wrong, first = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [results.ready.eq(1), rom.enable.eq(1), rom.address.eq(index)]
        m.d.sync += [
            early.eq(Cat(results.payload)),
            early_valid.eq(results.valid & results.ready & ~start),
            got.eq(self._defined(m, early)),
            got_valid.eq(early_valid),
            wanted.eq(rom.data),
        ]
        with m.If(start):
            m.d.sync += [index.eq(0), complete.eq(0), too_many.eq(0), first.eq(self.corrupt)]
        with m.Elif(results.valid & results.ready):
            m.d.sync += [
                index.eq(index + 1),
                complete.eq(complete | (index == len(expected) - 1)),
                too_many.eq(too_many | complete),
            ]
        flip = Signal()
        m.d.comb += flip.eq(first & got_valid)
        differs = Signal(-(-width // 8))
        counts = Signal()
        difference = got ^ wanted ^ Cat(flip, Const(0, width - 1))
        m.d.sync += [
            differs.eq(Cat(difference[i : i + 8].any() for i in range(0, width, 8))),
            counts.eq(got_valid),
        ]
        with m.If(got_valid):
            m.d.sync += first.eq(0)
        m.d.comb += wrong.eq(counts & differs.any())
        any_wrong = Signal()
        underrun = Signal()
        with m.If(start):
            m.d.sync += [any_wrong.eq(0), underrun.eq(0)]
        with m.Else():
            m.d.sync += [any_wrong.eq(any_wrong | wrong), underrun.eq(underrun | self.core.underrun)]
        m.d.comb += [
            self.numbers["results"].step.eq(counts),
            self.numbers["wrong"].step.eq(wrong),
            self.numbers["cycles"].step.eq(self.running),
        ]
        self.complete = complete
        good = Signal()
        m.d.comb += good.eq(complete & ~too_many & ~any_wrong & ~underrun)
        return good

    def _defined(self, m: Module, bits: Signal) -> Signal:
        """A transfer of results in which undefined values, those of lanes without a column, are 0."""
        results = data.View(self.core.results.payload.shape(), bits)
        lanes = (value & kept.replicate(len(value)) for value, kept in zip(results.values, results.keep, strict=True))
        values, defined = Cat(lanes), Signal.like(bits, name="defined")
        m.d.comb += defined.eq(Cat(values, bits[len(values) :]))
        return defined

    def _sequence(self, m: Module, restart: Signal, start: Signal, good: Signal) -> None:
        m.submodules.writer = writer = self.writer
        m.submodules.uart = uart = self.uart
        wiring.connect(m, writer.bytes, uart.bytes)
        for name, counter in self.numbers.items():
            m.submodules[f"count_{name}"] = counter
            m.d.comb += counter.clear.eq(start)
        m.d.comb += [
            writer.numbers.eq(Cat(counter.value for counter in self.numbers.values())),
            writer.good.eq(self.passed),
            self.tx.eq(uart.tx),
        ]
        assert len(writer.numbers) == DIGIT_BITS * sum(_DIGITS.values())
        # Short waits compare its lowest bits; during a run only the highest bit matters.
        timer = Signal(max(TIMEOUT_BITS, self.pause.bit_length()))
        m.d.sync += timer.eq(timer + 1)
        with m.FSM():
            with m.State("reset"):
                m.d.sync += restart.eq(1)
                with m.If(timer == _RESET):
                    m.d.sync += restart.eq(0)
                    m.next = "start"
            with m.State("start"):
                m.d.comb += start.eq(1)
                m.d.sync += [timer.eq(0), self.beat.eq(~self.beat), self.running.eq(1)]
                m.next = "run"
            with m.State("run"), m.If(self.complete | timer[TIMEOUT_BITS - 1]):
                m.d.sync += [timer.eq(0), self.running.eq(0)]
                m.next = "settle"
            with m.State("settle"), m.If(timer == _SETTLE):
                m.d.sync += [
                    self.passed.eq(good),
                    self.failed.eq(~good),
                    self.failed_ever.eq(self.failed_ever | ~good),
                ]
                m.next = "tell"
            with m.State("tell"):
                m.d.comb += writer.start.eq(1)
                m.next = "write"
            with m.State("write"):
                m.d.sync += timer.eq(0)
                with m.If(~writer.busy & uart.bytes.ready):
                    m.next = "pause"
            with m.State("pause"), m.If(timer == self.pause):
                m.d.sync += timer.eq(0)
                m.next = "reset"
