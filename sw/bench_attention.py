# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole tokens and prompts of Qwen2.5-0.5B's shape, with attention on the simulated accelerator.

    python -m sw.bench_attention [--tile 16|32] [--key-bits 8|16] [--contexts N,...] [--prompts N,...]

It prints JSON. `sw.bench` measures :data:`CONTEXTS` and :data:`PROMPTS` at all tiles.

Cycles do not depend on values, so a cache of any length is taken as it is. A prompt is measured call by call, in calls
of ``max_tokens`` tokens: of its equal blocks two are simulated, the last one, and the head. Of a long prompt only some
calls are simulated; a call between two of them takes what lies on the line between the two.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from hw.spec.config import AcceleratorConfig
from hw.spec.cycles import tile_cycles
from hw.spec.kv260 import FABRIC_HZ
from hw.spec.memory.kv_cache import KEY_BITS, LONGEST_CONTEXT
from hw.spec.timing.decoder import QWEN, prompt_cycles, token_cycles
from sw.bench_decoder import qwen_folder
from sw.common.command_line import Parser
from sw.common.errors import UserError, run_cli
from sw.devices.base import Completion, Job, PreparedBatch
from sw.devices.batches import Prepared
from sw.devices.jobs import AppendJob, LinearJob, ScoresJob, ValuesJob
from sw.devices.rtl import RtlDevice
from sw.export.resolve import resolve_model
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from sw.runtime import ProgramDecoder
from sw.runtime.hardware import AUTO, choose_config, layer_shapes

MEMORY = "kv260-2400"
SCORE_WORDS = 1 << 17
HARDWARE = ({"tile": 16, "lanes": 2}, {"tile": 32, "lanes": 4})
CONTEXTS, PROMPTS = (64, 1024, 4096), (128, 1024)
WIDE = {32: (1024, 4096)}
"""Contexts with keys of 16 bits, by tile."""
WHOLE_CALLS = 8
"""Calls of a prompt that are all simulated; of a longer prompt as many and the last one."""
TOKEN = 7
"""Any token: cycles do not depend on it."""


@dataclass(frozen=True)
class Cost:
    """Where the cycles of a call went.

    linear : what the linear layers take if nothing ever waits: the slowest of beats, array and drain
    attention : from the last result before appends, scores and values to their last result
    waiting : the rest: starts and ends of layers, norms, and memory that is late
    beats : of all weights and caches
    """

    linear: float = 0
    attention: float = 0
    waiting: float = 0
    beats: float = 0

    @property
    def cycles(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.waiting

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        """The sum with ``times`` the other."""
        names = ("linear", "attention", "waiting", "beats")
        return Cost(*(getattr(self, name) + times * getattr(other, name) for name in names))


def cost_of(jobs: Sequence[Job], completions: Sequence[Completion]) -> Cost:
    """The sum over jobs that follow each other."""
    total = Cost()
    for job, done in zip(jobs, completions, strict=True):
        linear = attention = 0
        if isinstance(job, LinearJob):
            linear = min(done.cycles, job.layout.out_tiles * tile_cycles(job.layout, job.tokens))
        elif isinstance(job, AppendJob | ScoresJob | ValuesJob):
            attention = done.cycles
        total = total.plus(Cost(linear, attention, done.cycles - linear - attention, done.beats))
    return total


class BlockDevice(RtlDevice):
    """A simulated accelerator that reports every job of the last batch, and can leave out blocks of a decoder.

    Members
    -------
    few : leave out all blocks but the first two and the last one
    jobs, completions : of the last batch
    """

    few = False
    jobs: list[Job]
    completions: list[Completion]

    def submit(self, batch: Sequence[Job] | PreparedBatch) -> int:
        """See Device."""
        if isinstance(batch, PreparedBatch):
            assert isinstance(batch, Prepared), "this device has prepared it"
            jobs = list(batch.moving.jobs)
        else:
            jobs = list(batch)
        last = max(block_of(job) for job in jobs)
        self.jobs = [job for job in jobs if not self.few or not 1 < block_of(job) < last]
        return super().submit(self.jobs)

    def wait(self, ticket: int, timeout: float) -> list[Completion]:
        """See Device."""
        self.completions = super().wait(ticket, timeout)
        return self.completions


def block_of(job: Job) -> int:
    """The number of a job's block; -1 of the norm before the head, and of the head."""
    first, _, rest = job.name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else -1


class Tokens:
    """A decoder of Qwen2.5-0.5B's shape on simulated hardware. A context manager that closes both."""

    def __init__(self, sizes: dict[str, int], context: int, key_bits: int, memory: str = MEMORY):
        path = resolve_model(str(qwen_folder()))
        options: dict[str, int | str] = {**AcceleratorConfig().to_dict(), **dict.fromkeys(AUTO, "auto")}
        options |= {"operators": "decoder", "score_words": SCORE_WORDS, **sizes}
        self.config = choose_config(layer_shapes(find_linears(path)), options)
        self.shape = replace(QWEN, key_bits=key_bits)
        self.device = BlockDevice(self.config, memory=memory)
        self.decoder = ProgramDecoder(OnnxFile(path), self.device, context=context, key_bits=key_bits)
        if not self.decoder.whole:
            raise UserError("the device does not compute attention")
        self._cache = self.decoder.cache_arrays()

    def __enter__(self) -> "Tokens":
        return self

    def __exit__(self, *exception: object) -> None:
        self.decoder.close()
        self.device.close()

    def token(self, context: int) -> Cost:
        """A token that sees this number of positions."""
        self.device.few = False
        self.decoder.restore(self._cache, context - 1)
        self.decoder.greedy([TOKEN])
        return cost_of(self.device.jobs, self.device.completions)

    def call(self, start: int, tokens: int, last: bool) -> Cost:
        """A call of a prompt. last : it gives the first new token."""
        self.device.few = True
        self.decoder.restore(self._cache, start)
        (self.decoder.greedy if last else self.decoder.prefill)([TOKEN] * tokens)
        pairs = list(zip(self.device.jobs, self.device.completions, strict=True))
        block = [pair for pair in pairs if block_of(pair[0]) == 1]
        return cost_of(*zip(*pairs, strict=True)).plus(cost_of(*zip(*block, strict=True)), self.shape.layers - 3)

    def prompt(self, tokens: int) -> Cost:
        """A whole prompt."""
        return prompt_cost(self.config, tokens, self.call)


class Call(NamedTuple):
    """A call of a prompt."""

    start: int
    tokens: int
    last: bool


def prompt_calls(config: AcceleratorConfig, tokens: int) -> Iterator[Call]:
    """The calls of a prompt."""
    for start in range(0, tokens, config.max_tokens):
        count = min(config.max_tokens, tokens - start)
        yield Call(start, count, start + count == tokens)


def prompt_cost(config: AcceleratorConfig, tokens: int, cost: Callable[[int, int, bool], Cost]) -> Cost:
    """A prompt. cost : of a call, by the fields of :class:`Call`; of some calls alone if there are many."""
    calls = list(prompt_calls(config, tokens))
    step = -(-len(calls) // WHOLE_CALLS)
    # No call lies on a line to the last one, because this one alone has the head.
    measured = [index for index in range(len(calls) - 1) if index % step == 0 or index == len(calls) - 2]
    costs = [cost(*calls[index]) for index in measured]
    total = cost(*calls[-1])
    for (index, following), (one, other) in zip(pairwise(measured), pairwise(costs), strict=True):
        for place in range(following - index):
            part = place / (following - index)
            total = total.plus(one, 1 - part).plus(other, part)
    return total.plus(costs[-1]) if costs else total


def _row(what: str, tokens: Tokens, length: int, cost: Cost, predicted: int) -> dict:
    count = length if what == "prompt" else 1
    numbers = {name: round(getattr(cost, name)) for name in ("cycles", "linear", "attention", "waiting", "beats")}
    return {
        "name": what,
        "length": length,
        "memory": MEMORY,
        "tile": tokens.config.tile,
        "key_bits": tokens.shape.key_bits,
        **numbers,
        "tokens_per_second": count * FABRIC_HZ / numbers["cycles"],
        "limit": count * FABRIC_HZ / numbers["beats"],
        "predicted": predicted,
    }


def measure(sizes: dict[str, int], key_bits: int, contexts: Sequence[int], prompts: Sequence[int]) -> list[dict]:
    """Tokens and prompts on hardware of these sizes."""
    if not (contexts or prompts):
        return []
    longest = max([*contexts, *prompts])
    with Tokens(sizes, longest, key_bits) as tokens:
        config, shape = tokens.config, tokens.shape
        rows = [_row("token", tokens, n, tokens.token(n), token_cycles(config, shape, n)) for n in contexts]
        rows += [_row("prompt", tokens, n, tokens.prompt(n), prompt_cycles(config, shape, n)) for n in prompts]
    return rows


def measure_attention() -> list[dict]:
    """Tokens and prompts on all hardware."""
    rows = []
    for sizes in HARDWARE:
        # Each on a device of its own: cycles in DDR depend a little on what it did before.
        rows += measure(sizes, QWEN.key_bits, CONTEXTS, ())
        rows += measure(sizes, QWEN.key_bits, (), PROMPTS)
        rows += measure(sizes, max(KEY_BITS), WIDE.get(sizes["tile"], ()), ())
    return rows


def _lengths(text: str) -> list[int]:
    lengths = [int(part) for part in text.split(",") if part.isdecimal() and 1 <= int(part) <= LONGEST_CONTEXT]
    if text and len(lengths) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"numbers of tokens from 1 to {LONGEST_CONTEXT:,} are wanted, not {text!r}")
    return lengths


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m sw.bench_attention", description="Cycles of tokens and prompts, as JSON.")
    sizes = {each["tile"]: each for each in HARDWARE}
    parser.add_argument("--tile", type=int, choices=list(sizes), default=HARDWARE[0]["tile"])
    parser.add_argument("--key-bits", type=int, choices=KEY_BITS, default=min(KEY_BITS))
    parser.add_argument("--contexts", type=_lengths, default=[], metavar="N,...", help="tokens that see N positions")
    parser.add_argument("--prompts", type=_lengths, default=[], metavar="N,...", help="prompts of N tokens")
    options = parser.parse_args()
    if not options.contexts + options.prompts:
        raise UserError("there is nothing to measure: --contexts or --prompts is wanted")
    rows = measure(sizes[options.tile], options.key_bits, options.contexts, options.prompts)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    run_cli(main)
