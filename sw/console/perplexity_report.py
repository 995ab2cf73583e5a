# SPDX-License-Identifier: Apache-2.0
"""A model's scores on a text, as a table for people and as JSON for programs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hw.spec.config import AcceleratorConfig
from sw.console.output import stdout_console
from sw.runtime.score import MOST, Score


@dataclass(frozen=True)
class Report:
    """The scores on all devices.

    Members
    -------
    text: name of the file.
    memory: preset of the simulated memory, None for other devices.
    config: None if no score is of a device.
    windows: tokens of each window.
    """

    model: str
    text: str
    memory: str | None
    config: AcceleratorConfig | None
    windows: Sequence[int]
    scores: Sequence[Score]

    def difference(self, score: Score) -> float:
        """The ratio of the score's perplexity to that of the first score, less 1."""
        return math.expm1(min(score.mean - self.scores[0].mean, MOST))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. A perplexity beyond float64 is null, because JSON has no infinity."""
        return {
            "model": self.model,
            "text": self.text,
            "memory": self.memory,
            "config": self.config.to_dict() if self.config else None,
            "config_digest": self.config.digest if self.config else None,
            "windows": list(self.windows),
            "rows": [
                {
                    "device": score.device,
                    "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
                    "mean_nll": score.mean,
                    "tokens": score.tokens,
                    "relative_difference": self.difference(score),
                    "cycles": score.cycles,
                    "seconds": score.seconds,
                }
                for score in self.scores
            ],
        }


def print_table(report: Report) -> None:
    """Prints a row per device on stdout."""
    console = stdout_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("device")
    for title in ("perplexity", "mean -ln p", "tokens", "against the first", "seconds"):
        table.add_column(title, justify="right")
    for index, score in enumerate(report.scores):
        table.add_row(
            score.device,
            f"{score.perplexity:,.4f}",
            f"{score.mean:.6f}",
            f"{score.tokens:,}",
            f"{100 * report.difference(score):+.4f} %" if index else "",
            f"{score.seconds:,.1f}",
        )
    console.print(table)
    count, longest, config = len(report.windows), max(report.windows), report.config
    lines = [f"{count} {'windows' if count > 1 else 'window'} of {longest:,} tokens, each with an empty cache"]
    if config:
        lines.append(
            f"hardware: tile {config.tile}, {config.weight_bits}-bit weights, {config.activation_bits}-bit activations,"
            f" {config.zero_point} zero points, config {config.digest[:16]}"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
