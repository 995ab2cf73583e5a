# SPDX-License-Identifier: Apache-2.0
"""A GGUF model (Llama or Qwen2 family) as a decoder ONNX graph with its tokenizer.

    python -m sw.gguf_export SRC.gguf --out DIR

DIR gets model.onnx, model.onnx.data, tokenizer.json and config.json (shapes, stop tokens, chat template).
Quantised linear layers keep their weights exactly (see sw.gguf_reader); a quantised embedding becomes float32.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sw.atomic import atomic_directory
from sw.decoder_graph import DecoderConfig, DecoderLayer, Linear, write_decoder
from sw.errors import UserError, run_cli
from sw.gguf_reader import GgufFile
from sw.gguf_tokenizer import build_tokenizer, stop_tokens

# Part of the key of cached exports: raise it when the output changes.
EXPORTER_VERSION = 1
FAMILIES = ("llama", "qwen2")


def export_gguf(source: Path, out: Path) -> Path:
    """Exports `source` into directory `out`, complete or not at all, and returns the path of its model.onnx.

    Raises UserError for damaged files, other families, block formats without an exact MatMulNBits form (see
    sw.gguf_reader) and weights that do not fit the metadata.
    """
    model = GgufFile(source)
    config = decoder_config(model)
    tokenizer = build_tokenizer(model)
    metadata = {"source": Path(source).name, "exporter": f"gristmill gguf_export {EXPORTER_VERSION}"}
    head = model.linear("output") if "output.weight" in model else None
    with atomic_directory(out) as work:
        (work / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (work / "config.json").write_text(json.dumps(_config_json(model, config), indent=2) + "\n")
        write_decoder(
            work,
            config,
            model.float_tensor("token_embd.weight"),
            _layers(model, config),
            model.float_tensor("output_norm.weight"),
            head,
            metadata,
        )
    return Path(out) / "model.onnx"


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
    hidden, heads = model.meta(f"{family}.embedding_length"), model.meta(f"{family}.attention.head_count")
    head_size = int(model.meta(f"{family}.attention.key_length", hidden // heads))
    rotary = model.meta(f"{family}.rope.dimension_count", head_size)
    if rotary != head_size:
        raise UserError(f"{model.path}: rotary embedding over {rotary} of {head_size} elements is not supported")
    return DecoderConfig(
        hidden_size=int(hidden),
        intermediate_size=int(model.meta(f"{family}.feed_forward_length")),
        layer_count=int(model.meta(f"{family}.block_count")),
        head_count=int(heads),
        kv_head_count=int(model.meta(f"{family}.attention.head_count_kv", heads)),
        head_size=head_size,
        vocab_size=len(model.meta("tokenizer.ggml.tokens")),
        context_length=int(model.meta(f"{family}.context_length")),
        rope_theta=float(model.meta(f"{family}.rope.freq_base", 10000.0)),
        norm_epsilon=float(model.meta(f"{family}.attention.layer_norm_rms_epsilon")),
        rope_factors=model.float_tensor("rope_freqs.weight") if "rope_freqs.weight" in model else None,
    )


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


def _config_json(model: GgufFile, config: DecoderConfig) -> dict[str, Any]:
    """Hugging Face's keys, and the chat template, so that one file beside the graph says how to drive it."""
    return {
        "model_type": model.meta("general.architecture"),
        "name": model.meta("general.name", Path(model.path).stem),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layer_count,
        "num_attention_heads": config.head_count,
        "num_key_value_heads": config.kv_head_count,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": "output.weight" not in model,
        "bos_token_id": model.meta("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": stop_tokens(model),
        "chat_template": model.meta("tokenizer.chat_template", None),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sw.gguf_export", description="GGUF to a decoder ONNX graph")
    parser.add_argument("source", type=Path, metavar="SRC.gguf")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    print(export_gguf(options.source, options.out))


if __name__ == "__main__":
    run_cli(main)
