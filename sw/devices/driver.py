# SPDX-License-Identifier: Apache-2.0
"""The accelerator's driver: it turns jobs into descriptors, interrupts into completions, error codes into messages."""

from collections.abc import Iterator, Sequence

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.control.descriptor import DESCRIPTOR_WORDS
from hw.spec.control.program import DESCRIPTOR_BYTES, LENGTH_BITS, program_image
from hw.spec.control.refusal import Accepted
from hw.spec.control.registers import (
    CACHE_UNIT,
    ERROR_TEXTS,
    EVENTS,
    IDENTIFICATION,
    ONE_DESCRIPTOR,
    VERSION,
    ErrorCode,
    config_digest,
    offset,
)
from sw.devices.base import Buffer, Completion, DeviceError, Job
from sw.devices.batches import BatchDevice, Prepared
from sw.devices.jobs import NO_APPENDS
from sw.devices.platform import Platform, Registers, mask
from sw.devices.programs import Code, Patch, Programs, beats_of

PATIENCE = 8
"""The driver gives up after this many times the hardware's own timeout without any progress."""
WINDOW = [(word, offset("descriptor", word)) for word in range(DESCRIPTOR_WORDS)]
"""Index and offset of the words of a descriptor."""
PUSH = {offset("control"): mask("control", "push")}
START = {offset("control"): mask("control", "start")}


class AcceleratorDevice(BatchDevice[Code]):
    """An accelerator that is accessed through a platform. Implements sw.devices.base.Device.

    If the hardware runs programs, a prepared batch is a program in the device's memory: it takes a few registers to
    start it, and one interrupt ends it. Its memory is free when the batch is deleted. All other batches are pushed, one
    descriptor after another. The hardware keeps the cycles of the last 32 completions: if more jobs of a program are
    complete before the driver reads them, the earlier ones of these have 0 cycles, and the next one has the sum.

    Raises DeviceError if the hardware is not the accelerator of `config`.
    """

    def __init__(self, config: AcceleratorConfig, platform: Platform):
        self.platform, self.registers = platform, Registers(platform)
        self._window: Sequence[int | None] = [None] * DESCRIPTOR_WORDS
        self._program: tuple[Buffer, int] | None = None
        # Whether an earlier batch may still be running, although nobody waits for it.
        self._abandoned = False
        self._programs = Programs()
        try:
            self._identify(config)
            self._reset()
            if config.has_attention:
                self._guard(NO_APPENDS)
            self.registers.set("interrupt_enable", "done", "error")
        except BaseException:
            platform.close()
            raise
        super().__init__(config, platform.memory)

    @property
    def seconds(self) -> float:
        """See Device."""
        return self.platform.seconds

    def close(self) -> None:
        """See Device."""
        was_open = not self._closed
        super().close()
        if was_open:
            self.platform.close()

    def counters(self) -> dict[str, int]:
        """The performance counters, in cycles and beats, since the device was opened."""
        return {name: self.registers.read(name) for name in EVENTS}

    def alloc(self, size: int) -> Buffer:
        """See Device."""
        self._check_open()
        if self._programs and not self.registers.read("status") & self._busy:
            for program in self._programs.take():
                self.memory.free(program)
        return super().alloc(size)

    def encode(self, jobs: Sequence[Job], often: bool) -> Code:
        """See BatchDevice.

        Raises DeviceError if an address is beyond what a descriptor holds, or weights are too large for it, or memory
        has no room for the program.
        """
        stored = often and self.config.has_programs
        # One interrupt for a batch. A batch that is pushed and is longer than the queue needs one for each job, because
        # its last descriptor is pushed only after earlier ones are complete.
        each, last = not stored and len(jobs) > self._capabilities["queue_depth"], len(jobs) - 1
        words = [_words(job, each or index == last) for index, job in enumerate(jobs)]
        code = self.make_code(jobs, words)
        if stored:
            image = program_image(words)
            self._programs.keep(code, self.alloc(len(image)))
            assert code.program is not None
            self.write(code.program, image)
            code.patch = Patch(jobs, words)
        return code

    def make_code(self, jobs: Sequence[Job], words: list[list[int]]) -> Code:
        """The code of a batch without its program. words: of each job's descriptor."""
        return Code(words, beats_of(jobs))

    def moved(self, batch: Prepared[Code]) -> None:
        """See BatchDevice. The words in memory change; jobs are not built again, unless an error is to be explained."""
        code = batch.code
        if code.patch is None:
            # Hardware without programs has no operation that depends on the position.
            assert batch.moving.jobs == batch.jobs
            return
        if self._abandoned and not self._queue:
            self._reset()
        assert code.program is not None, "a patch is that of a program"
        code.patch.apply(self.memory.view(code.program), code.beats, batch.moving.by)

    def appends_changed(self, allowed: range) -> None:
        """See BatchDevice."""
        if not self.config.has_attention:
            return
        if self._abandoned:
            self._reset()
        self._guard(allowed)

    def run(self, batch: Prepared[Code]) -> Iterator[Completion | None]:
        """See BatchDevice."""
        try:
            yield from self._run(batch)
        except Exception:
            raise
        except BaseException:
            # Interrupted or closed: the accelerator must not write to memory any more, because it may soon be reused.
            self._reset()
            raise

    def _run(self, batch: Prepared[Code]) -> Iterator[Completion | None]:
        jobs, code = batch.jobs, batch.code
        registers, capabilities, clock = self.registers, self._capabilities, self.platform.clock
        if registers.read("status") & self._busy:
            # An earlier batch was abandoned and is still running, or has failed.
            self._reset()
        self._abandoned = True
        base, first, pushed, done = self._completed, self._index, 0, 0
        before, then, watch = 0, clock(), None
        if code.program:
            self._start(code.program, len(jobs))
            before, first, pushed = registers.read("started"), 0, len(jobs)
        while done < len(jobs):
            while pushed < len(jobs) and pushed - done < capabilities["completions"] and self._has_room(pushed - done):
                self._push(code.descriptors[pushed])
                if not pushed:
                    before = registers.read("started")
                pushed += 1
            yield None
            if self.platform.wait_interrupt():
                registers.set("interrupt_pending", "done")
            completed, cycles = self._read_completions(base, done, code, 1 if batch.together else None)
            ends = range(done + 1, completed + 1)
            if batch.together:
                ends = ends[-1:]
            start = done
            for end in ends:
                cycle, now = cycles.get(end - 1, before), clock()
                beats = int(code.beats[start:end].sum())
                yield Completion(jobs[end - 1].name, (cycle - before) % (1 << 32), beats, now - then, end - start)
                before, then, start = cycle, now, end
            # Completed jobs are valid even if a later one has failed.
            if completed < len(jobs):
                if registers.read("status") & self._error:
                    self._fail(batch, first, completed)
                if completed == done:
                    watch = watch or _Watch(self)
                    watch.check(jobs[done], done)
            done = completed
        self._abandoned = False

    def _read_completions(self, base: int, done: int, code: Code, most: int | None) -> tuple[int, dict[int, int]]:
        """The number of complete jobs of a batch, and by job the cycle of its completion, from job `done` on.

        base: the count of completions at the start. most: read no more cycles than this. The hardware keeps a number
        of cycles: those of earlier jobs are lost. Then the time of these jobs counts for the next one whose cycle is
        known.
        """
        read, kept = self.registers.read, self._capabilities["completions"]
        self._completed = read("completed")
        completed = (self._completed - base) % (1 << 32)
        known = range(max(done, completed - (most or kept)), completed)
        cycles = {index: read("completion_cycles", (base + index) % kept) for index in known}
        if cycles and code.program and completed < len(code.descriptors):
            # The program goes on, and may have overwritten some of them meanwhile.
            newest = (read("completed") - base) % (1 << 32)
            cycles = {index: cycle for index, cycle in cycles.items() if newest - index <= kept}
        return completed, cycles

    def _identify(self, config: AcceleratorConfig) -> None:
        found = self.registers.read("identification")
        if found != IDENTIFICATION:
            raise DeviceError(f"there is no Gristmill accelerator: register identification is {found:#x}")
        version = self.registers.read("version")
        if version != VERSION:
            raise DeviceError(f"the accelerator's registers have version {version}, this software knows {VERSION}")
        digest = self.registers.read("config_digest")
        if digest != config_digest(config):
            raise DeviceError(
                f"the accelerator was built from config {digest:08x}, and {config_digest(config):08x} is needed"
            )
        self._capabilities = self.registers.fields("capabilities")
        self._error = mask("status", "error")
        self._busy = mask("status", "running", "resetting", "error")

    def _guard(self, allowed: range) -> None:
        """Writes the addresses of appends to the registers, which a reset does not change."""
        for name, address in (("cache_first", allowed.start), ("cache_end", allowed.stop)):
            self.registers.write(name, address // CACHE_UNIT)

    def _has_room(self, in_flight: int) -> bool:
        # While fewer descriptors are in flight than the queue holds, the register need not be read.
        depth = self._capabilities["queue_depth"]
        return in_flight < depth or self.registers.fields("status")["queued"] < depth

    def _push(self, words: list[int]) -> None:
        # The window keeps its contents, and the descriptors of successive layers differ in a few words.
        window = self._window
        new = {offset: words[index] for index, offset in WINDOW if window[index] != words[index]}
        self._window = words
        self._index = (self._index + 1) % (1 << LENGTH_BITS)
        self.platform.write_registers(new | PUSH)

    def _start(self, program: Buffer, length: int) -> None:
        new = {}
        if self._program != (program, length):
            words = (program.address & 0xFFFF_FFFF, program.address >> 32)
            new = {offset("program_address", word): value for word, value in enumerate(words)}
            new[offset("program_length")] = length
        self._program = program, length
        self._index = length
        self.platform.write_registers(new | START)

    def _fail(self, batch: Prepared[Code], first: int, done: int) -> None:
        """Resets the accelerator for the next batch, then raises DeviceError with the reason why it stopped."""
        jobs, code = batch.moving.jobs, batch.code
        error, address = self.registers.read("error_code"), self.registers.read("error_address")
        try:
            text = ERROR_TEXTS[ErrorCode(error)]
        except ValueError:
            text = f"error code {error}"
        place = f" at address {address:#x}" if address else ""
        if self.config.has_programs:
            last = (self.registers.fields("failed")["index"] - first) % (1 << LENGTH_BITS)
            name = self._failed(jobs, code, error, address, range(done, last + 1))
        else:
            name = self._culprit(jobs, code.descriptors, address)
        try:
            self._reset()
        except DeviceError as problem:
            raise DeviceError(f"{name}: {text}{place}; {problem}") from None
        raise DeviceError(f"{name}: {text}{place}")

    def _failed(self, jobs: Sequence[Job], code: Code, error: int, address: int, begun: range) -> str:
        """The layer that failed. begun: the jobs that were begun and are not complete."""
        if error in ONE_DESCRIPTOR and begun.stop <= len(jobs):
            return f"layer {jobs[begun.stop - 1].name}"
        if code.program and _holds(code.program, address):
            return f"the descriptor of layer {jobs[(address - code.program.address) // DESCRIPTOR_BYTES].name}"
        # Buffers may be used several times in a batch.
        for job in (*jobs[begun.start : begun.stop], *jobs):
            if _uses(job, address):
                return f"layer {job.name}"
        return _one_of(jobs)

    def _culprit(self, jobs: Sequence[Job], descriptors: list[list[int]], address: int) -> str:
        """The layer that failed, as far as it can be known from hardware without the register `failed`."""
        accepted = Accepted()
        for job, words in zip(jobs, descriptors):
            if accepted.take(self.config, words):
                return f"layer {job.name}"
            if _uses(job, address):
                return f"layer {job.name}"
        return _one_of(jobs)

    def _reset(self) -> None:
        """Resets the accelerator. Raises DeviceError if the reset does not end."""
        self.registers.set("control", "reset")
        watch = _Watch(self)
        while self.registers.fields("status")["resetting"]:
            watch.check(None, 0)
            self.platform.wait_interrupt()
        self.registers.set("interrupt_pending", "done", "error")
        self._completed = self.registers.read("completed")
        self._index = 0
        self._abandoned = False


class _Watch:
    """Detects that nothing has moved for PATIENCE times the hardware's timeout, counted in the accelerator's cycles."""

    def __init__(self, device: AcceleratorDevice):
        self._registers = device.registers
        self._limit = PATIENCE * self._registers.read("timeout")
        self._seen: tuple[int, ...] = ()
        self._since = 0

    def check(self, job: Job | None, done: int) -> None:
        """Raises DeviceError, which says what was waited for."""
        read = self._registers.read
        now = read("cycles")
        seen = done, read("beats"), read("reads_under_way"), read("writes_under_way")
        if seen != self._seen:
            self._seen, self._since = seen, now
        elif self._limit and now - self._since > self._limit:
            reads = sum(self._registers.fields("reads_under_way").values())
            writes = read("writes_under_way")
            owed = f"memory owes {reads} reads and {writes} writes"
            what = f"layer {job.name}" if job else "the reset to end"
            raise DeviceError(f"nothing moved for {now - self._since:,} cycles while waiting for {what}; {owed}")


def _holds(buffer: Buffer, address: int) -> bool:
    return buffer.address <= address < buffer.address + buffer.size


def _uses(job: Job, address: int) -> bool:
    return any(_holds(access.buffer, address) for access in (*job.reads(), *job.writes()))


def _one_of(jobs: Sequence[Job]) -> str:
    return f"one of the layers from {jobs[0].name} to {jobs[-1].name}" if len(jobs) > 1 else f"layer {jobs[0].name}"


def _words(job: Job, interrupt: bool) -> list[int]:
    try:
        return job.descriptor(interrupt).to_words()
    except ConfigError as error:
        raise DeviceError(f"layer {job.name}: {error}") from None
