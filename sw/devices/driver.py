# SPDX-License-Identifier: Apache-2.0
"""The accelerator's driver: it turns jobs into descriptors, interrupts into completions, error codes into messages."""

from collections.abc import Iterator, Sequence

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.control.descriptor import DESCRIPTOR_WORDS, Descriptor, VectorDescriptor
from hw.spec.control.refusal import refusal
from hw.spec.control.registers import ERROR_TEXTS, EVENTS, IDENTIFICATION, VERSION, ErrorCode, config_digest, offset
from sw.devices.base import Buffer, Completion, DeviceError, Job, PreparedBatch
from sw.devices.batches import BatchDevice
from sw.devices.platform import Platform, Registers, mask

PATIENCE = 8
"""The driver gives up after this many times the hardware's own timeout without any progress."""
WINDOW = [(word, offset("descriptor", word)) for word in range(DESCRIPTOR_WORDS)]
"""Index and offset of the words of a descriptor."""
PUSH = {offset("control"): mask("control", "push")}


class AcceleratorDevice(BatchDevice):
    """An accelerator that is accessed through a platform. Implements sw.devices.base.Device.

    Raises DeviceError if the hardware is not the accelerator of `config`.
    """

    def __init__(self, config: AcceleratorConfig, platform: Platform):
        self.platform, self.registers = platform, Registers(platform)
        self._window: Sequence[int | None] = [None] * DESCRIPTOR_WORDS
        try:
            self._identify(config)
            self._reset()
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

    def encode(self, jobs: Sequence[Job]) -> tuple[list[list[int]], list[int]]:
        """See BatchDevice: the descriptors' words, and each one's beats.

        Raises DeviceError if an address is beyond what a descriptor holds, or weights are too large for it.
        """
        # One interrupt for a batch. A batch that is longer than the queue needs one for each job, because its last
        # descriptor is pushed only after earlier ones are complete.
        often, last = len(jobs) > self._capabilities["queue_depth"], len(jobs) - 1
        words = [_words(job, often or index == last) for index, job in enumerate(jobs)]
        return words, [job.beats for job in jobs]

    def run(self, batch: PreparedBatch) -> Iterator[Completion | None]:
        """See BatchDevice."""
        try:
            yield from self._run(batch.jobs, *batch.code)
        except Exception:
            raise
        except BaseException:
            # Interrupted or closed: the accelerator must not write to memory any more, because it may soon be reused.
            self._reset()
            raise

    def _run(self, jobs: Sequence[Job], descriptors: list[list[int]], beats: list[int]) -> Iterator[Completion | None]:
        registers, capabilities, clock = self.registers, self._capabilities, self.platform.clock
        if registers.read("status") & self._busy:
            # An earlier batch was abandoned and is still running, or has failed.
            self._reset()
        base, pushed, done = self._completed, 0, 0
        before, then, watch = 0, clock(), None
        while done < len(jobs):
            while pushed < len(jobs) and pushed - done < capabilities["completions"] and self._has_room(pushed - done):
                self._push(descriptors[pushed])
                if not pushed:
                    before = registers.read("started")
                pushed += 1
            yield None
            if self.platform.wait_interrupt():
                registers.set("interrupt_pending", "done")
            self._completed = registers.read("completed")
            completed = (self._completed - base) % (1 << 32)
            for index in range(done, completed):
                cycle = registers.read("completion_cycles", (base + index) % capabilities["completions"])
                now = clock()
                yield Completion(jobs[index].name, (cycle - before) % (1 << 32), beats[index], now - then)
                before, then = cycle, now
            # Completed jobs are valid even if a later one has failed.
            if completed < len(jobs):
                if registers.read("status") & self._error:
                    self._fail(jobs, descriptors)
                if completed == done:
                    watch = watch or _Watch(self)
                    watch.check(jobs[done], done)
            done = completed

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

    def _has_room(self, in_flight: int) -> bool:
        # While fewer descriptors are in flight than the queue holds, the register need not be read.
        depth = self._capabilities["queue_depth"]
        return in_flight < depth or self.registers.fields("status")["queued"] < depth

    def _push(self, words: list[int]) -> None:
        # The window keeps its contents, and the descriptors of successive layers differ in a few words.
        window = self._window
        new = {offset: words[index] for index, offset in WINDOW if window[index] != words[index]}
        self._window = words
        self.platform.write_registers(new | PUSH)

    def _fail(self, jobs: Sequence[Job], descriptors: list[list[int]]) -> None:
        """Resets the accelerator for the next batch, then raises DeviceError with the reason why it stopped."""
        code, address = self.registers.read("error_code"), self.registers.read("error_address")
        try:
            text = ERROR_TEXTS[ErrorCode(code)]
        except ValueError:
            text = f"error code {code}"
        place = f" at address {address:#x}" if address else ""
        name = self._culprit(jobs, descriptors, address)
        try:
            self._reset()
        except DeviceError as error:
            raise DeviceError(f"{name}: {text}{place}; {error}") from None
        raise DeviceError(f"{name}: {text}{place}")

    def _culprit(self, jobs: Sequence[Job], descriptors: list[list[int]], address: int) -> str:
        def holds(buffer: Buffer) -> bool:
            return buffer.address <= address < buffer.address + buffer.size

        before = None
        for job, words in zip(jobs, descriptors):
            if refusal(self.config, words, before):
                return f"layer {job.name}"
            before = words
            if any(holds(access.buffer) for access in (*job.reads(), *job.writes())):
                return f"layer {job.name}"
        return f"one of the layers from {jobs[0].name} to {jobs[-1].name}" if len(jobs) > 1 else f"layer {jobs[0].name}"

    def _reset(self) -> None:
        """Resets the accelerator. Raises DeviceError if the reset does not end."""
        self.registers.set("control", "reset")
        watch = _Watch(self)
        while self.registers.fields("status")["resetting"]:
            watch.check(None, 0)
            self.platform.wait_interrupt()
        self.registers.set("interrupt_pending", "done", "error")
        self._completed = self.registers.read("completed")


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


def descriptor(job: Job, interrupt: bool = True) -> Descriptor | VectorDescriptor:
    """The descriptor of a job. interrupt: whether its completion raises the interrupt."""
    return job.descriptor(interrupt)


def _words(job: Job, interrupt: bool) -> list[int]:
    try:
        return descriptor(job, interrupt).to_words()
    except ConfigError as error:
        raise DeviceError(f"layer {job.name}: {error}") from None
