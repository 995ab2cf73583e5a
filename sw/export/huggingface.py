# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder with quantized layers (Llama or Qwen2 family) as a decoder ONNX graph with its tokenizer.

SRC_DIR holds config.json, tokenizer.json and *.safetensors. DIR gets model.onnx, model.onnx.data, tokenizer.json and
config.json (shapes, stop tokens, chat template). The weights of quantized layers (see sw.checkpoints.packed.formats)
and of the embedding are exact. A float head becomes int8 (see sw.model.lm_head); if its original integers are in the
folder (see sw.checkpoints.integer_tables), it gets them.
"""

from collections.abc import Iterator
from pathlib import Path

from sw.checkpoints.huggingface import Settings, decoder_config, read_settings, rope_scaling, text_settings
from sw.checkpoints.integer_tables import integer_table
from sw.checkpoints.packed.formats import layer_format, quantization
from sw.checkpoints.packed.layers import PACKED, LayerFormat, read_linear
from sw.checkpoints.safetensors_file import Checkpoint
from sw.common.errors import UserError
from sw.common.status_line import Progress
from sw.export.folder import EXPORTER_VERSION, write_folder
from sw.export.hub import repository
from sw.model.decoder import PROJECTIONS, DecoderConfig, DecoderLayer
from sw.model.lm_head import Table
from sw.model.source import DecoderSource


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
    tied = settings.flag("tie_word_embeddings", False)
    return DecoderSource(
        name=repository(folder.resolve()) or folder.resolve().name,
        family=settings.get("model_type"),
        config=config,
        embedding=_table(checkpoint, settings, form, "model.embed_tokens.weight"),
        layers=_layers(checkpoint, config, form),
        final_norm=checkpoint.floats("model.norm.weight"),
        head=None if tied else _head(checkpoint, settings, form),
        tied=tied,
        rope_scaling=rope_scaling(settings),
        **vars(text_settings(folder, settings)),
    )


def _check_biases(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raises UserError for a bias that must not exist according to config.json: transformers would ignore it.

    A missing bias is no error: transformers makes it zero. A bias of zeros changes nothing.
    """
    llama = settings.get("model_type") == "llama"
    attention = settings.flag("attention_bias", False) if llama else None
    has = dict.fromkeys("qkv", attention is None or attention) | {"o": bool(attention)}
    allowed = {f"self_attn.{name}_proj": wanted for name, wanted in has.items()}
    mlp = llama and settings.flag("mlp_bias", False)
    allowed |= {f"mlp.{name}_proj": mlp for name in ("gate", "up", "down")}
    for layer, wanted in allowed.items():
        tensor = f"model.layers.0.{layer}.bias"
        if tensor in checkpoint and not wanted and checkpoint.floats(tensor).any():
            key = "mlp_bias" if layer.startswith("mlp") else "attention_bias"
            said = f"{key} is false in {settings.path.name}" if llama else f"{settings.get('model_type')} has none"
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


def _layers(checkpoint: Checkpoint, config: DecoderConfig, form: LayerFormat | None) -> Iterator[DecoderLayer]:
    for i in range(config.layer_count):
        layer = f"model.layers.{i}"
        yield DecoderLayer(
            input_norm=checkpoint.floats(f"{layer}.input_layernorm.weight"),
            post_attention_norm=checkpoint.floats(f"{layer}.post_attention_layernorm.weight"),
            **{name: read_linear(checkpoint, f"{layer}.{module}", form) for name, module in PROJECTIONS.items()},
        )
