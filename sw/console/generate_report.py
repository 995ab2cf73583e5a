# SPDX-License-Identifier: Apache-2.0
"""The cost of an answer, as a table for people and as JSON for programs.

Cycles are those of the device's jobs alone, from a job's start to its last result in memory: the linear layers, or with
programs everything but the embedding, and attention if onnxruntime computes it. Tokens/s is FABRIC_HZ / cycles per
token. The roofline is FABRIC_HZ / beats of the weight stream per decoded token, the speed if every port delivers
weights in every cycle. Host time is wall time of this machine.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hw.spec.config import AcceleratorConfig
from hw.spec.kv260 import FABRIC_HZ
from sw.console.output import stdout_console
from sw.runtime import Usage

HOST = ("onnxruntime", "conversion", "driver")
"""Parts of the host's time: operators that are not on the device, copies to and from its memory, and its driver."""
STOPS = {
    "stop_token": "the model ended its answer",
    "max_new_tokens": "stopped at --max-new-tokens",
    "context": "stopped: the context of {context:,} tokens (--context) is full",
    "interrupted": "interrupted",
}


@dataclass
class Phase(Usage):
    """One phase of an answer: reading the prompt, or computing the tokens after it. seconds: total wall time."""

    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens/s of the device alone at FABRIC_HZ; None without cycles."""
        return FABRIC_HZ * self.tokens / self.cycles if self.cycles else None

    def per_token(self, total: float) -> float | None:
        """A total divided by the tokens; None if there are none."""
        return total / self.tokens if self.tokens else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with figures per token."""
        per_token = {name: self.per_token(getattr(self, name)) for name in ("cycles", "beats", "device", *HOST, "host")}
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "per_token": per_token}


@dataclass
class Answer:
    """An answer, complete or interrupted.

    Members
    -------
    ids: the new tokens, without the stop token.
    text: text of ids, as it was shown.
    stop: one of STOPS.
    prefill, decode: figures of the prompt, and of the tokens after it; only finished calls of the model count.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    stop: str = "interrupted"
    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)


@dataclass(frozen=True)
class Report:
    """An answer, and the settings that produced it.

    Members
    -------
    memory: preset of the simulated memory, None for other devices.
    config: None without a device.
    programs: whether the model ran as programs; otherwise the device computed its linear layers.
    attention: whether the device computed attention as well, so that a call was one program.
    context: tokens that the cache holds.
    sampling: temperature, top_p, seed.
    seconds: wall time of the whole command.
    """

    model: str
    device: str
    memory: str | None
    config: AcceleratorConfig | None
    programs: bool
    attention: bool
    adapter: str | None
    prompt: str
    system: str | None
    context: int
    sampling: dict[str, float]
    answer: Answer
    seconds: float

    @property
    def roofline(self) -> float | None:
        """Tokens/s if every port carried weights of this model in every cycle; None if nothing was decoded."""
        decode = self.answer.decode
        return FABRIC_HZ * decode.tokens / decode.beats if decode.beats else None

    @property
    def reached(self) -> float | None:
        """The fraction of the roofline that decoding reached; None without cycles."""
        rate = self.answer.decode.tokens_per_second
        return rate / self.roofline if rate and self.roofline else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        answer = self.answer
        return {
            "model": self.model,
            "device": self.device,
            "memory": self.memory,
            "config": self.config.to_dict() if self.config else None,
            "config_digest": self.config.digest if self.config else None,
            "programs": self.programs,
            "attention": self.attention,
            "adapter": self.adapter,
            "prompt": self.prompt,
            "system": self.system,
            "context": self.context,
            "sampling": self.sampling,
            "prompt_ids": answer.prompt_ids,
            "ids": answer.ids,
            "text": answer.text,
            "stop": answer.stop,
            "prefill": answer.prefill.to_dict(),
            "decode": answer.decode.to_dict(),
            "roofline": {"hz": float(FABRIC_HZ), "tokens_per_second": self.roofline, "reached": self.reached},
            "seconds": self.seconds,
        }


def print_table(report: Report) -> None:
    """Prints prompt and decoding side by side on stdout, with a summary of the hardware and the figures."""
    console = stdout_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("prompt", justify="right")
    table.add_column("decoding", justify="right")
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    console.print(_summary(report), highlight=False, soft_wrap=True)


def _rows(report: Report) -> list[tuple[str, str, str]]:
    phases = report.answer.prefill, report.answer.decode

    def row(title: str, form: str, values: list[float | None]) -> tuple[str, str, str]:
        prefill, decode = ("-" if value is None else form.format(value) for value in values)
        return title, prefill, decode

    def per_token(title: str, form: str, name: str, factor: float = 1.0) -> tuple[str, str, str]:
        return row(title, form, [phase.per_token(factor * getattr(phase, name)) for phase in phases])

    rows = [row("tokens", "{:,}", [phase.tokens for phase in phases])]
    if report.answer.prefill.cycles:
        rows.append(per_token("cycles per token", "{:,.0f}", "cycles"))
        rates: list[float | None] = [phase.tokens_per_second for phase in phases]
        what = "of the programs" if report.programs else "of the linear layers"
        rows.append(row(f"tokens/s {what} at {FABRIC_HZ / 1e6:.0f} MHz", "{:,.1f}", rates))
    if report.roofline:
        rows.append(("tokens/s if all ports carried weights in every cycle", "", f"{report.roofline:,.1f}"))
    if report.reached:
        rows.append(("  reached share of this rate", "", f"{100 * report.reached:.1f} %"))
    rows.append(per_token("host, ms per token", "{:,.1f}", "host", 1e3))
    if report.config:
        rows += [per_token(f"  {name}", "{:,.1f}", name, 1e3) for name in HOST]
        rows.append(per_token(f"{_DEVICE[report.device]}, s per token", "{:,.2f}", "device"))
    return rows


_DEVICE = {"rtl": "simulation", "reference": "numpy instead of hardware"}


def _summary(report: Report) -> str:
    answer, config = report.answer, report.config
    total = answer.prefill.cycles + answer.decode.cycles
    stop = STOPS[answer.stop].format(context=report.context)
    lines = [f"{stop}; {len(answer.prompt_ids):,} prompt tokens, {len(answer.ids):,} new ones, {report.seconds:.0f} s"]
    if config:
        lines.append(
            f"hardware: tile {config.tile}, {config.weight_bits}-bit weights, {config.zero_point} zero points,"
            f" {config.beat_bytes} bytes a beat, config {config.digest[:16]}"
        )
    if report.attention:
        lines.append("the model ran as programs, attention included; only the embedding was in onnxruntime")
    elif report.programs:
        lines.append("the model ran as programs, with attention in onnxruntime")
    if total:
        speed = total / (answer.prefill.device + answer.decode.device) / 1e6
        lines.append(f"cycles are simulated, memory {report.memory}; {speed:.2f} million a second")
        # The simulation displaces the host's data from the processor's caches.
        lines.append("host times are beside the simulation; make bench has those beside hardware that answers at once")
    elif config:
        lines.append(f"device {report.device} has no hardware, so no cycles")
    return "\n".join(lines)
