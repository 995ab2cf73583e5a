# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole models: cycles and host time of a token, peak memory, and whether devices agree.

    python -m sw.bench_decoder MODEL DEVICE OUT.npz [--tokens N] [--operators linear|decoder]

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
SMOLLM2 = "smollm2"
HOST_TOKENS = 64
INSTANT = "instant"
TIMEOUT = 1800
CAPABILITIES = {"queue_depth": QUEUE_DEPTH, "completions": COMPLETIONS}


class InstantPlatform:
    """Registers without an accelerator: each pushed descriptor is complete at once, and nothing is computed.

    A decoder on it takes the host's time of a token. A board uses no processor time, so the host's time beside a board
    is the same. Implements sw.devices.platform.Platform.
    """

    def __init__(self, config: AcceleratorConfig):
        self.memory = Arena(anonymous_memory(MEMORY_BYTES))
        self.seconds = 0.0
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
        return self._values[offset]

    def write_register(self, offset: int, value: int) -> None:
        """See Platform."""
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

    def __init__(self, config: AcceleratorConfig):
        super().__init__(config, InstantPlatform(config))


def _open(name: str, path: Path, operators: str) -> Device | None:
    if name == ONNXRUNTIME:
        return None
    options: dict[str, int | str] = {**AcceleratorConfig().to_dict(), **dict.fromkeys(AUTO, "auto")}
    options["operators"] = operators
    config = choose_config(layer_shapes(find_linears(path)), options)
    return InstantDevice(config) if name == INSTANT else open_device(name, config)


def run(model: str, name: str, out: Path, tokens: int, operators: str) -> None:
    """Runs a model and saves the logits of the prompt's last token and of all tokens after it, [tokens + 1, vocab], and
    the figures of the tokens. On the device "instant" these are greedy, so the logits are not read, and not saved.
    """
    path = resolve_model(model)
    device = _open(name, path, operators)
    with make_decoder(path, device, context=CONTEXT) as decoder:
        logits, usages = [decoder.forward(PROMPT)], []
        for index in range(tokens):
            before, ids = decoder.usage.copy(), [PROMPT[index % len(PROMPT)]]
            if name == INSTANT:
                decoder.greedy(ids)
            else:
                logits.append(decoder.forward(ids))
            usages.append(asdict(decoder.usage.since(before)))
    if device:
        device.close()
    np.savez(out, logits=np.concatenate(logits), figures=json.dumps({"usages": usages, "peak_bytes": peak_memory()}))


def peak_memory() -> int:
    """Most bytes that this process has held, file mappings included. getrusage would count its parent's, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise UserError("this system does not report the memory of a process (/proc/self/status)")


def measure(
    model: str, name: str, tokens: int, operators: str = AcceleratorConfig.operators
) -> tuple[np.ndarray, list[Usage], int]:
    """Runs a model in a process of its own; returns logits, figures of each token, and peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [sys.executable, "-m", "sw.bench_decoder", model, name, str(out), "--tokens", str(tokens)]
        command += ["--operators", operators]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise UserError(f"{model} on {name}: {done.stderr.strip().splitlines()[-1:]}")
        with np.load(out) as saved:
            figures = json.loads(str(saved["figures"]))
            return saved["logits"], [Usage(**usage) for usage in figures["usages"]], figures["peak_bytes"]


def measure_host() -> list[dict]:
    """Host milliseconds of a token of SmolLM2, medians: beside a board that answers at once, and beside a simulation.

    With operators "decoder" the model runs as programs. The simulation runs on the same processor and displaces the
    host's data from its caches.
    """
    rows = []
    cases = ((INSTANT, "linear", HOST_TOKENS), (INSTANT, "decoder", HOST_TOKENS), ("rtl", "linear", HOST_TOKENS // 8))
    for name, operators, tokens in cases:
        _, usages, peak = measure(SMOLLM2, name, tokens, operators)
        parts = {
            part: 1e3 * median(getattr(usage, part) for usage in usages)
            for part in ("onnxruntime", "conversion", "driver")
        }
        host = 1e3 * median(usage.host for usage in usages)
        case = {"model": SMOLLM2, "device": name, "operators": operators}
        rows.append({**case, **parts, "host": host, "peak_bytes": peak})
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
        logits[name], usages[name], peaks[name] = measure(model, name, 1)
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
    (rtl, usages, peak), (reference, *_) = (measure(model, name, 1, "decoder") for name in ("rtl", "reference"))
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
    options = parser.parse_args()
    run(options.model, options.device, options.out, options.tokens, options.operators)


if __name__ == "__main__":
    run_cli(main)
