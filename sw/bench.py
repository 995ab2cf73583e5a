# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.bench``: simulated cycles of real layers and of whole models, and how fast the tools are.

Cycles are exact and the same on every machine; seconds and cycles per second are this machine's. Useful bytes are those
of weights, scales, zero points and row exponents without any padding; the port limit is that all ports carry such bytes
in every cycle.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from hw.spec.config import EXPONENT_BITS, SCALE_BITS, AcceleratorConfig
from hw.spec.control.descriptor import FLOAT_BYTES, weight_bytes
from hw.spec.cycles import layer_cycles
from hw.spec.kv260 import FABRIC_HZ
from hw.spec.memory.geometry import LayerLayout, ceil_div, fit_layer
from hw.spec.memory.packing import pack
from hw.spec.numerics.linear import Weights
from sw.bench_decoder import measure_host, measure_qwen
from sw.common.errors import UserError, run_cli
from sw.console.bench_report import print_tables
from sw.devices.base import Completion, LinearJob, result_bytes
from sw.devices.rtl import RtlDevice

REPORT = Path("build/bench.json")
QWEN = {"qkv": (896, 1152), "o": (896, 896), "gate+up": (896, 9728), "down": (4864, 896)}
"""K and N of the decoder layers of Qwen2.5-0.5B."""
QWEN_LAYERS = 24
HEAD = (2 * 896, 151_936)
"""Its lm_head as int8: two planes of 4 bits along K, see docs/numerics.md."""
MEMORIES = ("ideal", "kv260-2400", "kv260-2133")
ROW = 8
"""Layers that are measured in a row."""
LONG = 1_000_000
"""Beats of a layer that is measured alone only: nothing about it is left to see in a row."""
TIMEOUT = 1800.0


@dataclass(frozen=True)
class Shape:
    """A layer to be measured."""

    name: str
    tokens: int
    k: int
    n: int


class Bench:
    """A device with room for layers of random bytes: what they are decides nothing about cycles.

    memory: preset of the memory model.
    """

    def __init__(self, config: AcceleratorConfig, memory: str):
        self.device = RtlDevice(config, memory=memory)
        self.memory = memory
        self._rng = np.random.default_rng(1)
        x = self._rng.standard_normal(config.max_tokens * config.max_k).astype(np.float32)
        self._activations = self.device.alloc(x.nbytes)
        self.device.write(self._activations, x)

    def job(self, name: str, layout: LayerLayout, tokens: int) -> LinearJob:
        """A layer in the device's memory."""
        weights = self.device.alloc(weight_bytes(layout))
        self.device.write(weights, self._rng.integers(0, 256, weights.size, np.uint8))
        results = self.device.alloc(result_bytes(layout, tokens))
        return LinearJob(name, layout, tokens, weights, self._activations, results)

    def free(self, job: LinearJob) -> None:
        """Gives its memory back."""
        self.device.free(job.weights)
        self.device.free(job.results)

    def run(self, jobs: Sequence[LinearJob]) -> tuple[list[Completion], dict[str, int]]:
        """Completions, and what the performance counters counted."""
        before = self.device.counters()
        completions = self.device.wait(self.device.submit(jobs), TIMEOUT)
        after = self.device.counters()
        return completions, {name: after[name] - before[name] for name in after}


def useful_bytes(layout: LayerLayout) -> int:
    """Bytes of a layer's weights without padding."""
    config = layout.config
    per_group = SCALE_BITS + config.zero_point_bits
    return layout.n * (layout.k * config.weight_bits + layout.groups * per_group + EXPONENT_BITS) // 8


def measure_layer(bench: Bench, shape: Shape) -> dict:
    """A layer alone, several in a row, and several in a row that share their activations."""
    config = bench.device.config
    layout = fit_layer(config, shape.k, shape.n, 128)
    job = bench.job(shape.name, layout, shape.tokens)
    (alone,), counters = bench.run([job])
    shared = LinearJob(**{**vars(job), "reuse": True})
    row = {}
    if layout.beats < LONG:
        for name, following in (("in_a_row", job), ("sharing", shared)):
            completions, _ = bench.run([job] + [following] * (ROW - 1))
            # Those in the middle: the first has its start-up, and the last need not make room for others.
            inner = completions[2:-1]
            row[name] = sum(completion.cycles for completion in inner) / len(inner)
    bench.free(job)
    activation_beats = ceil_div(FLOAT_BYTES * shape.tokens * layout.k, config.beat_bytes)
    useful = useful_bytes(layout)
    return {
        "name": shape.name,
        "memory": bench.memory,
        "tile": config.tile,
        "m": shape.tokens,
        "k": shape.k,
        "n": shape.n,
        "beats": layout.beats,
        "activation_beats": activation_beats,
        "bound": max(layout.beats + activation_beats, shape.tokens * layout.slices * layout.out_tiles),
        "cycles": alone.cycles,
        "predicted": layer_cycles(layout, shape.tokens),
        "cycles_in_a_row": row.get("in_a_row"),
        "cycles_sharing": row.get("sharing"),
        "useful_bytes": useful,
        "port_fraction": useful / (config.beat_bytes * alone.cycles),
        **{name: value for name, value in counters.items() if name.startswith("starved")},
    }


def measure_token(bench: Bench) -> dict:
    """All linear layers of one token of Qwen2.5-0.5B, one behind the other; every layer has weights of its own."""
    config = bench.device.config
    jobs = [
        bench.job(f"{name} {index}", fit_layer(config, k, n, 128), 1)
        for index in range(QWEN_LAYERS)
        for name, (k, n) in QWEN.items()
    ]
    jobs.append(bench.job("lm_head", LayerLayout(config, *HEAD, 128), 1))
    completions, counters = bench.run(jobs)
    for job in jobs:
        bench.free(job)
    cycles = sum(completion.cycles for completion in completions)
    useful = sum(useful_bytes(job.layout) for job in jobs)
    rate = useful / cycles
    # Somewhere in memory streams meet less than elsewhere.
    limit = max(bench.device.platform.memory_limit(seed) for seed in range(1, 9))
    return {
        "memory": bench.memory,
        "cycles": cycles,
        "useful_bytes": useful,
        "port_fraction": rate / config.beat_bytes,
        "memory_limit": limit,
        "memory_fraction": rate / limit,
        "tokens_per_second": FABRIC_HZ / cycles,
        **{name: value for name, value in counters.items() if name.startswith("starved")},
        "cycles_per_cpu_second": cycles / sum(completion.seconds for completion in completions),
    }


def measure_tools() -> dict:
    """Seconds of hw.build at tile 16 and 32, and of packing 0.36 G weights, those of Qwen2.5-0.5B's 24 layers."""
    figures = {}
    for tile in (16, 32):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "hw.build", "--tile", str(tile), "--out", folder],
                stdout=subprocess.DEVNULL,
                check=True,
                timeout=600,
            )
            figures[f"hw_build_tile_{tile}_seconds"] = time.perf_counter() - start
    config = AcceleratorConfig()
    rng = np.random.default_rng(1)
    seconds = 0.0
    for k, n in QWEN.values():
        layout = fit_layer(config, k, n, 128)
        q = rng.integers(0, 16, (layout.n, layout.k), dtype=np.uint8)
        groups = np.ones((layout.n, layout.groups), np.int64)
        weights = Weights(q, groups, groups, np.zeros(layout.n, np.int64))
        start = time.perf_counter()
        pack(layout, weights)
        seconds += time.perf_counter() - start
    figures["pack_qwen_layers_seconds"] = QWEN_LAYERS * seconds
    return figures


def shapes(tile: int) -> Iterable[Shape]:
    """What is measured on an array."""
    if tile == 16:
        yield from (Shape(name, 1, *shape) for name, shape in QWEN.items())
        yield Shape("lm_head", 1, *HEAD)
        yield Shape("small", 1, 896, 128)
    else:
        yield Shape("qkv", 1, *QWEN["qkv"])
    yield Shape("qkv", 16, *QWEN["qkv"])


def measure(status: Console) -> dict:
    """Everything, as one JSON-ready dictionary."""
    layers, tokens = [], []
    for tile, memories in ((16, MEMORIES), (32, MEMORIES[:1])):
        for memory in memories:
            status.print(f"simulating tile {tile}, memory {memory} ...")
            bench = Bench(AcceleratorConfig(tile=tile), memory)
            with bench.device:
                layers += [measure_layer(bench, shape) for shape in shapes(tile)]
                if tile == 16:
                    tokens.append(measure_token(bench))
    status.print("running whole models ...")
    decoders = {"host": measure_host(), "qwen": measure_qwen()}
    status.print("timing the tools ...")
    return {"layers": layers, "tokens": tokens, "decoders": decoders, "tools": measure_tools()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sw.bench", description="Benchmarks; simulated cycles are exact.")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args()
    if not Path("hw").is_dir():
        raise UserError("the benchmarks run from the project's own folder")
    report = measure(Console(stderr=True))
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)
        print(f"the same as JSON: {REPORT}")


if __name__ == "__main__":
    run_cli(main)
