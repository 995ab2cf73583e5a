# SPDX-License-Identifier: Apache-2.0
"""GPTQ and compressed-tensors folders that are not read: one line that names the setting or the tensor, and no file."""

import copy
import functools
import json
import operator
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sw.checkpoints.packed.formats import layer_format
from sw.checkpoints.packed.layers import read_linear
from sw.checkpoints.safetensors_file import Checkpoint
from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.export.resolve import resolve_model
from tests.sw.fixtures.checkpoints import QWEN2, make_checkpoint, read_tensors, refused, write_tensors
from tests.sw.fixtures.huggingface.packed import (
    Form,
    auto_round_config,
    compressed_config,
    compressed_tensors,
    gptq_config,
    gptq_tensors,
    write_packed,
)

ROOT = Path(__file__).resolve().parents[3]
ASYMMETRIC = Form(symmetric=False)
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A GPTQ folder whose config.json the tests replace."""
    folder = tmp_path_factory.mktemp("gptq") / "in"
    write_packed(folder, gptq_tensors, gptq_config(Form()), Form())
    return folder


def with_config(folder: Path, settings: object, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**QWEN2, "quantization_config": settings, **changes}))
    return folder


METHODS = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "4-bit weights (NF4, FP4) are indices",
    ),
    "fp8": ({"quant_method": "fp8"}, "is quantized by 'fp8', which is not supported: its weights are 8-bit floats"),
    "hqq": (
        {"quant_method": "hqq"},
        "is quantized by 'hqq', which is not supported: awq, gptq, compressed-te",
    ),
    "list": ({"quant_method": ["gptq"]}, "is quantized by \"['gptq']\", which is not supported"),
    "no object": ([1], "quantization_config is an object, not [1]"),
}
GPTQ: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 5}, "quantization_config's bits is 2, 3, 4 or 8, not 5"),
    "no bits": ({"bits": None}, "quantization_config's bits is 2, 3, 4 or 8, not null"),
    "truth": ({"bits": True}, "quantization_config's bits is 2, 3, 4 or 8, not true"),
    "float": ({"bits": 4.0}, "quantization_config's bits is 2, 3, 4 or 8, not 4.0"),
    "float group": ({"group_size": 32.0}, "group_size is -1 or a multiple of 16, not 32.0"),
    "other bits": ({"bits": 8}, "scales is [2, 64], not [1, 64]: qweight holds [32, 64] weights of 8 bits"),
    "group": ({"group_size": 40}, "quantization_config's group_size is -1 or a multiple of 16, not 40"),
    "no group": ({"group_size": 0}, "group_size is -1 or a multiple of 16, not 0"),
    "text group": ({"group_size": "32"}, 'group_size is -1 or a multiple of 16, not "32"'),
    "huge group": ({"group_size": 1 << 70}, "scales is [2, 64], not [1, 64]: qweight holds [64, 64] weights of 4 bits"),
    "other group": ({"group_size": 16}, "scales is [2, 64], not [4, 64]"),
    "marlin": ({"checkpoint_format": "marlin"}, 'checkpoint_format is gptq or gptq_v2, not "marlin"'),
    "planes": ({"format": "gptq_p"}, 'quantization_config\'s format is gptq or gptq_v2, not "gptq_p"'),
    "contradiction": ({"format": "gptq_v2"}, 'format is gptq, as checkpoint_format is, not "gptq_v2"'),
    "number": ({"checkpoint_format": 2}, "checkpoint_format is gptq or gptq_v2, not 2"),
    "older marlin": ({"is_marlin_format": True}, "is_marlin_format is null or false, not true"),
    "words": ({"pack_dtype": "int16"}, 'pack_dtype is int32, not "int16"'),
    "adapter": ({"adapter": {"name": "lora"}}, 'adapter is null or false, not {"name": "lora"}'),
    "dynamic": ({"dynamic": [1]}, "dynamic is an object, not [1]"),
    "pattern": ({"dynamic": {"+:(": {}}}, "quantization_config's dynamic has '(', which is no regular expression"),
    "endless": (
        {"dynamic": {"-:(.*)*x": {}}},
        "quantization_config's dynamic has '(.*)*x', which repeats a group or has",
    ),
    "long": ({"dynamic": {".*" * 7: {}}}, "has more than 6 repetitions: it could take very long"),
    "override": ({"dynamic": {".*q_proj": 8}}, "quantization_config's dynamic .*q_proj is an object, not 8"),
    "override bits": ({"dynamic": {".*q_proj": {"bits": 6}}}, "dynamic .*q_proj's bits is 2, 3, 4 or 8, not 6"),
    "not packed": ({"dynamic": {"-:.*q_proj": {}}}, f"layer {FIRST} has qweight, and dynamic says that it is float"),
}


AUTO_ROUND: dict[str, tuple[dict[str, Any], str]] = {
    "layout": (
        {"packing_format": "auto_round:llm_compressor"},
        "quantization_config's packing_format is auto_round:auto",
    ),
    "no layout": ({"packing_format": None}, "auto_round:auto_awq, not null"),
    "bits": ({"bits": 7}, "quantization_config's bits is 2, 3, 4 or 8, not 7"),
    "floats": ({"data_type": "mx_fp"}, 'quantization_config\'s data_type is int, not "mx_fp"'),
    "activations": ({"act_bits": 8}, "quantization_config's act_bits is 16 (only weights may be quantized), not 8"),
    "rotated": ({"rotation_config": {"a": 1}}, 'quantization_config\'s rotation_config is null, not {"a": 1}'),
    "cache": ({"static_kv_dtype": "fp8"}, 'static_kv_dtype is null, not "fp8"'),
    "layer": ({"extra_config": {"a": 3}}, "quantization_config's extra_config a is an object, not 3"),
    "pattern": (
        {"extra_config": {".*q_proj": {"bits": 8}}},
        "extra_config .*q_proj is a layer's name if its sizes are",
    ),
    "layer bits": ({"extra_config": {FIRST: {"bits": 1}}}, "q_proj$'s bits is 2, 3, 4 or 8, not 1"),
    "layer type": ({"extra_config": {FIRST: {"data_type": "fp"}}}, f"extra_config {FIRST}'s data_type is int, not"),
    "AWQ": (
        {"packing_format": "auto_round:auto_awq", "extra_config": {FIRST: {"bits": 8}}},
        "quantization_config's extra_config is without layers of other sizes, not",
    ),
}


@pytest.mark.parametrize(("changes", "message"), AUTO_ROUND.values(), ids=AUTO_ROUND.keys())
def test_auto_round_settings(changes, message, checkpoint):
    refused(with_config(checkpoint, auto_round_config(Form(), **changes)), message)


def group(**changes: Any) -> dict[str, Any]:
    """config_groups with a changed group."""
    return {"group_0": compressed_config(Form())["config_groups"]["group_0"] | changes}


def weights(**changes: Any) -> dict[str, Any]:
    """config_groups with changed settings of weights."""
    return group(weights=group()["group_0"]["weights"] | changes)


EIGHT = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
COMPRESSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        name: ({"format": name}, f'quantization_config\'s format is pack-quantized, not "{name}"')
        for name in ("float-quantized", "int-quantized", "marlin-24", "nvfp4-pack-quantized", "mixed-precision")
    },
    "no format": ({"format": None}, "quantization_config's format is pack-quantized, not null"),
    "format of a group": (
        {"format": "mixed-precision", "config_groups": group(format="float-quantized")},
        'config_groups.group_0.format is pack-quantized, not "float-quantized"',
    ),
    "activations": (
        {"config_groups": group(input_activations=EIGHT)},
        'config_groups.group_0.input_activations is null (only weights may be quantized), not {"num_bits": 8, ',
    ),
    "outputs": ({"config_groups": group(output_activations=EIGHT)}, "config_groups.group_0.output_activations is null"),
    "cache": ({"kv_cache_scheme": EIGHT}, 'quantization_config\'s kv_cache_scheme is null, not {"num_bits": 8'),
    "sparse": (
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        'quantization_config\'s sparsity_config is null, not "sparse-24-bitmask"',
    ),
    "rotated": ({"transform_config": {"config_groups": {"u": {}}}}, 'transform_config is null, not {"u": {}}'),
    "no weights": ({"config_groups": group(weights=None)}, "config_groups.group_0.weights is an object, not null"),
    "floats": ({"config_groups": weights(type="float")}, 'config_groups.group_0.weights.type is int, not "float"'),
    "float": (
        {"config_groups": weights(num_bits=4.0)},
        "config_groups.group_0.weights.num_bits is 2, 3, 4 or 8, not 4.0",
    ),
    "bits": ({"config_groups": weights(num_bits=5)}, "config_groups.group_0.weights.num_bits is 2, 3, 4 or 8, not 5"),
    "tensor": (
        {"config_groups": weights(strategy=None, group_size=None)},
        'config_groups.group_0.weights.strategy is group, or channel without group_size, not "tensor"',
    ),
    "block": (
        {"config_groups": weights(strategy="block")},
        "strategy is group, or channel without group_size, not",
    ),
    "both": ({"config_groups": weights(strategy="channel")}, "strategy is group, or channel without group_size, not"),
    "group size": ({"config_groups": weights(group_size=40)}, "weights.group_size is a multiple of 16, not 40"),
    "other size": ({"config_groups": weights(group_size=16)}, "weight_scale is [64, 2], not [64, 4]: weight_shape is "),
    "no size": ({"config_groups": weights(group_size=None)}, "weights.group_size is a multiple of 16, not null"),
    "dynamic": ({"config_groups": weights(dynamic=True)}, "weights.dynamic is false, not true"),
    "blocks": ({"config_groups": weights(block_structure="8x8")}, 'weights.block_structure is null, not "8x8"'),
    "symmetric": ({"config_groups": weights(symmetric=1)}, "symmetric is true or false, not 1"),
    "unknown": ({"config_groups": weights(lattice="e8")}, 'weights.lattice is absent: it is unknown, not "e8"'),
    "order": (
        {"config_groups": weights(actorder="group")},
        f"has no tensor {FIRST}.weight_g_idx, and actorder",
    ),
    "other order": ({"config_groups": weights(actorder="x")}, "weights.actorder is null, static, weight or group"),
    "preset": ({"config_groups": {"W4A16": ["Linear"]}}, 'config_groups.W4A16 is an object, not ["Linear"]'),
    "no groups": ({"config_groups": {}}, "config_groups is an object with groups, not {}"),
    "pattern": ({"ignore": ["re:("]}, "quantization_config's ignore has '(', which is no regular expression"),
    "names": ({"ignore": "lm_head"}, 'quantization_config\'s ignore is a list of names, not "lm_head"'),
    "targets": ({"config_groups": group(targets=[3])}, "config_groups.group_0.targets is a list of names, not [3]"),
    "ignored": ({"ignore": ["re:.*q_proj"]}, f"layer {FIRST} has weight_packed, and it is ignored or no target of"),
}


@pytest.mark.parametrize(("quantization", "message"), METHODS.values(), ids=METHODS.keys())
def test_methods(quantization, message, checkpoint):
    refused(with_config(checkpoint, quantization), message)


@pytest.mark.parametrize(("changes", "message"), GPTQ.values(), ids=GPTQ.keys())
def test_gptq_settings(changes, message, checkpoint):
    refused(with_config(checkpoint, gptq_config(Form(), **changes)), message)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A compressed-tensors folder whose config.json the tests replace."""
    folder = tmp_path_factory.mktemp("compressed") / "in"
    write_packed(folder, compressed_tensors, compressed_config(Form()), Form())
    return folder


@pytest.mark.parametrize(("changes", "message"), COMPRESSED.values(), ids=COMPRESSED.keys())
def test_compressed_settings(changes, message, compressed):
    refused(with_config(compressed, compressed_config(Form(), **changes)), message)


def test_float_layer_of_a_target(tmp_path):
    write_packed(tmp_path / "in", compressed_tensors, compressed_config(Form()), Form(), floats=("o_proj",))
    refused(tmp_path / "in", "self_attn.o_proj has a float weight, and it is a target of config_groups")


def test_mlx(checkpoint):
    refused(
        with_config(checkpoint, None, quantization={"bits": 4}),
        "quantization, which MLX writes, is not supp",
    )


def test_features_out_of_order(tmp_path):
    """desc_act: every feature has a group of its own."""
    for packer, config, tensor in (
        (gptq_tensors, gptq_config, "g_idx"),
        (compressed_tensors, compressed_config, "weight_g_idx"),
    ):
        form = Form(order="features")
        write_packed(tmp_path / "in", packer, config(form), form)
        refused(tmp_path / "in", f"tensor {FIRST}.{tensor}: its features are in groups out of order (desc_act or acto")


def _change(tensors: dict[str, np.ndarray], name: str, change) -> None:
    tensors[f"{FIRST}.{name}"] = np.ascontiguousarray(change(tensors[f"{FIRST}.{name}"]))


def _without(name: str):
    return lambda t: t.pop(f"{FIRST}.{name}"), f"has no tensor {FIRST}.{name}"


def _changed(name: str, change, message: str):
    return lambda t: _change(t, name, change), message


DAMAGED_GPTQ = {
    **{f"no {name}": _without(name) for name in ("qweight", "qzeros", "scales")},
    "both": (
        lambda t: t.update({f"{FIRST}.weight": np.zeros((64, 64), np.float32)}),
        f"layer {FIRST} has qweight and weight: one of them is wrong",
    ),
    "type": _changed("qweight", np.float32, f"tensor {FIRST}.qweight is F32, not I32"),
    "long": _changed("qweight", np.int64, f"tensor {FIRST}.qweight is I64, not I32"),
    "vector": _changed("qweight", np.ravel, "qweight is [512], not a matrix"),
    "empty": _changed("qweight", lambda v: v[:0], "qweight is [0, 64], not a matrix"),
    "short": _changed("qweight", lambda v: v[:4], "scales is [2, 64], not [1, 64]: qweight holds [32, 64] weights"),
    "scales": _changed("scales", lambda v: v[:, :8], "scales is [2, 8], not [2, 64]"),
    "nan": _changed("scales", lambda v: v * np.nan, "holds values that are not finite"),
    "zeros": _changed("qzeros", lambda v: v[:1], "qzeros is [1, 8], not [2, 8]"),
    "order": _changed("g_idx", lambda v: v[:8], f"tensor {FIRST}.g_idx is [8], and the layer has 64 inputs"),
    "groups": _changed("g_idx", lambda v: v + 1, f"tensor {FIRST}.g_idx names group 2, and there are 2"),
    "negative": _changed("g_idx", lambda v: v - 2, f"tensor {FIRST}.g_idx names group -2, and there are 2"),
    "bias": _changed("bias", lambda v: v[:8], "bias must be float32 [64], not float32 [8]"),
    "embedding": (
        lambda t: t.update({"model.embed_tokens.qweight": t[f"{FIRST}.qweight"]}),
        "tensor model.embed_tokens.qweight: a quantized embedding is not supported",
    ),
}
DAMAGED_COMPRESSED = {
    **{f"no {name}": _without(f"weight_{name}") for name in ("scale", "shape", "zero_point")},
    "no weights": (
        lambda t: t.pop(f"{FIRST}.weight_packed"),
        f"has no tensor {FIRST}.weight_packed",
    ),
    "type": _changed("weight_packed", np.float32, f"tensor {FIRST}.weight_packed is F32, not I32"),
    "short": _changed("weight_packed", lambda v: v[:, :4], "weight_packed is [64, 4], not [64, 8]: weight_shape is"),
    "scales": _changed("weight_scale", lambda v: v[:8], "weight_scale is [8, 2], not [64, 2]"),
    "huge": _changed("weight_shape", lambda v: v << 50, "weight_packed is [64, 8], not [72057594037927936, 9007199254"),
    "largest": _changed(
        "weight_shape", lambda v: v * 0 + np.iinfo(np.int64).max, "weight_packed is [64, 8], not [92233720368"
    ),
    "negative": _changed("weight_shape", np.negative, "weight_shape is [-64, -64], not a layer's shape"),
    "three": _changed("weight_shape", lambda v: v[[0, 1, 1]], "weight_shape is [64, 64, 64], not a layer's shape"),
    "floats": _changed("weight_shape", np.float32, f"tensor {FIRST}.weight_shape is F32, not I64 or I32"),
    "zeros": _changed("weight_zero_point", lambda v: v[:4], "weight_zero_point is [4, 2], not [8, 2]"),
    "old zeros": _changed("weight_zero_point", np.int8, "weight_zero_point is [8, 2], not [64, 2]"),
    "range": _changed("weight_zero_point", lambda v: np.full((64, 2), 8, np.int8), "a zero point is outside -8 to 7"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_GPTQ.values(), ids=DAMAGED_GPTQ.keys())
def test_damaged_gptq(damage, message, tmp_path):
    write_packed(tmp_path / "in", gptq_tensors, gptq_config(Form()), Form())
    tensors = read_tensors(tmp_path / "in")
    damage(tensors)
    write_tensors(tmp_path / "in" / "model.safetensors", tensors)
    refused(tmp_path / "in", message)


@pytest.mark.parametrize(("damage", "message"), DAMAGED_COMPRESSED.values(), ids=DAMAGED_COMPRESSED.keys())
def test_damaged_compressed(damage, message, tmp_path):
    write_packed(tmp_path / "in", compressed_tensors, compressed_config(ASYMMETRIC), ASYMMETRIC)
    tensors = read_tensors(tmp_path / "in")
    damage(tensors)
    write_tensors(tmp_path / "in" / "model.safetensors", tensors)
    refused(tmp_path / "in", message)


def test_zero_points_of_symmetric_layers(tmp_path):
    write_packed(tmp_path / "in", compressed_tensors, compressed_config(Form()), ASYMMETRIC)
    refused(tmp_path / "in", f"layer {FIRST}: it has weight_zero_point, and symmetric is true")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999])
def test_truncated(share, tmp_path):
    write_packed(tmp_path / "in", compressed_tensors, compressed_config(Form()), Form())
    path = tmp_path / "in" / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * share))
    refused(tmp_path / "in", "model.safetensors is ")


def test_missing_shard(tmp_path):
    write_packed(tmp_path / "in", gptq_tensors, gptq_config(Form()), Form())
    tensors = read_tensors(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_tensors(tmp_path / "in" / shards[0], tensors)
    index = {"weight_map": dict(zip(tensors, [shards[0]] * (len(tensors) - 1) + [shards[1]]))}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "in", "is not complete: model-00002-of-00002.safetensors, which")


def test_settings_beside_the_config(tmp_path, monkeypatch):
    """AutoGPTQ's quantize_config.json, alone and beside config.json."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    form = Form(group=16)
    write_packed(tmp_path / "in", gptq_tensors, gptq_config(form), form)
    expected = resolve_model(tmp_path / "in").with_name("model.onnx.data").read_bytes()
    with_config(tmp_path / "in", None)
    older = tmp_path / "in" / "quantize_config.json"
    older.write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": False, "sym": True}))
    assert resolve_model(tmp_path / "in").with_name("model.onnx.data").read_bytes() == expected
    with pytest.raises(UserError, match=r"is quantized already: quantize_config\.json says gptq"):
        float_model(tmp_path / "in", tmp_path / "work")
    with_config(tmp_path / "in", gptq_config(form))
    assert resolve_model(tmp_path / "in").with_name("model.onnx.data").read_bytes() == expected
    older.write_text(json.dumps({"bits": 4, "group_size": 128}))
    with pytest.raises(UserError, match=r"group_size is 16 in config\.json and 128 in quantize_config\.json"):
        resolve_model(tmp_path / "in")
    older.write_text(json.dumps({"bits": 5, "group_size": 16}))
    with_config(tmp_path / "in", None)
    with pytest.raises(UserError, match=r"quantize_config\.json: quantization_config's bits is 2, 3, 4 or 8, not 5"):
        resolve_model(tmp_path / "in")


def test_older_key(tmp_path, monkeypatch):
    """compression_config of older compressed-tensors."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    write_packed(tmp_path / "in", compressed_tensors, compressed_config(Form()), Form())
    expected = resolve_model(tmp_path / "in").with_name("model.onnx.data").read_bytes()
    with_config(tmp_path / "in", None, compression_config=compressed_config(Form()))
    assert resolve_model(tmp_path / "in").with_name("model.onnx.data").read_bytes() == expected


ODD = [None, True, False, -1, 0, 3, 1 << 70, 1.5, 4.0, float("nan"), "", "x", [], [1], ["re:"], {}, {"a": {"b": 1}}]


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested objects and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize("method", ["gptq", "auto-round", "compressed", "awq"])
def test_odd_values(method, checkpoint, compressed, tmp_path):
    """Any value in any place of the settings is read, or refused in one line."""
    folder = {"compressed": compressed, "awq": tmp_path / "in"}.get(method, checkpoint)
    if method == "awq":
        make_checkpoint(folder)
    config = {
        "gptq": gptq_config(Form(), meta={"quantizer": ["gptqmodel:1"]}, dynamic={"-:x": {}, "q_proj": {"bits": 4}}),
        "compressed": compressed_config(Form(), sparsity_config={"format": "dense"}, transform_config={"a": 1}),
        "auto-round": auto_round_config(Form(), extra_config={FIRST: {"bits": 4}}, act_bits=16),
        "awq": dict(QWEN2["quantization_config"]),
    }[method]
    tensors, outcomes = Checkpoint(folder), Counter()
    for place in places(config):
        for value in ODD:
            changed: Any = copy.deepcopy(config)
            functools.reduce(operator.getitem, place[:-1], changed)[place[-1]] = value
            try:
                form = layer_format(Settings(folder / "config.json", {"quantization_config": changed}))
                read_linear(tensors, FIRST, form)
            except UserError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 10


def test_command_line(tmp_path):
    """Exit status 2, one line, and neither a partial folder nor a partial cache."""
    write_packed(tmp_path / "in", gptq_tensors, gptq_config(Form(), bits=5), Form())
    environment = os.environ | {"GRISTMILL_CACHE": str(tmp_path / "cache")}
    for command in (
        ["sw.awq_export", str(tmp_path / "in"), "--out", str(tmp_path / "out")],
        ["sw.generate", "--model", str(tmp_path / "in"), "--device", "reference", "--prompt", "hi"],
    ):
        bad = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert (bad.returncode, bad.stdout) == (2, "")
        assert bad.stderr == f"error: {tmp_path}/in/config.json: quantization_config's bits is 2, 3, 4 or 8, not 5\n"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in"]
