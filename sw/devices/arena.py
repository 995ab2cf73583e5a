# SPDX-License-Identifier: Apache-2.0
"""Buffers in one contiguous region of physical memory."""

import bisect
import mmap
from contextlib import suppress

import numpy as np

from sw.devices.base import PAGE, Buffer, DeviceError

MEMORY_BASE = 0x1000_0000
"""Start of a simulated device's memory. Address 0, which an address that was never set has, is outside of it."""
MEMORY_BYTES = 2 << 30
"""Address space of a simulated device; parts that are not allocated take no memory."""


def anonymous_memory(size: int) -> np.ndarray:
    """`size` bytes of this process's memory as uint8. Pages take physical memory only after they are written."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux; Python 3.11 has no name for it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)


class Arena:
    """Allocates PAGE-aligned buffers, each at the lowest free address.

    Parameters
    ----------
    memory: uint8 [size], the bytes.
    base: physical address of the first one, a multiple of PAGE.
    """

    def __init__(self, memory: np.ndarray, base: int = MEMORY_BASE):
        self.memory, self.base = memory, base
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def alloc(self, size: int) -> Buffer:
        """A buffer with undefined contents. Raises DeviceError if no gap is large enough."""
        if size < 1:
            raise DeviceError(f"a buffer has at least 1 byte, not {size}")
        address = self.base
        for start in self._starts:
            if start - address >= size:
                break
            address = start + -(-self._sizes[start] // PAGE) * PAGE
        if address + size > self.base + len(self.memory):
            raise DeviceError(f"the device's memory ({len(self.memory):,} bytes) has no room for {size:,} more")
        bisect.insort(self._starts, address)
        self._sizes[address] = size
        return Buffer(address, size)

    def free(self, buffer: Buffer) -> None:
        """Frees a buffer. Raises DeviceError for a buffer that is not allocated."""
        self.view(buffer)
        self._starts.remove(buffer.address)
        del self._sizes[buffer.address]
        mapping = self.memory.base
        if isinstance(mapping, memoryview):
            mapping = mapping.obj
        if isinstance(mapping, mmap.mmap):
            with suppress(OSError):  # optional: it only returns memory earlier
                mapping.madvise(mmap.MADV_DONTNEED, buffer.address - self.base, buffer.size)

    def close(self) -> None:
        """Forgets all buffers and the memory, whose mapping then ends with the last view that somebody still has."""
        self.memory = np.empty(0, np.uint8)
        self._starts.clear()
        self._sizes.clear()

    def view(self, buffer: Buffer) -> np.ndarray:
        """The buffer's bytes: uint8 [size], writable. Raises DeviceError for a buffer that is not allocated."""
        if self._sizes.get(buffer.address) != buffer.size:
            raise _not_allocated(buffer)
        start = buffer.address - self.base
        return self.memory[start : start + buffer.size]

    def check(self, part: Buffer) -> None:
        """Raises DeviceError unless these bytes are in one allocated buffer."""
        index = bisect.bisect_right(self._starts, part.address) - 1
        start = self._starts[index] if index >= 0 else 0
        if index < 0 or part.address + part.size > start + self._sizes[start]:
            raise _not_allocated(part)

    def bytes(self, address: int, size: int) -> np.ndarray:
        """Bytes by their address: uint8 [size], writable, for jobs whose buffers were checked."""
        start = address - self.base
        return self.memory[start : start + size]


def _not_allocated(buffer: Buffer) -> DeviceError:
    return DeviceError(f"no buffer of {buffer.size:,} bytes is allocated at address {buffer.address:#x}")
