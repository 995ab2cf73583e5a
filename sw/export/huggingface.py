# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder with quantized layers as a decoder ONNX graph with its tokenizer.

SRC_DIR holds config.json, tokenizer.json and *.safetensors. DIR gets model.onnx, model.onnx.data, tokenizer.json and
config.json (shapes, stop tokens, chat template). The weights of quantized layers (see sw.checkpoints.packed.formats)
and of the embedding are exact. A float head becomes int8 (see sw.model.lm_head); if its original integers are in the
folder (see sw.checkpoints.integer_tables), it gets them.
"""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sw.checkpoints.experts import read_experts
from sw.checkpoints.families import logits_divisor
from sw.checkpoints.huggingface import decoder_config, family_of, text_settings
from sw.checkpoints.integer_tables import integer_table
from sw.checkpoints.packed.formats import layer_format, quantization
from sw.checkpoints.packed.layers import PACKED, LayerFormat, read_linear
from sw.checkpoints.rotary import rope_scaling
from sw.checkpoints.safetensors_file import Checkpoint
from sw.checkpoints.settings import Settings, read_settings
from sw.common.errors import UserError
from sw.common.status_line import Progress
from sw.export.folder import EXPORTER_VERSION, write_folder
from sw.export.hub import repository
from sw.model.decoder import PROJECTIONS, DecoderConfig, DecoderLayer, split_rows
from sw.model.experts import EXPERT
from sw.model.families import ATTENTION_BIAS, FAMILIES, MLP_BIAS
from sw.model.lm_head import Table
from sw.model.source import DecoderSource

FUSED = {("q_proj", "k_proj", "v_proj"): "self_attn.qkv_proj", ("gate_proj", "up_proj"): "mlp.gate_up_proj"}
"""Layers that are the rows of one layer, in this order, in Phi-3 -> its module."""
NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "input_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "post_attention_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
"""Norm of DecoderLayer -> Hugging Face's module."""
HEAD_NORMS = ("qwen3", "gemma3_text", "qwen3_moe")


def export_checkpoint(source: Path, out: Path, *, lm_head: str = "int8", progress: Progress | None = None) -> Path:
    """Exports folder `source` to directory `out` and returns the path of its model.onnx. After an error `out` is
    unchanged.

    lm_head: one of sw.model.lm_head.HEAD_MODES. progress: called with the layers that are done and all layers.
    Raises UserError for damaged files, other families and formats, and weights that do not match config.json.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"no such folder: {source}")
    settings = read_settings(source / "config.json", required=True)
    decoder = checkpoint_source(source, settings, layer_format(settings))
    metadata = {"source": decoder.name, "exporter": f"gristmill awq_export {EXPORTER_VERSION}"}
    return write_folder(out, decoder, metadata, lm_head, progress)


def check_settings(folder: Path, floats: bool) -> None:
    """Raises UserError for a folder that cannot be used because of the files beside its tensors.

    floats: whether its layers must be float, not quantized.
    """
    settings = read_settings(folder / "config.json", required=True)
    if floats:
        expect_float(settings)
    else:
        layer_format(settings)
    decoder_config(settings)
    text_settings(folder, settings)


def expect_float(settings: Settings) -> None:
    """Raises UserError for a folder with quantized layers. settings: its config.json."""
    found, folder = quantization(settings), settings.path.parent
    if found is not None:
        raise UserError(f"{folder} is quantized already: {found.path.name} says {str(found.get('quant_method'))[:80]}")


def checkpoint_source(folder: Path, settings: Settings, form: LayerFormat | None) -> DecoderSource:
    """The decoder and text of a Hugging Face folder; its layers are read later.

    settings: its config.json. form: the format of its quantized layers; None if there must be none.
    Raises UserError like export_checkpoint.
    """
    config = decoder_config(settings)
    checkpoint = Checkpoint(folder)
    _check_biases(checkpoint, settings)
    name, family = family_of(settings)
    tied = settings.flag("tie_word_embeddings", family.tied)
    final_norm = _norm(checkpoint, "model.norm.weight", name)
    return DecoderSource(
        name=repository(folder.resolve()) or folder.resolve().name,
        family=name,
        config=config,
        embedding=_table(checkpoint, settings, form, "model.embed_tokens.weight"),
        layers=_layers(checkpoint, config, form, name),
        # The head has no other factor than this norm, and none of its own weights changes.
        final_norm=final_norm / np.float32(logits_divisor(settings, name)),
        head=None if tied else _head(checkpoint, settings, form),
        tied=tied,
        rope_scaling=rope_scaling(settings),
        **vars(text_settings(folder, settings)),
    )


def _check_biases(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raises UserError for a bias that must not exist according to config.json: transformers would ignore it.

    A missing bias is no error: transformers makes it zero. A bias of zeros changes nothing.
    """
    name, family = family_of(settings)
    for module in (*PROJECTIONS.values(), *FUSED.values()):
        key = MLP_BIAS if module.startswith("mlp") else ATTENTION_BIAS
        always = family.qkv_bias and module.startswith(("self_attn.q", "self_attn.k", "self_attn.v"))
        if always or (key in family.bias_keys and settings.flag(key, False)):
            continue
        tensor = f"model.layers.0.{module}.bias"
        if tensor in checkpoint and checkpoint.floats(tensor).any():
            said = f"{key} is false in {settings.path.name}" if key in family.bias_keys else f"{name} has none"
            raise UserError(f"{checkpoint.folder}: tensor {tensor} is there, and {said}")


def _head(checkpoint: Checkpoint, settings: Settings, form: LayerFormat | None) -> Table:
    exists = any(f"lm_head.{tensor}" in checkpoint for tensor in ("weight", *PACKED))
    if form is not None and exists and form.is_quantized(checkpoint, "lm_head"):
        return form.read(checkpoint, "lm_head")
    return _table(checkpoint, settings, form, "lm_head.weight")


def _table(checkpoint: Checkpoint, settings: Settings, form: LayerFormat | None, name: str) -> Table:
    for packed in PACKED:
        if (tensor := f"{name.removesuffix('weight')}{packed}") in checkpoint:
            raise UserError(f"{checkpoint.folder}: tensor {tensor}: a quantized embedding is not supported")
    values = checkpoint.table(name)
    return values if form is None else integer_table(checkpoint.folder, settings, name, values)


def _layers(
    checkpoint: Checkpoint, config: DecoderConfig, form: LayerFormat | None, name: str
) -> Iterator[DecoderLayer]:
    gemma = name == "gemma3_text"
    norms = GEMMA_NORMS if gemma else NORMS
    for index in range(config.layer_count):
        layer = f"model.layers.{index}"
        found = {field: f"{layer}.{module}.weight" for field, module in norms.items()}
        # The norms of heads are those of Qwen3 and Gemma 3, which always have them.
        if name in HEAD_NORMS:
            found |= {f"{kind}_norm": f"{layer}.self_attn.{kind}_norm.weight" for kind in "qk"}
        fields: dict[str, Any] = {field: _norm(checkpoint, tensor, name) for field, tensor in found.items()}
        if config.routing is not None and index not in config.routing.dense:
            fields["experts"] = read_experts(checkpoint, layer, config.routing, form, FAMILIES[name])
        yield DecoderLayer(**fields, **_projections(checkpoint, layer, config, form, FAMILIES[name].fused, fields))


def _norm(checkpoint: Checkpoint, tensor: str, name: str) -> np.ndarray:
    """The weight of a norm. Gemma's checkpoints store it less 1."""
    values = checkpoint.floats(tensor)
    return values + np.float32(1) if name == "gemma3_text" else values


def _projections(
    checkpoint: Checkpoint,
    layer: str,
    config: DecoderConfig,
    form: LayerFormat | None,
    fused: bool,
    others: Container[str],
) -> dict[str, Any]:
    """The linear layers besides experts. others: names of the layer's other parts."""
    if not fused:
        fields = [field for field in PROJECTIONS if "experts" not in others or field not in EXPERT]
        return {field: read_linear(checkpoint, f"{layer}.{PROJECTIONS[field]}", form) for field in fields}
    found: dict[str, Any] = {}
    for field in ("o_proj", "down_proj"):
        found[field] = read_linear(checkpoint, f"{layer}.{PROJECTIONS[field]}", form)
    shapes = config.projection_shapes()
    for parts, module in FUSED.items():
        found |= split_rows(read_linear(checkpoint, f"{layer}.{module}", form), parts, shapes, f"{layer}.{module}")
    return found
