# SPDX-License-Identifier: Apache-2.0
"""GPTQ and compressed-tensors folders: exact weights, the logits of a plain numpy decoder on host and device."""

import functools
import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from sw.devices import make_config, open_device
from sw.export.huggingface import export_checkpoint
from sw.export.resolve import resolve_model
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from sw.runtime import Decoder, ProgramDecoder
from tests.sw.fixtures.checkpoints import (
    IDS,
    LLAMA,
    QWEN2,
    empty_cache,
    make_checkpoint,
    read_tensors,
    relative_error,
    step,
    write_tensors,
)
from tests.sw.fixtures.huggingface.packed import (
    Form,
    Packer,
    auto_round_config,
    compressed_config,
    compressed_tensors,
    float_logits,
    gptq_config,
    gptq_tensors,
    make_layer,
    write_packed,
)

LAYERS = QWEN2["num_hidden_layers"]
GPTQ_V2 = functools.partial(gptq_tensors, version=2)
WITHOUT_ORDER = functools.partial(gptq_tensors, g_idx=False)
SEPARATE = functools.partial(compressed_tensors, separate=True)
OLD_ZEROS = functools.partial(compressed_tensors, old_zeros=True)
UNTIED = QWEN2 | {"tie_word_embeddings": False}
ASYMMETRIC = Form(symmetric=False)
CASES: dict[str, tuple[Packer, dict, Form]] = {
    "gptq": (gptq_tensors, gptq_config(Form()), Form()),
    "gptq 8 bits": (gptq_tensors, gptq_config(Form(bits=8)), Form(bits=8)),
    "gptq asymmetric": (gptq_tensors, gptq_config(ASYMMETRIC), ASYMMETRIC),
    "gptq 8 bits asymmetric": (
        gptq_tensors,
        gptq_config(replace(ASYMMETRIC, bits=8)),
        replace(ASYMMETRIC, bits=8),
    ),
    "gptq v2": (GPTQ_V2, gptq_config(ASYMMETRIC, checkpoint_format="gptq_v2"), ASYMMETRIC),
    "gptq format": (GPTQ_V2, gptq_config(ASYMMETRIC, checkpoint_format=None, format="gptq_v2"), ASYMMETRIC),
    "gptq channel": (gptq_tensors, gptq_config(Form(group=-1)), Form(group=-1)),
    "gptq no g_idx": (WITHOUT_ORDER, gptq_config(Form(group=16)), Form(group=16)),
    "gptq 48": (gptq_tensors, gptq_config(Form(group=48)), Form(group=48)),
    "gptq blocks": (
        gptq_tensors,
        gptq_config(Form(order="blocks"), desc_act=True),
        Form(order="blocks"),
    ),
    "gptq bf16": (gptq_tensors, gptq_config(Form()), Form(scales="BF16", floats="BF16")),
    "gptq 2 bits": (gptq_tensors, gptq_config(Form(bits=2)), Form(bits=2)),
    "gptq 2 bits asymmetric": (
        GPTQ_V2,
        gptq_config(replace(ASYMMETRIC, bits=2), checkpoint_format="gptq_v2"),
        replace(ASYMMETRIC, bits=2),
    ),
    "gptq 3 bits": (gptq_tensors, gptq_config(Form(bits=3)), Form(bits=3)),
    "gptq 3 bits asymmetric": (
        gptq_tensors,
        gptq_config(replace(ASYMMETRIC, bits=3)),
        replace(ASYMMETRIC, bits=3),
    ),
    "auto-round 2 bits": (WITHOUT_ORDER, auto_round_config(Form(bits=2)), Form(bits=2)),
    "auto-round 3 bits": (WITHOUT_ORDER, auto_round_config(Form(bits=3)), Form(bits=3)),
    "compressed 2 bits": (
        compressed_tensors,
        compressed_config(replace(ASYMMETRIC, bits=2)),
        replace(ASYMMETRIC, bits=2),
    ),
    "compressed 3 bits": (
        compressed_tensors,
        compressed_config(replace(ASYMMETRIC, bits=3)),
        replace(ASYMMETRIC, bits=3),
    ),
    "compressed 3 bits, 0.17": (SEPARATE, compressed_config(Form(bits=3, group=-1)), Form(bits=3, group=-1)),
    "auto-round": (WITHOUT_ORDER, auto_round_config(Form()), Form()),
    "auto-round asymmetric": (
        functools.partial(gptq_tensors, version=2, g_idx=False),
        auto_round_config(ASYMMETRIC, "auto_round", act_bits=16),
        ASYMMETRIC,
    ),
    "compressed": (compressed_tensors, compressed_config(Form()), Form()),
    "compressed asymmetric": (compressed_tensors, compressed_config(ASYMMETRIC), ASYMMETRIC),
    "compressed old zeros": (OLD_ZEROS, compressed_config(ASYMMETRIC), ASYMMETRIC),
    "compressed channel": (
        compressed_tensors,
        compressed_config(replace(ASYMMETRIC, group=-1)),
        replace(ASYMMETRIC, group=-1),
    ),
    "compressed 8 bits": (
        compressed_tensors,
        compressed_config(replace(ASYMMETRIC, bits=8)),
        replace(ASYMMETRIC, bits=8, scales="F32"),
    ),
    "compressed bf16": (
        compressed_tensors,
        compressed_config(ASYMMETRIC),
        replace(ASYMMETRIC, scales="BF16", floats="BF16"),
    ),
    "compressed blocks": (compressed_tensors, compressed_config(Form(order="blocks")), Form(order="blocks")),
}


def graph_names(linears) -> list[str]:
    return [name.strip("/").replace("/", ".").removesuffix(".MatMulNBits") for name in linears.names]


def onnx_logits(path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return step(session, IDS, empty_cache(session), len(IDS))[0]


def check_layers(path, layers, head: bool = True) -> None:
    """Integers, zero points and scales of every feature are equal to the packed ones."""
    linears = find_linears(path)
    found = dict(zip(graph_names(linears), linears))
    assert sorted(found) == sorted([*layers, *(["lm_head"] if head else [])])
    for name, layer in layers.items():
        read, groups = found[name], np.arange(layer.q.shape[1]) // found[name].group_size
        assert read.group_size & (read.group_size - 1) == 0
        assert np.array_equal(read.q, layer.q)
        assert np.array_equal(read.zero_points[:, groups], layer.z[:, layer.groups])
        assert np.array_equal(read.scales[:, groups], layer.s[:, layer.groups])


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits(case, tmp_path):
    packer, quantization, form = CASES[case]
    weights, layers = write_packed(tmp_path / "in", packer, quantization, form)
    path = export_checkpoint(tmp_path / "in", tmp_path / "out")
    check_layers(path, layers)
    assert len(layers) == 7 * LAYERS
    head = find_linears(path)[-1].dequantize()
    assert relative_error(onnx_logits(path), float_logits(tmp_path / "in", weights, head)) < 1e-5


@pytest.mark.parametrize("base", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize("case", ["gptq bf16", "compressed bf16", "compressed 8 bits"])
@pytest.mark.parametrize("operators", ["linear", "decoder"])
def test_device(operators, case, base, tmp_path):
    """The reference device, layer by layer and as programs, against the float decoder."""
    packer, quantization, form = CASES[case]
    weights, _ = write_packed(tmp_path / "in", packer, quantization, form, base=base)
    path = export_checkpoint(tmp_path / "in", tmp_path / "out")
    expected = float_logits(tmp_path / "in", weights, find_linears(path)[-1].dequantize())
    config = make_config(tile=8, max_tokens=8, max_k=1024, zero_point="integer", operators=operators)
    with open_device("reference", config) as device:
        if operators == "linear":
            decoder = Decoder(path, device, context=32)
        else:
            decoder = ProgramDecoder(OnnxFile(path), device, context=32)
        assert relative_error(decoder.forward(IDS, True), expected) < 1e-3
        assert decoder.usage.beats > 0


def test_layers_of_several_groups(tmp_path):
    """Names, patterns and classes as targets; ignored names and patterns; two widths in one folder."""
    eight, four = Form(bits=8, group=16, symmetric=False), Form(group=-1)
    config = compressed_config(four)
    groups = config["config_groups"]
    groups["group_1"] = compressed_config(eight)["config_groups"]["group_0"] | {
        "format": "pack-quantized",
        "targets": ["re:.*layers\\.1\\.mlp\\.(gate|up)_proj", "model.layers.0.self_attn.o_proj"],
    }
    groups["group_0"]["format"] = "pack-quantized"
    config |= {
        "format": "mixed-precision",
        "ignore": ["lm_head", "re:.*q_proj$", "model.layers.1.self_attn.v_proj"],
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
    }
    weights, layers = write_packed(
        tmp_path / "in",
        compressed_tensors,
        config,
        four,
        floats=("q_proj", "layers.1.self_attn.v_proj"),
        forms=dict.fromkeys(("1.mlp.gate_proj", "1.mlp.up_proj", "0.self_attn.o_proj"), eight),
    )
    path = export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float")
    assert len(layers) == 7 * LAYERS - 3
    check_layers(path, layers, head=False)
    assert sorted({layer.bits for layer in find_linears(path)}) == [4, 8]
    assert relative_error(onnx_logits(path), float_logits(tmp_path / "in", weights)) < 1e-5


def test_dynamic_gptq(tmp_path):
    """GPTQModel's settings of some layers: the first pattern that matches counts."""
    eight = Form(bits=8, group=16)
    dynamic = {
        "-:.*layers\\.0\\.mlp\\.down": {},
        "+:.*down_proj": {"bits": 8, "group_size": 16},
        "+:.*o_proj": {"bits": 8, "sym": True},
        ".*layers\\.[01]\\..*down_proj": {"bits": 4},
    }
    weights, layers = write_packed(
        tmp_path / "in",
        gptq_tensors,
        gptq_config(Form(), dynamic=dynamic),
        Form(),
        floats=("layers.0.mlp.down_proj",),
        forms={"layers.1.mlp.down_proj": eight, "o_proj": Form(bits=8)},
    )
    path = export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float")
    check_layers(path, layers, head=False)
    assert relative_error(onnx_logits(path), float_logits(tmp_path / "in", weights)) < 1e-5


def test_auto_round_layers(tmp_path):
    """extra_config: layers of other sizes by name, and float layers by name or pattern."""
    eight = {"bits": 8, "group_size": 16, "sym": True}
    extra = {"model.layers.1.mlp.down_proj": eight, ".*layers\\.0\\.mlp\\.up.*": {"bits": 16, "data_type": "float"}}
    weights, layers = write_packed(
        tmp_path / "in",
        WITHOUT_ORDER,
        auto_round_config(Form(), extra_config=extra | {".*o_proj.*": {"bits": 4}}),
        Form(),
        floats=("layers.0.mlp.up_proj",),
        forms={"layers.1.mlp.down_proj": Form(bits=8, group=16)},
    )
    path = export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float")
    check_layers(path, layers, head=False)
    assert relative_error(onnx_logits(path), float_logits(tmp_path / "in", weights)) < 1e-5


def test_auto_round_awq(tmp_path):
    """The same words as AutoAWQ's."""
    make_checkpoint(tmp_path / "in")
    expected = export_checkpoint(tmp_path / "in", tmp_path / "awq").with_name("model.onnx.data").read_bytes()
    config = auto_round_config(ASYMMETRIC, "auto_round:auto_awq")
    (tmp_path / "in" / "config.json").write_text(json.dumps(QWEN2 | {"quantization_config": config}))
    path = export_checkpoint(tmp_path / "in", tmp_path / "out")
    assert path.with_name("model.onnx.data").read_bytes() == expected


@pytest.mark.parametrize(("packer", "config"), [(gptq_tensors, gptq_config), (compressed_tensors, compressed_config)])
def test_group_beyond_the_layer(packer, config, tmp_path):
    """One group for all of K, whatever its size is."""
    form = Form(group=-1)
    _, layers = write_packed(tmp_path / "in", packer, config(Form(group=1 << 70)), form)
    check_layers(export_checkpoint(tmp_path / "in", tmp_path / "out"), layers)


def test_biases_of_zeros(tmp_path):
    """Older GPTQ programs write a bias for every layer, also where the model has none."""

    def packer(name, layer, form):
        return gptq_tensors(name, layer, form) | {f"{name}.bias": np.zeros(len(layer.q), np.float16)}

    weights, layers = write_packed(tmp_path / "in", packer, gptq_config(Form()), Form(), base=LLAMA)
    path = export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float")
    check_layers(path, layers, head=False)
    assert not any(node.op_type == "Add" for node in OnnxFile(path).graph.node)
    assert relative_error(onnx_logits(path), float_logits(tmp_path / "in", weights)) < 1e-5


@pytest.mark.parametrize("case", ["gptq 8 bits asymmetric", "gptq v2", "compressed asymmetric", "compressed channel"])
def test_quantized_head(case, tmp_path):
    """A head that is quantized in the file is not changed; compressed-tensors names it by the class Linear."""
    packer, quantization, form = CASES[case]
    write_packed(tmp_path / "in", packer, quantization | {"ignore": []}, form, base=UNTIED)
    tensors, head = read_tensors(tmp_path / "in"), make_layer(np.random.default_rng(8), 264, 64, form)
    del tensors["lm_head.weight"]
    write_tensors(tmp_path / "in" / "model.safetensors", tensors | packer("lm_head", head, form))
    found = find_linears(export_checkpoint(tmp_path / "in", tmp_path / "out"))[-1]
    assert (found.name, found.bits) == ("/lm_head/MatMulNBits", form.bits)
    assert np.array_equal(found.dequantize(), head.weight.astype(np.float32))


@pytest.mark.parametrize(("packer", "config"), [(gptq_tensors, gptq_config), (compressed_tensors, compressed_config)])
def test_commands_take_the_folder(packer, config, tmp_path, monkeypatch):
    """MODEL of every command, exported once to the cache."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    write_packed(tmp_path / "in", packer, config(Form()), Form())
    first = resolve_model(tmp_path / "in")
    assert first.parent.parent == tmp_path / "cache"
    assert resolve_model(tmp_path / "in") == first
