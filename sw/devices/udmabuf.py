# SPDX-License-Identifier: Apache-2.0
"""Memory that an accelerator without coherent ports shares with this process: a u-dma-buf.

Source: https://github.com/ikwzm/udmabuf, Readme.md and udmabuf_sync_command_argments() in u-dma-buf.c: a value that is
written to sync_for_device or sync_for_cpu holds offset, size and direction of one range.

The mapping is cached, because onnxruntime reads and writes this memory, and reads of uncached memory are several times
slower. So caches are cleaned before the accelerator starts, and invalidated before its results are read. Both
operations end with a barrier. It also orders all earlier writes before the register write that starts the accelerator.
"""

import fcntl
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from hw.spec.control.descriptor import ADDRESS_LIMIT
from sw.devices.base import PAGE, DeviceError
from sw.devices.host import Host

CLASSES = ("/sys/class/u-dma-buf", "/sys/class/udmabuf")
"""The class has a different name in different versions of the module."""
LINE = 64
"""Bytes of a cache line of Cortex-A53."""
NEAR = 16 * 1024
"""Ranges with at most this many bytes between them are cleaned as one: these lines cost about as much as another system
call."""
MOST = 1 << 32
"""Maximum size of a buffer in bytes, because offsets in commands have 32 bits."""
BOTH, FROM_DEVICE = 0, 2
"""Directions. Cleaning uses BOTH: with FROM_DEVICE, kernels before 5.19 invalidate instead."""
FIX = (
    "load the app and the module: sudo modprobe u-dma-buf; if dmesg says that the allocation failed, raise cma= on the"
    " kernel's command line"
)


class BusyError(DeviceError):
    """Another process has the accelerator."""


@dataclass(frozen=True)
class BufferPlace:
    """A u-dma-buf. name; folder: the folder of its attributes; address: physical address of the first byte; size in
    bytes; coherent: whether the kernel treats the device as coherent, so that it does not sync caches.
    """

    name: str
    folder: str
    address: int
    size: int
    coherent: bool


def find_buffer(host: Host, name: str) -> BufferPlace | None:
    """The u-dma-buf of this name. Raises DeviceError if its attributes make no sense."""
    for folder in (f"{base}/{name}" for base in CLASSES):
        if host.path(folder).is_dir():
            address, size = host.read(f"{folder}/phys_addr"), host.read(f"{folder}/size")
            try:
                place = int(address or "", 16), int(size or "", 0)
            except ValueError:
                raise DeviceError(f"{folder} has no phys_addr and size") from None
            return BufferPlace(name, folder, *place, coherent=host.read(f"{folder}/dma_coherent") == "1")
    return None


def problem(place: BufferPlace) -> str:
    """Why the accelerator cannot use this buffer, or an empty text."""
    if place.address % PAGE:
        return f"its address {place.address:#x} is no multiple of {PAGE}"
    if not PAGE <= place.size <= MOST:
        return f"it has {place.size:,} bytes, and {PAGE:,} to {MOST:,} can be used"
    if place.address + place.size > ADDRESS_LIMIT:
        return f"its end {place.address + place.size:#x} is beyond what a descriptor addresses, {ADDRESS_LIMIT:#x}"
    if place.coherent:
        return "its device tree node says dma-coherent, and the accelerator's ports are not"
    return ""


class DmaBuffer:
    """A u-dma-buf, locked by this process.

    Members
    -------
    memory: uint8 [size], cached.

    Raises DeviceError if it cannot be used, BusyError if another process has locked it.
    """

    def __init__(self, host: Host, place: BufferPlace):
        if text := problem(place):
            raise DeviceError(f"buffer {place.name} cannot be used: {text}")
        self._host, self.place = host, place
        self._fds: list[int] = []
        try:
            # Without O_SYNC: cached.
            device = self._open(f"/dev/{place.name}", os.O_RDWR)
            try:
                fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BusyError(
                    f"another process uses the accelerator; fuser -v /dev/{place.name} says which one"
                ) from None
            self._for_device = self._open(f"{place.folder}/sync_for_device", os.O_WRONLY)
            self._for_cpu = self._open(f"{place.folder}/sync_for_cpu", os.O_WRONLY)
            self.memory = np.frombuffer(host.map(device, place.size), np.uint8)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, flags: int) -> int:
        self._fds.append(self._host.open(name, flags, FIX))
        return self._fds[-1]

    def clean_commands(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """Commands for `sync_for_device`, from ranges (physical address, bytes)."""
        return self._commands(_merge(ranges, NEAR), BOTH)

    def invalidate_commands(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """Commands for `sync_for_cpu`, from ranges (physical address, bytes). Each range must consist of whole cache
        lines, because other data in these lines would be lost.
        """
        return self._commands(_merge(ranges, 0), FROM_DEVICE)

    def _commands(self, ranges: list[tuple[int, int]], direction: int) -> list[bytes]:
        base = self.place.address
        values = ((start - base) << 32 | (end - start) | direction << 2 | 1 for start, end in ranges)
        return [b"0x%016x" % value for value in values]

    def sync_for_device(self, commands: Sequence[bytes]) -> None:
        """Cleans the processor's caches: writes their data to memory."""
        self._sync(self._for_device, commands, "sync_for_device")

    def sync_for_cpu(self, commands: Sequence[bytes]) -> None:
        """Invalidates the processor's caches over data that the accelerator has written."""
        self._sync(self._for_cpu, commands, "sync_for_cpu")

    def _sync(self, fd: int, commands: Sequence[bytes], name: str) -> None:
        try:
            for command in commands:
                self._host.write(fd, command)
        except OSError as error:
            raise DeviceError(f"{self.place.folder}/{name} failed ({error.strerror})") from None

    def close(self) -> None:
        """Unlocks the buffer. Its mapping exists as long as there is a view of it."""
        self.memory = np.empty(0, np.uint8)
        for fd in self._fds:
            with suppress(OSError):
                # Without this, the mapping's own descriptor would keep the lock.
                fcntl.flock(fd, fcntl.LOCK_UN)
            with suppress(OSError):
                os.close(fd)
        self._fds.clear()


def _merge(ranges: Iterable[tuple[int, int]], near: int) -> list[tuple[int, int]]:
    """(start, end) of ranges (start, bytes): whole cache lines, ascending; ranges at most `near` apart are joined."""
    merged: list[tuple[int, int]] = []
    for start, size in sorted(set(ranges)):
        start, end = start // LINE * LINE, -(-(start + size) // LINE) * LINE
        if merged and start - merged[-1][1] <= near:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
