# SPDX-License-Identifier: Apache-2.0
"""The accelerator in a Kria KV260 under Linux: registers and interrupt through UIO, memory in a u-dma-buf.

The UIO device and the buffer have the names in hw.spec.kv260; they exist while the app is loaded. The config comes from
the manifest beside the firmware.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import WINDOW_BYTES, offset
from hw.spec.kv260 import APP_NAME, BUFFER_NAME, CONTROL_ADDRESS, CONTROL_BYTES, UIO_NAME
from hw.spec.manifest import Manifest, ManifestError
from sw.devices.arena import Arena
from sw.devices.base import Buffer, Completion, DeviceError, Job
from sw.devices.batches import Prepared
from sw.devices.driver import AcceleratorDevice
from sw.devices.host import Host
from sw.devices.jobs import EXPONENTS, WEIGHTS, Access
from sw.devices.programs import Code, beats_of
from sw.devices.udmabuf import FIX, DmaBuffer, find_buffer
from sw.devices.uio import Uio, find_uio

FIRMWARE = f"/lib/firmware/xilinx/{APP_NAME}"
LOAD = f"load the app: sudo xmutil unloadapp; sudo xmutil loadapp {APP_NAME}"
SPIN_SECONDS = 200e-6
"""Time to poll the registers before waiting for the interrupt: most batches take less, and a wake-up takes longer."""
WAIT_SECONDS = 0.1
"""Duration of one wait for the interrupt."""
LATE_SECONDS = 1e-3
"""Longest delay of an interrupt."""
POLL_SECONDS = 100e-6
"""Time between two polls of the registers if there is no interrupt."""
_PENDING = offset("interrupt_pending") // 4


def manifest_path(host: Host) -> Path:
    """The hardware's manifest: $GRISTMILL_MANIFEST, or the one beside the firmware."""
    named = os.environ.get("GRISTMILL_MANIFEST")
    return Path(named) if named else host.path(f"{FIRMWARE}/manifest.json")


def board_manifest(host: Host) -> Manifest:
    """The manifest of the board's hardware. Raises DeviceError if there is none, or it is not an accelerator's."""
    path = manifest_path(host)
    try:
        manifest = Manifest.load(path)
    except ManifestError as error:
        raise DeviceError(f"{error}; copy that of the bitstream there, or name it in $GRISTMILL_MANIFEST") from None
    if manifest.block != "accelerator":
        raise DeviceError(f"{path}: block {manifest.block} is not the whole accelerator")
    return manifest


def board_config() -> AcceleratorConfig:
    """The config of this machine's hardware. Raises DeviceError like `board_manifest`."""
    return board_manifest(Host()).config


def check_config(config: AcceleratorConfig, expected: Mapping[str, int | str]) -> None:
    """Raises DeviceError unless the board's hardware has these values in these fields."""
    for name, value in expected.items():
        have = getattr(config, name)
        if have != value:
            raise DeviceError(f"the board's hardware has {name} {have}, and {value} is asked for")


class KV260Platform:
    """Registers, interrupt and memory of the board. Implements sw.devices.platform.Platform; one process at a time.

    Parameters
    ----------
    registers: "uio", or "mem" for /dev/mem at the bitstream's address, without an interrupt. With "mem" the driver
        cannot know whether the app is loaded; if nothing answers, an access stops the whole machine.

    Raises DeviceError, with the fix, if something is missing or cannot be used.
    """

    def __init__(self, host: Host, registers: str = "uio"):
        place = find_buffer(host, BUFFER_NAME)
        if place is None:
            raise DeviceError(f"there is no buffer {BUFFER_NAME}: {FIX}")
        self.buffer = DmaBuffer(host, place)
        self.memory = Arena(self.buffer.memory, place.address)
        self.uio: Uio | None = None
        self._fd = -1
        try:
            if registers == "uio":
                self.uio = self._open_uio(host)
                self._window = self.uio.window
            elif registers == "mem":
                self._fd = host.open("/dev/mem", os.O_RDWR | os.O_SYNC, "the kernel was built without it")
                self._window = host.map_registers(self._fd, CONTROL_BYTES, CONTROL_ADDRESS)
            else:
                raise DeviceError(f"registers are reached through uio or mem, not {registers}")
            self.polls = self.uio is None or not self.uio.has_interrupt
        except BaseException:
            self.close()
            raise
        self.seconds = 0.0

    @staticmethod
    def _open_uio(host: Host) -> Uio:
        place = find_uio(host, UIO_NAME)
        if place is None:
            raise DeviceError(f"there is no UIO device {UIO_NAME}: {LOAD}")
        if place.size < WINDOW_BYTES:
            raise DeviceError(f"UIO device {UIO_NAME} maps {place.size} bytes, and the registers take {WINDOW_BYTES}")
        return Uio(host, place)

    def read_register(self, offset: int) -> int:
        """See Platform."""
        return self._window[offset >> 2]

    def write_register(self, offset: int, value: int) -> None:
        """See Platform."""
        self._window[offset >> 2] = value

    def write_registers(self, offsets_and_values: Mapping[int, int]) -> None:
        """See Platform."""
        window = self._window
        for place, value in offsets_and_values.items():
            window[place >> 2] = value

    def wait_interrupt(self) -> bool:
        """See Platform."""
        # Both causes are enabled while a driver has the accelerator open, so the register equals the interrupt line.
        window, start = self._window, time.perf_counter()
        try:
            until = start + SPIN_SECONDS
            while not window[_PENDING]:
                if time.perf_counter() > until:
                    return self._sleep(start + WAIT_SECONDS)
            return True
        finally:
            self.seconds += time.perf_counter() - start

    def _sleep(self, until: float) -> bool:
        window = self._window
        if self.uio is not None and not self.polls:
            self.uio.arm()
            fired = self.uio.wait(max(0, until - time.perf_counter()))
            high = window[_PENDING] != 0
            # The line is high, but the interrupt did not fire: it is not wired as the device tree says. Polling is
            # slower, but works.
            self.polls = high and not fired and not self.uio.wait(LATE_SECONDS)
            return high
        while not (high := window[_PENDING] != 0) and time.perf_counter() < until:
            time.sleep(POLL_SECONDS)
        return high

    def clock(self) -> float:
        """See Platform."""
        return time.perf_counter()

    def close(self) -> None:
        """See Platform."""
        if self.uio is not None:
            self.uio.close()
            self._window, self.uio = self.uio.window, None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.memory.close()
        self.buffer.close()


STREAMS = (WEIGHTS, EXPONENTS)
"""Operands, and KV caches, that software accesses by `Device.write` and `Device.read` alone."""


class KV260Device(AcceleratorDevice):
    """The accelerator on a KV260.

    Parameters
    ----------
    host: the machine; None: this one.
    registers: see KV260Platform; None: $GRISTMILL_REGISTERS, or uio.
    expected: required values of fields of hw.spec.config.AcceleratorConfig.

    Raises DeviceError, with the fix, if something is missing, or if the hardware has another config.
    """

    name = "kv260"
    platform: KV260Platform

    def __init__(
        self, expected: Mapping[str, int | str] | None = None, *, host: Host | None = None, registers: str | None = None
    ):
        host = host or Host()
        config = board_manifest(host).config
        check_config(config, expected or {})
        # KV caches that batches of this device have written, and all places of which there was a view, also freed ones.
        self._appended: set[Access] = set()
        self._viewed: set[Access] = set()
        super().__init__(config, KV260Platform(host, registers or os.environ.get("GRISTMILL_REGISTERS") or "uio"))

    def view(self, buffer: Buffer) -> np.ndarray:
        """See Device. Batches clean the caches over it from now on."""
        self._viewed.add(Access("", buffer, buffer.size))
        return super().view(buffer)

    def write(self, buffer: Buffer, values: Any) -> None:
        """See Device. The caches are cleaned, so the data reaches memory."""
        super().write(buffer, values)
        self.platform.buffer.sync_for_device(self.platform.buffer.clean_commands([(buffer.address, buffer.size)]))

    def read(self, buffer: Buffer, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """See Device. What was appended is read from memory: batches do not invalidate the caches over it."""
        read = Access("", buffer, buffer.size)
        if read.overlaps(self._appended):
            commands = self.platform.buffer.invalidate_commands([_range(read)])
            self.platform.buffer.sync_for_cpu(commands)
        return super().read(buffer, dtype, shape)

    def moved(self, batch: Prepared[Code]) -> None:
        """See BatchDevice. The caches are cleaned over the program."""
        super().moved(batch)
        if program := batch.code.program:
            commands = self.platform.buffer.clean_commands([(program.address, program.size)])
            self.platform.buffer.sync_for_device(commands)

    def make_code(self, jobs: Sequence[Job], words: list[list[int]]) -> "BoardCode":
        """See AcceleratorDevice."""
        used = [access for job in jobs for access in (*job.reads(), *job.writes()) if access.what not in STREAMS]
        results = [_range(access) for job in jobs for access in job.writes() if access.what not in STREAMS]
        self._appended.update(access for job in jobs for access in job.writes() if access.what in STREAMS)
        # The results' caches too: otherwise a dirty line there would be written back later and overwrite results.
        buffer, used = self.platform.buffer, list(dict.fromkeys(used))
        clean = buffer.clean_commands(map(_range, used))
        invalidate = buffer.invalidate_commands(results)
        return BoardCode(words, beats_of(jobs), used=used, clean=clean, invalidate=invalidate)

    def run(self, batch: Prepared[Code]) -> Iterator[Completion | None]:
        """See BatchDevice."""
        code = batch.code
        assert isinstance(code, BoardCode), "make_code made it"
        if code.views not in (None, len(self._viewed)):
            # Only a view can have made a line dirty since then: `write` cleans the caches itself.
            dirty = [_range(access) for access in code.used if access.overlaps(self._viewed)]
            code.clean, code.views = self.platform.buffer.clean_commands(dirty), len(self._viewed)
        self.platform.buffer.sync_for_device(code.clean)
        if code.views is None:
            code.views = -1
        yield from super().run(batch)
        self.platform.buffer.sync_for_cpu(code.invalidate)


@dataclass(eq=False, kw_only=True)
class BoardCode(Code):
    """The code of a batch for the board.

    Members
    -------
    used: operands and results, without streams.
    clean, invalidate: commands for the caches before and after the batch.
    views: number of views that `clean` knows; None: the first batch cleans everything.
    """

    used: list[Access]
    clean: list[bytes]
    invalidate: list[bytes]
    views: int | None = None


def _range(access: Access) -> tuple[int, int]:
    return access.buffer.address, access.size
