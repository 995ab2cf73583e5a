# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: what they mean by PEFT's rules, and one line for each that is not read."""

import json

import numpy as np
import pytest

from sw.checkpoints.adapter import read_adapter
from sw.common.errors import UserError
from tests.sw.fixtures.adapters import PREFIX, adapter_config, modules, write_adapter
from tests.sw.fixtures.checkpoints import read_tensors, write_tensors

Q0, Q1, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q0: (16, 64), Q1: (16, 64), UP: (24, 64)}


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_matrices(kind, tmp_path):
    pairs = write_adapter(tmp_path, SHAPES, adapter_config(4, alpha=6), kind=kind)
    adapter = read_adapter(tmp_path)
    assert sorted(adapter.layers) == sorted(SHAPES)
    for module, (a, b) in pairs.items():
        layer = adapter.layers[module]
        assert np.array_equal(layer.a, a) and np.array_equal(layer.b, b)
        assert (layer.rank, layer.factor) == (4, 1.5)
        assert np.allclose(layer.weight, 1.5 * b @ a, rtol=1e-5, atol=1e-6)


def test_factors(tmp_path):
    """A pattern matches the end of a module's name from a dot on, the first one counts, and r and alpha differ."""
    config = adapter_config(
        4,
        alpha=8,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 16},
        alpha_pattern={"p_proj": 1000, r"model\.layers\.\d.*q_proj": 12, "q_proj": 1},
    )
    write_adapter(tmp_path / "a", SHAPES, config, {Q1: 2, UP: 16})
    layers = read_adapter(tmp_path / "a").layers
    assert {name: (each.rank, each.factor) for name, each in layers.items()} == {Q0: (4, 3), Q1: (2, 6), UP: (16, 0.5)}
    write_adapter(tmp_path / "b", SHAPES, config | {"use_rslora": True}, {Q1: 2, UP: 16})
    found = {name: each.factor for name, each in read_adapter(tmp_path / "b").layers.items()}
    assert found == pytest.approx({Q0: 12 / 2, Q1: 12 / 2**0.5, UP: 8 / 4})


def test_factors_of_the_package(tmp_path):
    """The same numbers in PEFT, if it is installed."""
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    patterns = {"p_proj": 1, r"model\.layers\.\d.*q_proj": 2, "q_proj": 3}
    assert [get_pattern_key(patterns, name) for name in (Q0, UP)] == [r"model\.layers\.\d.*q_proj", UP]


def test_name_of_the_default_adapter(tmp_path):
    """Some programs keep the adapter's name in those of the tensors."""
    write_adapter(tmp_path, SHAPES, adapter_config())
    tensors = read_tensors(tmp_path)
    renamed = {name.replace(".weight", ".default.weight"): values for name, values in tensors.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", renamed)
    assert sorted(read_adapter(tmp_path).layers) == sorted(SHAPES)


def test_digest(tmp_path):
    for name, config in (("a", adapter_config()), ("b", adapter_config()), ("c", adapter_config(alpha=9))):
        write_adapter(tmp_path / name, SHAPES, config)
    digests = [read_adapter(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


SETTINGS = {
    "type": ({"peft_type": "LOHA"}, 'peft_type is "LORA", not "LOHA"'),
    "no type": ({"peft_type": None}, 'peft_type is "LORA", not null'),
    "rank": ({"r": 0}, "r is a whole number from 1, not 0"),
    "no rank": ({"r": None}, "r is a positive number, not null"),
    "alpha": ({"lora_alpha": "8"}, 'lora_alpha is a positive number, not "8"'),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is a positive number, not null"),
    "DoRA": ({"use_dora": True}, "use_dora is absent, null or false: it is not supported, not true"),
    "bias": ({"bias": "lora_only"}, 'bias is "none", not "lora_only"'),
    "own bias": ({"lora_bias": True}, "lora_bias is absent, null or false"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is absent, null or false"),
    "base": ({"init_lora_weights": "pissa"}, "init_lora_weights is one that keeps the base's weights, as true or gau"),
    "Conv1D": ({"fan_in_fan_out": True}, "fan_in_fan_out is false: it is for weights [K, N], not true"),
    "replicas": ({"layer_replication": [[0, 2]]}, "layer_replication is absent, null or false"),
    "unknown": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is absent, null or false"),
    "patterns": ({"rank_pattern": [1]}, "rank_pattern is an object, not [1]"),
    "pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern has '(', which is no regular expression"),
    "endless": ({"alpha_pattern": {"(.*)*x": 1}}, "alpha_pattern has '(.*)*x', which repeats a group"),
    "pattern's rank": ({"rank_pattern": {"up_proj": -1}}, "up_proj is a positive number, not -1"),
    "other rank": ({"r": 8}, f"layer {UP}: lora_A is [4, 64] and lora_B [24, 4], and its rank is 8 in adapter_config"),
    "rslora": ({"use_rslora": 1}, "use_rslora is true or false, not 1"),
}


@pytest.mark.parametrize(("changes", "message"), SETTINGS.values(), ids=SETTINGS)
def test_refused_settings(changes, message, tmp_path):
    write_adapter(tmp_path, SHAPES, adapter_config())
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config() | changes))
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path)
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


TENSORS = {
    "DoRA": ({f"{Q0}.lora_magnitude_vector": np.ones(16, np.float32)}, "q_proj.lora_magnitude_vector is no lora_A or"),
    "embedding": (
        {"model.embed_tokens.lora_embedding_A": np.ones((4, 9), np.float32)},
        "lora_embedding_A is no lora_A",
    ),
    "module": ({"lm_head.weight": np.ones((4, 9), np.float32)}, "lm_head.weight is no lora_A or lora_B of a linear"),
    "half": ({f"{UP}2.lora_A.weight": np.ones((4, 64), np.float32)}, f"has no tensor {PREFIX}{UP}2.lora_B.weight"),
    "infinite": ({f"{UP}.lora_A.weight": np.full((4, 64), np.inf, np.float32)}, "holds values that are not finite"),
    "integers": ({f"{UP}.lora_A.weight": np.ones((4, 64), np.int32)}, "up_proj.lora_A.weight is I32, not one of F16"),
    "vector": (
        {f"{UP}.lora_B.weight": np.ones(24, np.float32)},
        "lora_A is [4, 64] and lora_B [24], and its rank is 4",
    ),
}


@pytest.mark.parametrize(("changes", "message"), TENSORS.values(), ids=TENSORS)
def test_refused_tensors(changes, message, tmp_path):
    write_adapter(tmp_path, SHAPES, adapter_config())
    tensors = read_tensors(tmp_path) | {PREFIX + name: values for name, values in changes.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path)
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "nowhere")
    write_adapter(tmp_path / "a", dict.fromkeys(modules([0], ["mlp.up_proj"]), (24, 64)), adapter_config())
    tensors = tmp_path / "a" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged: tensor"):
        read_adapter(tmp_path / "a")
    tensors.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(tmp_path / "a")
    write_tensors(tensors, {})
    with pytest.raises(UserError, match=r"adapter_model\.safetensors has no tensors"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "a")
