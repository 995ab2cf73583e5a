# SPDX-License-Identifier: Apache-2.0
"""The hardware that a model needs, from the shapes of its layers; and layers longer than the default hardware's."""

import json
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from hw.spec.config import MAX_K, AcceleratorConfig
from hw.spec.cycles import cycles
from sw import generate, layers
from sw.common.errors import UserError
from sw.devices import make_config
from sw.devices.pack import plan_layer
from sw.graph.linears import Linears
from sw.model.linear import Outline
from sw.runtime.hardware import LayerShape, choose_config, layer_shapes
from tests.sw.fixtures.checkpoints import awq_config, make_checkpoint

AUTO: dict[str, int | str] = {"weight_bits": "auto", "zero_point": "auto", "max_k": "auto"}
DEFAULT = AcceleratorConfig().max_k
LONG = 8960
"""K of Qwen2.5-1.5B's down projection, beyond the default."""


def shape(k=64, bits=4, group_size=32, name="layer", zero_points=(0.0, 15.0), needs_fixed=False):
    return LayerShape(name, k, 32, group_size, bits, np.array(zero_points), needs_fixed)


def test_auto_weight_bits():
    """The bits of the layers of at most 4 bits, if the others fit as two planes; or else the bits of all layers."""

    def chosen(*bits):
        return choose_config([shape(bits=value, zero_points=(0.0,)) for value in bits], AUTO).weight_bits

    assert chosen(4, 8) == chosen(8, 3, 4) == chosen(2, 8) == 4
    assert chosen(3, 5) == chosen(3, 6) == 3
    assert chosen(2, 4) == 4
    assert chosen(2) == chosen(1) == 2
    assert chosen(8) == chosen(5, 8) == 8
    assert chosen(1, 3, 5) == 3


def test_auto_zero_point():
    """Fixed zero points for fractions and for integers outside the field; 8 bits then run as two planes."""

    def chosen(*shapes):
        config = choose_config(shapes, AUTO)
        return config.weight_bits, config.zero_point

    fixed = shape(zero_points=(-3.5, 15.9), needs_fixed=True)
    assert chosen(fixed) == chosen(fixed, shape(bits=8, zero_points=(128.0,))) == (4, "fixed")
    assert chosen(shape(bits=8, zero_points=(-250.0, 250.0), needs_fixed=True)) == (4, "fixed")
    assert chosen(shape(bits=8, zero_points=(128.0,))) == (8, "integer")

    def found(zero_points, bits=4):
        values = np.array([zero_points], np.float32)
        outline = Outline("l", 1, 32 * len(zero_points), 32, bits, values)
        (item,) = layer_shapes(cast(Linears, SimpleNamespace(outlines=lambda: [outline])))
        return item.needs_fixed

    assert found([0.5, 3]) and found([-1, 3]) and found([3, 16]) and found([3, 256], 8)
    assert not found([0, 15]) and not found([0, 255], 8)


def test_auto_max_k():
    """The default if it is enough, or else the longest layer's K with its padding and planes."""

    def chosen(*shapes, **options):
        config = choose_config(shapes, AUTO | options)
        assert all(plan_layer(config, item).layout.k <= config.max_k for item in shapes)
        return config.max_k

    assert chosen(shape()) == chosen(shape(DEFAULT)) == DEFAULT
    assert chosen(shape(), shape(LONG, group_size=128), shape(576)) == LONG
    assert chosen(shape(DEFAULT + 1)) == DEFAULT + 32
    assert chosen(shape(DEFAULT // 2 + 1, bits=8), shape()) == DEFAULT + 2 * 32
    # One group over all of K is split into groups that the accumulators can hold.
    assert DEFAULT < chosen(shape(9000, group_size=9000)) <= 9000 + 128
    assert chosen(shape(MAX_K, group_size=128)) == MAX_K
    for tile in (4, 8, 16, 32):
        assert chosen(shape(LONG + 7), tile=tile) == LONG + 32
    # A given value stays.
    assert chosen(shape(LONG), max_k=MAX_K) == MAX_K


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        (
            shape(LONG),
            {"max_k": DEFAULT},
            "K is at most max_k (8,192), not 8,960; hardware built with --max-k 8960 takes it",
        ),
        (shape(MAX_K + 1), {}, "K is at most max_k (32,768), not 32,800"),
        (shape(MAX_K + 1), {"max_k": DEFAULT}, "K is at most max_k (8,192), not 32,800"),
        (shape(MAX_K // 2 + 1, bits=8), {"weight_bits": 4}, "K is at most max_k (32,768), not 32,832"),
        (
            shape(30_000, bits=8),
            {"weight_bits": 8, "zero_point": "fixed"},
            "the sum over max_k=30128 takes 65 bits, and the numerics are defined in 64: lower max_k, weight_bits or"
            " activation_bits",
        ),
    ],
)
def test_layers_that_are_too_long(item, options, message):
    with pytest.raises(UserError) as refused:
        choose_config([shape(), item], AUTO | options)
    assert str(refused.value) == f"layer layer: {message}"


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """An AutoAWQ checkpoint of a small decoder whose down projections are as long as Qwen2.5-1.5B's."""
    folder = tmp_path_factory.mktemp("long")
    make_checkpoint(folder, awq_config(intermediate_size=LONG))
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Exports of this file's models."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.getbasetemp() / "long_cache"))


def run(capsys, main, *arguments):
    """Runs a command line in this process; returns its JSON."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


SMALL = ("--tile", "4", "--ports", "1", "--max-tokens", "5")
LINEAR = (*SMALL, "--operators", "linear")
"""Options of hardware that is built quickly, the second without the vector unit."""


@pytest.mark.parametrize("device", ["reference", "rtl"])
def test_long_layers(device, long_model, capsys):
    """Every layer of a block is exact and takes the expected cycles, without an option for longer hardware."""
    values = run(capsys, layers.main, long_model, "--device", device, *LINEAR, "--limit", "7")
    assert values["config"]["max_k"] == LONG
    rows = values["layers"]
    assert max(row["k"] for row in rows) == LONG
    assert all(row["exact"] and row["relative_error"] < 1e-3 for row in rows)
    config = AcceleratorConfig.from_dict(values["config"])
    for row in rows if device == "rtl" else []:
        predicted = cycles(config, row["m"], row["k"], row["n"], row["group_size"])
        assert predicted <= row["cycles"] <= 1.03 * predicted + 300


def test_long_model_answers(long_model, capsys):
    """The tokens are the same as with an option for longer hardware."""
    options = (
        "--model",
        long_model,
        "--device",
        "reference",
        *SMALL,
        "--prompt",
        "Hi",
        "--max-new-tokens",
        "3",
        "--raw",
    )
    auto = run(capsys, generate.main, *options)
    asked = run(capsys, generate.main, *options, "--max-k", str(MAX_K))
    assert (auto["config"]["max_k"], asked["config"]["max_k"]) == (LONG, MAX_K)
    assert auto["ids"] == asked["ids"] and len(auto["ids"]) > 0
    for hardware in ("reference", "rtl"):
        with pytest.raises(
            UserError, match=r"^layer .*down_proj.*: .* not 8,960; hardware built with --max-k 8960 takes it$"
        ):
            generate.main([*options, "--device", hardware, "--max-k", "8192"])


def test_max_k_is_no_number(long_model):
    with pytest.raises(UserError, match=r"^argument --max-k: a whole number or auto, not 'long'$"):
        layers.main([long_model, "--device", "reference", "--max-k", "long"])
    with pytest.raises(UserError, match=r"^max_k is a multiple of the tile \(16\), not 100$"):
        layers.main([long_model, "--device", "reference", "--max-k", "100"])
    assert make_config().max_k == DEFAULT
