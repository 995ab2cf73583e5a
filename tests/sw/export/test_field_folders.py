# SPDX-License-Identifier: Apache-2.0
"""Folders of many kinds: the Hugging Face cache, transformers.js, older AutoAWQ, old files, unusual settings."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sw import generate, layers
from sw.checkpoints import families, rotary
from sw.checkpoints.families import FIXED, HARMLESS
from sw.checkpoints.huggingface import decoder_config
from sw.checkpoints.settings import read_settings
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.export.huggingface import export_checkpoint
from sw.export.resolve import find_model, resolve_model
from sw.graph.file import OnnxFile
from sw.text.folder import TextFolder
from tests.sw.fixtures.checkpoints import LLAMA, QWEN2, awq_config, make_checkpoint, read_tensors, write_tensors

OPTIONS = ["--device", "reference", "--tile", "4", "--prompt", "hi", "--max-new-tokens", "2", "--json"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of a small tied AutoAWQ model."""
    folder = tmp_path_factory.mktemp("exported")
    make_checkpoint(folder / "awq", awq_config(tie_word_embeddings=True))
    export_checkpoint(folder / "awq", folder / "out")
    return folder / "out"


def answer(model, capsys):
    assert generate.main(["--model", str(model), *OPTIONS]) == 0
    return json.loads(capsys.readouterr().out)


def hub(exported, root):
    """The export in the form of huggingface_hub's cache."""
    snapshot, blobs = root / "snapshots" / "r", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(exported.iterdir())):
        shutil.copy(path, blobs / f"{number:02x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:02x}")
    return snapshot


def test_hugging_face_cache(exported, tmp_path, capsys):
    snapshot = hub(exported, tmp_path / "hub")
    assert answer(snapshot, capsys)["ids"] == answer(exported, capsys)["ids"]


def test_link_that_leaves_the_cache(exported, tmp_path):
    snapshot = hub(exported, tmp_path / "hub")
    data = snapshot / "model.onnx.data"
    target = data.resolve()
    shutil.move(target, tmp_path / "outside")
    data.unlink()
    data.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"model\.onnx\.data is a link that leaves the model's folder"):
        OnnxFile(snapshot / "model.onnx")
    # The same with a model outside the cache.
    shutil.copytree(exported, tmp_path / "plain")
    (tmp_path / "plain" / "model.onnx.data").unlink()
    (tmp_path / "plain" / "model.onnx.data").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link that leaves the model's folder"):
        OnnxFile(tmp_path / "plain" / "model.onnx")


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("../secret", "external data file ../secret is not beside the model"),
        ("/etc/passwd", "external data file /etc/passwd is not beside the model"),
    ],
)
def test_external_data_elsewhere(location, problem, tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [tensor])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=problem):
        OnnxFile(tmp_path / "m.onnx")


def test_transformers_js(exported, tmp_path, capsys):
    """Graphs in onnx/, text files one folder up, and an input for the number of tokens whose logits are needed."""
    folder = tmp_path / "repository"
    (folder / "onnx").mkdir(parents=True)
    model = onnx.load(exported / "model.onnx")
    model.graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []))
    onnx.save(model, folder / "onnx" / "model_q4.onnx")
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(exported / name, folder)
    expected = answer(exported, capsys)["ids"]
    assert answer(folder, capsys)["ids"] == expected
    assert answer(folder / "onnx" / "model_q4.onnx", capsys)["ids"] == expected
    assert layers.main([str(folder), "--device", "reference", "--tile", "4", "--limit", "2"]) == 0
    # The float graph is named model.onnx, and the quantizer must take it.
    (folder / "onnx" / "model.onnx").write_bytes(b"\x08")
    (folder / "onnx" / "model_fp16.onnx").write_bytes(b"\x08")
    assert find_model(folder).name == "model_q4.onnx"
    assert find_model(folder, floats=True).name == "model.onnx"


@pytest.mark.parametrize("template", ["", "{# #}"])
def test_template_that_renders_nothing(template, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"the prompt is empty: the chat template in .*jinja renders nothing"):
        generate.main(["--model", str(tmp_path / "m"), *OPTIONS])


def test_outdated_index(tmp_path, capsys):
    tensors = make_checkpoint(tmp_path / "m")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model(tmp_path / "m").is_file()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "other.safetensors")
    with pytest.raises(UserError, match="is not complete"):
        resolve_model(tmp_path / "m")


def test_tensor_in_two_files(tmp_path):
    make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "a.safetensors")
    write_tensors(tmp_path / "m" / "b.safetensors", {"model.norm.weight": np.ones(64, np.float32)})
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is in a\.safetensors and in b\.safetensors"):
        resolve_model(tmp_path / "m")


OLD = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


def test_older_autoawq(tmp_path):
    make_checkpoint(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps({**QWEN2, "quantization_config": None}))
    (tmp_path / "old" / "quant_config.json").write_text(json.dumps(OLD))
    old, new = (resolve_model(tmp_path / name).with_name("model.onnx.data") for name in ("old", "new"))
    assert old.read_bytes() == new.read_bytes()
    with pytest.raises(UserError, match=r"is quantized already: quant_config\.json says awq"):
        float_model(tmp_path / "old", tmp_path / "work")
    (tmp_path / "new" / "quant_config.json").write_text(json.dumps(OLD | {"q_group_size": 64}))
    with pytest.raises(UserError, match=r"group_size is 32 in config\.json and 64 in quant_config\.json"):
        resolve_model(tmp_path / "new")


def test_pytorch_folder(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin is a PyTorch file, which is not read: save the model with"
    ):
        find_model(tmp_path)


@pytest.mark.parametrize("key", FIXED)
def test_config_values_that_are_refused(key, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, key: True}))
    with pytest.raises(UserError, match=f"{key}|sliding window"):
        decoder_config(read_settings(tmp_path / "config.json"))


OWN_KEYS = {
    "phi3": {"original_max_position_embeddings", "resid_pdrop", "embd_pdrop"},
    "smollm3": {"no_rope_layers", "no_rope_layer_interval"},
    "granite": {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"},
    "gemma3_text": {
        "hidden_activation",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "sliding_window_pattern",
        "rope_local_base_freq",
    },
    "mixtral": {
        "sliding_window",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    },
    "qwen3_moe": {
        "decoder_sparse_step",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "num_experts",
        "norm_topk_prob",
        "output_router_logits",
        "router_aux_loss_coef",
        "mlp_only_layers",
    },
}
"""Family -> the keys of its class in transformers (4.57 and 5.24) that LlamaConfig and Qwen2Config do not have."""


def test_every_config_key_is_known():
    """Every key of transformers' LlamaConfig and Qwen2Config (4.57) is read here, fixed, or harmless; so are the keys
    of other families.
    """
    sources = "".join(Path(str(module.__file__)).read_text() for module in (families, rotary))
    for family, names in OWN_KEYS.items():
        fixed = FIXED | families.FIXED_OF.get(family, {})
        assert all(f'"{name}"' in sources or name in fixed or name in HARMLESS for name in names), family
    read = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "layer_types",
        "model_type",
        "architectures",
        "quantization_config",
    ]
    keys = [
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "pretraining_tp",
        "use_cache",
        "rope_theta",
        "rope_scaling",
        "attention_bias",
        "attention_dropout",
        "mlp_bias",
        "head_dim",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "torch_dtype",
        "dtype",
        "is_encoder_decoder",
        "add_cross_attention",
        "partial_rotary_factor",
    ]
    assert set(keys) <= {*read, *FIXED, *HARMLESS}
    assert not set(FIXED) & HARMLESS


def test_linear_scaling_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    factors = decoder_config(read_settings(tmp_path / "config.json")).rope_factors
    assert factors is not None
    assert (factors == 2).all()


@pytest.mark.parametrize(
    ("base", "tensor", "problem"),
    [
        (QWEN2, "self_attn.o_proj.bias", "is there, and qwen2 has none"),
        (LLAMA, "self_attn.q_proj.bias", "is there, and attention_bias is false"),
        (LLAMA, "self_attn.o_proj.bias", "is there, and attention_bias is false"),
        (LLAMA, "mlp.up_proj.bias", "is there, and mlp_bias is false"),
    ],
)
def test_bias_that_contradicts(base, tensor, problem, tmp_path):
    make_checkpoint(tmp_path / "m", base)
    tensors = read_tensors(tmp_path / "m")
    tensors[f"model.layers.0.{tensor}"] = np.ones(64, np.float32)
    write_tensors(tmp_path / "m" / "model.safetensors", tensors)
    with pytest.raises(UserError, match=problem):
        resolve_model(tmp_path / "m")


def test_add_bos_token(exported, tmp_path):
    """For Llama's tokenizer classes add_bos_token decides, for others tokenizer.json."""
    shutil.copytree(exported, tmp_path / "m")
    token = TextFolder(exported).tokenizer.id_to_token(256)
    path = tmp_path / "m" / "tokenizer_config.json"

    def first(**values):
        path.write_text(json.dumps({"bos_token": token, **values}))
        return TextFolder(tmp_path / "m").prompt_ids("hi", raw=True)[0]

    assert first(tokenizer_class="LlamaTokenizerFast", add_bos_token=True) == 256
    assert first(tokenizer_class="LlamaTokenizerFast", add_bos_token=False) != 256
    assert first(tokenizer_class="Qwen2Tokenizer", add_bos_token=True) != 256
    for key in ("split_special_tokens", "add_eos_token"):
        with pytest.raises(UserError, match=f"{key} is not supported"):
            first(tokenizer_class="LlamaTokenizer", **{key: True})
