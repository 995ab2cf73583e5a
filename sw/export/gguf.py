# SPDX-License-Identifier: Apache-2.0
"""A GGUF model (in one file or several) as a decoder ONNX graph with its tokenizer.

DIR gets model.onnx, model.onnx.data, tokenizer.json and config.json (shapes, stop tokens, chat template).
The weights of quantized linear layers, including the head, are exact (see sw.checkpoints.gguf.layers); a float head
becomes int8 (see sw.model.lm_head). A quantized embedding is not changed if its format has no minimums (Q6_K, Q8_0 and
others); any other becomes float16 if this is exact, else float32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sw.checkpoints.gguf.experts import expert_tensors, family_of, read_experts, read_routing
from sw.checkpoints.gguf.families import FUSED, layer_tensors, logits_divisor, norm_tensors, with_architecture
from sw.checkpoints.gguf.keys import check_keys
from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.gguf.tokenizer import read_gguf_tokenizer
from sw.checkpoints.rotary import standard_rope_scaling
from sw.common.errors import UserError
from sw.common.status_line import Progress
from sw.export.folder import EXPORTER_VERSION, write_folder
from sw.model.decoder import MAX_POSITIONS, DecoderConfig, DecoderLayer, split_rows
from sw.model.families import ARCHITECTURES
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import Linear, Table
from sw.model.source import DecoderSource

FAMILIES = ARCHITECTURES
"""Supported values of general.architecture."""


def export_gguf(source: Path, out: Path, *, lm_head: str = "int8", progress: Progress | None = None) -> Path:
    """Exports `source` to directory `out` and returns the path of its model.onnx. After an error `out` is unchanged.

    lm_head: one of sw.model.lm_head.HEAD_MODES. progress: called with the layers that are done and all layers.
    Raises UserError for damaged files, other families, block formats that are not in sw.checkpoints.gguf.blocks, and
    weights that do not match the metadata.
    """
    metadata = {"source": Path(source).name, "exporter": f"gristmill gguf_export {EXPORTER_VERSION}"}
    return write_folder(out, gguf_source(GgufFile(source)), metadata, lm_head, progress)


def gguf_source(model: GgufFile) -> DecoderSource:
    """The file's decoder and text; its layers are read later. Raises UserError like export_gguf."""
    config = decoder_config(model)
    text = read_gguf_tokenizer(model)
    _expect_known_tensors(model, config)
    embedding, head = _tables(model)
    return DecoderSource(
        name=str(model.meta("general.name", model.path.stem)),
        family=family_of(model)[0],
        config=config,
        embedding=embedding,
        layers=_layers(model, config),
        final_norm=model.float_tensor("output_norm.weight") / np.float32(logits_divisor(model)),
        head=head,
        tied="output.weight" not in model,
        tokenizer_json=text.tokenizer.to_str(pretty=True),
        bos_id=text.bos_id,
        stop_ids=text.stop_ids,
        bos_token=text.text(text.bos_id),
        eos_token=text.text(text.stop_ids[0] if text.stop_ids else None),
        chat_template=model.meta("tokenizer.chat_template", None),
        rope_scaling=standard_rope_scaling(config),
        warnings=text.warnings,
    )


def decoder_config(model: GgufFile) -> DecoderConfig:
    """The shape in the metadata. Raises UserError for families and variants that the graph does not express."""
    check_keys(model, FAMILIES)
    family = model.meta("general.architecture")
    hidden, heads = model.integer(f"{family}.embedding_length"), model.integer(f"{family}.attention.head_count")
    head_size = model.integer(f"{family}.attention.key_length", hidden // max(heads, 1))
    value_size = model.integer(f"{family}.attention.value_length", head_size)
    if value_size != head_size:
        raise UserError(f"{model.path}: values of {value_size} elements beside keys of {head_size} are not supported")
    tokens = len(model.texts("tokenizer.ggml.tokens"))
    if model.integer(f"{family}.vocab_size", tokens) != tokens:
        problem = f"vocab_size is {model.integer(f'{family}.vocab_size')}, and the tokenizer has {tokens} tokens"
        raise UserError(f"{model.path}: {problem}")
    rotary = model.integer(f"{family}.rope.dimension_count", head_size)
    if rotary != head_size and (family != "phi3" or not 0 < rotary < head_size):
        raise UserError(f"{model.path}: rotary embedding over {rotary} of {head_size} elements is not supported")
    shape = DecoderConfig(
        hidden_size=hidden,
        intermediate_size=model.integer(f"{family}.feed_forward_length"),
        layer_count=model.integer(f"{family}.block_count"),
        head_count=heads,
        kv_head_count=model.integer(f"{family}.attention.head_count_kv", heads),
        head_size=head_size,
        vocab_size=tokens,
        context_length=min(model.integer(f"{family}.context_length"), MAX_POSITIONS),
        rope_theta=model.number(f"{family}.rope.freq_base", 10000.0),
        norm_epsilon=model.number(f"{family}.attention.layer_norm_rms_epsilon"),
        rope_factors=_rope_factors(model, family, rotary),
        rotary_size=0 if rotary == head_size else rotary,
        routing=read_routing(model),
    )
    return with_architecture(model, shape)


def _rope_factors(model: GgufFile, family: str, rotary: int) -> np.ndarray | None:
    """The divisors of the rotary frequencies: the file's table, times its linear scaling.

    As in llama.cpp, a factor without a type means linear scaling, and rope.scale_linear is its older name.
    """
    factors = model.float_tensor("rope_freqs.weight") if "rope_freqs.weight" in model else None
    kind = model.meta(f"{family}.rope.scaling.type", "linear")
    if family == "phi3" and kind == "longrope":
        # The tables are read with the architecture's own keys.
        return None
    if kind not in ("none", "linear"):
        raise UserError(f"{model.path}: rotary scaling {str(kind)[:80]!r} is not supported, only linear")
    factor = model.number(f"{family}.rope.scaling.factor", model.number(f"{family}.rope.scale_linear", 0.0))
    if kind == "none" or factor in (0.0, 1.0):
        return factors
    if not 0 < factor < np.inf:
        raise UserError(f"{model.path}: metadata {family}.rope.scaling.factor is a positive number, not {factor:g}")
    return np.float32(factor) * (np.ones(rotary // 2, np.float32) if factors is None else factors)


def _expect_known_tensors(model: GgufFile, config: DecoderConfig) -> None:
    """Raises UserError for a tensor that these families' graphs do not have; llama.cpp refuses such files, too."""
    architecture = model.meta("general.architecture")
    known = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
    if architecture == "phi3":
        known |= {"rope_factors_short.weight", "rope_factors_long.weight"}
    experts = set() if config.routing is None else set(expert_tensors(config.routing))
    layers, norms = layer_tensors(architecture), norm_tensors(architecture).values()
    for i in range(config.layer_count):
        # Each block may have a copy of the rotary factors; old converters also wrote rotary tables for each block.
        known |= {f"blk.{i}.{name}.weight" for name in (*norms, "rope_freqs")}
        known |= {f"blk.{i}.{name}.{part}" for name in layers for part in ("weight", "bias")}
        known |= {f"blk.{i}.{name}" for name in experts}
        known.add(f"blk.{i}.attn_rot_embd")
    if unknown := sorted(set(model.tensors) - known):
        raise UserError(f"{model.path}: tensor {unknown[0]} does not belong to a {config.layer_count}-block model")


def _tables(model: GgufFile) -> tuple[Table, Table | None]:
    """Embedding and head; the head is None if the embedding is also the head."""
    embedding = model.table("token_embd")
    head = model.table("output") if "output.weight" in model else None
    if isinstance(embedding, QuantizedLinear) and not embedding.has_integer_zero_points:
        # Rows can be gathered from Q8_0 and Q6_K, but only MatMulNBits supports the float zero points of Q4_K.
        return model.float_tensor("token_embd.weight"), embedding if head is None else head
    return embedding, head


def _layers(model: GgufFile, config: DecoderConfig) -> Iterator[DecoderLayer]:
    architecture = model.meta("general.architecture")
    # ggml's Llama graphs rotate neighbouring elements, so the rows of q and k are reordered in their files.
    # Other graphs rotate the halves of a head, like Hugging Face and onnxruntime.
    _, family = family_of(model)

    def rotated(name: str, heads: int) -> Linear:
        layer = model.linear(name)
        if family.neighbours and layer.n == heads * config.head_size:
            rows = np.arange(layer.n).reshape(heads, config.head_size // 2, 2).swapaxes(1, 2)
            layer = layer.with_rows(rows.reshape(-1))
        return layer

    def projections(block: str) -> dict[str, Any]:
        found: dict[str, Any] = {"o_proj": model.linear(f"{block}.attn_output")}
        if config.routing is None:
            found["down_proj"] = model.linear(f"{block}.ffn_down")
        if family.fused:
            shapes = config.projection_shapes()
            for parts, name in FUSED.items():
                found |= split_rows(model.linear(f"{block}.{name}"), parts, shapes, f"{block}.{name}")
            return found
        found |= {
            "q_proj": rotated(f"{block}.attn_q", config.head_count),
            "k_proj": rotated(f"{block}.attn_k", config.kv_head_count),
            "v_proj": model.linear(f"{block}.attn_v"),
        }
        if config.routing is not None:
            return found | {"experts": read_experts(model, block, config.routing)}
        return found | {
            "gate_proj": model.linear(f"{block}.ffn_gate"),
            "up_proj": model.linear(f"{block}.ffn_up"),
        }

    for i in range(config.layer_count):
        block = f"blk.{i}"
        norms: dict[str, Any] = {
            name: model.float_tensor(f"{block}.{tensor}.weight") for name, tensor in norm_tensors(architecture).items()
        }
        yield DecoderLayer(**norms, **projections(block))
