# SPDX-License-Identifier: Apache-2.0
"""A GGUF model (Llama or Qwen2 family) as a decoder ONNX graph with its tokenizer.

DIR gets model.onnx, model.onnx.data, tokenizer.json and config.json (shapes, stop tokens, chat template).
Quantised linear layers keep their weights exactly (see sw.checkpoints.gguf_reader), the head included; a head in any
other format becomes int8 (see sw.model.lm_head). An embedding in Q8_0 or Q4_0 stays as it is; others become float16
where that is exact, else float32.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sw.checkpoints.gguf_reader import GgufFile
from sw.checkpoints.gguf_tokenizer import build_tokenizer, special_token, stop_tokens
from sw.checkpoints.huggingface import standard_rope_scaling
from sw.common.errors import UserError
from sw.common.status_line import Progress
from sw.export.folder import EXPORTER_VERSION, write_folder
from sw.model.decoder import MAX_POSITIONS, DecoderConfig, DecoderLayer
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import Linear, Table
from sw.model.source import DecoderSource

FAMILIES = ("llama", "qwen2")


def export_gguf(source: Path, out: Path, *, lm_head: str = "int8", progress: Progress | None = None) -> Path:
    """Exports `source` into directory `out`, complete or not at all, and returns the path of its model.onnx.

    lm_head: one of sw.model.lm_head.HEAD_MODES. progress: called with layers done, and layers in all.
    Raises UserError for damaged files, other families, block formats without an exact MatMulNBits form (see
    sw.checkpoints.gguf_reader) and weights that do not fit the metadata.
    """
    metadata = {"source": Path(source).name, "exporter": f"gristmill gguf_export {EXPORTER_VERSION}"}
    return write_folder(out, gguf_source(GgufFile(source)), metadata, lm_head, progress)


def gguf_source(model: GgufFile) -> DecoderSource:
    """The file's decoder and text, its layers still to be read. Raises UserError as export_gguf does."""
    config = decoder_config(model)
    tokenizer = build_tokenizer(model)
    embedding, head = _tables(model)
    stop_ids = stop_tokens(model)
    bos_id = model.integer("tokenizer.ggml.bos_token_id", None)
    return DecoderSource(
        name=str(model.meta("general.name", model.path.stem)),
        family=model.meta("general.architecture"),
        config=config,
        embedding=embedding,
        layers=_layers(model, config),
        final_norm=model.float_tensor("output_norm.weight"),
        head=head,
        tied="output.weight" not in model,
        tokenizer_json=tokenizer.to_str(pretty=True),
        bos_id=bos_id,
        stop_ids=stop_ids,
        bos_token=special_token(model, bos_id),
        eos_token=special_token(model, stop_ids[0] if stop_ids else None),
        chat_template=model.meta("tokenizer.chat_template", None),
        rope_scaling=standard_rope_scaling(config),
    )


def decoder_config(model: GgufFile) -> DecoderConfig:
    """The shape in the metadata. Raises UserError for families and variants that the graph does not express."""
    family = model.meta("general.architecture")
    if family not in FAMILIES:
        raise UserError(f"{model.path}: architecture {family!r} is not supported ({', '.join(FAMILIES)} are)")
    if model.meta(f"{family}.expert_count", 0):
        raise UserError(f"{model.path}: mixture-of-experts models are not supported")
    scaling = model.meta(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(f"{model.path}: rotary scaling {scaling!r} is not supported")
    hidden, heads = model.integer(f"{family}.embedding_length"), model.integer(f"{family}.attention.head_count")
    head_size = model.integer(f"{family}.attention.key_length", hidden // max(heads, 1))
    rotary = model.integer(f"{family}.rope.dimension_count", head_size)
    if rotary != head_size:
        raise UserError(f"{model.path}: rotary embedding over {rotary} of {head_size} elements is not supported")
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=model.integer(f"{family}.feed_forward_length"),
        layer_count=model.integer(f"{family}.block_count"),
        head_count=heads,
        kv_head_count=model.integer(f"{family}.attention.head_count_kv", heads),
        head_size=head_size,
        vocab_size=len(model.texts("tokenizer.ggml.tokens")),
        context_length=min(model.integer(f"{family}.context_length"), MAX_POSITIONS),
        rope_theta=model.number(f"{family}.rope.freq_base", 10000.0),
        norm_epsilon=model.number(f"{family}.attention.layer_norm_rms_epsilon"),
        rope_factors=model.float_tensor("rope_freqs.weight") if "rope_freqs.weight" in model else None,
    )


def _tables(model: GgufFile) -> tuple[Table, Table | None]:
    """Embedding and head; no head where the embedding serves as one."""
    embedding = model.table("token_embd")
    head = model.table("output") if "output.weight" in model else None
    if isinstance(embedding, QuantizedLinear) and not embedding.has_integer_zero_points:
        # Rows can be gathered from Q8_0 and Q4_0; Q4_1's float zero points are known to MatMulNBits alone.
        return model.float_tensor("token_embd.weight"), embedding if head is None else head
    return embedding, head


def _layers(model: GgufFile, config: DecoderConfig) -> Iterator[DecoderLayer]:
    # ggml's Llama graphs rotate neighbouring elements and their files carry q and k reordered to suit;
    # Qwen2 graphs rotate the halves of a head, like Hugging Face and onnxruntime.
    reordered = model.meta("general.architecture") == "llama"

    def rotated(name: str, heads: int) -> Linear:
        layer = model.linear(name)
        if reordered and layer.n == heads * config.head_size:
            rows = np.arange(layer.n).reshape(heads, config.head_size // 2, 2).swapaxes(1, 2)
            layer = layer.with_rows(rows.reshape(-1))
        return layer

    for i in range(config.layer_count):
        block = f"blk.{i}"
        yield DecoderLayer(
            input_norm=model.float_tensor(f"{block}.attn_norm.weight"),
            q_proj=rotated(f"{block}.attn_q", config.head_count),
            k_proj=rotated(f"{block}.attn_k", config.kv_head_count),
            v_proj=model.linear(f"{block}.attn_v"),
            o_proj=model.linear(f"{block}.attn_output"),
            post_attention_norm=model.float_tensor(f"{block}.ffn_norm.weight"),
            gate_proj=model.linear(f"{block}.ffn_gate"),
            up_proj=model.linear(f"{block}.ffn_up"),
            down_proj=model.linear(f"{block}.ffn_down"),
        )
