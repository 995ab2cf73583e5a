# SPDX-License-Identifier: Apache-2.0
"""Whole tokens of real shapes on the simulated hardware: logits and caches are the reference device's, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sw.bench_decoder import qwen_folder
from sw.devices import Device, make_config, open_device
from sw.export.resolve import resolve_model
from sw.graph.file import OnnxFile
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.linears import same_bits

pytestmark = [pytest.mark.simulator, pytest.mark.full, pytest.mark.timeout(4 * 3600)]

LONG = 2000
AGAIN = 32
"""Tokens of the long run that are computed again."""


@contextmanager
def open_decoder(name: str, path: Path, context: int, zero_point: str, score_words: int) -> Iterator[ProgramDecoder]:
    """All of a token on this device."""
    sizes = {"tile": 16, "lanes": 2, "max_k": 8192, "score_words": score_words}
    device: Device | None = open_device(name, make_config(operators="decoder", zero_point=zero_point, **sizes))
    assert device
    with device:
        decoder = ProgramDecoder(OnnxFile(path), device, context=context, tell=pytest.fail)
        assert decoder.whole
        yield decoder


def continued(decoder: ProgramDecoder, prompt: list[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """The most probable tokens behind a prompt, and the logits of each: float32 [vocabulary]."""
    for start in range(0, len(prompt) - 1, decoder.block):
        decoder.prefill(prompt[start : min(start + decoder.block, len(prompt) - 1)])
    tokens, rows = prompt[-1:], []
    for _ in range(count):
        rows.append(decoder.forward(tokens[-1:])[0])
        tokens.append(int(rows[-1].argmax()))
    return tokens[1:], rows


def assert_equal_caches(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The powers of two of positions that were never written may be anything."""
    assert found.keys() == expected.keys()
    different = [
        name for name in found if not name.endswith("exponents") and not np.array_equal(found[name], expected[name])
    ]
    assert not different


@pytest.mark.parametrize(("model", "prompt", "count"), [("smollm2", 300, 32), ("qwen", 40, 2)])
def test_equals_the_reference(model, prompt, count, smollm2):
    path = smollm2 if model == "smollm2" else resolve_model(str(qwen_folder()))
    print("seed", seed := 15)
    ids = np.random.default_rng(seed).integers(0, 40_000, prompt).tolist()
    zero_point = "fixed" if model == "smollm2" else "integer"
    results = []
    for name in ("reference", "rtl"):
        with open_decoder(name, path, 512, zero_point, 16 * 512) as decoder:
            results.append((*continued(decoder, ids, count), decoder.cache_arrays()))
    (expected, expected_rows, expected_caches), (found, found_rows, caches) = results
    assert found == expected
    assert all(same_bits(one, other) for one, other in zip(found_rows, expected_rows, strict=True))
    assert_equal_caches(caches, expected_caches)


def test_long_run(smollm2):
    """The last tokens of a long text, on the simulated hardware, from the cache that the reference device had."""
    print("seed", seed := 16)
    ids = np.random.default_rng(seed).integers(0, 40_000, 8).tolist()
    with open_decoder("reference", smollm2, 2048, "fixed", 16 * 2048) as decoder:
        tokens, _ = continued(decoder, ids, LONG - AGAIN)
        caches, length = decoder.cache_arrays(), decoder.length
        expected, expected_rows = continued(decoder, tokens[-1:], AGAIN)
        expected_caches = decoder.cache_arrays()
    with open_decoder("rtl", smollm2, 2048, "fixed", 16 * 2048) as decoder:
        decoder.restore(caches, length, length)
        found, rows = continued(decoder, tokens[-1:], AGAIN)
        assert_equal_caches(decoder.cache_arrays(), expected_caches)
    assert found == expected
    assert all(same_bits(one, other) for one, other in zip(rows, expected_rows, strict=True))
