# SPDX-License-Identifier: Apache-2.0
"""Makes torch_*.onnx and transformers_*.onnx in tests/sw/data: small decoders with random weights.

    pip install torch==2.13.0 transformers==5.23.0 onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 onnxruntime==1.31.1
    python tests/sw/make_torch_models.py [--out tests/sw/data] [NAME ...]

Exporters: torch.onnx.export (dynamo=True; what TorchScript exports look like is in make_optimum_models.py), and the one
that transformers itself has since version 5. onnxruntime quantises what they write.
"""
# pyright: reportMissingImports=false

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from tiny_decoders import HEAD_SIZE, KV_HEADS, LAYERS, Quantisation, configuration, quantise, random_weights, save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.exporters import OnnxConfig, OnnxExporter

BATCH, TOKENS, PAST = 2, 3, 4
"""Sizes of the example inputs; all of them stay free in the exported graph."""
CACHE = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]


def make_model(family: str, seed: int, *, tied: bool = False) -> PreTrainedModel:
    """A Hugging Face model, float32. family: qwen2 (with biases on q, k and v) or llama."""
    make_config, make = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    model = make(make_config(**configuration(family, tie_word_embeddings=tied)))
    weights = random_weights(family, seed, tied=tied)
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and bool(missing) == tied
    return model.eval()


class Interleaved(torch.nn.Module):
    """The model with its cache as tensors: key and value of layer 0, of layer 1, ..."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        """Returns the logits and the cache."""
        return self.run(input_ids, attention_mask, position_ids, past)

    def run(self, input_ids, attention_mask, position_ids, past):
        """As forward."""
        cache = DynamicCache()
        for i in range(LAYERS):
            cache.update(past[2 * i], past[2 * i + 1], i)
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = result.past_key_values.layers
        return result.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


class IdsOnly(Interleaved):
    """No mask, no positions: every token is one, and they follow the past."""

    def forward(self, input_ids, *past):
        """Returns the logits and the cache."""
        return self.run(input_ids, None, None, past)


class KeysFirst(Interleaved):
    """The keys of all layers before all values, and a mask but no positions."""

    def forward(self, input_ids, attention_mask, key_cache, value_cache):
        """Returns the logits, the keys and the values."""
        past = [tensor for pair in zip(key_cache, value_cache) for tensor in pair]
        logits, *present = self.run(input_ids, attention_mask, None, past)
        return logits, present[::2], present[1::2]


def example_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Token ids, mask, positions and cache; the cache interleaved, [batch, KV heads, past, head size] each."""
    ids = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask = torch.ones(BATCH, PAST + TOKENS, dtype=torch.long)
    positions = torch.arange(PAST, PAST + TOKENS).expand(BATCH, TOKENS).contiguous()
    return ids, mask, positions, [torch.randn(BATCH, KV_HEADS, PAST, HEAD_SIZE) for _ in CACHE]


def export_named(model: PreTrainedModel, opset: int, ids_only: bool = False) -> onnx.ModelProto:
    """torch.onnx.export, inputs and outputs named as onnxruntime-genai and optimum name them."""
    ids, mask, positions, past = example_inputs()
    tokens, total = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}
    inputs = [("input_ids", ids, tokens)]
    if not ids_only:
        inputs += [("attention_mask", mask, total), ("position_ids", positions, tokens)]
    names, values, shapes = zip(*inputs)
    program = torch.onnx.export(
        (IdsOnly if ids_only else Interleaved)(model).eval(),
        (*values, *past),
        dynamo=True,
        opset_version=opset,
        input_names=[*names, *(f"past_key_values.{name}" for name in CACHE)],
        output_names=["logits", *(f"present.{name}" for name in CACHE)],
        dynamic_shapes=(*shapes, ({0: "batch_size", 2: "past_sequence_length"},) * len(CACHE)),
    )
    return program.model_proto


def export_unnamed(model: PreTrainedModel, opset: int) -> onnx.ModelProto:
    """torch.onnx.export with the names that it finds itself."""
    ids, mask, _, past = example_inputs()
    tokens, total = {0: "batch", 1: "tokens"}, {0: "batch", 1: "total"}
    cache = {0: "batch", 2: "past"}
    program = torch.onnx.export(
        KeysFirst(model).eval(),
        (ids, mask, past[::2], past[1::2]),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(tokens, total, [cache] * LAYERS, [cache] * LAYERS),
    )
    return program.model_proto


def export_transformers(model: PreTrainedModel, opset: int, fusions: str | None = None) -> onnx.ModelProto:
    """transformers' own exporter. fusions: cpu replaces parts by onnxruntime's operators."""
    ids, mask, _, past = example_inputs()
    cache = DynamicCache(config=model.config)
    for i in range(LAYERS):
        cache.update(past[2 * i], past[2 * i + 1], i)
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    config = OnnxConfig(dynamic=True, opset_version=opset, ort_fusions=fusions)
    with tempfile.TemporaryDirectory() as work:
        OnnxExporter().export(model, inputs, config).save_pretrained(work)
        return onnx.load(f"{work}/model.onnx")


MAKERS: dict[str, Callable[[], tuple[onnx.ModelProto, Quantisation]]] = {
    "torch_qwen2_opset18": lambda: (
        export_named(make_model("qwen2", 18), 18, ids_only=True),
        Quantisation(symmetric=True),
    ),
    "torch_llama_opset20": lambda: (
        export_unnamed(make_model("llama", 20, tied=True), 20),
        Quantisation(symmetric=False, head=False, accuracy_level=4),
    ),
    "torch_qwen2_opset21": lambda: (
        export_named(make_model("qwen2", 21), 21),
        Quantisation(symmetric=False, qdq=True),
    ),
    "torch_qwen2_opset23": lambda: (
        export_named(make_model("qwen2", 23), 23),
        Quantisation(symmetric=True, qdq=True),
    ),
    "transformers_qwen2": lambda: (
        export_transformers(make_model("qwen2", 5), 20),
        Quantisation(symmetric=False),
    ),
    "transformers_llama_fused": lambda: (
        export_transformers(make_model("llama", 6), 20, "cpu"),
        Quantisation(symmetric=True, accuracy_level=4),
    ),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="torch's and transformers' exports for the tests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)} (default: all)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.names or MAKERS:
        model, how = MAKERS[name]()
        save(quantise(model, how), options.out / f"{name}.onnx")


if __name__ == "__main__":
    main()
