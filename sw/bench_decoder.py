# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole models: cycles and host time of a token, peak memory, and whether devices agree.

    python -m sw.bench_decoder MODEL DEVICE OUT.npz [--tokens N] [--operators linear|decoder] [--score-words N]

`sw.bench` starts this command once for every device, because peak memory is measured per process. The command computes
a short prompt and N tokens one by one, and saves all logits and the figures.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from hw.spec.config import OPERATORS, AcceleratorConfig
from hw.spec.control.registers import (
    BY_NAME,
    COMPLETIONS,
    IDENTIFICATION,
    QUEUE_DEPTH,
    VERSION,
    WINDOW_BYTES,
    config_digest,
    offset,
)
from hw.spec.kv260 import FABRIC_HZ
from sw.common.errors import UserError, run_cli
from sw.devices import Device, open_device
from sw.devices.arena import MEMORY_BYTES, Arena, anonymous_memory
from sw.devices.driver import AcceleratorDevice
from sw.devices.platform import mask
from sw.export.resolve import cache_directory, resolve_model
from sw.graph.linears import find_linears
from sw.runtime import Usage
from sw.runtime.hardware import AUTO, ONNXRUNTIME, choose_config, layer_shapes
from sw.runtime.setup import make_decoder

PROMPT = tuple(range(40, 48))
CONTEXT = 256
SMOLLM2, QWEN = "smollm2", "qwen"
ATTENTION = "attention"
"""The operators of hardware with attention, in the figures."""
SCORE_WORDS = 4096
HOST_TOKENS = 64
INSTANT = "instant"
TIMEOUT = 1800
CAPABILITIES = {"queue_depth": QUEUE_DEPTH, "completions": COMPLETIONS}


class InstantPlatform:
    """Registers without an accelerator: each pushed descriptor is complete at once, and nothing is computed.

    A decoder on it takes the host's time of a token. A board uses no processor time, so the host's time beside a board
    is the same. Implements sw.devices.platform.Platform.

    Members, besides those of Platform
    -------
    accesses: number of reads and writes of registers so far.
    """

    def __init__(self, config: AcceleratorConfig):
        self.memory = Arena(anonymous_memory(MEMORY_BYTES))
        self.seconds = 0.0
        self.accesses = 0
        self._control, self._completed = offset("control"), offset("completed")
        self._length = offset("program_length")
        self._push, self._start = mask("control", "push"), mask("control", "start")
        fields = BY_NAME["capabilities"].field
        capabilities = sum(value << fields(name).low for name, value in CAPABILITIES.items())
        self._values = dict.fromkeys(range(0, WINDOW_BYTES, 4), 0) | {
            offset("identification"): IDENTIFICATION,
            offset("version"): VERSION,
            offset("config_digest"): config_digest(config),
            offset("capabilities"): capabilities,
        }

    def read_register(self, offset: int) -> int:
        """See Platform."""
        self.accesses += 1
        return self._values[offset]

    def write_register(self, offset: int, value: int) -> None:
        """See Platform."""
        self.accesses += 1
        self._values[offset] = value
        if offset == self._control and value & self._push:
            self._values[self._completed] += 1
        if offset == self._control and value & self._start:
            self._values[self._completed] += self._values[self._length]

    def write_registers(self, offsets_and_values: Mapping[int, int]) -> None:
        """See Platform."""
        for register, value in offsets_and_values.items():
            self.write_register(register, value)

    def wait_interrupt(self) -> bool:
        """See Platform."""
        return True

    def clock(self) -> float:
        """See Platform."""
        return 0.0

    def close(self) -> None:
        """See Platform."""


class InstantDevice(AcceleratorDevice):
    """The driver on an InstantPlatform."""

    name = INSTANT
    platform: InstantPlatform

    def __init__(self, config: AcceleratorConfig):
        super().__init__(config, InstantPlatform(config))


def _open(name: str, path: Path, operators: str, score_words: int) -> Device | None:
    if name == ONNXRUNTIME:
        return None
    options: dict[str, int | str] = {**AcceleratorConfig().to_dict(), **dict.fromkeys(AUTO, "auto")}
    options |= {"operators": operators, "score_words": score_words}
    config = choose_config(layer_shapes(find_linears(path)), options)
    return InstantDevice(config) if name == INSTANT else open_device(name, config)


def run(model: str, name: str, out: Path, tokens: int, operators: str, score_words: int = 0) -> None:
    """Runs a model and saves the logits of the prompt's last token and of all tokens after it, [tokens + 1, vocab], and
    the figures of the tokens. On the device "instant" these are greedy, so the logits are not read, and not saved, and
    the accesses to registers are counted.
    """
    path = resolve_model(model)
    device = _open(name, path, operators, score_words)
    platform = device.platform if isinstance(device, InstantDevice) else None
    with make_decoder(path, device, context=CONTEXT) as decoder:
        logits, usages, accesses = [decoder.forward(PROMPT)], [], []
        for index in range(tokens):
            before, ids = decoder.usage.copy(), [PROMPT[index % len(PROMPT)]]
            count = platform.accesses if platform else 0
            if platform:
                decoder.greedy(ids)
                accesses.append(platform.accesses - count)
            else:
                logits.append(decoder.forward(ids))
            usages.append(asdict(decoder.usage.since(before)))
    if device:
        device.close()
    figures = {"usages": usages, "accesses": accesses, "peak_bytes": peak_memory()}
    np.savez(out, logits=np.concatenate(logits), figures=json.dumps(figures))


def peak_memory() -> int:
    """Most bytes that this process has held, file mappings included. getrusage would count its parent's, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise UserError("this system does not report the memory of a process (/proc/self/status)")


class Measured(NamedTuple):
    """What a process measured: logits; figures of each token, and its accesses to registers; peak memory in bytes."""

    logits: np.ndarray
    usages: list[Usage]
    accesses: list[int]
    peak: int


def measure(
    model: str, name: str, tokens: int, operators: str = AcceleratorConfig.operators, score_words: int = 0
) -> Measured:
    """Runs a model in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [sys.executable, "-m", "sw.bench_decoder", model, name, str(out), "--tokens", str(tokens)]
        command += ["--operators", operators, "--score-words", str(score_words)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise UserError(f"{model} on {name}: {done.stderr.strip().splitlines()[-1:]}")
        with np.load(out) as saved:
            figures = json.loads(str(saved["figures"]))
            usages = [Usage(**usage) for usage in figures["usages"]]
            return Measured(saved["logits"], usages, figures["accesses"], figures["peak_bytes"])


def measure_host() -> list[dict]:
    """Host milliseconds of a token, medians, and its accesses to registers: beside a board that answers at once, and of
    SmolLM2 also beside a simulation.

    With operators "decoder" the model runs as programs, with "attention" as one, with attention on the device. The
    simulation runs on the same processor and displaces the host's data from its caches.
    """
    rows = []
    cases = [
        (SMOLLM2, INSTANT, "linear", HOST_TOKENS),
        (SMOLLM2, INSTANT, "decoder", HOST_TOKENS),
        (SMOLLM2, INSTANT, ATTENTION, HOST_TOKENS),
        (SMOLLM2, "rtl", "linear", HOST_TOKENS // 8),
        (QWEN, INSTANT, ATTENTION, HOST_TOKENS),
    ]
    for model, name, operators, tokens in cases:
        path = str(qwen_folder()) if model == QWEN else model
        hardware = ("decoder", SCORE_WORDS) if operators == ATTENTION else (operators, 0)
        _, usages, accesses, peak = measure(path, name, tokens, *hardware)
        parts = {
            part: 1e3 * median(getattr(usage, part) for usage in usages)
            for part in ("onnxruntime", "conversion", "driver")
        }
        host = 1e3 * median(usage.host for usage in usages)
        case = {"model": model, "device": name, "operators": operators}
        rows.append({**case, **parts, "host": host, "accesses": median(accesses or [0]), "peak_bytes": peak})
    return rows


def qwen_folder() -> Path:
    """A model of Qwen2.5-0.5B's shape with random weights, made on first use: see sw.synthetic."""
    from sw.synthetic import write_qwen2_awq

    folder = cache_directory() / "synthetic-qwen2.5-0.5b-awq"
    if not folder.is_dir():
        write_qwen2_awq(folder)
    return folder


def measure_qwen() -> dict:
    """One token of Qwen2.5-0.5B's shape, after a prompt of 8: on the simulated RTL, the reference and onnxruntime.

    programs: the same as programs, so with all operators but embedding and attention on the device.
    """
    model = str(qwen_folder())
    logits, usages, peaks = {}, {}, {}
    for name in ("rtl", "reference", ONNXRUNTIME):
        logits[name], usages[name], _, peaks[name] = measure(model, name, 1)
    usage, expected = usages["rtl"][0], logits[ONNXRUNTIME]
    return {
        "cycles": usage.cycles,
        "beats": usage.beats,
        "port_fraction": usage.beats / usage.cycles,
        **_token(usage, logits["rtl"], logits["reference"], expected),
        "peak_bytes": peaks,
        "programs": _measure_programs(model, expected),
    }


def _measure_programs(model: str, expected: np.ndarray) -> dict:
    """A model's token as programs. expected: onnxruntime's logits."""
    (rtl, usages, _, peak), (reference, *_) = (measure(model, name, 1, "decoder") for name in ("rtl", "reference"))
    (usage,) = usages
    return {"cycles": usage.cycles, **_token(usage, rtl, reference, expected), "peak_bytes": peak}


def _token(usage: Usage, rtl: np.ndarray, reference: np.ndarray, expected: np.ndarray) -> dict:
    """The speed of a token on the simulated RTL, and how its logits compare. expected: onnxruntime's logits."""
    return {
        "tokens_per_second": FABRIC_HZ / usage.cycles,
        "equals_reference": bool(np.array_equal(rtl.view(np.uint32), reference.view(np.uint32))),
        "relative_error": float(np.abs(rtl - expected).max() / np.abs(expected).max()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sw.bench_decoder")
    parser.add_argument("model")
    parser.add_argument("device")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--operators", choices=OPERATORS, default=AcceleratorConfig.operators)
    parser.add_argument("--score-words", type=int, default=0)
    options = parser.parse_args()
    run(options.model, options.device, options.out, options.tokens, options.operators, options.score_words)


if __name__ == "__main__":
    run_cli(main)
