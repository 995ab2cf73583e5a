# SPDX-License-Identifier: Apache-2.0
"""Files of models with experts: other layouts of the same weights, quantized GGUF tensors, and damaged files."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest

from sw.checkpoints.gguf.reader import GgufFile
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.export.gguf import export_gguf
from sw.graph.experts.match import find_mixtures
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from tests.sw.families.test_export import check
from tests.sw.fixtures.checkpoints import write_tensors
from tests.sw.fixtures.families.gguf_files import write_family_gguf
from tests.sw.fixtures.families.models import configuration, write_family

ROUTER = "model.layers.2.mlp.gate.weight"
GATE = "model.layers.1.mlp.experts.{}.gate_proj.weight"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_one_tensor(name, tmp_path):
    """All experts in one tensor, as transformers 5 holds them."""
    weights = write_family(tmp_path / "in", name)
    modules = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}.get(
        name, ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    count = 4 if name == "mixtral" else 6
    for layer in (f"model.layers.{index}" for index in range(4)):
        weights[f"{layer}.mlp.gate.weight"] = weights.pop(f"{layer}.{modules[0]}.gate.weight")
        gate, up, down = (
            [weights.pop(f"{layer}.{modules[0]}.experts.{index}.{part}.weight") for index in range(count)]
            for part in modules[1:]
        )
        weights[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([np.stack(gate), np.stack(up)], axis=1)
        weights[f"{layer}.mlp.experts.down_proj"] = np.stack(down)
    write_tensors(tmp_path / "in" / "model.safetensors", weights)
    check(float_model(tmp_path / "in", tmp_path / "out"), name)
    weights["model.layers.3.mlp.experts.down_proj"] = weights["model.layers.3.mlp.experts.down_proj"][1:]
    write_tensors(tmp_path / "in" / "model.safetensors", weights)
    with pytest.raises(UserError, match=r"layers.3.mlp.experts.down_proj is \[\d, 64, \d+\], but the model's config"):
        float_model(tmp_path / "in", tmp_path / "other")


REFUSED = {
    "too many are used": (
        {"num_experts_per_tok": 7},
        {},
        "num_experts_per_tok is at most the number of experts 6, not 7",
    ),
    "none is used": ({"num_experts_per_tok": 0}, {}, "num_experts_per_tok is a whole number from 1, not 0"),
    "no experts": ({"num_experts": 0}, {}, "num_experts is a whole number from 1, not 0"),
    "two numbers": ({"num_local_experts": 5}, {}, "num_experts is equal to num_local_experts 5, not 6"),
    "size": ({"moe_intermediate_size": 48}, {}, "mlp/experts.0/gate_proj is [32, 64], but the model's configuration"),
    "dense layers": ({"mlp_only_layers": "all"}, {}, "mlp_only_layers is a list of indices of layers"),
    "step": ({"decoder_sparse_step": 0}, {}, "decoder_sparse_step is a whole number from 1, not 0"),
    "norm": ({"norm_topk_prob": "yes"}, {}, "norm_topk_prob is true or false"),
    "router": ({}, {ROUTER: np.ones((5, 64), np.float32)}, f"{ROUTER} is [5, 64], and the model has 6 experts"),
    "wide router": ({}, {ROUTER: np.ones((6, 32), np.float32)}, "layers.2/mlp/gate is [6, 32], but the model's config"),
    "no router": ({}, {ROUTER: None}, f"has no tensor {ROUTER}"),
    "missing layer": ({}, {GATE.format(3): None}, f"has no tensor {GATE.format(3)}"),
    "missing expert": (
        {},
        {GATE.format(5).replace("gate", part): None for part in ("gate", "up", "down")},
        "layers.1.mlp.experts.5 is missing: the model has 6 experts",
    ),
    "surplus expert": (
        {},
        {GATE.format(6): np.ones((32, 64), np.float32)},
        "layers.1.mlp.experts.6 is there, and the model has 6 experts",
    ),
    "shape": ({}, {GATE.format(0): np.ones((31, 64), np.float32)}, "experts.0/gate_proj is [31, 64], but the model's"),
}


@pytest.mark.parametrize(("settings", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(settings, tensors, message, tmp_path):
    weights = write_family(tmp_path / "in", "qwen3_moe") | tensors
    found = {name: values for name, values in weights.items() if values is not None}
    write_tensors(tmp_path / "in" / "model.safetensors", found)
    (tmp_path / "in" / "config.json").write_text(json.dumps(configuration("qwen3_moe") | settings))
    with pytest.raises(UserError) as error:
        float_model(tmp_path / "in", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


def test_exit_code(tmp_path):
    """The command gives one line and 2."""
    write_family_gguf(tmp_path / "m.gguf", "mixtral", expert_used_count=9)
    command = [sys.executable, "-m", "sw.gguf_export", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and not found.stdout
    assert "metadata llama.expert_used_count is 1 to expert_count 4, not 9" in found.stderr
    assert found.stderr.count("\n") == 1


REFUSED_GGUF = {
    "count": (
        "mixtral",
        {"expert_count": 5},
        "tensor blk.0.ffn_gate_inp.weight is [4, 64], and the model has 5 experts",
    ),
    "none used": ("qwen3_moe", {"expert_used_count": 0}, "expert_used_count is 1 to expert_count 6, not 0"),
    "no count": (
        "mixtral",
        {"expert_count": 0},
        "tensor blk.0.ffn_down_exps.weight does not belong to a 4-block model",
    ),
    "gating": ("qwen3_moe", {"expert_gating_func": 2}, "metadata qwen3moe.expert_gating_func = 2 is not supported"),
    "size": (
        "qwen3_moe",
        {"expert_feed_forward_length": 64},
        "experts.0/gate_proj is [32, 64], but the model's config",
    ),
    "dense": ("llama", {"expert_count": 4, "expert_used_count": 2}, "has no tensor blk.0.ffn_gate_inp.weight"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED_GGUF.values(), ids=REFUSED_GGUF.keys())
def test_refused_gguf(name, changes, message, tmp_path):
    write_family_gguf(tmp_path / "m.gguf", name, **changes)
    with pytest.raises(UserError) as error:
        export_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1"])
def test_quantized_gguf(kind, tmp_path):
    """Every expert's layer is its part of the tensor, without loss."""
    write_family_gguf(tmp_path / "m.gguf", "mixtral", experts_kind=kind)
    path = export_gguf(tmp_path / "m.gguf", tmp_path / "out", lm_head="float")
    linears = find_linears(path)
    assert len(linears) == 4 * 4 * 3 and len(find_mixtures(linears.file)) == 4
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer in (linears[0], linears[-1], linears[17]):
        # /model/layers.1/mlp/experts.2/down_proj/MatMulNBits
        _, _, block, _, expert, module, _ = layer.name.split("/")
        tensor = tensors[f"blk.{block[7:]}.ffn_{module.removesuffix('_proj')}_exps.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)[int(expert[8:])]
        assert np.abs(layer.dequantize() - values).max() <= 1e-6 * np.abs(values).max()


def test_experts_apart(tmp_path):
    """Files of early 2024 have a tensor for each expert."""
    write_family_gguf(tmp_path / "m.gguf", "mixtral", experts_apart=True)
    assert "blk.0.ffn_up.3.weight" in GgufFile(tmp_path / "m.gguf")
    check(export_gguf(tmp_path / "m.gguf", tmp_path / "out", lm_head="float"), "mixtral")


def test_graph_of_a_mixture(tmp_path):
    """What the matcher says of an exported graph."""
    write_family(tmp_path / "in", "qwen3_moe_step")
    found = find_mixtures(OnnxFile(float_model(tmp_path / "in", tmp_path / "out")))
    assert [(len(part.experts), part.used) for part in found] == [(6, 3)]
    assert found[0].experts[4].up.startswith("/model/layers.1/mlp/experts.4/up_proj/")
    assert found[0].input.startswith("/model/layers.1/post_attention_layernorm/")
