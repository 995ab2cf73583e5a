# SPDX-License-Identifier: Apache-2.0
"""The results of sw.quantize, as a table for people, as JSON for programs, and as the file quantize.json."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sw.awq.quantizer import FLOAT, LayerReport
from sw.awq.rounding import Form
from sw.awq.sizes import Sizes
from sw.awq.stream import Stream
from sw.console.output import stdout_console
from sw.runtime.score import Score

NAMES = {FLOAT: "float", "rtn": "round to nearest", "awq": "AWQ"}


@dataclass(frozen=True)
class Report:
    """The results of one run.

    Members
    -------
    source, out: paths as given. format: format of `out`. method: method by which `out` was quantized. rounding: that of
    AWQ, one of sw.awq.quantizer.ROUNDINGS.
    lm_head: one of sw.model.lm_head.HEAD_MODES. calibration, evaluation: names of the texts.
    calibration_tokens: number of tokens used for calibration. windows: tokens of each scored window.
    scores: perplexities, the float model's first and that of `out` last. All have the same lm_head.
    stream: what the accelerator reads, None if no hardware runs the model.
    layers: reports of the layers in the graph's order. seconds: wall time.
    """

    source: str
    out: str
    form: Form
    method: str
    rounding: str
    lm_head: str
    format: str
    calibration: str
    calibration_tokens: int
    evaluation: str
    windows: Sequence[int]
    scores: Sequence[Score]
    sizes: Sizes
    stream: Stream | None
    layers: Sequence[LayerReport]
    seconds: float

    def recovered(self) -> float | None:
        """The fraction of rounding to nearest's loss of perplexity that AWQ recovers; None without a comparison."""
        found = {score.device: score.perplexity for score in self.scores}
        if not {FLOAT, "rtn", "awq"} <= set(found):
            return None
        lost = found["rtn"] - found[FLOAT]
        return (found["rtn"] - found["awq"]) / lost if lost > 0 and math.isfinite(lost) else None

    def error_ratio(self) -> float:
        """Geometric mean over all layers of the error relative to rounding to nearest."""
        ratios = [layer.error / layer.error_rtn for layer in self.layers if layer.error_rtn > 0 and layer.error > 0]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. A perplexity beyond float64 is null, because JSON has no infinity."""
        return {
            "source": self.source,
            "out": self.out,
            "method": self.method,
            "rounding": self.rounding,
            **asdict(self.form),
            "lm_head": self.lm_head,
            "format": self.format,
            "calibration": {"text": self.calibration, "tokens": self.calibration_tokens},
            "evaluation": {"text": self.evaluation, "windows": list(self.windows)},
            "perplexity": {
                score.device: score.perplexity if math.isfinite(score.perplexity) else None for score in self.scores
            },
            "recovered": self.recovered(),
            "bytes": {"float16": self.sizes.before, "quantized": self.sizes.after, "smaller": self.sizes.smaller},
            "stream": None if self.stream is None else asdict(self.stream),
            "seconds": self.seconds,
            "layers": [asdict(layer) for layer in self.layers],
        }


def write_json(report: Report, path: Path) -> None:
    """Writes the JSON document to a file."""
    path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


def print_table(report: Report) -> None:
    """Prints a row for each group of layers that share a scale, the perplexities and the sizes on stdout."""
    console = stdout_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer", overflow="fold")
    for title in ("K", "N", "ratio", "scale folded into", "error, nearest", f"error, {report.method}", "relative"):
        table.add_column(title, justify="left" if title.startswith("scale") else "right")
    for layer in report.layers:
        table.add_row(
            _short(layer.name),
            f"{layer.k:,}",
            f"{layer.n:,}",
            f"{layer.ratio:.2f}" if layer.fold else "-",
            _short(layer.fold).rpartition(".")[2] if layer.fold else "-",
            f"{layer.error_rtn:.2e}",
            f"{layer.error:.2e}",
            f"{100 * layer.error / layer.error_rtn:.0f} %" if layer.error_rtn else "-",
        )
    console.print(table)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"lm_head {report.lm_head} in all")
    table.add_column("perplexity", justify="right")
    table.add_column("against float", justify="right")
    first = report.scores[0]
    for score in report.scores:
        more = f"{100 * math.expm1(min(score.mean - first.mean, 700)):+.2f} %" if score is not first else ""
        table.add_row(_name(report, score.device), f"{score.perplexity:,.4f}", more)
    console.print(table)
    console.print("\n".join(_lines(report)), highlight=False, soft_wrap=True)


def _name(report: Report, way: str) -> str:
    return "AWQ and GPTQ" if (way, report.rounding) == ("awq", "gptq") else NAMES[way]


def _lines(report: Report) -> list[str]:
    recovered, form = report.recovered(), report.form
    count, longest = len(report.windows), max(report.windows)
    lines = [
        f"evaluated on {report.evaluation}: {count} {'windows' if count > 1 else 'window'} of {longest:,} tokens",
        f"calibrated on {report.calibration}: {report.calibration_tokens:,} tokens",
    ]
    if recovered is not None:
        part = f"{100 * recovered:.1f} % of the perplexity that rounding to nearest loses"
        lines.insert(0, f"{_name(report, 'awq')} recovers {part}")
    fields = ", stored in 4" if form.bits == 3 else ""
    return [
        *lines,
        f"errors are E|x dW|^2 / E|x W|^2 of a layer's output; the geometric mean is {100 * report.error_ratio():.0f} %"
        " of rounding to nearest's",
        report.sizes.line(),
        *_stream(report),
        f"{report.out}: {form.bits} bits{fields}, groups of {form.group_size}, {form.zero_point} zero points,"
        f" {report.format}; {report.seconds:.0f} s",
    ]


def _stream(report: Report) -> list[str]:
    found, bits = report.stream, report.form.bits
    if found is None:
        return []
    line = f"stream of a token: {found.layers / 1e6:,.2f} MB, head {found.head / 1e6:,.2f} MB,"
    line += f" on hardware of {found.weight_bits}-bit weights"
    if bits < found.weight_bits and found.narrow is not None:
        line += f"; {found.narrow / 1e6:,.2f} MB without the head on hardware of {bits}-bit weights"
    return [line]


def _short(name: str) -> str:
    """A layer's or constant's name without the parts that all names share."""
    parts = [part for part in name.replace("/", ".").split(".") if part]
    drop = ("model", "weight", "MatMul", "FusedMatMul", "Gemm")
    return ".".join(part for part in parts if part not in drop) or name
