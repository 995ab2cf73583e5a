# SPDX-License-Identifier: Apache-2.0
"""Attention on the device: bit for bit the definition, for prompts in blocks, windows, and caches of any precision."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.attention import attention, cache_keys, cache_values
from sw.devices.base import DeviceError
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.graph.match import match_decoder
from sw.model.parts import Attention
from sw.model.parts import Decoder as Parts
from sw.program.load import attention_of
from sw.runtime import ProgramDecoder
from sw.text.sampling import Sampler
from tests.sw.fixtures.linears import same_bits
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_decoder import IDS, changed, in_blocks, relative
from tests.sw.runtime.test_programs import hardware

CONTEXT = 32
SCORE_WORDS = 8 * CONTEXT
"""Enough for eight rows."""


class Defined(ProgramDecoder):
    """The same programs with attention by its definition, on the host. key_bits: of its cache."""

    def __init__(self, path: Path, config: AcceleratorConfig, key_bits: int = 8):
        file = OnnxFile(path)
        super().__init__(file, ReferenceDevice(config), context=CONTEXT)
        decoder = match_decoder(file)
        assert isinstance(decoder, Parts)
        self.parts = [attention_of(block) for block in decoder.blocks]
        self.key_bits = key_bits
        self.past = [np.zeros((0, self._programs.qkv.columns), np.float32) for _ in self.parts]

    def _attend(self, index: int, tokens: int) -> None:
        part = self.parts[index]
        self.past[index] = np.concatenate([self.past[index][: self.length], self._programs.qkv.view(tokens)])
        output = self._programs.attended(index, tokens)
        output[:] = defined(self._device.config, part, self.past[index], tokens, self.key_bits)[:, None]


def defined(config: AcceleratorConfig, part: Attention, qkv: np.ndarray, tokens: int, key_bits: int) -> np.ndarray:
    """The output of the last tokens: float32 [tokens, heads * head_size]. qkv: of all positions."""
    size, total = part.head_size, len(qkv)
    columns = qkv.reshape(total, -1, size)
    position, row = np.arange(total), np.arange(total - tokens, total)[:, None]
    visible = (position <= row) & (position > row - (part.window or total))
    outputs = []
    for head in range(part.heads):
        kv_head = head // (part.heads // part.kv_heads)
        keys = columns[:, part.heads + kv_head]
        values = columns[:, part.heads + part.kv_heads + kv_head]
        cached = cache_keys(keys, np.zeros(size, np.float32), key_bits)
        q = columns[total - tokens :, head]
        scale = np.array(part.scale, np.float32)
        outputs.append(attention(config, q, cached, cache_values(values), scale, visible))
    return np.concatenate(outputs, axis=1)


@pytest.fixture(scope="module", params=[32, 64])
def model(request, tmp_path_factory) -> Path:
    """Two blocks; four query heads share two KV heads. o has eight bits: its activations are in memory twice."""
    return write_random(tmp_path_factory.mktemp("model"), {"o_proj": (8, 64)}, head_size=request.param)


def on_device(path: Path, key_bits: int = 8, **changes) -> ProgramDecoder:
    device = ReferenceDevice(hardware(**{"score_words": SCORE_WORDS, **changes}))
    decoder = ProgramDecoder(OnnxFile(path), device, context=CONTEXT, key_bits=key_bits, tell=pytest.fail)
    assert decoder.whole
    return decoder


@pytest.mark.parametrize("key_bits", [8, 16])
@pytest.mark.parametrize("tile", [4, 16, 32])
def test_equals_the_definition(model, key_bits, tile):
    found = in_blocks(on_device(model, key_bits, tile=tile))
    assert same_bits(found, in_blocks(Defined(model, hardware(tile=tile), key_bits)))


def test_close_to_onnxruntime(model):
    device = ReferenceDevice(hardware())
    plain = in_blocks(ProgramDecoder(OnnxFile(model), device, context=CONTEXT))
    assert relative(in_blocks(on_device(model)), plain) < 0.05
    assert relative(in_blocks(on_device(model, 16)), plain) < 0.05


def test_few_scores_on_chip(model):
    """Rows that do not fit a bank run one after another."""
    assert same_bits(in_blocks(on_device(model, score_words=2 * CONTEXT)), in_blocks(on_device(model)))


def narrow(graph: onnx.GraphProto, window: int) -> None:
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("local_window_size", window))


@pytest.mark.parametrize("window", [1, 3, 9, 30])
def test_windows(model, window, tmp_path):
    """A cache for fewer positions than the context, which begins again at its first slot."""
    path = changed(model, tmp_path, lambda graph: narrow(graph, window))
    decoder = on_device(path)
    assert same_bits(in_blocks(decoder), in_blocks(Defined(path, hardware())))
    attention = decoder._programs.attention
    assert attention is not None and attention.capacities == [min(CONTEXT, window + 8)] * 2


def test_last_tokens_alone(model):
    """Outputs that need only the last token's logits, or none."""
    every = in_blocks(on_device(model))
    decoder = on_device(model)
    decoder.prefill(IDS[:8])
    assert same_bits(decoder.forward(IDS[8:13]), every[12:13])
    assert decoder.greedy(IDS[13:14]) == every[13].argmax()
    sampler = Sampler(0.7, 0.9, 3)
    assert decoder.sample(IDS[14:18], sampler) == Sampler(0.7, 0.9, 3)(every[17])


def test_earlier_positions_again(model):
    """A cache that is made shorter, or empty, is like one that never held more."""
    decoder = on_device(model)
    first = in_blocks(decoder)
    decoder.reset()
    assert same_bits(in_blocks(decoder), first)
    decoder.length = 8
    assert same_bits(decoder.forward(IDS[8:9]), first[8:9])


def test_a_layer_that_fails_keeps_the_cache(model):
    decoder = on_device(model)
    decoder.forward(IDS[:8])
    again = decoder.forward(IDS[8:9])
    decoder.length = 8
    with pytest.raises(DeviceError, match="finite"), broken(decoder):
        decoder.forward(IDS[8:10])
    assert decoder.length == 8
    assert same_bits(decoder.forward(IDS[8:9]), again)


class broken:
    """Makes a value of the embedding infinite."""

    def __init__(self, decoder: ProgramDecoder):
        self.decoder = decoder

    def __enter__(self) -> None:
        begin = self.decoder._begin

        def changed_begin(ids: Sequence[int], total: int) -> None:
            begin(ids, total)
            self.decoder._programs.embedded.view(len(ids))[-1, 3] = np.inf

        self.decoder._begin = changed_begin

    def __exit__(self, *exception: object) -> None:
        del self.decoder._begin


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score_words": 16}, "a context of 32 positions is longer than score_words"),
        ({"ports": 1, "port_width": 32}, "takes weight ports of 64 bits together, not 32"),
    ],
)
def test_attention_stays_with_onnxruntime(model, changes, reason):
    told: list[str] = []
    device = ReferenceDevice(hardware(**{"score_words": SCORE_WORDS, **changes}))
    decoder = ProgramDecoder(OnnxFile(model), device, context=CONTEXT, tell=told.append)
    assert not decoder.whole
    assert len(told) == 1
    assert reason in told[0]
    assert relative(in_blocks(decoder), in_blocks(on_device(model))) < 0.05
