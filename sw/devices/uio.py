# SPDX-License-Identifier: Apache-2.0
"""A device's registers and interrupt through Linux's userspace I/O.

Source: Documentation/driver-api/uio-howto.rst and drivers/uio/uio_pdrv_genirq.c of Linux. That driver disables the
interrupt when it fires; a write of 1 enables it again, and a read returns the count of interrupts so far.
"""

import errno
import os
import select
from contextlib import suppress
from dataclasses import dataclass

from sw.devices.base import DeviceError
from sw.devices.host import Host, Window

CLASS = "/sys/class/uio"
_ENABLE = (1).to_bytes(4, "little")


@dataclass(frozen=True)
class UioPlace:
    """The place of a UIO device. device: its path; address, size: address and size in bytes of its first map."""

    device: str
    address: int
    size: int


def find_uio(host: Host, name: str) -> UioPlace | None:
    """The UIO device of this name. Raises DeviceError if its values in sysfs are not valid."""
    # In some kernels the unit's address is part of the name.
    for entry in sorted(host.path(CLASS).glob("uio*")):
        text = host.read(f"{CLASS}/{entry.name}/name") or ""
        if text == name or text.endswith(f".{name}"):
            values = [host.read(f"{CLASS}/{entry.name}/maps/map0/{item}") for item in ("addr", "size")]
            try:
                address, size = (int(value or "", 16) for value in values)
            except ValueError:
                raise DeviceError(f"{CLASS}/{entry.name}/maps/map0 has no address and size") from None
            return UioPlace(f"/dev/{entry.name}", address, size)
    return None


class _Closed:
    """The registers of a device that was closed."""

    def __getitem__(self, index: int, /) -> int:
        raise DeviceError("the accelerator is closed")

    def __setitem__(self, index: int, value: int, /) -> None:
        raise DeviceError("the accelerator is closed")

    def release(self) -> None:
        """Does nothing."""


class Uio:
    """One UIO device: its first map, and its interrupt if it has one.

    Members
    -------
    window: the registers.
    has_interrupt: whether the kernel has an interrupt for the device.

    Raises DeviceError if the device cannot be opened or mapped.
    """

    def __init__(self, host: Host, place: UioPlace):
        self._host, self.place = host, place
        self._fd = host.open(place.device, os.O_RDWR, "load the app again")
        try:
            self.window: Window = host.map_registers(self._fd, place.size)
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)
            # If there is no interrupt, the kernel refuses to enable it.
            self.has_interrupt = self.arm()
        except BaseException:
            os.close(self._fd)
            raise

    def arm(self) -> bool:
        """Enables the interrupt; if the line is already high, it fires at once. Returns whether there is one."""
        try:
            self._host.write(self._fd, _ENABLE)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSYS):
                return False
            raise DeviceError(f"{self.place.device}: the interrupt cannot be turned on ({error.strerror})") from None
        return True

    def wait(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds for the armed interrupt and reads its count; returns whether it fired."""
        if not self._poll.poll(1000 * timeout):
            return False
        try:
            os.read(self._fd, 4)
        except OSError as error:
            raise DeviceError(f"{self.place.device}: the interrupt cannot be read ({error.strerror})") from None
        return True

    def close(self) -> None:
        """Closes the device."""
        self.window.release()
        self.window = _Closed()
        with suppress(OSError):
            os.close(self._fd)
