# SPDX-License-Identifier: Apache-2.0
"""``python -m sw.bench``: simulated cycles of real layer shapes, and how fast the tools are.

Cycles are exact and the same on every machine; seconds and cycles per second are this machine's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hw.spec.config import AcceleratorConfig
from hw.spec.cycles import layer_cycles
from hw.spec.layout import LayerLayout, fit_layer, pack
from hw.spec.numerics import Weights
from sw.devices.base import LinearJob, weight_bytes, weight_image
from sw.devices.rtl import RtlDevice
from sw.errors import UserError, run_cli

REPORT = Path("build/bench.json")
QWEN = {"qkv": (896, 1152), "o": (896, 896), "gate+up": (896, 9728), "down": (4864, 896)}
"""K and N of the decoder layers of Qwen2.5-0.5B."""
TIMEOUT = 1800.0


def random_layer(layout: LayerLayout, seed: int) -> np.ndarray:
    """A layer of random weights as its stream: uint8 [beats, beat_bytes]."""
    rng, config = np.random.default_rng(seed), layout.config
    groups = (layout.n, layout.groups)
    return pack(
        layout,
        Weights(
            rng.integers(0, config.weight_max + 1, (layout.n, layout.k), dtype=np.uint8),
            rng.integers(0, config.weight_max + 1, groups),
            rng.integers(-config.scale_max, config.scale_max + 1, groups),
            rng.integers(-20, 20, layout.n),
        ),
    )


def jobs_for(device: RtlDevice, layout: LayerLayout, tokens: int, count: int) -> list[LinearJob]:
    """``count`` times the same layer, in the device's memory."""
    weights = device.alloc(weight_bytes(layout))
    device.write(weights, weight_image(layout, random_layer(layout, seed=1)))
    activations, results = device.alloc(4 * tokens * layout.k), device.alloc(4 * tokens * layout.n)
    device.write(activations, np.random.default_rng(2).standard_normal((tokens, layout.k)).astype(np.float32))
    return [LinearJob(f"{index}", layout, tokens, weights, activations, results) for index in range(count)]


def measure_layers(device: RtlDevice, shapes: Sequence[tuple[str, int, int, int]]) -> list[dict]:
    """Simulated cycles of each (name, tokens, K, N), alone and in a row of three."""
    rows = []
    for name, tokens, k, n in shapes:
        layout = fit_layer(device.config, k, n, 128)
        jobs = jobs_for(device, layout, tokens, 3)
        alone = device.wait(device.submit(jobs[:1]), TIMEOUT)[0]
        in_a_row = device.wait(device.submit(jobs), TIMEOUT)
        for buffer in (jobs[0].weights, jobs[0].activations, jobs[0].results):
            device.free(buffer)
        bound = max(layout.beats, tokens * layout.k // device.config.tile * layout.out_tiles)
        seconds = sum(completion.seconds for completion in in_a_row)
        rows.append(
            {
                "name": name,
                "tile": device.config.tile,
                "m": tokens,
                "k": k,
                "n": n,
                "beats": layout.beats,
                "bound": bound,
                "cycles": alone.cycles,
                "ratio": alone.cycles / bound,
                "predicted": layer_cycles(layout, tokens),
                "cycles_in_a_row": in_a_row[1].cycles,
                "ratio_in_a_row": in_a_row[1].cycles / bound,
                "cycles_per_cpu_second": sum(c.cycles for c in in_a_row) / seconds,
            }
        )
    return rows


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
    layouts = [fit_layer(config, k, n, 128) for k, n in QWEN.values()]
    rng = np.random.default_rng(1)
    seconds = 0.0
    for layout in layouts:
        q = rng.integers(0, 16, (layout.n, layout.k), dtype=np.uint8)
        groups = np.ones((layout.n, layout.groups), np.int64)
        weights = Weights(q, groups, groups, np.zeros(layout.n, np.int64))
        start = time.perf_counter()
        pack(layout, weights)
        seconds += time.perf_counter() - start
    figures["pack_qwen_layers_seconds"] = 24 * seconds
    return figures


def print_tables(layers: list[dict], tools: dict) -> None:
    """The figures as two tables."""
    # Piped into a file there is no width to respect.
    console = Console(width=None if sys.stdout.isatty() else 132)
    table = Table(title="Simulated cycles (4x128-bit ports, integer zero points, group 128)")
    for column in ("layer", "tile", "M", "K", "N", "beats", "bound", "cycles", "/ bound", "predicted"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    table.add_column("in a row", justify="right")
    table.add_column("/ bound", justify="right")
    table.add_column("M cycles/cpu-s", justify="right")
    for row in layers:
        table.add_row(
            row["name"],
            *(f"{row[key]:,}" for key in ("tile", "m", "k", "n", "beats", "bound", "cycles")),
            f"{row['ratio']:.4f}",
            f"{row['predicted']:,}",
            f"{row['cycles_in_a_row']:,}",
            f"{row['ratio_in_a_row']:.4f}",
            f"{row['cycles_per_cpu_second'] / 1e6:.2f}",
        )
    console.print(table)
    console.print("bound: max(beats, M x slices x output tiles). In a row: the second of three such layers.")
    table = Table(title="Tools, on this machine")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in tools.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}")
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sw.bench", description="Benchmarks; simulated cycles are exact.")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options = parser.parse_args()
    if not Path("hw").is_dir():
        raise UserError("the benchmarks run from the project's own folder")
    status = Console(stderr=True)
    layers: list[dict] = []
    for tile, shapes in {
        16: [(name, 1, *shape) for name, shape in QWEN.items()]
        + [("qkv", 16, *QWEN["qkv"]), ("small", 1, 896, 128), ("small", 16, 896, 128)],
        32: [("qkv", 1, *QWEN["qkv"]), ("qkv", 16, *QWEN["qkv"])],
    }.items():
        with RtlDevice(AcceleratorConfig(tile=tile)) as device:
            status.print(f"simulating tile {tile} ...")
            layers += measure_layers(device, shapes)
    status.print("timing the tools ...")
    tools = measure_tools()
    tile16 = [row["cycles_per_cpu_second"] for row in layers if row["tile"] == 16 and row["cycles"] > 10_000]
    tools["simulated_cycles_per_cpu_second_tile_16"] = float(np.median(tile16))
    report = {"layers": layers, "tools": tools}
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(layers, tools)
        print(f"the same as JSON: {REPORT}")


if __name__ == "__main__":
    run_cli(main)
