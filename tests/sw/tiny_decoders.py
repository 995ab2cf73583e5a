# SPDX-License-Identifier: Apache-2.0
"""What the makers of the decoder models in tests/sw/data share: random weights, quantisation, clean files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.quant_utils import QuantFormat

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, CONTEXT = 64, 96, 2, 4, 2, 16, 128
VOCAB = 263
"""256 bytes, 4 merges and 3 control tokens; no multiple of anything."""
BLOCK = 32


@dataclass(frozen=True)
class Quantisation:
    """How float products become 4-bit ones.

    head: lm_head too. qdq: as DequantizeLinear -> MatMul, which needs opset 21, and not as MatMulNBits.
    """

    symmetric: bool
    head: bool = True
    qdq: bool = False
    accuracy_level: int | None = None


def configuration(family: str, **changes: Any) -> dict[str, Any]:
    """Hugging Face's configuration, without model_type. family: qwen2 or llama."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5 if family == "llama" else 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": VOCAB - 2,
        "pad_token_id": VOCAB - 1,
    }
    return values | changes


def linear_shapes(family: str, intermediate: int = INTERMEDIATE) -> Iterator[tuple[str, int, int, bool]]:
    """(name, N, K, whether it has a bias) of the linear layers of all blocks, as Hugging Face names them."""
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        for name, n in (("q", HIDDEN), ("k", KV_HEADS * HEAD_SIZE), ("v", KV_HEADS * HEAD_SIZE)):
            yield f"{block}.self_attn.{name}_proj", n, HIDDEN, family == "qwen2"
        yield f"{block}.self_attn.o_proj", HIDDEN, HIDDEN, False
        yield f"{block}.mlp.gate_proj", intermediate, HIDDEN, False
        yield f"{block}.mlp.up_proj", intermediate, HIDDEN, False
        yield f"{block}.mlp.down_proj", HIDDEN, intermediate, False


def random_weights(
    family: str, seed: int, *, tied: bool = False, plain_norms: bool = False, intermediate: int = INTERMEDIATE
) -> dict[str, np.ndarray]:
    """A state dict, float32: large enough weights that logits differ by several units.

    plain_norms: all ones, as before training: exporters then find equal tensors. Embeddings are multiples of 1/32,
    because a repository stores these in less.
    """
    rng = np.random.default_rng(seed)
    weights = {"model.embed_tokens.weight": np.clip(np.rint(rng.standard_normal((VOCAB, HIDDEN)) * 32), -127, 127) / 32}
    for name, n, k, has_bias in linear_shapes(family, intermediate):
        weights[f"{name}.weight"] = rng.standard_normal((n, k)) * 1.5 / np.sqrt(k)
        if has_bias:
            weights[f"{name}.bias"] = rng.standard_normal(n) / 2
    for name in norm_names():
        weights[name] = np.ones(HIDDEN) if plain_norms else rng.uniform(0.5, 1.5, HIDDEN)
    if not tied:
        weights["lm_head.weight"] = np.rint(rng.standard_normal((VOCAB, HIDDEN)) * 32) / 64
    return {name: values.astype(np.float32) for name, values in weights.items()}


def norm_names() -> list[str]:
    """All norms' weights; each is [HIDDEN]."""
    kinds = ("input_layernorm", "post_attention_layernorm")
    return [f"model.layers.{i}.{kind}.weight" for i in range(LAYERS) for kind in kinds] + ["model.norm.weight"]


def quantise(model: onnx.ModelProto, how: Quantisation) -> onnx.ModelProto:
    """onnxruntime's own quantiser, round to nearest, on every MatMul with a constant second operand."""
    heads = {tensor.name for tensor in model.graph.initializer if VOCAB in tensor.dims}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    quantizer = MatMulNBitsQuantizer(
        model,
        block_size=BLOCK,
        is_symmetric=how.symmetric,
        accuracy_level=how.accuracy_level,
        nodes_to_exclude=[] if how.head else [node.name for node in products if node.input[1] in heads],
        quant_format=QuantFormat.QDQ if how.qdq else QuantFormat.QOperator,
    )
    quantizer.process()
    made = quantizer.model
    return made if isinstance(made, onnx.ModelProto) else made.model


def save(model: onnx.ModelProto, path: Path) -> None:
    """One file without what exporters note about where they ran: paths, source lines, stack traces."""
    clean(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    print(f"{path}: {path.stat().st_size:,} bytes")


def clean(model: onnx.ModelProto) -> None:
    """Removes descriptions and notes of every part of a model."""
    for item in _parts(model):
        del item.metadata_props[:]
        item.doc_string = ""


def _parts(model: onnx.ModelProto) -> Iterable[Any]:
    yield model
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        yield graph
        yield from graph.value_info
        yield from graph.node
        if isinstance(graph, onnx.GraphProto):
            yield from [*graph.initializer, *graph.input, *graph.output]
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
