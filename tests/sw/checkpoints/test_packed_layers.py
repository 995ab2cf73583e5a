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
from sw.checkpoints.packed.words import BITS, block_size, split_groups, unpack_rows
from sw.checkpoints.safetensors_file import Checkpoint
from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from tests.sw.fixtures.checkpoints import write_tensors
from tests.sw.fixtures.huggingface.packed import Form, gptq_config, gptq_tensors, make_layer, pack

DATA = Path(__file__).parents[1] / "fixtures" / "data" / "packed"
COMPRESSED = [
    f"model.{strategy}_{bits}_{kind}"
    for strategy in ("group", "channel")
    for bits in BITS
    for kind in ("symmetric", "asymmetric")
]
GPTQ = [
    f"{version}_{bits}_{size}" for version in ("v1", "v2", "zeros") for bits in BITS for size in ("group", "channel")
]


def settings(name: str, **changes) -> Settings:
    return Settings(DATA / name, json.loads((DATA / name).read_text()) | changes)


def check(checkpoint: Checkpoint, form: LayerFormat, name: str) -> None:
    """The weights are those of the package bit for bit: it and dequantize() subtract and multiply in float32."""
    assert form.is_quantized(checkpoint, name)
    assert np.array_equal(form.read(checkpoint, name).dequantize(), checkpoint.tensor(f"{name}.expected"))


@pytest.fixture(scope="module", params=["compressed_tensors", "gptq"])
def folder(request, tmp_path_factory):
    """(folder, format's name)"""
    path = tmp_path_factory.mktemp(request.param)
    (path / "model.safetensors").write_bytes((DATA / f"{request.param}.safetensors").read_bytes())
    return path, request.param


def test_layers_of_the_packages(folder):
    path, name = folder
    checkpoint = Checkpoint(path)
    if name == "compressed_tensors":
        form = compressed_format(settings("compressed_tensors.json"))
        for layer in COMPRESSED:
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
                UserError, match=r"a zero point is stored as (15|255), which programs read in different"
            ):
                gptq_format(settings("gptq.json", **changes)).read(checkpoint, layer)
            changes["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
        check(checkpoint, gptq_format(settings("gptq.json", **changes)), layer)


@pytest.mark.parametrize("bits", BITS)
def test_words(bits):
    numbers = np.random.default_rng(2).integers(0, 1 << bits, (5, 64))
    assert np.array_equal(unpack_rows(pack(numbers, bits), bits), numbers)


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
