# SPDX-License-Identifier: Apache-2.0
"""The Linux machine of a board's accelerator: all access to its files, its devices and its clock.

A board driver makes all its calls to the kernel through a Host, so tests can run the same driver on another tree of
files. `write` and `map_registers` are separate functions because the kernel acts on these accesses at once; plain files
cannot do this, so tests replace them.
"""

import mmap
import os
import time
from pathlib import Path
from typing import Protocol

from sw.devices.base import DeviceError


class Window(Protocol):
    """32-bit registers by index: byte offset / 4."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...

    def release(self) -> None:
        """Releases the mapping."""
        ...


class Host:
    """root: the folder that contains /dev, /sys, /proc and /lib."""

    def __init__(self, root: Path = Path("/")):
        self.root = root

    def path(self, name: str) -> Path:
        """The place of an absolute path below root."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """The text of a small file without spaces and zero bytes at its ends; None if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip(" \t\r\n\0")
        except OSError:
            return None

    def open(self, name: str, flags: int, fix: str) -> int:
        """A file descriptor, which the caller closes. fix: what to do if the file is missing. Raises DeviceError."""
        try:
            return self._open(self.path(name), flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DeviceError(f"{name} is not there: {fix}") from None
        except PermissionError:
            raise DeviceError(f"{name}: permission denied; run it with sudo, or: sudo chmod a+rw {name}") from None
        except OSError as error:
            raise DeviceError(f"{name} cannot be opened ({error.strerror})") from None

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags)

    def map(self, fd: int, size: int, offset: int = 0) -> mmap.mmap:
        """Maps bytes of a device. Raises DeviceError."""
        try:
            return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        except (OSError, ValueError) as error:
            raise DeviceError(f"{size:,} bytes of a device cannot be mapped ({error})") from None

    def map_registers(self, fd: int, size: int, offset: int = 0) -> Window:
        """Maps registers of a device. Raises DeviceError."""
        # Access to an element of a memoryview of this format is one aligned load or store of 32 bits. Access to a slice
        # of the mapping would be a memcpy, which may access a register twice.
        return memoryview(self.map(fd, size, offset)).cast("I")

    def write(self, fd: int, data: bytes) -> None:
        """One write to a device or an attribute; it takes effect before this returns. Raises OSError."""
        os.write(fd, data)

    def monotonic(self) -> float:
        """Seconds of the clock that is used to measure the fabric's clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Waits for a time of that clock."""
        time.sleep(seconds)
