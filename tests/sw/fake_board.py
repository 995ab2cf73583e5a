# SPDX-License-Identifier: Apache-2.0
"""A KV260 in a temporary folder: the files that driver and doctor look at, and the simulated accelerator behind them.

Files, locks, mappings, poll and read are real. Two things stand for the kernel and the fabric: what a write to a device
or an attribute does at once, and the registers. The accelerator's memory is not the file that the driver maps: only
syncs copy between them, whole cache lines, as caches would at worst. A sync that is missing gives wrong results.
"""

import errno
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np

from hw.spec import kv260 as board
from hw.spec.config import AcceleratorConfig
from hw.spec.control.registers import offset
from sw.devices.arena import MEMORY_BASE
from sw.devices.host import Host
from sw.devices.kv260 import FIRMWARE
from sw.devices.library import SimulatedPlatform, build_library

UIO = "/sys/class/uio/uio4"
BUFFER = f"/sys/class/u-dma-buf/{board.BUFFER_NAME}"
DEVICE_TREE = "/proc/device-tree"
FPGA = "/sys/class/fpga_manager/fpga0"
OVERLAY = f"/sys/kernel/config/device-tree/overlays/{board.APP_NAME}_image_0"
DDR_CLOCK = "/sys/kernel/debug/clk/ddr_ref/clk_rate"
ADDRESS = MEMORY_BASE + 0x1234_5000
SIZE = board.BUFFER_BYTES


@cache
def library_of(config: AcceleratorConfig) -> tuple[Path, Path]:
    """The simulated accelerator and its manifest: see sw.devices.library.build_library."""
    return build_library(config)


class FakeBoard(Host):
    """The board as a Host.

    Parameters
    ----------
    root: an empty folder.
    memory: preset of the simulated memory.
    clock_hz: of the fabric: a second of this host is so many simulated cycles.

    Members
    -------
    overrides: what registers (byte offsets) answer instead.
    denied: paths that this user may not open.
    has_interrupt, interrupt_arrives: whether the kernel knows of one, and whether it ever comes.
    syncs: False: caches are never cleaned nor invalidated.
    flips: True: one bit of all results is wrong.
    """

    def __init__(self, root: Path, config: AcceleratorConfig, memory: str = "ideal", clock_hz: float = board.FABRIC_HZ):
        super().__init__(root)
        library, manifest = library_of(config)
        self.simulated = SimulatedPlatform(library, manifest, config, memory)
        self.config, self.clock_hz = config, clock_hz
        self.overrides: dict[int, int] = {}
        self.denied: set[str] = set()
        self.has_interrupt = self.interrupt_arrives = self.syncs = True
        self.flips = False
        self.interrupts = self.waited = 0
        self.commands: list[tuple[str, int, int, int]] = []
        self.skipped = 0
        self._make_files(manifest)

    def _make_files(self, manifest: Path) -> None:
        app = board.APP_NAME
        for name, text in {
            f"{FPGA}/state": "operating\n",
            f"{OVERLAY}/status": "applied\n",
            f"{DEVICE_TREE}/fpga-full/firmware-name": f"{app}.bit.bin\0",
            f"{FIRMWARE}/{app}.bit.bin": "",
            f"{FIRMWARE}/{app}.dtbo": "",
            f"{FIRMWARE}/shell.json": "{}",
            f"{UIO}/name": f"{board.UIO_NAME}\n",
            f"{UIO}/maps/map0/addr": f"{board.CONTROL_ADDRESS:#010x}\n",
            f"{UIO}/maps/map0/size": f"{board.CONTROL_BYTES:#010x}\n",
            f"{BUFFER}/phys_addr": f"{ADDRESS:#018x}\n",
            f"{BUFFER}/size": f"{SIZE}\n",
            f"{BUFFER}/dma_coherent": "0\n",
            f"{BUFFER}/sync_for_cpu": "0\n",
            f"{BUFFER}/sync_for_device": "0\n",
            DDR_CLOCK: "533328000\n",
        }.items():
            self.put(name, text)
        shutil.copy(manifest, self.path(f"{FIRMWARE}/manifest.json"))
        self.path("/dev").mkdir()
        os.mkfifo(self.path("/dev/uio4"))
        self.put("/dev/mem", "")
        with self.path(f"/dev/{board.BUFFER_NAME}").open("wb") as file:
            file.truncate(SIZE)
        self.cached = np.memmap(self.path(f"/dev/{board.BUFFER_NAME}"), np.uint8, "r+")
        start = ADDRESS - self.simulated.memory.base
        self.memory = self.simulated.memory.memory[start : start + SIZE]
        # What memory holds is not what a cache holds.
        self.memory[: 4 << 20] = 0x55

    def put(self, name: str, text: str) -> None:
        """Writes a file."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def remove(self, name: str) -> None:
        """Removes a file or a folder."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def _open(self, path: Path, flags: int) -> int:
        if any(path == self.path(name) for name in self.denied):
            raise PermissionError(errno.EACCES, "Permission denied")
        return super()._open(path, flags)

    def map_registers(self, fd: int, size: int, offset: int = 0) -> "SimulatedWindow":
        """See Host."""
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        assert (size, offset) == (board.CONTROL_BYTES, board.CONTROL_ADDRESS if name == "mem" else 0)
        return SimulatedWindow(self)

    def write(self, fd: int, data: bytes) -> None:
        """See Host: what the kernel does at once."""
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path == self.path("/dev/uio4"):
            assert data == b"\1\0\0\0"
            self._turn_on(fd)
        else:
            command = int(data, 0)
            start, size, direction = command >> 32, command & 0xFFFF_FFF0, command >> 2 & 3
            assert command & 1
            assert start % 64 == size % 64 == 0 < size, "a part of a cache line"
            if start + size > SIZE:
                raise OSError(errno.EINVAL, "Invalid argument")
            self._sync(path.name, slice(start, start + size), direction)

    def _turn_on(self, fd: int) -> None:
        if not self.has_interrupt:
            raise OSError(errno.EIO, "Input/output error")
        # The fabric goes on while the driver waits for it; idle, it need not be simulated.
        if not self.simulated.read_register(offset("status")):
            return
        if self.simulated.wait_interrupt() and self.interrupt_arrives:
            self.interrupts += 1
            os.write(fd, self.interrupts.to_bytes(4, "little"))

    def _sync(self, name: str, part: slice, direction: int) -> None:
        self.commands.append((name, part.start, part.stop - part.start, direction))
        if not self.syncs:
            return
        if name == "sync_for_device":
            assert direction != 2, "some kernels would invalidate"
            self.memory[part] = self.cached[part]
        else:
            assert name == "sync_for_cpu" and direction == 2
            self.cached[part] = self.memory[part]
            if self.flips:
                self.cached[part.start] ^= 1

    def monotonic(self) -> float:
        """See Host."""
        library, device = self.simulated._library, self.simulated._device
        return (library.gm_cycles(device) + self.skipped) / self.clock_hz

    def sleep(self, seconds: float) -> None:
        """See Host. Nothing happens meanwhile, so that it is not simulated."""
        self.skipped += round(seconds * self.clock_hz)

    def close(self) -> None:
        """Ends the simulation."""
        self.simulated.close()


class SimulatedWindow:
    """Registers by index."""

    def __init__(self, fake: FakeBoard):
        self._fake, self._high = fake, 0

    def __getitem__(self, index: int, /) -> int:
        fake, place = self._fake, 4 * index
        if place == offset("cycles", 1):
            return self._high
        value = fake.simulated.read_register(place)
        if place == offset("cycles"):
            value += (fake.simulated.read_register(offset("cycles", 1)) << 32) + fake.skipped
            self._high, value = value >> 32, value & 0xFFFF_FFFF
        return fake.overrides.get(place, value)

    def __setitem__(self, index: int, value: int, /) -> None:
        self._fake.simulated.write_register(4 * index, value)

    def release(self) -> None:
        """See sw.devices.host.Window."""
