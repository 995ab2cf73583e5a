# SPDX-License-Identifier: Apache-2.0
"""Float checkpoints and GGUF files of every family against transformers (fixtures/families/models.py)."""

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sw.checkpoints.gguf.reader import GgufFile
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.export.gguf import decoder_config, export_gguf
from tests.sw.fixtures.checkpoints import empty_cache, step, write_tensors
from tests.sw.fixtures.families.gguf_files import MODELS, write_family_gguf
from tests.sw.fixtures.families.models import CONFIGS, PROMPT, ROWS, configuration, expected, write_family


def check(path: Path, name: str, pieces: int = 1) -> None:
    """The graph's logits of the prompt in pieces, and its greedy text, are those of transformers."""
    logits, tokens = expected(name)
    session = onnxruntime.InferenceSession(path)
    past, total, found = empty_cache(session), 0, []
    for piece in np.array_split(PROMPT, pieces):
        total += len(piece)
        rows, past = step(session, piece.tolist(), past, total)
        found.append(rows)
    rows = np.concatenate(found)
    assert np.abs(rows[ROWS] - logits).max() < 1e-4
    text = [int(rows[-1].argmax())]
    while len(text) < len(tokens):
        total += 1
        rows, past = step(session, text[-1:], past, total)
        text.append(int(rows[-1].argmax()))
    assert text == tokens


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_float_checkpoint(name, pieces, tmp_path):
    write_family(tmp_path / "in", name)
    check(float_model(tmp_path / "in", tmp_path / "out"), name, pieces)


@pytest.mark.parametrize("name", MODELS)
def test_gguf(name, tmp_path):
    write_family_gguf(tmp_path / "m.gguf", name)
    check(export_gguf(tmp_path / "m.gguf", tmp_path / "out", lm_head="float"), name)


def test_scores_of_gemma_27b(tmp_path):
    """GGUF has no key for their scale; llama.cpp knows the model by its 62 layers."""
    for layers, size in ((4, 32), (62, 16)):
        write_family_gguf(tmp_path / "m.gguf", "gemma3", block_count=layers)
        assert decoder_config(GgufFile(tmp_path / "m.gguf")).attention_scale == size**-0.5


REFUSED = {
    "kinds": (
        "ministral",
        {"layer_types": ["full_attention", "chunked_attention"] * 2},
        "layer_types is a list of full",
    ),
    "few kinds": ("ministral", {"layer_types": ["full_attention"]}, "layer_types is a list for 4 layers"),
    "mixed kinds": ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types is sliding_attention for all 4"),
    "no window": ("gemma3", {"sliding_window": None}, "sliding_window is a whole number from 1, because"),
    "window": ("mistral", {"sliding_window": 0}, "sliding_window is a whole number from 1, not 0"),
    "windows of Qwen3": ("qwen3", {"use_sliding_window": True}, "use_sliding_window 'True' is not supported"),
    "softcap": ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping '30.0' is not supported"),
    "both ways": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention 'True' is not"),
    "activation": ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported, only gelu_p"),
    "SiLU": ("granite", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
    "no rope": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is a list of 0 and 1 for 4 layers"),
    "rope": ("smollm3", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers is a list of 0 and 1 for 4 layers"),
    "multiplier": ("granite", {"residual_multiplier": 0}, "residual_multiplier is a positive number, not 0"),
    "part": ("phi3", {"partial_rotary_factor": 0.8}, "a rotation of 25 elements of a head is no multiple of 16"),
    "large part": ("phi3", {"partial_rotary_factor": 2.0}, "partial_rotary_factor is at most 1"),
    "no part": ("phi3", {"partial_rotary_factor": 0.01}, "one element of a head at least, not 0.01"),
    "other part": ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 1, not 0.5"),
    "no factors": ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor is a list of numbers, not null"),
    "factors": ("phi4", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "the table of rotary factors is [1]"),
    "llama3 in Phi-3": ("phi3", {"rope_scaling": {"type": "llama3"}}, "'llama3' is not supported, only longrope"),
    "longrope": (
        "qwen3",
        {"rope_scaling": {"type": "longrope"}},
        "'longrope' is not supported, only linear and llama3",
    ),
    "head": ("qwen3", {"head_dim": 16}, "/model/layers.0/self_attn/q_proj is [128, 64], but the model's configuration"),
    "biases": ("phi3", {}, "model.layers.0.self_attn.qkv_proj.bias is there, and phi3 has none"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(name, changes, message, tmp_path):
    weights = write_family(tmp_path / "in", name)
    if "bias" in message:
        weights["model.layers.0.self_attn.qkv_proj.bias"] = np.ones(8, np.float32)
        write_tensors(tmp_path / "in" / "model.safetensors", weights)
    (tmp_path / "in" / "config.json").write_text(json.dumps(configuration(name) | changes))
    with pytest.raises(UserError) as error:
        float_model(tmp_path / "in", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


def test_newer_settings(tmp_path):
    """transformers 5 writes rope_parameters, which Gemma 3 has for each type of layer, and layer_types."""
    config = configuration("gemma3")
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    rotary = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    }
    write_family(tmp_path / "in", "gemma3")
    config = {key: value for key, value in config.items() if key not in old}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"layer_types": kinds, "rope_parameters": rotary}))
    check(float_model(tmp_path / "in", tmp_path / "out"), "gemma3")


REFUSED_GGUF = {
    "no rotation": ("granite", {"granite.rope.scaling.finetuned": False}, "rope.scaling.finetuned = False is not"),
    "infinite": (
        "granite",
        {"residual_scale": math.inf},
        "metadata granite.residual_scale is a positive number, not inf",
    ),
    "pattern": ("gemma3", {"attention__sliding_window_pattern": [True]}, "has 1 values, and the model 4 layers"),
    "context": ("phi4", {"rope__scaling__original_context_length": 1}, "original_context_length is 1, not above 1"),
    "rotation": ("qwen3", {"rope__dimension_count": 16}, "rotary embedding over 16 of 32 elements is not supported"),
    "no part": ("phi4", {"rope__dimension_count": 0}, "rotary embedding over 0 of 32 elements is not supported"),
    "window": ("qwen3", {"attention__sliding_window": 5}, "qwen3.attention.sliding_window = 5 is not supported"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED_GGUF.values(), ids=REFUSED_GGUF.keys())
def test_refused_gguf(name, changes, message, tmp_path):
    write_family_gguf(tmp_path / "m.gguf", name, **changes)
    with pytest.raises(UserError) as error:
        decoder_config(GgufFile(tmp_path / "m.gguf"))
    assert message in str(error.value) and "\n" not in str(error.value)
