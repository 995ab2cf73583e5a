# SPDX-License-Identifier: Apache-2.0
"""Packed layers against the packages that define the formats, and against number-by-number statements of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sw.checkpoints.packed.compressed_tensors import compressed_format
from sw.checkpoints.packed.gptq import gptq_format
from sw.checkpoints.packed.layers import LayerFormat
from sw.checkpoints.packed.targets import Targets, read_targets
from sw.checkpoints.packed.words import BITS, block_size, split_groups, unpack_rows, unpack_separate, word_count
from sw.checkpoints.safetensors_file import Checkpoint
from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from tests.sw.fixtures.checkpoints import write_tensors
from tests.sw.fixtures.huggingface.packed import (
    Form,
    compressed_config,
    compressed_tensors,
    gptq_config,
    gptq_tensors,
    make_layer,
    pack,
)

DATA = Path(__file__).parents[1] / "fixtures" / "data" / "packed"
COMPRESSED = [
    f"model.{strategy}_{bits}_{kind}"
    for strategy in ("group", "channel")
    for bits in BITS
    for kind in ("symmetric", "asymmetric")
]
OLDER = [name for name in COMPRESSED if "_3_" in name]
GPTQ = [
    f"{version}_{bits}_{size}" for version in ("v1", "v2", "zeros") for bits in BITS for size in ("group", "channel")
]


def settings(name: str, **changes) -> Settings:
    return Settings(DATA / name, json.loads((DATA / name).read_text()) | changes)


def check(checkpoint: Checkpoint, form: LayerFormat, name: str) -> None:
    """The weights are those of the package bit for bit: it and dequantize() subtract and multiply in float32."""
    assert form.is_quantized(checkpoint, name)
    assert np.array_equal(form.read(checkpoint, name).dequantize(), checkpoint.tensor(f"{name}.expected"))


@pytest.fixture(scope="module", params=["compressed_tensors", "compressed_tensors_older", "gptq"])
def folder(request, tmp_path_factory):
    """(folder, format's name)"""
    path = tmp_path_factory.mktemp(request.param)
    (path / "model.safetensors").write_bytes((DATA / f"{request.param}.safetensors").read_bytes())
    return path, request.param


def test_layers_of_the_packages(folder):
    path, name = folder
    checkpoint = Checkpoint(path)
    if name != "gptq":
        form = compressed_format(settings(f"{name}.json"))
        for layer in COMPRESSED if name == "compressed_tensors" else OLDER:
            check(checkpoint, form, layer)
        assert not form.targets.scheme("model.other")
        return
    for layer in GPTQ:
        version, bits, size = layer.split("_")
        changes: dict[str, Any] = {"bits": int(bits), "group_size": -1 if size == "channel" else 32}
        if version == "v2":
            changes |= {"format": "gptq_v2", "checkpoint_format": "gptq_v2"}
        if version == "zeros":
            # The package's own files name it.
            with pytest.raises(
                UserError, match=r"a zero point is stored as (3|7|15|255), which programs read in different"
            ):
                gptq_format(settings("gptq.json", **changes)).read(checkpoint, layer)
            changes["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
        check(checkpoint, gptq_format(settings("gptq.json", **changes)), layer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 11, 22, 32, 64, 75])
def test_words(bits, count):
    """Rows of any length; a number of 3 bits may be in two words."""
    numbers = np.random.default_rng(2).integers(0, 1 << bits, (5, count))
    numbers[0] = (1 << bits) - 1
    words = pack(numbers, bits)
    assert words.shape[1] == word_count(count, bits)
    found = unpack_rows(words, bits)
    assert found.dtype == np.uint8
    assert found.shape[1] == words.shape[1] * 32 // bits
    assert np.array_equal(found[:, :count], numbers)
    assert np.array_equal(unpack_separate(pack(numbers, bits, separate=True), bits)[:, :count], numbers)


@pytest.mark.parametrize(("k", "separate"), [(80, False), (128, False), (128, True), (160, False), (160, True)])
def test_both_forms_of_three_bits(k, separate, tmp_path):
    """compressed-tensors: the number of words decides. For 80 features it is 8 in both forms."""
    layer = make_layer(np.random.default_rng(3), 43, k, Form(bits=3, group=16, symmetric=False))
    tensors = compressed_tensors("layer", layer, Form(bits=3, group=16, symmetric=False), separate=separate)
    write_tensors(tmp_path / "a.safetensors", tensors)
    config = compressed_config(Form(bits=3, group=16, symmetric=False))
    form = compressed_format(Settings(tmp_path / "config.json", config))
    found = form.read(Checkpoint(tmp_path), "layer")
    assert np.array_equal(found.q, layer.q)
    assert np.array_equal(found.zero_points, layer.z)


def test_symmetric_three_bits(tmp_path):
    """GPTQ of 3 bits, version 1: the zero points of a symmetric layer are 4, or the writer was wrong."""
    form = Form(bits=3)
    layer = make_layer(np.random.default_rng(3), 32, 32, form)
    tensors = gptq_tensors("layer", layer, form)
    write_tensors(tmp_path / "a.safetensors", tensors)
    reader = gptq_format(Settings(tmp_path / "config.json", gptq_config(form)))
    assert (reader.read(Checkpoint(tmp_path), "layer").zero_points == 4).all()
    write_tensors(tmp_path / "a.safetensors", tensors | {"layer.qzeros": np.zeros((1, 3), np.int32)})
    with pytest.raises(
        UserError, match=r"layer\.qzeros: a zero point is not 4, and sym is true: older versions of GPT"
    ):
        reader.read(Checkpoint(tmp_path), "layer")


@pytest.mark.parametrize(
    ("k", "size", "block"),
    [(64, 64, 64), (96, 96, 32), (4096, 4096, 128), (40, 40, 16), (96, 128, 32), (256, 128, 128), (4096, 1024, 1024)]
    + [(96, 48, 16), (768, 384, 128), (100, 32, 32)],
)
def test_blocks(k, size, block):
    """Every feature keeps its number."""
    assert block_size(k, size) == block
    values = np.arange(2 * -(-k // size)).reshape(2, -1)
    found = split_groups(values, k, size, block)
    assert found.shape == (2, -(-k // block))
    assert np.array_equal(found[:, np.arange(k) // block], values[:, np.arange(k) // size])


def test_zero_points_that_are_certain(tmp_path):
    """In version 1 a zero point of 0 in the last field of a word is read in one way by all programs."""
    layer = make_layer(np.random.default_rng(3), 16, 32, Form())
    layer.z[7] = 0
    write_tensors(tmp_path / "a.safetensors", gptq_tensors("layer", layer, Form()))
    form = gptq_format(Settings(tmp_path / "config.json", gptq_config(Form())))
    assert np.array_equal(form.read(Checkpoint(tmp_path), "layer").zero_points, layer.z)
    layer.z[6] = 0
    write_tensors(tmp_path / "a.safetensors", gptq_tensors("layer", layer, Form()))
    with pytest.raises(UserError, match=r"tensor layer\.qzeros: a zero point is stored as 15, which programs read in"):
        form.read(Checkpoint(tmp_path), "layer")


def targets(schemes: dict[str, str], *ignored: str) -> Targets[str]:
    values = Settings(Path("config.json"), {"targets": list(schemes), "ignore": list(ignored)})
    found = read_targets(values, "targets", "targets")
    return Targets(dict(zip(found, schemes.values())), read_targets(values, "ignore", "ignore"))


@pytest.mark.parametrize(
    ("schemes", "ignored", "name", "scheme"),
    [
        ({"Linear": "a"}, [], "model.x", "a"),
        ({"Module": "a"}, [], "model.x", "a"),
        ({"LlamaAttention": "a"}, [], "model.x", None),
        ({"Linear": "a"}, ["model.x"], "model.x", None),
        ({"Linear": "a"}, ["model.x"], "model.x.y", "a"),
        ({"Linear": "a"}, ["model"], "model.x", "a"),
        ({"Linear": "a"}, ["re:model"], "model.x", None),
        ({"Linear": "a"}, ["re:x"], "model.x", "a"),
        ({"Linear": "a"}, ["re:.*x$"], "model.x", None),
        ({"Linear": "a"}, ["Linear"], "model.x", None),
        ({"Linear": "a", "re:.*x": "b", "model.x": "c"}, [], "model.x", "c"),
        ({"Linear": "a", "re:.*x": "b"}, [], "model.x", "b"),
        ({"re:.*": "a", "re:.*x": "b"}, [], "model.x", "a"),
        ({"re:.*": "a", "z.x": "b"}, [], "z.x", "b"),
    ],
)
def test_targets(schemes, ignored, name, scheme):
    """The rules of the package: exact names, then patterns, then classes; a pattern matches from the beginning."""
    assert targets(schemes, *ignored).scheme(name) == scheme


def test_targets_of_the_package():
    """The same cases in the package itself, if it is installed."""
    package = pytest.importorskip("compressed_tensors.utils.match")
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(1, 1)
    for mark in test_targets.pytestmark:
        for schemes, ignored, name, scheme in mark.args[1]:
            found = package.match_targets(name, module, schemes)
            is_ignored = package.is_match(name, module, ignored)
            assert (None if is_ignored or not found else schemes[found[0]]) == scheme
