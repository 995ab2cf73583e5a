# SPDX-License-Identifier: Apache-2.0
"""Real shapes through the whole software: SmolLM2's text equals onnxruntime's, and Qwen2.5-0.5B's shape is exact."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from hw.spec.config import OPERATORS
from hw.spec.memory.kv_cache import KEY_BITS
from sw.bench_decoder import measure, measure_qwen
from sw.devices import make_config, open_device
from sw.graph.file import OnnxFile
from sw.runtime import BaseDecoder, Decoder, ProgramDecoder
from sw.runtime.setup import make_decoder

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about a water mill.",
    "List three uses of a systolic array, and explain the first in one sentence.",
)


def greedy(decoder: BaseDecoder, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Token ids, and the logits of each choice; it does not end at stop tokens."""
    decoder.reset()
    logits, out = [], []
    for start in range(0, len(ids), decoder.block):
        last = decoder.forward(ids[start : start + decoder.block])
    for _ in range(count):
        logits.append(last[0])
        out.append(int(last[0].argmax()))
        last = decoder.forward(out[-1:])
    return out, np.stack(logits)


def prompt_ids(path, prompt: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    return tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids


def compare(path, prompts, count: int, operators: str) -> None:
    """On the RTL the token ids equal onnxruntime's, and the logits equal the reference's bit for bit."""
    everything = {}
    for name in (None, "reference", "rtl"):
        device = open_device(name, make_config(operators=operators, tile=16, zero_point="fixed")) if name else None
        with make_decoder(path, device, context=256) as decoder:
            assert type(decoder) is (ProgramDecoder if device and operators == "decoder" else Decoder)
            everything[name] = [greedy(decoder, prompt_ids(path, prompt), count) for prompt in prompts]
        if device:
            device.close()
    for prompt, plain, reference, rtl in zip(prompts, *everything.values()):
        assert rtl[0] == plain[0], prompt
        assert np.array_equal(rtl[1].view(np.uint32), reference[1].view(np.uint32)), prompt
        error = np.abs(rtl[1] - plain[1]).max() / np.abs(plain[1]).max()
        assert 0 < error < 1e-2, prompt


@pytest.mark.simulator
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operators", OPERATORS)
def test_smollm2_continues_like_onnxruntime(operators, smollm2):
    compare(smollm2, PROMPTS, 32, operators)


@pytest.mark.slow
@pytest.mark.full
def test_smollm2_as_programs(smollm2):
    """The device finds the tokens itself, and they are onnxruntime's."""
    with Decoder(smollm2, None, context=256) as decoder:
        wanted = [greedy(decoder, prompt_ids(smollm2, prompt), 32)[0] for prompt in PROMPTS]
    with open_device("reference", make_config(operators="decoder", tile=16, zero_point="fixed")) as device:
        decoder = ProgramDecoder(OnnxFile(smollm2), device, context=256)
        for prompt, tokens in zip(PROMPTS, wanted):
            decoder.reset()
            ids = prompt_ids(smollm2, prompt)
            for start in range(0, len(ids) - 1, decoder.block):
                decoder.prefill(ids[start : min(start + decoder.block, len(ids) - 1)])
            found = ids[-1:]
            for _ in tokens:
                found.append(decoder.greedy(found[-1:]))
            assert found[1:] == tokens, prompt


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("key_bits", KEY_BITS)
def test_smollm2_with_attention(key_bits, smollm2):
    """Attention on the device: onnxruntime's tokens, or others first where two logits are closer than 0.05."""
    with Decoder(smollm2, None, context=256) as decoder:
        wanted = [greedy(decoder, prompt_ids(smollm2, prompt), 32) for prompt in PROMPTS]
    config = make_config(operators="decoder", tile=16, zero_point="fixed", score_words=4096)
    with open_device("reference", config) as device:
        decoder = ProgramDecoder(OnnxFile(smollm2), device, context=256, key_bits=key_bits, tell=pytest.fail)
        for prompt, (tokens, logits) in zip(PROMPTS, wanted):
            found, _ = greedy(decoder, prompt_ids(smollm2, prompt), 32)
            for mine, token, row in zip(found, tokens, logits):
                if mine != token:
                    assert row[token] - row[mine] < 0.05, prompt
                    break


@pytest.mark.simulator
@pytest.mark.full
@pytest.mark.timeout(3600)
def test_qwen_shape():
    """One token of 24 blocks and an int8 head: it is exact, close to onnxruntime, and needs little memory."""
    figures = measure_qwen()
    assert figures["equals_reference"]
    assert 0 < figures["relative_error"] < 1e-2
    assert figures["port_fraction"] > 0.97
    assert max(figures["peak_bytes"].values()) < 2.5e9
    programs = figures["programs"]
    assert programs["equals_reference"]
    assert 0 < programs["relative_error"] < 1e-2
    # The operators between the layers cost less than 1 % of a token.
    assert programs["cycles"] < 1.01 * figures["cycles"]


@pytest.mark.simulator
def test_memory():
    """Memory of SmolLM2's whole process on the RTL."""
    logits, usages, _, peak = measure("smollm2", "rtl", 1)
    assert np.isfinite(logits).all() and usages[0].cycles > 1e6
    assert peak < 700e6
