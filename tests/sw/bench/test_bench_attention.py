# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole tokens and prompts: what it counts, and that its figures and predictions belong together."""

from dataclasses import replace
from pathlib import Path

import pytest

from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.timing.decoder import QWEN, call_cycles, prompt_cycles, token_cycles
from sw import bench_attention
from sw.bench_attention import BlockDevice, Cost, Tokens, block_of, cost_of, prompt_calls, prompt_cost
from sw.devices.base import Completion
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.pages.store import load
from sw.program.lower import Output
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_programs import hardware

CONFIG = AcceleratorConfig(operators="decoder", lanes=2, max_k=8192, score_words=1 << 17)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The jobs of a token."""
    path = write_random(tmp_path_factory.mktemp("model"), head_size=32, context=100)
    with ReferenceDevice(hardware(score_words=16 * SCORE_UNIT)) as device:
        decoder = ProgramDecoder(OnnxFile(path), device, context=100, tell=pytest.fail)
        yield decoder._programs.whole(1, 9, Output.BEST)


def test_cost(jobs):
    """A job counts once; a linear layer takes no more than it took, and no more than it needs without waiting."""
    done = [Completion(job.name, 1000 + index, 10, 0.0) for index, job in enumerate(jobs)]
    cost = cost_of(jobs, done)
    attention = [each.cycles for each in done if "self_attn" in each.name and "proj" not in each.name]
    assert len(attention) == 2 * (2 + 2 + 2 + 2)
    assert (cost.cycles, cost.attention) == (sum(each.cycles for each in done), sum(attention))
    assert cost.beats == 10 * len(jobs) and 0 < cost.linear < cost.waiting
    short = [each._replace(cycles=1) for each in done]
    assert cost_of(jobs, short).linear == sum(type(job).__name__ == "LinearJob" for job in jobs)


def test_blocks(jobs):
    numbers = [block_of(job) for job in jobs]
    assert set(numbers) == {-1, 0, 1} and numbers[-1] == -1
    assert numbers[:-2] == sorted(numbers[:-2])


@pytest.mark.parametrize("tokens", [1, 16, 17, 128, 1000, 1024])
def test_prompts(tokens):
    """If the cycles of a call grow evenly, a prompt whose calls are not all simulated has the exact sum."""
    calls = list(prompt_calls(CONFIG, tokens))
    assert sum(call.tokens for call in calls) == tokens and [call.last for call in calls].count(True) == 1
    measured = []

    def cost(start: int, count: int, last: bool) -> Cost:
        measured.append(start)
        return Cost(linear=5000 if last else 100 + 3 * start, beats=count)

    total = prompt_cost(CONFIG, tokens, cost)
    assert total.linear == pytest.approx(sum(5000 if last else 100 + 3 * start for start, _, last in calls))
    assert len(measured) <= 11 and len(set(measured)) == len(measured)


def test_figures_and_predictions():
    """The predictions are within 3 % of docs/figures.json, and are those of today's model."""
    rows = load()["attention"]["figures"]
    assert {row["tile"] for row in rows} == {16, 32} and {row["key_bits"] for row in rows} == {8, 16}
    for row in rows:
        sizes = next(sizes for sizes in bench_attention.HARDWARE if sizes["tile"] == row["tile"])
        config, shape = replace(CONFIG, **sizes), replace(QWEN, key_bits=row["key_bits"])
        predicted = {"token": token_cycles, "prompt": prompt_cycles}[row["name"]](config, shape, row["length"])
        assert predicted == row["predicted"], f"python -m sw.bench --only attention --update: {row}"
        assert abs(predicted - row["cycles"]) <= 0.03 * row["cycles"], row
        assert row["linear"] + row["attention"] + row["waiting"] == pytest.approx(row["cycles"], abs=2)


@pytest.mark.simulator
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sizes", bench_attention.HARDWARE, ids=str)
def test_prediction(sizes):
    """In memory without delays the prediction of a token and of a call of a prompt is within 1 %."""
    with Tokens(sizes, 1024, QWEN.key_bits, memory="ideal") as tokens:
        config = tokens.config
        pairs = [(tokens.token(context).cycles, token_cycles(config, QWEN, context)) for context in (64, 1024)]
        pairs += [(tokens.call(at, 16, False).cycles, call_cycles(config, QWEN, 16, at, False)) for at in (0, 1008)]
    print(pairs)
    for cycles, predicted in pairs:
        assert abs(predicted - cycles) <= 0.01 * cycles, pairs


def test_blocks_that_are_left_out(jobs, tmp_path: Path):
    """`few` keeps the first two blocks, the last one, and what belongs to none."""
    kept = []

    class Fake(BlockDevice):
        def __init__(self):
            self.few = True

    many = [replace(job, name=f"layers.{index}.x") for index in range(5) for job in jobs[:2]] + [jobs[-1]]
    fake = Fake()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sw.devices.rtl.RtlDevice.submit", lambda self, batch: kept.append(list(batch)) or 1)
        assert fake.submit(many) == 1
        fake.few = False
        fake.submit(many)
    assert [block_of(job) for job in kept[0]] == [0, 0, 1, 1, 4, 4, -1]
    assert kept[1] == many
