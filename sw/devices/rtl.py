# SPDX-License-Identifier: Apache-2.0
"""The generated Verilog as a device: every job runs cycle by cycle through the simulated core."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hw.spec.command import LayerCommand
from hw.spec.config import EXPONENT_BITS, AcceleratorConfig
from hw.spec.layout import LayerLayout, ceil_div
from hw.spec.manifest import Port
from hw.spec.numerics import Activations
from sw.devices.base import Completion, DeviceError, LinearJob
from sw.devices.library import STREAMS, CoreLibrary, Run, build_library
from sw.devices.simulated import SimulatedDevice, Staged
from sw.errors import UserError

CYCLES_AT_ONCE = 300_000
"""Simulated cycles between two looks at whether someone wants the device to stop: a fraction of a second."""
PATIENCE = 100_000
"""Cycles without any transfer after which a batch is given up. The core's longest pause is a few thousand."""


class RtlDevice(SimulatedDevice):
    """The core under simulation, one batch after the other, each from an idle core.

    Parameters
    ----------
    config: the hardware; it is built on first use, which takes a compiler and about half a minute.
    files: (library, manifest) if they exist already.
    stalls: by stream ("command", "weights", "activations", "results"), in how many of 65,536 cycles it pauses at
        random; slower, with the same results.
    seed: of the stalls.
    patience: cycles without any transfer after which a batch is given up.

    Raises UserError if the hardware cannot be built, DeviceError if it is not that of `config`.
    """

    name = "rtl"

    def __init__(
        self,
        config: AcceleratorConfig,
        *,
        files: tuple[Path, Path] | None = None,
        stalls: Mapping[str, int] | None = None,
        seed: int = 1,
        patience: int = PATIENCE,
    ):
        unknown = set(stalls or {}) - set(STREAMS)
        if unknown:
            raise UserError(f"no stream is named {min(unknown)}: the core has {', '.join(STREAMS)}")
        self._core = CoreLibrary(*(files or build_library(config)), config)
        self._stalls, self._seed, self._patience = dict(stalls or {}), seed, patience
        super().__init__(config)

    def close(self) -> None:
        """See Device."""
        was_open = not self._closed
        super().close()
        if was_open:
            self._core.close()

    def run(self, staged: Sequence[Staged]) -> Iterator[Completion]:
        """See SimulatedDevice."""
        start = time.thread_time()
        feeds = self._feeds(staged)
        results = feeds["results"]
        ends = np.cumsum([len(array) for array in results.arrays])
        done = clock = before = 0
        while done < len(staged):
            if self.stopping.is_set():
                return
            # Without stalls the cut is invisible to the core; with random ones it could see an offer withdrawn.
            length = None if self._stalls else _transfers_at_once(staged[done].job, len(results.arrays[done]))
            part = {name: feed.next(length if feed is results else None) for name, feed in feeds.items()}
            run = self._core.run(part, self._stalls, self._seed, self._patience)
            for name, feed in feeds.items():
                feed.taken += run.taken[name]
            self._check(run, feeds, staged[done].job.name)
            for finished in run.finished:
                # The last array may have been cut off before its end.
                if results.taken < ends[done]:
                    break
                item = staged[done]
                self._store(item, results.arrays[done])
                now, end = time.thread_time(), clock + finished
                yield Completion(item.job.name, end - before, item.job.layout.beats, now - start)
                start, before = now, end
                done += 1
            clock += run.cycles
        left = [name for name, feed in feeds.items() if feed.taken != feed.total]
        if left:
            self._core.reset()
            raise DeviceError(f"the core gave all results and did not take all of the {left[0]} stream")

    def _check(self, run: Run, feeds: Mapping[str, "_Feed"], name: str) -> None:
        if run.gave_up:
            self._core.reset()
            places = [f"{key} {f.taken:,} of {f.total:,}" for key, f in feeds.items() if f.taken != f.total]
            raise DeviceError(
                f"layer {name}: the core moved nothing for {self._patience:,} cycles, and these streams still wait:"
                f" {', '.join(places)}"
            )
        if run.underrun:
            self._core.reset()
            raise DeviceError(f"layer {name}: the core read a scale before it was there")

    def _feeds(self, staged: Sequence[Staged]) -> dict[str, "_Feed"]:
        ports, words = self._core.manifest.streams, self._core.words
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in STREAMS}
        for item in staged:
            job = item.job
            command = LayerCommand.from_layer(job.layout, job.tokens, job.reuse).to_int(self.config)
            raw = command.to_bytes(4 * words["command"], "little")
            arrays["command"].append(np.frombuffer(raw, np.uint32).reshape(1, -1))
            arrays["weights"].append(_words(item.beats, words["weights"]))
            if not job.reuse:
                payload = activation_payload(self.config, ports["activations"], item.activations)
                arrays["activations"].append(_words(payload, words["activations"]))
            count = result_count(job.layout, job.tokens, ports["results"].fields["values"].elements)
            arrays["results"].append(np.zeros((count, words["results"]), np.uint32))
        return {name: _Feed(arrays[name]) for name in STREAMS}

    def _store(self, item: Staged, payload: np.ndarray) -> None:
        field = self._core.manifest.streams["results"].fields["values"]
        assert field.offset % 32 == 0 and field.width == 32 * field.elements
        values = payload[:, field.offset // 32 :][:, : field.elements]
        item.results[:] = gather_results(item.job.layout, item.job.tokens, values)


class _Feed:
    """All transfers of one stream in a batch, and how many of them have happened."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.total = sum(map(len, arrays))
        self.taken = 0

    def next(self, count: int | None = None) -> list[np.ndarray]:
        """The next `count` transfers, or all that are left, as slices of the arrays."""
        stop = self.total if count is None else self.taken + count
        parts, first = [], 0
        for array in self.arrays:
            part = array[max(self.taken - first, 0) : max(stop - first, 0)]
            if len(part):
                parts.append(part)
            first += len(array)
        return parts


def activation_payload(config: AcceleratorConfig, port: Port, activations: Activations) -> np.ndarray:
    """Mantissas and token exponents as the core takes them: uint8 [slices * M, bytes], slice by slice, all tokens of a
    slice in a row. The fields lie where the manifest's port says.
    """
    tokens, k = activations.mantissas.shape
    slices, width = k // config.tile, config.activation_bits
    rows = activations.mantissas.reshape(tokens, slices, config.tile).swapaxes(0, 1).reshape(-1, config.tile)
    exponents = np.tile(activations.exponents, slices)[:, None]
    bits = np.zeros((len(rows), port.width), np.uint8)
    for name, values, size in (("mantissas", rows, width), ("exponent", exponents, EXPONENT_BITS)):
        field = port.fields[name]
        raw = np.ascontiguousarray(values.astype("<i2")).view(np.uint8).reshape(*values.shape, 2)
        split = np.unpackbits(raw, axis=-1, bitorder="little", count=size)
        bits[:, field.offset : field.offset + field.width] = split.reshape(len(rows), -1)
    return np.packbits(bits, axis=1, bitorder="little")


def result_count(layout: LayerLayout, tokens: int, lanes: int) -> int:
    """Transfers of a layer's results: every token of an output tile begins a new one."""
    tile = layout.config.tile
    return tokens * ((layout.out_tiles - 1) * (tile // lanes) + ceil_div(layout.last_columns, lanes))


def gather_results(layout: LayerLayout, tokens: int, values: np.ndarray) -> np.ndarray:
    """Result transfers uint32 [count, lanes], as the core sends them, as float32 [M, N]."""
    tile, lanes = layout.config.tile, values.shape[1]
    y = np.empty((tokens, layout.n), np.uint32)
    whole = (layout.out_tiles - 1) * tile
    split = tokens * whole // lanes
    y[:, :whole] = values[:split].reshape(-1, tokens, tile).swapaxes(0, 1).reshape(tokens, whole)
    # The last tile's columns end inside a transfer where N is not a multiple of the lanes.
    y[:, whole:] = values[split:].reshape(tokens, -1)[:, : layout.n - whole]
    return y.view(np.float32)


def _words(payload: np.ndarray, words: int) -> np.ndarray:
    """Payloads uint8 [transfers, bytes] as uint32 [transfers, words]."""
    if payload.shape[1] != 4 * words:
        payload = np.pad(payload, ((0, 0), (0, 4 * words - payload.shape[1])))
    return np.ascontiguousarray(payload).view(np.uint32)


def _transfers_at_once(job: LinearJob, transfers: int) -> int:
    layout = job.layout
    slices = layout.out_tiles * layout.slices
    cycles = max(layout.beats, job.tokens * slices, transfers)
    return -(-transfers * CYCLES_AT_ONCE // cycles)
