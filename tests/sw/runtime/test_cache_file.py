# SPDX-License-Identifier: Apache-2.0
"""A cache as a file: a later run continues from it bit for bit, and no other model or hardware takes it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from sw.common.errors import UserError
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.runtime import BaseDecoder, Decoder, ProgramDecoder
from sw.runtime.cache_file import load_cache, save_cache, saved_context
from tests.sw.fixtures.linears import same_bits
from tests.sw.fixtures.random_decoder import write_random
from tests.sw.runtime.test_decoder import DATA, IDS, changed
from tests.sw.runtime.test_device_attention import SCORE_WORDS, narrow
from tests.sw.runtime.test_programs import hardware

pytestmark = pytest.mark.slow

CONTEXT = 32
Open = Callable[..., BaseDecoder]


def whole(path: Path, context: int = CONTEXT, **options) -> BaseDecoder:
    device = ReferenceDevice(hardware(score_words=SCORE_WORDS))
    return ProgramDecoder(OnnxFile(path), device, context=context, tell=pytest.fail, **options)


def programs(path: Path, context: int = CONTEXT) -> BaseDecoder:
    return ProgramDecoder(OnnxFile(path), ReferenceDevice(hardware()), context=context)


def hybrid(path: Path, context: int = CONTEXT) -> BaseDecoder:
    return Decoder(path, ReferenceDevice(hardware(operators="linear")), context=context)


def host(path: Path, context: int = CONTEXT) -> BaseDecoder:
    return Decoder(path, None, context=context)


KINDS: dict[str, Open] = {"whole": whole, "programs": programs, "hybrid": hybrid, "host": host}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"), head_size=32)


def saved(open_decoder: Open, path: Path, file: Path, tokens: int = 10) -> BaseDecoder:
    """A decoder that has read some tokens, and whose cache is in the file."""
    decoder = open_decoder(path)
    for start in range(0, tokens, decoder.block):
        decoder.prefill(IDS[start : min(start + decoder.block, tokens)])
    save_cache(file, decoder, IDS[:tokens])
    return decoder


@pytest.mark.parametrize("kind", KINDS)
def test_continues(kind, model, tmp_path):
    first = saved(KINDS[kind], model, tmp_path / "cache")
    later = KINDS[kind](model)
    assert load_cache(tmp_path / "cache", later, IDS[:14]) == later.length == 10
    assert same_bits(later.forward(IDS[10:14], every=True), first.forward(IDS[10:14], every=True))
    assert saved_context(tmp_path / "cache") == CONTEXT
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_cache_that_grows(tmp_path):
    """A graph whose cache is not changed in place."""
    path = DATA / "optimum_qwen2.onnx"
    first = saved(host, path, tmp_path / "cache")
    later = host(path)
    assert load_cache(tmp_path / "cache", later, [*IDS[:7], 5, 6]) == 7
    again = host(path)
    again.prefill(IDS[:7])
    assert same_bits(later.forward([5, 6]), again.forward([5, 6]))
    assert first.length == 10


@pytest.mark.parametrize("kind", KINDS)
def test_another_prompt(kind, model, tmp_path):
    """The tokens that the prompts share stay; the last token is always computed."""
    saved(KINDS[kind], model, tmp_path / "cache")
    later, again = KINDS[kind](model), KINDS[kind](model)
    prompt = [*IDS[:6], 1, 2]
    assert load_cache(tmp_path / "cache", later, prompt) == 6
    again.prefill(prompt[:6])
    assert same_bits(later.forward(prompt[6:]), again.forward(prompt[6:]))
    assert load_cache(tmp_path / "cache", KINDS[kind](model), IDS[:10]) == 9
    other = KINDS[kind](model)
    assert load_cache(tmp_path / "cache", other, [299, 1]) == other.length == 0


def test_windows(model, tmp_path):
    """A cache that has begun again can be shortened by the tokens of one call at most."""
    path = changed(model, tmp_path, lambda graph: narrow(graph, 3))
    saved(whole, path, tmp_path / "cache", 20)
    assert load_cache(tmp_path / "cache", whole(path), [*IDS[:11], 1, 2]) == 0
    later, again = whole(path), whole(path)
    prompt = [*IDS[:12], 1, 2]
    assert load_cache(tmp_path / "cache", later, prompt) == 12
    for start in (0, 8):
        again.prefill(prompt[start : min(start + 8, 12)])
    assert same_bits(later.forward(prompt[12:]), again.forward(prompt[12:]))


def other_weights(path: Path, folder: Path) -> Path:
    def change(graph: onnx.GraphProto) -> None:
        tensor = next(one for one in graph.initializer if one.name == "model.norm.weight")
        tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))

    return changed(path, folder, change)


def test_other_models_and_hardware(model, tmp_path):
    file = tmp_path / "cache"
    saved(whole, model, file)
    decoders = [
        whole(model, context=31),
        whole(model, key_bits=16),
        programs(model),
        whole(other_weights(model, tmp_path)),
    ]
    for decoder in decoders:
        with pytest.raises(UserError, match="is the cache of another model, other hardware, or another --context"):
            load_cache(file, decoder, IDS)
        assert decoder.length == 0


def test_damaged_files(model, tmp_path):
    file = tmp_path / "cache"
    saved(whole, model, file)
    data = file.read_bytes()
    for name, content in (("cut", data[: len(data) // 2]), ("empty", b""), ("text", b"hello"), ("array", None)):
        path = tmp_path / name
        if content is None:
            with path.open("wb") as handle:
                np.save(handle, np.zeros(3))
        else:
            path.write_bytes(content)
        for load in (lambda path=path: load_cache(path, whole(model), IDS), lambda path=path: saved_context(path)):
            with pytest.raises(UserError, match=f"{name} is not a complete cache"):
                load()
    with pytest.raises(UserError, match="is not a complete cache"):
        load_cache(tmp_path / "nothing", whole(model), IDS)
    with pytest.raises(UserError, match="cannot write the cache"):
        save_cache(tmp_path / "no" / "folder", whole(model), [])
