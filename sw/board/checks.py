# SPDX-License-Identifier: Apache-2.0
"""The doctor's checks of a board, from its files to single results, each with a fix.

Registers are read only if the app is loaded: if nothing in the fabric answers, an access stops the machine.
"""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from hw.spec.control.registers import IDENTIFICATION, VERSION, WINDOW_BYTES, config_digest, offset
from hw.spec.kv260 import APP_NAME, BUFFER_BYTES, BUFFER_NAME, CONTROL_ADDRESS, FABRIC_HZ, UIO_NAME
from hw.spec.manifest import Manifest
from sw.board.layers import interrupt_check, program_check, result_check, stream_check
from sw.common.errors import one_line
from sw.devices.base import DeviceError
from sw.devices.host import Host
from sw.devices.kv260 import FIRMWARE, LOAD, KV260Device, board_manifest
from sw.devices.udmabuf import FIX as BUFFER_FIX
from sw.devices.udmabuf import BusyError, DmaBuffer, find_buffer, problem
from sw.devices.uio import Uio, find_uio

OK, WRONG, UNKNOWN = "ok", "wrong", "cannot tell"
FPGA = "/sys/class/fpga_manager/fpga0"
FIRMWARE_NAME = "/proc/device-tree/fpga-full/firmware-name"
DDR_CLOCK = "/sys/kernel/debug/clk/ddr_ref/clk_rate"
FABRIC_CLOCK = "/sys/kernel/debug/clk/pl0_ref/clk_rate"
LOW_MEMORY = 1 << 32
"""Memory below this has 32-bit addresses; the bitstream's address map may not include the rest."""
CLOCK_TOLERANCE = 0.03
CLOCK_SECONDS, CLOCK_TRIES = 1e-3, 3
LEAST_TRANSFERS = 2100e6
"""Least transfers of the memory per second: this board has been reported with 2133 and 2400 MT/s."""
COPY = f"copy the app folder of this bitstream to {FIRMWARE}, then {LOAD}"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. status: OK, WRONG or UNKNOWN; fix: how to fix the fault, or empty."""

    check: str
    status: str
    text: str
    fix: str = ""


def examine(host: Host, clock_hz: float = FABRIC_HZ) -> Iterator[Finding]:
    """Every check, each after the checks that it depends on. clock_hz: the clock that the bitstream is timed for."""
    wrong: list[str] = []

    def note(finding: Finding) -> Finding:
        if finding.status == WRONG:
            wrong.append(finding.check)
        return finding

    manifest: Manifest | None = None
    for check in (app, firmware, registers, buffer, memory_clock):
        yield note(check(host))
    try:
        manifest = board_manifest(host)
        yield Finding("manifest", OK, f"config {manifest.config.digest[:16]}, tile {manifest.config.tile}")
    except DeviceError as error:
        yield note(Finding("manifest", WRONG, str(error)))
    names = ("exclusive use", "identification", "version", "configuration", "fabric clock")
    if "app" in wrong or "registers" in wrong:
        yield from _skipped(names, wrong[0])
        yield from _skipped(DEVICE_CHECKS, wrong[0])
        return
    hz = float(clock_hz)
    with ExitStack() as stack:
        try:
            # The buffer's lock says whether another process uses the board.
            memory = open_buffer(host)
            stack.callback(memory.close)
            yield Finding(names[0], OK, "no other process uses the accelerator")
        except BusyError as error:
            yield note(Finding(names[0], WRONG, str(error)))
            yield from _skipped((*names[1:], *DEVICE_CHECKS), names[0])
            return
        except DeviceError:
            memory = None
            yield from _skipped(names[:1], "buffer")
        place = find_uio(host, UIO_NAME)
        assert place is not None
        try:
            uio = Uio(host, place)
        except DeviceError as error:
            yield note(Finding(names[1], WRONG, str(error)))
            yield from _skipped((*names[2:], *DEVICE_CHECKS), names[1])
            return
        stack.callback(uio.close)
        yield note(identification(uio))
        if wrong and wrong[-1] == names[1]:
            yield from _skipped((*names[2:], *DEVICE_CHECKS), names[1])
            return
        yield note(version(uio))
        yield note(configuration(uio, manifest))
        hz = measure_clock(host, uio)
        yield note(fabric_clock(host, hz, clock_hz))
    needed = {"manifest", "version", "configuration"} & set(wrong)
    if memory is None:
        yield from _skipped(DEVICE_CHECKS, "buffer")
    elif needed:
        yield from _skipped(DEVICE_CHECKS, min(needed, key=wrong.index))
    else:
        yield from device_checks(host, hz)


def _skipped(checks: tuple[str, ...], because: str) -> Iterator[Finding]:
    for check in checks:
        yield Finding(check, UNKNOWN, f"not checked, because of: {because}")


def app(host: Host) -> Finding:
    """Whether the fabric holds this design, according to the kernel."""
    check = "app"
    missing = [
        name
        for name in (f"{APP_NAME}.bit.bin", f"{APP_NAME}.dtbo", "shell.json")
        if not host.path(f"{FIRMWARE}/{name}").is_file()
    ]
    state = host.read(f"{FPGA}/state")
    if state != "operating":
        text = f"the FPGA manager's state is {state!r}" if state else f"{FPGA}/state is not there: no Kria?"
        return Finding(check, WRONG, f"the fabric is not configured: {text}", COPY if missing else LOAD)
    overlays = host.path("/sys/kernel/config/device-tree/overlays")
    try:
        loaded = sorted(entry.name for entry in overlays.iterdir()) if overlays.is_dir() else None
    except OSError:
        loaded = None
    if loaded is not None and not any(APP_NAME in name for name in loaded):
        text = f"app {APP_NAME} is not loaded: overlays are {', '.join(loaded) or 'none'}"
        return Finding(check, WRONG, text, COPY if missing else LOAD)
    if missing:
        return Finding(check, WRONG, f"{FIRMWARE} has no {missing[0]}", COPY)
    if loaded is None:
        return Finding(check, UNKNOWN, "the overlays cannot be read", "run it with sudo, or: sudo xmutil listapps")
    return Finding(check, OK, f"{APP_NAME} is loaded")


def firmware(host: Host) -> Finding:
    """Whether the device tree names this bitstream."""
    check, name = "firmware", host.read(FIRMWARE_NAME)
    if name is None:
        return Finding(check, UNKNOWN, f"{FIRMWARE_NAME} cannot be read", "sudo xmutil listapps")
    if name != f"{APP_NAME}.bit.bin":
        return Finding(check, WRONG, f"the device tree names {name!r}, not {APP_NAME}.bit.bin", LOAD)
    return Finding(check, OK, f"{name} is in the fabric")


def registers(host: Host) -> Finding:
    """Whether the registers can be accessed, and are at the address of the bitstream."""
    check = "registers"
    try:
        place = find_uio(host, UIO_NAME)
        if place is None:
            fix = f"sudo modprobe uio_pdrv_genirq of_id=generic-uio; then {LOAD}"
            return Finding(check, WRONG, f"there is no UIO device named {UIO_NAME}", fix)
        if place.address != CONTROL_ADDRESS or place.size < WINDOW_BYTES:
            text = f"{place.device} has {place.size:#x} bytes at {place.address:#x} instead of {CONTROL_ADDRESS:#x}"
            return Finding(check, WRONG, text, COPY)
        Uio(host, place).close()
    except DeviceError as error:
        return Finding(check, WRONG, str(error))
    return Finding(check, OK, f"{place.device} at {place.address:#x}")


def open_buffer(host: Host) -> DmaBuffer:
    """The buffer, locked until it is closed. Raises DeviceError."""
    place = find_buffer(host, BUFFER_NAME)
    if place is None:
        raise DeviceError(f"there is no u-dma-buf named {BUFFER_NAME}")
    return DmaBuffer(host, place)


def buffer(host: Host) -> Finding:
    """Whether there is memory for the accelerator, large enough and at an address that the accelerator can access."""
    check = "buffer"
    try:
        place = find_buffer(host, BUFFER_NAME)
        if place is None:
            return Finding(check, WRONG, f"there is no u-dma-buf named {BUFFER_NAME}", BUFFER_FIX)
        if text := problem(place):
            return Finding(check, WRONG, text, "correct its node in the overlay and load the app again")
        with suppress(BusyError):
            open_buffer(host).close()
    except DeviceError as error:
        return Finding(check, WRONG, str(error))
    if place.address + place.size > LOW_MEMORY:
        text = f"it is at {place.address:#x}, not below 4 GiB"
        return Finding(check, WRONG, text, "give the overlay's buffer dma-mask = <32> and load the app again")
    if place.size < BUFFER_BYTES:
        # If there were too little contiguous memory, there would be no buffer at all: so the overlay requests less.
        text = f"it has {place.size:,} bytes instead of {BUFFER_BYTES:,}: large models do not fit"
        fix = f"the loaded overlay has another size than <{BUFFER_BYTES:#x}>: {COPY}"
        return Finding(check, WRONG, text, fix)
    return Finding(check, OK, f"{place.size:,} bytes at {place.address:#x}")


def memory_clock(host: Host) -> Finding:
    """The DDR's clock according to the kernel; only root can read it."""
    check, text = "memory clock", host.read(DDR_CLOCK)
    if text is None or not text.isdigit():
        return Finding(check, UNKNOWN, f"{DDR_CLOCK} cannot be read", "run it with sudo; see memory rate")
    # This is the controller's clock. The memory's clock is twice as fast, with two transfers in each cycle.
    transfers = 4 * int(text)
    rate = f"{transfers / 1e6:,.0f} MT/s, {8 * transfers / 1e9:.1f} GB/s at most"
    if transfers < LEAST_TRANSFERS:
        return Finding(check, WRONG, rate, "update the boot firmware: sudo xmutil bootfw_status, bootfw_update")
    return Finding(check, OK, rate)


def identification(uio: Uio) -> Finding:
    """Whether the hardware is a Gristmill accelerator."""
    found = uio.window[offset("identification") // 4]
    status = OK if found == IDENTIFICATION else WRONG
    return Finding("identification", status, f"register reads {found:#x}", "" if status == OK else COPY)


def version(uio: Uio) -> Finding:
    """Whether the registers have the version that this software supports."""
    found = uio.window[offset("version") // 4]
    if found == VERSION:
        return Finding("version", OK, f"registers of version {found}")
    text = f"the registers have version {found}, this software supports {VERSION}"
    return Finding("version", WRONG, text, "build the bitstream from this checkout, or use the bitstream's software")


def configuration(uio: Uio, manifest: Manifest | None) -> Finding:
    """Whether the hardware in the fabric is the manifest's."""
    check, found = "configuration", uio.window[offset("config_digest") // 4]
    if manifest is None:
        return Finding(check, UNKNOWN, f"{found:08x}; not checked, because of: manifest")
    if found != config_digest(manifest.config):
        text = f"the hardware was built from config {found:08x}, the manifest has {config_digest(manifest.config):08x}"
        return Finding(check, WRONG, text, f"copy the manifest of this bitstream to {FIRMWARE}, or {LOAD}")
    return Finding(check, OK, f"{found:08x}, the manifest's")


def measure_clock(host: Host, uio: Uio) -> float:
    """The fabric's clock in Hz, from its cycle counter. Of several short measurements, the one whose start and end are
    known most precisely is taken.
    """
    counter, window = offset("cycles") // 4, uio.window

    def look() -> tuple[float, int, float]:
        before = host.monotonic()
        return before, window[counter], host.monotonic()

    found = []
    for _ in range(CLOCK_TRIES):
        first = look()
        host.sleep(CLOCK_SECONDS)
        last = look()
        seconds = (last[0] + last[2] - first[0] - first[2]) / 2
        found.append((last[2] - last[0] + first[2] - first[0], (last[1] - first[1]) % (1 << 32) / seconds))
    return min(found)[1]


def fabric_clock(host: Host, hz: float, wanted: float) -> Finding:
    """Whether the fabric runs at the clock that it is timed for. With a slower clock results are right, but late."""
    check, text = "fabric clock", f"{hz / 1e6:.1f} MHz, measured with the cycle counter"
    if abs(hz / wanted - 1) <= CLOCK_TOLERANCE:
        return Finding(check, OK, text)
    believed = host.read(FABRIC_CLOCK)
    said = f" (the kernel says {int(believed) / 1e6:.1f})" if believed and believed.isdigit() else ""
    fix = f"the overlay must set it: {LOAD}, and look for xlnx,fclk in dmesg"
    return Finding(check, WRONG, f"{text}{said}, instead of {wanted / 1e6:.1f}", fix)


DEVICE_CHECKS = ("interrupt", "self-test", "programs", "memory rate")


def device_checks(host: Host, hz: float) -> Iterator[Finding]:
    """The checks that need the driver and run layers. hz: the measured clock."""
    try:
        device = KV260Device(host=host)
    except DeviceError as error:
        yield Finding(DEVICE_CHECKS[0], WRONG, one_line(error))
        yield from _skipped(DEVICE_CHECKS[1:], DEVICE_CHECKS[0])
        return
    with device:
        for check, run in zip(DEVICE_CHECKS, (interrupt_check, result_check, program_check, stream_check)):
            try:
                text, fix = run(device, hz)
                yield Finding(check, WRONG if fix else OK, text, fix)
            except DeviceError as error:
                yield Finding(
                    check, WRONG, one_line(error), "the ports' address map, or the clock: see the lines above"
                )
