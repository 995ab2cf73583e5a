# SPDX-License-Identifier: Apache-2.0
"""The simulated core as a shared library: how it is built and how it is called.

sim.device builds it, in a process of its own; sim/device/core.cpp defines what is declared here.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_uint32, c_uint64, c_void_p
from pathlib import Path

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.manifest import Manifest, ManifestError
from sw.devices.base import DeviceError
from sw.errors import UserError

STREAMS = ("command", "weights", "activations", "results")
ALWAYS = 1 << 16
"""A stall that never ends; N of ALWAYS cycles are stalled."""


class _Segment(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("transfers", c_uint64)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("segments", POINTER(_Segment) * 4),
        ("segment_count", c_uint64 * 4),
        ("words", c_uint32 * 4),
        ("stall", c_uint32 * 4),
        ("seed", c_uint64),
        ("patience", c_uint64),
        ("finished", POINTER(c_uint64)),
        ("cycles", c_uint64),
        ("transfers", c_uint64 * 4),
        ("waited", c_uint64 * 4),
        ("underrun", c_uint32),
    ]


def build_library(config: AcceleratorConfig) -> tuple[Path, Path]:
    """(library, manifest) of the simulated core, built on first use; progress goes to stderr.

    Raises UserError with the builder's own line, a missing compiler's for example.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.to_dict().items()]
    problem = ""
    with subprocess.Popen(
        [sys.executable, "-m", "sim.device", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
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


class CoreLibrary:
    """One simulated core. Not for several threads at once.

    Members
    -------
    manifest: of the core inside.
    words: 32-bit words of one transfer, by stream.

    Raises DeviceError if the files are not what `config` describes.
    """

    def __init__(self, library: Path, manifest: Path, config: AcceleratorConfig):
        try:
            self.manifest = Manifest.load(manifest)
        except ManifestError as error:
            raise DeviceError(str(error)) from None
        if self.manifest.config != config:
            digest = self.manifest.config.digest
            raise DeviceError(f"{manifest}: hardware of config {digest[:16]}, and {config.digest[:16]} is needed")
        missing = [name for name in STREAMS if name not in self.manifest.streams]
        if missing:
            raise DeviceError(f"{manifest}: block {self.manifest.block} has no stream {missing[0]}")
        try:
            self._library = ctypes.CDLL(os.fspath(library))
        except OSError as error:
            raise DeviceError(f"{library} cannot be loaded ({error})") from None
        self._library.gm_open.restype = c_void_p
        self._library.gm_close.argtypes = self._library.gm_reset.argtypes = [c_void_p]
        self._library.gm_run.argtypes = [c_void_p, POINTER(_Batch)]
        self.words = {name: -(-self.manifest.streams[name].width // 32) for name in STREAMS}
        self._core = self._library.gm_open()

    def reset(self) -> None:
        """Forgets whatever the core was doing."""
        self._library.gm_reset(self._core)

    def close(self) -> None:
        """Frees the core; once only."""
        self._library.gm_close(self._core)

    def run(
        self,
        transfers: Mapping[str, Sequence[np.ndarray]],
        stalls: Mapping[str, int],
        seed: int,
        patience: int,
    ) -> "Run":
        """Clocks the core until the last array of results is full.

        transfers: by stream, uint32 arrays [transfers, words]; results are written to theirs. What follows the last
        result of one call may be continued in the next: no cycle lies between them.
        stalls: by stream, in how many of 65,536 cycles it pauses at random. patience: cycles without any transfer
        after which the run is given up.
        """
        batch = _Batch(seed=seed, patience=patience)
        for index, name in enumerate(STREAMS):
            arrays = transfers[name]
            assert all(a.dtype == np.uint32 and a.shape[1] == self.words[name] and a.flags.c_contiguous for a in arrays)
            batch.segments[index] = (_Segment * len(arrays))(*(_Segment(a.ctypes.data, len(a)) for a in arrays))
            batch.segment_count[index] = len(arrays)
            batch.words[index] = self.words[name]
            batch.stall[index] = stalls.get(name, 0)
        finished = (c_uint64 * len(transfers["results"]))()
        batch.finished = finished
        gave_up = bool(self._library.gm_run(self._core, ctypes.byref(batch)))
        return Run(batch, list(finished), gave_up)


class Run:
    """What one call did.

    Members
    -------
    gave_up: nothing moved for too long.
    cycles: of this call.
    finished: for each array of results, the cycle of its last transfer.
    taken: transfers, by stream.
    underrun: the core caught a design error.
    """

    def __init__(self, batch: _Batch, finished: list[int], gave_up: bool):
        self.gave_up = gave_up
        self.cycles = int(batch.cycles)
        self.finished = finished
        self.taken = {name: int(batch.transfers[index]) for index, name in enumerate(STREAMS)}
        self.underrun = bool(batch.underrun)
