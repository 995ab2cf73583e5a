# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.bench``: simulated cycles of real layers and of whole models, and the speed of the tools.

Cycles are exact and the same on every machine; seconds and cycles per second depend on the machine. Useful bytes are
weights, scales, zero points and row exponents without any padding. At the port limit all ports carry useful bytes in
every cycle.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hw.spec.config import EXPONENT_BITS, OPERATORS, SCALE_BITS, AcceleratorConfig
from hw.spec.control.descriptor import FLOAT_BYTES, weight_bytes
from hw.spec.cycles import layer_cycles
from hw.spec.kv260 import FABRIC_HZ
from hw.spec.memory.geometry import LayerLayout, ceil_div, fit_layer
from hw.spec.memory.packing import pack
from hw.spec.numerics.linear import Weights
from sw import bench_attention
from sw.bench_decoder import measure_host, measure_qwen
from sw.common.command_line import Parser
from sw.common.errors import UserError, run_cli
from sw.console.bench_report import print_tables
from sw.devices import make_config
from sw.devices.base import Completion, LinearJob, result_bytes
from sw.devices.rtl import RtlDevice
from sw.pages.regressions import compare
from sw.pages.store import load, save, take

REPORT = Path("build/bench.json")
QWEN = {"qkv": (896, 1152), "o": (896, 896), "gate+up": (896, 9728), "down": (4864, 896)}
"""K and N of the decoder layers of Qwen2.5-0.5B."""
QWEN_LAYERS = 24
HEAD = (2 * 896, 151_936)
"""Its lm_head as int8: two planes of 4 bits along K, see docs/numerics.md."""
MEMORIES = ("ideal", "kv260-2400", "kv260-2133")
GEMM = (64, 768, 3072)
"""M, K and N of the tiled matrix multiplication of arXiv 2503.16731, which runs on a KV260, too."""
GEMM_HZ = 100e6
"""Clock of the design in that paper."""
ROW = 8
"""Layers that are measured in a row."""
LONG = 1_000_000
"""A layer of at least this many beats is measured alone only: several in a row would show nothing more."""
TIMEOUT = 1800.0


@dataclass(frozen=True)
class Shape:
    """A layer to be measured."""

    name: str
    tokens: int
    k: int
    n: int


class Bench:
    """A device with memory for layers of random bytes. Cycles do not depend on the values.

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
        """Allocates a layer in the device's memory."""
        weights = self.device.alloc(weight_bytes(layout))
        self.device.write(weights, self._rng.integers(0, 256, weights.size, np.uint8))
        results = self.device.alloc(result_bytes(layout, tokens))
        return LinearJob(name, layout, tokens, weights, self._activations, results)

    def free(self, job: LinearJob) -> None:
        """Frees the job's memory."""
        self.device.free(job.weights)
        self.device.free(job.results)

    def run(self, jobs: Sequence[LinearJob]) -> tuple[list[Completion], dict[str, int]]:
        """Runs jobs; returns completions and the increase of each performance counter."""
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
    """Measures a layer alone, several in a row, and several in a row that share their activations."""
    config = bench.device.config
    layout = fit_layer(config, shape.k, shape.n, 128)
    job = bench.job(shape.name, layout, shape.tokens)
    (alone,), counters = bench.run([job])
    shared = LinearJob(**{**vars(job), "reuse": True})
    row = {}
    if layout.beats < LONG:
        for name, following in (("in_a_row", job), ("sharing", shared)):
            completions, _ = bench.run([job] + [following] * (ROW - 1))
            # Only those in the middle: the first includes the start-up, and no layer follows the last.
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


def measure_gemm(memory: str, tile: int) -> dict:
    """Measures GEMM as one layer, int4 weights times 16-bit activations; GFLOPS are 2 M K N per second at GEMM_HZ."""
    tokens, k, n = GEMM
    with (bench := Bench(make_config(tile=tile, max_tokens=tokens, max_k=1024), memory)).device:
        (alone,), _ = bench.run([bench.job("gemm", fit_layer(bench.device.config, k, n, 128), tokens)])
    return {
        "memory": memory,
        "tile": tile,
        "m": tokens,
        "k": k,
        "n": n,
        "cycles": alone.cycles,
        "gflops": 2 * tokens * k * n / alone.cycles * GEMM_HZ / 1e9,
    }


def measure_token(bench: Bench) -> dict:
    """Measures all linear layers of one token of Qwen2.5-0.5B in sequence; every layer has weights of its own."""
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
    # Conflicts between streams depend on the addresses.
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


def time_builds() -> dict[str, float]:
    """Measures the seconds of hw.build at tile 16 and 32."""
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
    return figures


def time_packing() -> dict[str, float]:
    """Measures the seconds of packing 0.36 G weights, as many as Qwen2.5-0.5B's 24 layers have."""
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
    return {"pack_qwen_layers_seconds": QWEN_LAYERS * seconds}


def shapes(tile: int) -> Iterable[Shape]:
    """The layers that are measured on an array."""
    if tile == 16:
        yield from (Shape(name, 1, *shape) for name, shape in QWEN.items())
        yield Shape("lm_head", 1, *HEAD)
        yield Shape("small", 1, 896, 128)
    else:
        yield Shape("qkv", 1, *QWEN["qkv"])
    yield Shape("qkv", 16, *QWEN["qkv"])


def measure_layers(status: Console) -> list[dict]:
    """Measures single layers on every array and memory."""
    rows = []
    for tile, memories in ((16, MEMORIES), (32, MEMORIES[:1])):
        for memory in memories:
            status.print(f"simulating layers, tile {tile}, memory {memory} ...")
            with (bench := Bench(make_config(tile=tile), memory)).device:
                rows += [measure_layer(bench, shape) for shape in shapes(tile)]
    return rows


def measure_gemms(status: Console) -> list[dict]:
    """Measures GEMM on both arrays, in ideal memory and in the memory of the paper's board."""
    rows = []
    for tile in (16, 32):
        for memory in MEMORIES[:2]:
            status.print(f"simulating a GEMM, tile {tile}, memory {memory} ...")
            rows.append(measure_gemm(memory, tile))
    return rows


def measure_tokens(status: Console) -> list[dict]:
    """Measures a token on every memory."""
    rows = []
    for memory in MEMORIES:
        status.print(f"simulating a token, memory {memory} ...")
        with (bench := Bench(AcceleratorConfig(), memory)).device:
            rows.append(measure_token(bench))
    return rows


def measure_simulation(status: Console) -> list[dict]:
    """Measures the speed of the simulated device on the linear layers of a token, without and with a vector unit."""
    rows, memory = [], "kv260-2400"
    for operators in OPERATORS:
        status.print(f"simulating a token, operators {operators} ...")
        with (bench := Bench(make_config(operators=operators), memory)).device:
            speed = measure_token(bench)["cycles_per_cpu_second"]
        rows.append({"operators": operators, "memory": memory, "cycles_per_cpu_second": speed})
    return rows


def measure_decoders(status: Console) -> dict:
    """Whole models."""
    status.print("running whole models ...")
    return {"host": measure_host(), "qwen": measure_qwen()}


def measure_attention(status: Console) -> list[dict]:
    """Whole tokens and prompts with attention on the device."""
    status.print("running tokens and prompts with attention on the device ...")
    return bench_attention.measure_attention()


def measure_tools(status: Console) -> dict:
    """Measures the seconds that the tools take."""
    status.print("timing the tools ...")
    return {**time_builds(), **time_packing()}


PARTS: dict[str, Callable[[Console], Any]] = {
    "layers": measure_layers,
    "gemm": measure_gemms,
    "tokens": measure_tokens,
    "simulation": measure_simulation,
    "decoders": measure_decoders,
    "attention": measure_attention,
    "tools": measure_tools,
}
"""The benchmarks' parts by name, in order."""


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"there are {', '.join(PARTS)}, not {unknown[0]!r}")
    return [name for name in PARTS if name in names]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m sw.bench", description="Benchmarks; simulated cycles are exact.")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument(
        "--only", type=_parts, default=list(PARTS), metavar="PARTS", help=f"some of {','.join(PARTS)} (default: all)"
    )
    against = parser.add_mutually_exclusive_group()
    against.add_argument(
        "--check", action="store_true", help="fail if a count of simulated cycles is above that in docs/figures.json"
    )
    against.add_argument("--update", action="store_true", help="write the measured figures into docs/figures.json")
    return parser


def main() -> int:
    """The command line; returns the exit code: 0, or 1 if --check finds more cycles."""
    options = _parser().parse_args()
    if not Path("hw").is_dir():
        raise UserError("the benchmarks run from the project's own folder")
    status = Console(stderr=True)
    report = {name: PARTS[name](status) for name in options.only}
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)
        print(f"the same as JSON: {REPORT}")
    if options.update:
        update(report)
    return int(options.check and not check(report))


def update(report: dict) -> None:
    """Writes the parts that the pages quote into docs/figures.json."""
    sections = load()
    for name in report:
        if name in sections:
            take(sections, name, report[name])
    save(sections)
    print("docs/figures.json is written; python -m sw.figures writes the pages", file=sys.stderr)


def check(report: dict) -> bool:
    """Whether no count of simulated cycles is above that in docs/figures.json; prints the differences."""
    worse, better = compare(load(), report)
    for line in worse:
        print(f"error: {line}", file=sys.stderr)
    for line in better:
        print(f"better: {line}; run python -m sw.bench --update", file=sys.stderr)
    return not worse


if __name__ == "__main__":
    run_cli(main)
