# SPDX-License-Identifier: Apache-2.0
"""The performance model of programs against the RTL: the block of a decoder, and its head."""

from dataclasses import replace

import numpy as np
import pytest

from hw.spec.control.descriptor import weight_bytes
from hw.spec.memory.geometry import fit_layer
from hw.spec.memory.operands import result_pitch
from hw.spec.ops import Wait
from hw.spec.timing.program import program_cycles
from sw.devices import Device, make_config
from sw.devices.jobs import NOWHERE, Epilogue, LinearJob, Rotation, Rows, Second, VectorJob
from sw.devices.rtl import RtlDevice
from sw.graph.file import OnnxFile
from sw.program.lower import Output
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.random_decoder import write_random

pytestmark = pytest.mark.simulator

CONFIGS = {
    "tile4": dict(tile=4, ports=1, max_k=1024, max_tokens=5, score_words=1 << 14),
    "tile8": dict(tile=8, max_k=2048, max_tokens=8),
    "tile16": dict(tile=16, lanes=2, score_words=1 << 17),
}
HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD = 192, 512, 1000, 3, 1, 64
TOLERANCE = 0.05
CALLS = ((1, 63), (1, 1023), (1, 2047), (5, 0), (5, 500))
"""Tokens and the first one's position. At 2,048 positions five rows do not fit a bank of tile4."""


@pytest.fixture(
    scope="module", params=["tile4", *(pytest.param(name, marks=pytest.mark.full) for name in ("tile8", "tile16"))]
)
def device(request):
    with RtlDevice(make_config(operators="decoder", **CONFIGS[request.param]), memory="ideal") as opened:
        yield opened


class _Block:
    """The jobs of one block. Weights are zeros: cycles do not depend on values."""

    def __init__(self, device: Device, tokens: int):
        self.device, self.tokens = device, tokens

    def rows(self, columns: int) -> Rows:
        rows = Rows(self.device.alloc(self.tokens * result_pitch(columns)), result_pitch(columns))
        self.device.write(rows.buffer, np.ones(rows.buffer.size // 4, np.float32))
        return rows

    def linear(self, name: str, k: int, n: int, x: Rows, y: Rows, epilogue: Epilogue, wait: Wait) -> LinearJob:
        layout = fit_layer(self.device.config, k, n, 32)
        weights = self.device.alloc(weight_bytes(layout))
        self.device.write(weights, np.zeros(weights.size, np.uint8))
        return LinearJob(name, layout, self.tokens, weights, x.buffer, y.buffer, False, wait, epilogue, y.pitch)

    def jobs(self) -> list[LinearJob | VectorJob]:
        hidden, middle, normed, gated = (self.rows(columns) for columns in (HIDDEN, HIDDEN, HIDDEN, INNER))
        columns, after = (HEADS + 2 * KV_HEADS) * HEAD, Wait.ACTIVATIONS
        attended, qkv, table = (self.rows(count) for count in (HEADS * HEAD, columns, HEAD))
        factor, bias = self.rows(HIDDEN).buffer, Rows(self.rows(columns).buffer)
        norm = Second(factor, normed)
        first = Epilogue(scale=True, addend=bias, rotation=Rotation(table, HEAD, HEADS + KV_HEADS))
        o, down = (Epilogue(addend=rows, second=norm, epsilon=1e-5) for rows in (hidden, middle))
        silu = Epilogue(scale=True, silu=True)
        return [
            VectorJob("norm", self.tokens, HIDDEN, hidden, NOWHERE, epilogue=Epilogue(second=norm, epsilon=1e-5)),
            self.linear("qkv", HIDDEN, columns, normed, qkv, first, after),
            self.linear("o", HEADS * HEAD, HIDDEN, attended, middle, o, Wait.NOTHING),
            self.linear("gate_up", HIDDEN, 2 * INNER, normed, gated, silu, after),
            self.linear("down", INNER, HIDDEN, gated, hidden, down, after),
            self.linear("head", HIDDEN, VOCAB, normed, self.rows(VOCAB), Epilogue(scale=True), after),
        ]


def test_prediction(device):
    for tokens in (1, 3, device.config.max_tokens):
        jobs = _Block(device, tokens).jobs()
        took = np.cumsum([done.cycles for done in device.wait(device.submit(device.prepare(jobs)), 120)])
        predicted = program_cycles(device.config, [job.descriptor() for job in jobs])
        assert len(predicted) == len(jobs) and predicted == sorted(predicted)
        what = f"M {tokens} took {took.tolist()} cycles, predicted were {predicted}"
        assert abs(predicted[-1] - took[-1]) <= TOLERANCE * took[-1], what
        # Also within the program; the start and single short layers are off by more.
        assert (abs(predicted[2:] - took[2:]) <= 2 * TOLERANCE * took[2:]).all(), what


def test_prediction_with_attention(device, tmp_path):
    """A whole call of a small decoder, in which latencies count most: two blocks with attention, and the head."""
    if not device.config.has_attention:
        pytest.skip("hardware without attention")
    path, context = write_random(tmp_path, head_size=HEAD, context=2100), 2100
    decoder = ProgramDecoder(OnnxFile(path), device, context=context, key_bits=8, tell=pytest.fail)
    assert decoder._programs.attention
    decoder._programs.attention.use()
    for tokens, position in CALLS:
        jobs = decoder._programs.whole(tokens, position, Output.BEST)
        took = np.cumsum([done.cycles for done in device.wait(device.submit(jobs), 600)])
        predicted = program_cycles(device.config, [job.descriptor() for job in jobs])
        lines = [f"{job.name}: {cycles}, {count}" for job, cycles, count in zip(jobs, took, predicted, strict=True)]
        what = f"M {tokens} at {position}: {took[-1]}, {predicted[-1]}, {predicted[-1] / took[-1]:.4f}"
        print(what)
        assert abs(predicted[-1] - took[-1]) <= TOLERANCE * took[-1], "\n".join([what, *lines])


def test_waiting_costs_time(device):
    """A program without dependencies takes less time, and a single token that is not followed takes more."""
    program = [job.descriptor() for job in _Block(device, 1).jobs()]
    total = program_cycles(device.config, program)[-1]
    free = [replace(descriptor, wait=Wait.NOTHING) for descriptor in program]
    moved = [replace(program[0], second_results=0), *program[1:]]
    assert program_cycles(device.config, free)[-1] < total < program_cycles(device.config, moved)[-1]
