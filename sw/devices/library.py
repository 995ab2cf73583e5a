# SPDX-License-Identifier: Apache-2.0
"""Builds and calls the simulated accelerator, which is a shared library.

sim.device builds it, in a process of its own; sim/device/accelerator.cpp defines the functions that are declared here.
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from ctypes import c_char_p, c_double, c_int, c_uint32, c_uint64, c_void_p
from itertools import chain
from pathlib import Path
from typing import Any

from hw.spec.config import AcceleratorConfig, option
from hw.spec.manifest import Manifest, ManifestError
from hw.spec.memory.faults import Fault
from hw.spec.memory.operands import ADDRESS_BITS
from sw.common.errors import UserError
from sw.devices.arena import MEMORY_BYTES, Arena, anonymous_memory
from sw.devices.base import DeviceError

MEMORIES = ("ideal", "kv260-2400", "kv260-2133", "hostile")
"""Presets of the memory model; sim/device describes them."""
CYCLES_AT_ONCE = 100_000
"""Simulated cycles of one wait for the interrupt: about a tenth of a second."""


class Statistics(ctypes.Structure):
    """Counts of the memory so far. Lengths of bursts are in bytes."""

    _fields_ = [
        ("read_bytes", c_uint64),
        ("write_bytes", c_uint64),
        ("read_bursts", c_uint64),
        ("write_bursts", c_uint64),
        ("refreshes", c_uint64),
        ("row_misses", c_uint64),
        ("port_read_beats", c_uint64 * 4),
        ("shortest_write_burst", c_uint64),
        ("longest_write_burst", c_uint64),
    ]


_FUNCTIONS: dict[str, tuple[Any, tuple]] = {
    "gm_open": (c_void_p, (c_char_p, c_uint64)),
    "gm_close": (None, (c_void_p,)),
    "gm_map": (c_int, (c_void_p, c_uint64, c_uint64, c_void_p)),
    "gm_write_register": (c_int, (c_void_p, c_uint32, c_uint32)),
    "gm_write_registers": (c_int, (c_void_p, c_void_p, c_uint32, ctypes.POINTER(c_uint32))),
    "gm_read_register": (c_int, (c_void_p, c_uint32, ctypes.POINTER(c_uint32))),
    "gm_run": (c_int, (c_void_p, c_uint64)),
    "gm_problem": (c_char_p, (c_void_p,)),
    "gm_cycles": (c_uint64, (c_void_p,)),
    "gm_fault": (None, (c_void_p, c_int, c_uint64, c_uint64)),
    "gm_statistics": (None, (c_void_p, ctypes.POINTER(Statistics))),
    "gm_stream_limit": (c_double, (c_char_p, c_uint32, c_uint32, c_uint64, c_uint64)),
}


def build_library(config: AcceleratorConfig) -> tuple[Path, Path]:
    """(library, manifest) of the simulated core, built on first use; progress goes to stderr.

    Raises UserError with the builder's message, for example about a missing compiler.
    """
    options = [f"{option(name)}={value}" for name, value in config.to_dict().items()]
    problem = ""
    with _start_builder(options) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("error: "):
                    problem = line.removeprefix("error: ").strip()
                elif line.strip():
                    problem = problem or line.strip()
                    print(line.rstrip(), file=sys.stderr, flush=True)
            answer = process.stdout.read()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise UserError(f"the simulated device could not be built: {problem or f'status {process.returncode}'}")
    places = json.loads(answer)
    return Path(places["library"]), Path(places["manifest"])


def _start_builder(options: list[str]) -> subprocess.Popen[str]:
    """The builder in a process of its own: sw imports nothing of sim."""
    return subprocess.Popen(
        [sys.executable, "-m", "sim.device", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


class SimulatedPlatform:
    """The verilated accelerator and its memory model. Implements sw.devices.platform.Platform; thread-safe.

    Parameters
    ----------
    preset: the memory model, one of MEMORIES.
    seed: seed of the memory model's random delays.

    Raises UserError for an unknown preset, DeviceError if the files do not match `config`.
    """

    def __init__(self, library: Path, manifest: Path, config: AcceleratorConfig, preset: str, seed: int = 1):
        check_preset(preset)
        try:
            self.manifest = Manifest.load(manifest)
        except ManifestError as error:
            raise DeviceError(str(error)) from None
        if self.manifest.config != config:
            digest = self.manifest.config.digest
            raise DeviceError(f"{manifest}: hardware of config {digest[:16]}, and {config.digest[:16]} is needed")
        if self.manifest.block != "accelerator":
            raise DeviceError(f"{manifest}: block {self.manifest.block} is not the whole accelerator")
        try:
            self._library = ctypes.CDLL(os.fspath(library))
        except OSError as error:
            raise DeviceError(f"{library} cannot be loaded ({error})") from None
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self.preset = preset
        self.seconds = self._processor = 0.0
        self.memory = Arena(anonymous_memory(MEMORY_BYTES))
        self._lock = threading.Lock()
        self._device = self._library.gm_open(preset.encode(), seed)
        bytes_at = self.memory.memory.ctypes.data
        if self._library.gm_map(self._device, self.memory.base, MEMORY_BYTES, bytes_at):
            raise DeviceError("the simulated memory could not be mapped")

    def _call(self, function: Callable, *arguments: Any) -> int:
        with self._lock:
            if self._device is None:
                raise DeviceError("the simulated accelerator is closed")
            wall, processor = time.perf_counter(), time.thread_time()
            status = function(self._device, *arguments)
            # Processor time of the calling thread, which may be another one in each call.
            self._processor += time.thread_time() - processor
            self.seconds += time.perf_counter() - wall
            if status == -2:
                problem = self._library.gm_problem(self._device).decode()
                raise DeviceError(f"the hardware broke a rule of the bus: {problem}")
        return status

    def _check(self, status: int, what: str, offset: int) -> None:
        if status:
            reason = "did not answer" if status < 0 else f"answered with error {status}"
            raise DeviceError(f"the control port {reason} when register {offset:#x} was {what}")

    def read_register(self, offset: int) -> int:
        """See Platform."""
        value = c_uint32()
        self._check(self._call(self._library.gm_read_register, offset, ctypes.byref(value)), "read", offset)
        return value.value

    def write_register(self, offset: int, value: int) -> None:
        """See Platform."""
        self._check(self._call(self._library.gm_write_register, offset, value), "written", offset)

    def write_registers(self, offsets_and_values: Mapping[int, int]) -> None:
        """See Platform."""
        pairs, failed = list(offsets_and_values.items()), c_uint32()
        words = (c_uint32 * (2 * len(pairs)))(*chain.from_iterable(pairs))
        status = self._call(self._library.gm_write_registers, words, len(pairs), ctypes.byref(failed))
        if status:
            self._check(status, "written", pairs[failed.value][0])

    def wait_interrupt(self) -> bool:
        """See Platform: runs the simulation."""
        return self._call(self._library.gm_run, CYCLES_AT_ONCE) == 1

    def clock(self) -> float:
        """See Platform: processor time of the simulation so far."""
        return self._processor

    def fault(self, fault: Fault, address: int = 0, size: int = 1 << ADDRESS_BITS) -> None:
        """Injects a fault into a range of addresses of the memory; Fault.NONE removes all faults."""
        with self._lock:
            self._library.gm_fault(self._device, fault, address, size)

    def statistics(self) -> Statistics:
        """Counts of the memory so far."""
        statistics = Statistics()
        with self._lock:
            self._library.gm_statistics(self._device, ctypes.byref(statistics))
        return statistics

    def memory_limit(self, seed: int, cycles: int = 200_000) -> float:
        """Bytes per cycle of this memory for endless contiguous reads on all ports, simulated without the accelerator.

        seed: chooses the addresses that are read.
        """
        config = self.manifest.config
        return self._library.gm_stream_limit(self.preset.encode(), config.ports, config.port_width // 8, cycles, seed)

    def close(self) -> None:
        """See Platform; closing twice is harmless."""
        with self._lock:
            if self._device is not None:
                self._library.gm_close(self._device)
                self._device = None
                self.memory.close()


def check_preset(preset: str) -> None:
    """Raises UserError if there is no memory model of this name."""
    if preset not in MEMORIES:
        raise UserError(f"memory is one of {', '.join(MEMORIES)}, not {preset}")
