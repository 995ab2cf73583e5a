# SPDX-License-Identifier: Apache-2.0
"""The results of sw.layers, as a table for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hw.spec.config import AcceleratorConfig
from sw.console.output import stdout_console
from sw.program.alone import AttentionResult


@dataclass(frozen=True)
class LayerResult:
    """The results of one layer.

    Members
    -------
    name, m, k, n, group_size, weight_bits: the model's layer, and the number m of computed tokens.
    cycles: simulated cycles of the layer alone on an idle accelerator; 0 without hardware.
    beats: beats of its weight stream.
    bus_use: beats / cycles.
    exact: every result equals the reference's, bit for bit.
    max_abs_error, relative_error: errors against onnxruntime; see sw.layers.
    device_seconds: processor time of the device.
    """

    name: str
    m: int
    k: int
    n: int
    group_size: int
    weight_bits: int
    cycles: int
    beats: int
    bus_use: float
    exact: bool
    max_abs_error: float
    relative_error: float
    device_seconds: float

    def to_dict(self) -> dict:
        """The JSON form: all members except device_seconds."""
        values = asdict(self)
        del values["device_seconds"]
        return values


@dataclass(frozen=True)
class Report:
    """The results of all layers.

    Members
    -------
    memory: preset of the simulated memory.
    prompt_source: "tokenizer" or "bytes"; "noise" if the model reads no token ids.
    attention: of each block; empty if it is not computed.
    seconds: wall time of the whole command.
    """

    model: str
    device: str
    memory: str
    config: AcceleratorConfig
    tokens: int
    prompt_source: str
    layers: Sequence[LayerResult]
    attention: Sequence[AttentionResult]
    seconds: float

    @property
    def is_exact(self) -> bool:
        """Whether all results are equal to the definitions."""
        return all(result.exact for result in (*self.layers, *self.attention))

    def totals(self) -> dict:
        """Sums and the worst error."""
        cycles = sum(layer.cycles for layer in self.layers)
        beats = sum(layer.beats for layer in self.layers)
        device_seconds = sum(layer.device_seconds for layer in self.layers)
        return {
            "layers": len(self.layers),
            "exact": sum(layer.exact for layer in self.layers),
            "cycles": cycles,
            "beats": beats,
            "bus_use": beats / cycles if cycles else 0.0,
            "max_abs_error": max(layer.max_abs_error for layer in self.layers),
            "relative_error": max(layer.relative_error for layer in self.layers),
            "cycles_per_second": cycles / device_seconds if device_seconds else 0.0,
            "device_seconds": device_seconds,
            "seconds": self.seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "model": self.model,
            "device": self.device,
            "memory": self.memory if self.device == "rtl" else None,
            "config": self.config.to_dict(),
            "config_digest": self.config.digest,
            "tokens": self.tokens,
            "prompt_source": self.prompt_source,
            "layers": [layer.to_dict() for layer in self.layers],
            "attention": [asdict(block) for block in self.attention],
            "totals": self.totals(),
        }


def print_table(report: Report) -> None:
    """Prints a row per layer and a line of totals on stdout."""
    console = stdout_console()
    totals = report.totals()
    rows = [_row(name, layer) for name, layer in zip(_short([layer.name for layer in report.layers]), report.layers)]
    share = f"{totals['exact']}/{totals['layers']}"
    numbers = (f"{totals['beats']:,}", _cycles(totals["cycles"]), _share(totals["bus_use"]), share)
    footer = (f"{totals['layers']} layers", "", "", "", "", "", *numbers, f"{totals['relative_error']:.1e}")
    titles = ("layer", "K", "N", "group", "bits", "beats", "cycles", "bus use", "exact", "error")
    table = Table(show_footer=True, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(titles[0], footer[0], overflow="fold")
    for index in range(1, len(titles)):
        # On a narrow terminal the names are wrapped, and the numbers are not.
        width = max(len(row[index]) for row in (*rows, footer))
        table.add_column(titles[index], footer[index], justify="right", min_width=width)
    for row, layer in zip(rows, report.layers):
        table.add_row(*row, style=None if layer.exact else "bold red")
    console.print(table)
    console.print(_summary(report, totals), highlight=False, soft_wrap=True)


def _row(name: str, layer: LayerResult) -> tuple[str, ...]:
    shape = map(str, (layer.k, layer.n, layer.group_size, layer.weight_bits))
    exact = "yes" if layer.exact else "NO"
    found = (_cycles(layer.cycles), _share(layer.bus_use), exact, f"{layer.relative_error:.1e}")
    return (name, *shape, f"{layer.beats:,}", *found)


def _summary(report: Report, totals: dict) -> str:
    config = report.config
    lines = [
        f"{totals['exact']} of {totals['layers']} layers equal the numpy reference bit for bit, M {report.tokens}",
        f"error is against onnxruntime, max|y - y_ort| / max|y_ort|; the worst is {totals['relative_error']:.1e}",
        f"hardware: tile {config.tile}, {config.weight_bits}-bit weights, {config.zero_point} zero points,"
        f" {config.beat_bytes} bytes a beat, config {config.digest[:16]}",
    ]
    lines[2:2] = _attention(report.attention)
    if totals["cycles"]:
        lines.append(
            f"cycles are simulated, memory {report.memory}, each layer alone on an idle accelerator;"
            f" {totals['cycles_per_second'] / 1e6:.2f} million a second of processor time, {report.seconds:.0f} s in"
            " all"
        )
    else:
        lines.append(f"device {report.device} has no hardware, so no cycles; {report.seconds:.0f} s in all")
    if report.prompt_source == "bytes":
        lines.append("no tokenizer.json beside the model: the prompt's bytes were its token ids")
    elif report.prompt_source == "noise":
        lines.append("the model reads no token ids (input_ids): its inputs were seeded noise")
    return "\n".join(lines)


def _attention(blocks: Sequence[AttentionResult]) -> list[str]:
    """One line about the attention of all blocks, and the names of those that differ."""
    if not blocks:
        return []
    exact, cycles = sum(block.exact for block in blocks), sum(block.cycles for block in blocks)
    worst = max(block.relative_error for block in blocks)
    text = (
        f"attention of {exact} of {len(blocks)} blocks equals its numpy definition bit for bit,"
        f" {blocks[0].positions} positions; {f'{cycles:,} cycles; ' if cycles else ''}the worst error is {worst:.1e}"
    )
    wrong = [block.name for block in blocks if not block.exact]
    return [text, *([f"NOT equal: {', '.join(wrong)}"] if wrong else [])]


def _cycles(value: int) -> str:
    return f"{value:,}" if value else "-"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value else "-"


def _short(names: Sequence[str]) -> list[str]:
    """The names without the path parts at their begin and end that all have in common."""
    if len(names) < 2:
        return list(names)
    parts = [name.split("/") for name in names]
    first, last = _common(parts), _common([part[::-1] for part in parts])
    short = ["/".join(part[first : len(part) - last]) for part in parts]
    return short if all(short) else list(names)


def _common(lists: Sequence[Sequence[str]]) -> int:
    """The number of first elements that all lists share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*lists)))
