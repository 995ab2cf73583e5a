# SPDX-License-Identifier: Apache-2.0
"""Prints the benchmarks' figures as tables."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sw.console.output import stdout_console

WIDTH_WITHOUT_TERMINAL = 150


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _starved(row: dict) -> list[str]:
    return [f"{row[f'starved_{cause}']:,}" for cause in ("weights", "activations", "output")]


def print_tables(report: dict) -> None:
    """Prints a table for each measured part."""
    console = stdout_console(WIDTH_WITHOUT_TERMINAL)
    for name, figures in report.items():
        _PRINT[name](console, figures)


def _print_layers(console: Console, rows: list[dict]) -> None:
    console.print(_cycles([row for row in rows if row["memory"] == "ideal"]))
    console.print(
        "Cycles are simulated, from the push of a descriptor until its results are in memory, for the layer"
        " alone on an idle accelerator. beats: those of the weight stream, and of the activations if all ports carry"
        " them; bound: max(all beats, M x slices x output tiles). In a row: the mean over such layers back to back;"
        " sharing: the same mean if all use the activations of the first. lm_head: int8 as two planes of 4 bits, so K"
        " is doubled. small: N 128.\n"
    )
    console.print(_bandwidth([row for row in rows if row["m"] == 1 and row["tile"] == 16]))
    console.print(
        "Of ports: useful bytes per cycle, of all that the ports can carry. Starved: cycles, by what was missing.\n"
    )


def _print_gemm(console: Console, rows: list[dict]) -> None:
    numbers = ("tile", "M", "K", "N", "cycles", "GFLOPS at 100 MHz")
    table = _table("The matrix multiplication of arXiv 2503.16731", ("memory",), numbers)
    for row in rows:
        figures = (f"{row[key]:,}" for key in ("tile", "m", "k", "n", "cycles"))
        table.add_row(row["memory"], *figures, f"{row['gflops']:.1f}")
    console.print(table)
    console.print(
        "int4 weights times 16-bit activations, simulated cycles, 2 M K N operations. The paper reports 3.1 GFLOPS on a"
        " KV260 at 100 MHz, in its own number formats.\n"
    )


def _print_tokens(console: Console, rows: list[dict]) -> None:
    console.print(_tokens(rows))
    console.print(
        "All linear layers of a token, each with weights of its own. Memory limit: what the simulated memory gives to"
        " endless contiguous reads on all ports. tokens/s: of these layers alone, at 250 MHz.\n"
    )


def _print_simulation(console: Console, rows: list[dict]) -> None:
    table = _table("The simulated device", ("operators", "memory"), ("million cycles per second of processor time",))
    for row in rows:
        table.add_row(row["operators"], row["memory"], f"{row['cycles_per_cpu_second'] / 1e6:.2f}")
    console.print(table)


def _print_tools(console: Console, figures: dict[str, float]) -> None:
    table = _table("Tools, on this machine", ("figure",), ("value",))
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}")
    console.print(table)


def _table(title: str, texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _print_decoders(console: Console, decoders: dict) -> None:
    qwen = decoders["qwen"]
    programs = qwen["programs"]
    table = _table("One token through the whole runtime: Qwen2.5-0.5B's shape", ("figure",), ("value",))
    rows = {
        "cycles, simulated, memory kv260-2400": f"{qwen['cycles']:,}",
        "weight beats per cycle": _percent(qwen["port_fraction"]),
        "tokens/s of its linear layers at 250 MHz": f"{qwen['tokens_per_second']:.1f}",
        "logits equal the reference's, bit for bit": "yes" if qwen["equals_reference"] else "NO",
        "logits against onnxruntime, relative": f"{qwen['relative_error']:.1e}",
        **{f"peak memory, {name}": f"{peak / 1e6:,.0f} MB" for name, peak in qwen["peak_bytes"].items()},
        "as programs, all operators but attention: cycles": f"{programs['cycles']:,}",
        "as programs: tokens/s at 250 MHz": f"{programs['tokens_per_second']:.1f}",
        "as programs: equal to the reference, bit for bit": "yes" if programs["equals_reference"] else "NO",
        "as programs: against onnxruntime, relative": f"{programs['relative_error']:.1e}",
    }
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    console.print(
        "A model of that shape in AutoAWQ's format with random weights: 24 blocks of 4 bits in groups of 128, QKV"
        " biases, int8 lm_head. The token follows a prompt of 8.\n"
    )
    numbers = ("onnxruntime", "conversion", "driver", "all, ms", "register accesses", "peak memory, MB")
    texts = ("model", "device", "operators")
    table = _table("Host time of a token without the device, medians, this machine", texts, numbers)
    for row in decoders["host"]:
        parts = (f"{row[name]:.2f}" for name in ("onnxruntime", "conversion", "driver", "host"))
        accesses = f"{row['accesses']:.0f}" if row["accesses"] else ""
        table.add_row(*(row[name] for name in texts), *parts, accesses, f"{row['peak_bytes'] / 1e6:,.0f}")
    console.print(table)
    console.print(
        "instant: the same runtime and driver on registers that answer at once, as beside a board, which takes no"
        " processor time. rtl: beside the simulation, in whose milliseconds the processor's caches forget the host."
        " attention: a token is one program. qwen: Qwen2.5-0.5B's shape.\n"
    )


def _print_attention(console: Console, rows: list[dict]) -> None:
    numbers = (
        *("tile", "key bits", "cycles", "linear layers", "attention", "waiting", "predicted", "/ cycles"),
        *("tokens/s", "limit of the beats"),
    )
    table = _table("Qwen2.5-0.5B's shape with attention on the device", ("what",), numbers)
    for row in rows:
        table.add_row(
            f"{row['name']} {row['length']:,}",
            *(f"{row[key]:,}" for key in ("tile", "key_bits", "cycles")),
            *(_percent(row[part] / row["cycles"]) for part in ("linear", "attention", "waiting")),
            f"{row['predicted']:,}",
            f"{row['predicted'] / row['cycles']:.4f}",
            *(f"{row[key]:.1f}" for key in ("tokens_per_second", "limit")),
        )
    console.print(table)
    console.print(
        "Memory kv260-2400, tokens/s at 250 MHz. token N: it sees N positions; prompt N: N tokens in calls of 16."
        " Linear layers: what they take if nothing waits; attention: from the last result before it to its own last"
        " result; waiting: the rest. Predicted: hw.spec.timing, for memory without delays. Limit: one beat in every"
        " cycle. Of a prompt's equal blocks two and the last one are simulated, and of 64 calls ten.\n"
    )


def _mean(value: float | None, bound: float) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value:,.0f}", f"{value / bound:.4f}")


def _cycles(rows: list[dict]) -> Table:
    numbers = (
        *("tile", "M", "K", "N", "weight beats", "activation beats", "bound", "cycles", "/ bound", "predicted"),
        *("in a row", "/ bound", "sharing", "/ beats"),
    )
    table = _table("Layers of Qwen2.5-0.5B, ideal memory (4x128-bit ports, group 128)", ("layer",), numbers)
    for row in rows:
        compute = row["m"] * row["k"] // row["tile"] * -(-row["n"] // row["tile"])
        table.add_row(
            row["name"],
            *(f"{row[key]:,}" for key in ("tile", "m", "k", "n", "beats", "activation_beats", "bound", "cycles")),
            f"{row['cycles'] / row['bound']:.4f}",
            f"{row['predicted']:,}",
            *_mean(row["cycles_in_a_row"], row["bound"]),
            *_mean(row["cycles_sharing"], max(row["beats"], compute)),
        )
    return table


def _bandwidth(rows: list[dict]) -> Table:
    numbers = ("useful bytes", "cycles", "of ports", "starved: weights", "activations", "output")
    table = _table("The same at tile 16, M 1, by memory", ("layer", "memory"), numbers)
    for row in rows:
        figures = (f"{row['useful_bytes']:,}", f"{row['cycles']:,}", _percent(row["port_fraction"]), *_starved(row))
        table.add_row(row["name"], row["memory"], *figures)
    return table


def _tokens(rows: list[dict]) -> Table:
    numbers = (
        *("cycles", "useful bytes", "of ports", "memory limit, B/cycle", "of the limit", "tokens/s"),
        *("starved: weights", "activations", "output", "M cycles/cpu-s"),
    )
    table = _table("One token of Qwen2.5-0.5B: 24 layers and lm_head, tile 16, M 1", ("memory",), numbers)
    for row in rows:
        table.add_row(
            row["memory"],
            f"{row['cycles']:,}",
            f"{row['useful_bytes']:,}",
            _percent(row["port_fraction"]),
            f"{row['memory_limit']:.2f}",
            _percent(row["memory_fraction"]),
            f"{row['tokens_per_second']:.1f}",
            *_starved(row),
            f"{row['cycles_per_cpu_second'] / 1e6:.2f}",
        )
    return table


_PRINT = {
    "layers": _print_layers,
    "gemm": _print_gemm,
    "tokens": _print_tokens,
    "simulation": _print_simulation,
    "decoders": _print_decoders,
    "attention": _print_attention,
    "tools": _print_tools,
}
