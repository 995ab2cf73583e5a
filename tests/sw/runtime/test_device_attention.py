# SPDX-License-Identifier: Apache-2.0
"""Attention on the device: bit for bit the definition, for prompts in blocks, windows, and caches of any precision."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from hw.spec.config import SCORE_UNIT, AcceleratorConfig
from hw.spec.numerics.attention import attention, cache_keys, cache_values
from hw.spec.numerics.block_float import BLOCK
from sw.devices.base import DeviceError
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.graph.match import match_decoder
from sw.model.parts import Attention
from sw.model.parts import Decoder as Parts
from sw.program.attention import check_attention
from sw.program.keys import KeyForm
from sw.program.load import attention_of
from sw.program.obstacles import Obstacle
from sw.runtime import Decoder, ProgramDecoder
from sw.text.sampling import Sampler
from tests.sw.fixtures.linears import same_bits
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_decoder import IDS, changed, in_blocks, relative
from tests.sw.runtime.test_programs import hardware

pytestmark = pytest.mark.slow

CONTEXT = 32
SCORE_WORDS = 8 * SCORE_UNIT
"""Enough for eight rows."""


class Defined(ProgramDecoder):
    """The same programs with attention by its definition, on the host. keys: the form of its keys, as on the device."""

    def __init__(self, path: Path, config: AcceleratorConfig, keys: Sequence[Sequence[KeyForm]]):
        file = OnnxFile(path)
        super().__init__(file, ReferenceDevice(config), context=CONTEXT)
        decoder = match_decoder(file)
        assert isinstance(decoder, Parts)
        self.parts = [attention_of(block) for block in decoder.blocks]
        self.keys = keys
        self.past = [np.zeros((0, self._programs.qkv.columns), np.float32) for _ in self.parts]

    def _attend(self, index: int, tokens: int) -> None:
        part = self.parts[index]
        self.past[index] = np.concatenate([self.past[index][: self.length], self._programs.qkv.view(tokens)])
        output = self._programs.attended(index, tokens)
        output[:] = defined(self._device.config, part, self.past[index], tokens, self.keys[index])[:, None]


def defined(
    config: AcceleratorConfig, part: Attention, qkv: np.ndarray, tokens: int, forms: Sequence[KeyForm]
) -> np.ndarray:
    """The output of the last tokens: float32 [tokens, heads * head_size]. qkv: of all positions."""
    total, padding = len(qkv), -part.head_size % BLOCK
    columns = np.pad(qkv.reshape(total, -1, part.head_size), [(0, 0), (0, 0), (0, padding)])
    size = part.head_size + padding
    position, row = np.arange(total), np.arange(total - tokens, total)[:, None]
    visible = (position <= row) & (position > row - (part.window or total))
    outputs = []
    for head in range(part.heads):
        kv_head = head // (part.heads // part.kv_heads)
        keys = columns[:, part.heads + kv_head]
        values = columns[:, part.heads + part.kv_heads + kv_head]
        centre, bits, factors = forms[kv_head]
        cached = cache_keys(keys / factors, np.zeros(size, np.float32) if centre is None else centre, bits)
        q = columns[total - tokens :, head] * factors
        scale = np.array(part.scale, np.float32)
        output = attention(config, q, cached, cache_values(values), scale, visible)
        assert not output[:, part.head_size :].any()
        outputs.append(output[:, : part.head_size])
    return np.concatenate(outputs, axis=1)


@pytest.fixture(scope="module", params=[32, pytest.param(64, marks=pytest.mark.full)])
def model(request, tmp_path_factory) -> Path:
    """Two blocks; four query heads share two KV heads. o has eight bits: its activations are in memory twice."""
    return write_random(tmp_path_factory.mktemp("model"), {"o_proj": (8, 64)}, head_size=request.param)


def on_device(path: Path, key_bits: int | str = 8, **changes) -> ProgramDecoder:
    device = ReferenceDevice(hardware(**{"score_words": SCORE_WORDS, **changes}))
    decoder = ProgramDecoder(OnnxFile(path), device, context=CONTEXT, key_bits=key_bits, tell=pytest.fail)
    assert decoder.whole
    return decoder


def forms(decoder: ProgramDecoder) -> Sequence[Sequence[KeyForm]]:
    attention = decoder._programs.attention
    assert attention is not None
    return attention.keys


@pytest.mark.parametrize("key_bits", [8, 16])
@pytest.mark.parametrize("tile", [4, 16, 32])
def test_equals_the_definition(model, key_bits, tile):
    decoder = on_device(model, key_bits, tile=tile)
    assert {form.bits for block in forms(decoder) for form in block} == {key_bits}
    assert same_bits(in_blocks(decoder), in_blocks(Defined(model, hardware(tile=tile), forms(decoder))))


def test_close_to_onnxruntime(model):
    device = ReferenceDevice(hardware())
    plain = in_blocks(ProgramDecoder(OnnxFile(model), device, context=CONTEXT))
    assert relative(in_blocks(on_device(model)), plain) < 0.05
    assert relative(in_blocks(on_device(model, 16)), plain) < 0.05


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Heads of 80 elements. Groups of o end within heads; it has eight bits in the second block."""
    return write_random(tmp_path_factory.mktemp("odd"), {"1.o_proj": (8, 64)}, head_size=80)


@pytest.mark.parametrize(("tile", "key_bits"), [(4, 16), (8, 8), (16, 8)])
def test_padded_heads(odd, tile, key_bits):
    """Heads of 80 elements are padded to 96: bit for bit the definition, and the layers are as without padding."""
    decoder = on_device(odd, key_bits, tile=tile)
    assert decoder._programs.qkv.columns == 8 * 96
    found = in_blocks(decoder)
    assert same_bits(found, in_blocks(Defined(odd, hardware(tile=tile), forms(decoder))))
    plain = in_blocks(ProgramDecoder(OnnxFile(odd), ReferenceDevice(hardware(tile=tile)), context=CONTEXT))
    assert relative(found, plain) < 0.05
    linear = ReferenceDevice(hardware(tile=tile, operators="linear"))
    assert relative(found, in_blocks(Decoder(odd, linear, context=CONTEXT))) < 0.05


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tile": 32}, r"multiple of the tile \(32\), not 16"),
        ({"max_k": 736}, r"K is at most max_k \(736\), not 768"),
    ],
)
def test_padding_that_does_not_fit(odd, config, reason):
    """Then attention stays in onnxruntime, and the programs are those without padding."""
    told: list[str] = []
    device = ReferenceDevice(hardware(score_words=SCORE_WORDS, **config))
    decoder = ProgramDecoder(OnnxFile(odd), device, context=CONTEXT, tell=told.append)
    assert not decoder.whole and decoder._programs.qkv.columns == 8 * 80
    (line,) = told
    assert re.search(rf"^onnxruntime computes attention, because of layers\.\d.*heads of 80 .* to 96, .*{reason}", line)
    device = ReferenceDevice(hardware(**config))
    plain = ProgramDecoder(OnnxFile(odd), device, context=CONTEXT)
    assert same_bits(decoder.forward(IDS[:8]), plain.forward(IDS[:8]))


def plant(graph: onnx.GraphProto, pair: int, size: float) -> None:
    """Adds a large bias to a rotated pair of the keys of block 0, KV head 0."""
    (tensor,) = (one for one in graph.initializer if one.name == "model.layers.0.self_attn.k_proj.bias")
    values = onnx.numpy_helper.to_array(tensor).copy()
    half = len(values) // 4
    values[[pair % half, half + pair % half]] += size
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize(
    ("pair", "size", "bits", "gain"),
    [(0, 60, 16, 1.5), (0, 20, 8, 1.4), (-1, 20, 8, 1.5)],
    ids=["fast", "smaller", "slow"],
)
def test_outliers(model, pair, size, bits, gain, tmp_path):
    """A pair that turns fast takes 16 bits, or a factor; of one that turns slowly the centre takes nearly all."""
    path = changed(model, tmp_path, lambda graph: plant(graph, pair, size))
    decoder = on_device(path, "auto")
    assert [[form.bits for form in block] for block in forms(decoder)] == [[bits, 8], [8, 8]]
    plain = in_blocks(ProgramDecoder(OnnxFile(path), ReferenceDevice(hardware()), context=CONTEXT))
    found = in_blocks(decoder)
    assert same_bits(found, in_blocks(Defined(path, hardware(), forms(decoder))))
    ones = np.ones_like(forms(decoder)[0][0].factors)
    assert (forms(decoder)[0][0].factors[0] > 2) == (pair == 0)
    narrow = [[KeyForm(None, 8, ones)] * 2] * 2
    errors = [relative(logits, plain) for logits in (found, in_blocks(Defined(path, hardware(), narrow)))]
    assert errors[0] < 0.05 and errors[0] < errors[1] / gain, errors


def test_few_scores_on_chip(model):
    """Rows that do not fit a bank run one after another."""
    assert same_bits(in_blocks(on_device(model, score_words=2 * SCORE_UNIT)), in_blocks(on_device(model)))


def narrow(graph: onnx.GraphProto, window: int) -> None:
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("local_window_size", window))


@pytest.mark.parametrize("window", [1, 3, 9, 30])
def test_windows(model, window, tmp_path):
    """A cache for fewer positions than the context, which begins again at its first slot."""
    path = changed(model, tmp_path, lambda graph: narrow(graph, window))
    decoder = on_device(path)
    assert same_bits(in_blocks(decoder), in_blocks(Defined(path, hardware(), forms(decoder))))
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


def soften(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("softcap", 30.0))


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (soften, {}, "its scores have a softcap"),
        (lambda graph: None, {"ports": 1, "port_width": 32}, "takes weight ports of 64 bits together, not 32"),
    ],
    ids=["softcap", "narrow"],
)
def test_attention_stays_with_onnxruntime(model, change, config, reason, tmp_path):
    path, told = changed(model, tmp_path, change), []
    device = ReferenceDevice(hardware(**{"score_words": SCORE_WORDS, **config}))
    decoder = ProgramDecoder(OnnxFile(path), device, context=CONTEXT, tell=told.append)
    assert not decoder.whole
    assert len(told) == 1 and reason in told[0]
    assert (
        relative(
            in_blocks(decoder), in_blocks(ProgramDecoder(OnnxFile(path), ReferenceDevice(hardware()), context=CONTEXT))
        )
        < 1e-3
    )


def test_a_context_that_is_too_long():
    part = Attention("", "", 4, 2, 64, 0.125, 0.0, None, *[""] * 6)
    config = hardware(score_words=SCORE_UNIT)
    check_attention(config, [part], SCORE_UNIT)
    with pytest.raises(Obstacle, match="a context of 65 positions is longer than score_words \\(64\\)"):
        check_attention(config, [part], SCORE_UNIT + 1)
    (padded,) = check_attention(config, [replace(part, head_size=80)], SCORE_UNIT)
    assert padded == replace(part, head_size=96)
