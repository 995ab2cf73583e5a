# SPDX-License-Identifier: Apache-2.0
"""The hardware on which a whole token runs: scores on chip for context and tokens, or the reason why there are none."""

import pytest

from hw.spec.config import SCORE_UNIT
from hw.spec.memory.kv_cache import LONGEST_CONTEXT
from hw.spec.ops.scores import bank_words
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.program.obstacles import Obstacle
from sw.program.whole import LEAST_SCORE_WORDS, config_with_attention, score_words_for
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_decoder import DATA
from tests.sw.runtime.test_programs import hardware


def test_score_words():
    """The same hardware for short contexts, then the power of two that all rows need, as far as hardware goes."""
    assert score_words_for(16, 1) == score_words_for(16, 512) == score_words_for(1, 8192) == LEAST_SCORE_WORDS
    assert score_words_for(16, 513) == score_words_for(16, 1024) == 16 * 1024
    assert score_words_for(64, 512) == 64 * 512
    for tokens in (1, 5, 16, 64):
        for context in (1, 64, 65, 1000, 4096, LONGEST_CONTEXT):
            words = score_words_for(tokens, context)
            assert words & (words - 1) == 0 and words % SCORE_UNIT == 0 and bank_words(1, context) <= words
            wanted = bank_words(tokens, context)
            assert words >= wanted or words == 1 << 18
            assert words < 2 * wanted or words == LEAST_SCORE_WORDS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model"), head_size=32)


def test_config(model):
    """Only score_words changes, and the decoder on it is whole."""
    plain = hardware()
    config = config_with_attention(plain, OnnxFile(model), 32)
    assert config.to_dict() == plain.to_dict() | {"score_words": LEAST_SCORE_WORDS}
    with ReferenceDevice(config) as device:
        assert ProgramDecoder(OnnxFile(model), device, context=32, tell=pytest.fail).whole


@pytest.mark.parametrize(
    ("changes", "context", "reason"),
    [
        ({"weight_bits": 5}, 32, "the hardware: a KV cache takes weight_bits of 4 or 8, not 5"),
        ({"max_k": 256}, 32, "the hardware: max_k is at least 512 with score_words, not 256"),
        ({"operators": "linear"}, 32, r"the hardware: score_words is 0 without the vector unit .*"),
        ({}, 33, "layers.0.self_attn: the tables of its rotation have 32 positions, and the context 33"),
    ],
)
def test_hardware_without(changes, context, reason, model):
    with pytest.raises(Obstacle, match=f"^{reason}$"):
        config_with_attention(hardware(**changes), OnnxFile(model), context)


def test_graphs_without(tmp_path):
    """A graph whose attention is other operators, and a context that no cache has."""
    with pytest.raises(Obstacle, match=r"^layers\.0\.self_attn: Softmax"):
        config_with_attention(hardware(), OnnxFile(DATA / "torch_qwen2_opset18.onnx"), 32)
    long = LONGEST_CONTEXT + 1
    path = write_random(tmp_path, head_size=32, context=long)
    with pytest.raises(Obstacle, match=r"^layers\.0\.self_attn: .*32,768"):
        config_with_attention(hardware(), OnnxFile(path), long)
