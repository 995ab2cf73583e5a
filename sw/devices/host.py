# SPDX-License-Identifier: Apache-2.0
"""The Linux machine around a board's accelerator: its files, its devices and its clock, all reached from one place.

Everything that a board driver asks the kernel for goes through a Host, so that the same driver runs on another tree of
files. `write` and `map_registers` are apart from the rest because behind them the kernel acts at once: a file cannot.
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
        """Gives the mapping back."""
        ...


class Host:
    """root: the folder that has /dev, /sys, /proc and /lib in it."""

    def __init__(self, root: Path = Path("/")):
        self.root = root

    def path(self, name: str) -> Path:
        """Where an absolute path is."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """A small text file without spaces and zero bytes around; None if it is not there or may not be read."""
        try:
            return self.path(name).read_text(errors="replace").strip(" \t\r\n\0")
        except OSError:
            return None

    def open(self, name: str, flags: int, mend: str) -> int:
        """A file descriptor, closed by the caller. Raises DeviceError; mend: what to do if the file is not there."""
        try:
            return self._open(self.path(name), flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DeviceError(f"{name} is not there: {mend}") from None
        except PermissionError:
            raise DeviceError(f"{name}: permission denied; run it with sudo, or: sudo chmod a+rw {name}") from None
        except OSError as error:
            raise DeviceError(f"{name} cannot be opened ({error.strerror})") from None

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags)

    def map(self, fd: int, size: int, offset: int = 0) -> mmap.mmap:
        """Bytes of a device. Raises DeviceError."""
        try:
            return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        except (OSError, ValueError) as error:
            raise DeviceError(f"{size:,} bytes of a device cannot be mapped ({error})") from None

    def map_registers(self, fd: int, size: int, offset: int = 0) -> Window:
        """Registers of a device. Raises DeviceError."""
        # An element of a memoryview of this format is one aligned load or store of 32 bits; a slice of the mapping
        # would be a memcpy, which may touch a register twice.
        return memoryview(self.map(fd, size, offset)).cast("I")

    def write(self, fd: int, data: bytes) -> None:
        """One write to a device or an attribute, which has its effect before this returns. Raises OSError."""
        os.write(fd, data)

    def monotonic(self) -> float:
        """Seconds of the clock that the fabric's is measured with."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Lets that clock go on."""
        time.sleep(seconds)
