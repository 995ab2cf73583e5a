# SPDX-License-Identifier: Apache-2.0
"""The cycles of a shape are those of the programs that the runtime makes for a model of this shape."""

from dataclasses import replace

import pytest

from hw.spec.config import SCORE_UNIT
from hw.spec.timing.decoder import DecoderShape, call_cycles, prompt_cycles, token_cycles
from hw.spec.timing.program import program_cycles
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.program.lower import Output
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.random_decoder import CONFIG, write_random
from tests.sw.runtime.test_programs import hardware

HEAD, GROUP, CONTEXT = 64, 32, 600
CALLS = ((1, 0), (1, 63), (1, 511), (3, 40), (8, 0), (8, 500))
"""Tokens and position. At 500 a bank holds the scores of fewer rows than a call has tokens."""


@pytest.mark.parametrize("key_bits", [8, 16])
def test_programs_of_the_runtime(key_bits, tmp_path):
    config = hardware(score_words=16 * SCORE_UNIT, lanes=1)
    shape = DecoderShape(
        CONFIG.hidden_size,
        CONFIG.layer_count,
        CONFIG.head_count,
        CONFIG.kv_head_count,
        HEAD,
        CONFIG.intermediate_size,
        CONFIG.vocab_size,
        key_bits=key_bits,
        group_size=GROUP,
    )
    path = write_random(tmp_path, head_size=HEAD, context=CONTEXT)
    with ReferenceDevice(config) as device:
        decoder = ProgramDecoder(OnnxFile(path), device, context=CONTEXT, key_bits=key_bits, tell=pytest.fail)
        for tokens, position in CALLS:
            for output in (Output.BEST, None):
                jobs = decoder._programs.whole(tokens, position, output)
                expected = program_cycles(config, [job.descriptor() for job in jobs])[-1]
                assert call_cycles(config, shape, tokens, position, bool(output)) == expected, (tokens, position)


def test_blocks_are_alike():
    """Cycles of many blocks are those of three and the third one again and again, to a few cycles."""
    config = hardware(score_words=64 * SCORE_UNIT)
    shape = DecoderShape(192, 9, 3, 1, 64, 512, 1000)
    for context in (64, 1000):
        counts = [token_cycles(config, replace(shape, layers=layers), context) for layers in (3, 6, 9)]
        assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_prompts_and_tokens():
    config, shape = hardware(score_words=64 * SCORE_UNIT), DecoderShape(192, 4, 3, 1, 64, 512, 1000)
    assert token_cycles(config, shape, 64) < token_cycles(config, shape, 1024) < token_cycles(config, shape, 4096)
    assert prompt_cycles(config, shape, 1) == token_cycles(config, shape, 1)
    calls = [call_cycles(config, shape, 8, 0, False), call_cycles(config, shape, 3, 8)]
    assert prompt_cycles(config, shape, 11) == sum(calls)
    wide = replace(shape, key_bits=16)
    assert token_cycles(config, wide, 4096) > token_cycles(config, shape, 4096)
