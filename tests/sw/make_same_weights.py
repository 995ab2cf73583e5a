# SPDX-License-Identifier: Apache-2.0
"""Makes tests/sw/data/same_weights: one small Qwen2 with 4-bit weights as three kinds of checkpoint.

    pip install torch==2.13.0 transformers==5.23.0 onnxruntime-genai==0.18.0 onnx-ir==1.1.0 onnx==1.23.2 \\
        onnxruntime==1.31.1 gguf==0.19.0
    python tests/sw/make_same_weights.py [--out tests/sw/data/same_weights]

    autoawq/     AutoAWQ GEMM, https://github.com/casper-hansen/AutoAWQ/blob/main/awq/modules/linear/gemm.py:
                 qweight int32 [K, N/8], qzeros int32 [K/G, N/8], scales float16 [K/G, N]
    genai/       autoawq/ through onnxruntime-genai's model builder, its lm_head float
    model.gguf   Q4_0: blocks of d:f16 and 16 bytes, their low nibbles elements 0-15, w = d * (q - 8)
    greedy.json  what transformers computes of these weights, float32: prompts, token ids, and how clear they are

All zero points are 8 and all scales float16, which both formats hold; the group size is 32. The head is on an int8
grid that rounding to nearest finds again: w = i * 2^-8 with some |i| = 127 in each group of 32, so that max|w| / 127
is 2^-8 in groups of any size.
"""
# pyright: reportMissingImports=false

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import onnx
import torch
from safetensors.numpy import save_file
from tiny_decoders import (
    BLOCK,
    CONTEXT,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    VOCAB,
    clean,
    configuration,
    linear_shapes,
    norm_names,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import Qwen2Config, Qwen2ForCausalLM

SEED = 8360
"""Chosen for its margin (see greedy) of 0.12 or more with both prompts, and for varied text."""
NEW_TOKENS = 32
PROMPTS = {"chat": "Hello!", "raw": "Time and tide"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of an int32, the lowest first."""
MERGES = (("t", "h"), ("i", "n"), ("e", "r"), ("th", "er"))
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Quantised:
    """w = (q - 8) * d: q uint8 [N, K], d float16 [N, K / BLOCK]."""

    q: np.ndarray
    d: np.ndarray

    def values(self) -> np.ndarray:
        """float32 [N, K]."""
        return (self.q.astype(np.float32) - 8) * self.d.astype(np.float32).repeat(BLOCK, axis=1)


Weights = dict[str, "Quantised | np.ndarray"]


def make_weights(seed: int) -> Weights:
    """By Hugging Face's names; all but the linear layers of the blocks is float16."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, n, k, has_bias in linear_shapes("qwen2"):
        q = np.clip(np.rint(rng.standard_normal((n, k)) * 3 + 8), 0, 15).astype(np.uint8)
        d = rng.uniform(0.3, 0.7, (n, k // BLOCK)) / np.sqrt(k)
        weights[f"{name}.weight"] = Quantised(q, d.astype(np.float16))
        if has_bias:
            weights[f"{name}.bias"] = (rng.standard_normal(n) / 2).astype(np.float16)
    for name in norm_names():
        weights[name] = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float16)
    embedding = np.clip(np.rint(rng.standard_normal((VOCAB, HIDDEN)) * 32), -127, 127) / 32
    weights["model.embed_tokens.weight"] = embedding.astype(np.float16)
    # Large rows for tokens that are printable: then the greedy text is, mostly, and does not end.
    printable = np.isin(np.arange(VOCAB), [*range(32, 127), *range(256, 256 + len(MERGES))])
    head = np.rint(rng.standard_normal((VOCAB, HIDDEN)) * np.where(printable, 60, 12)[:, None]).clip(-127, 127)
    peaks = rng.integers(0, BLOCK, (VOCAB, HIDDEN // BLOCK)) + np.arange(0, HIDDEN, BLOCK)
    np.put_along_axis(head, peaks, rng.choice([-127, 127], peaks.shape), axis=1)
    weights["lm_head.weight"] = (head / 256).astype(np.float16)
    return weights


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE as Qwen2's: token i is byte i, then the merges, then the control tokens."""
    alphabet = byte_letters()
    tokens = [*alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(MERGES)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in CONTROL])
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte, as in GPT-2."""
    letters, spare = [], 256
    for byte in range(256):
        visible = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        letters.append(chr(byte if visible else spare))
        spare += not visible
    return letters


def write_autoawq(folder: Path, weights: Weights) -> None:
    """The files of an AutoAWQ checkpoint: config, tokenizer, and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for name, values in weights.items():
        if isinstance(values, Quantised):
            layer = name.removesuffix(".weight")
            scales = np.ascontiguousarray(values.d.T)
            tensors[f"{layer}.qweight"] = pack_awq(values.q.T)
            tensors[f"{layer}.qzeros"] = pack_awq(np.full(scales.shape, 8, np.uint8))
            tensors[f"{layer}.scales"] = scales
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    awq = {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "zero_point": True, "version": "gemm"}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **configuration("qwen2"),
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "torch_dtype": "float16",
        "quantization_config": awq | {"modules_to_not_convert": None},
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": VOCAB - 2, "pad_token_id": VOCAB - 1})
    make_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": CONTROL[1],
        "pad_token": CONTROL[2],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def pack_awq(values: np.ndarray) -> np.ndarray:
    """uint8 [rows, N] of 4 bits as int32 [rows, N / 8]."""
    columns = values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    # safetensors writes memory as it lies, whatever the strides say.
    return np.ascontiguousarray(np.bitwise_or.reduce(columns << shifts, axis=2)).view(np.int32)


def write_gguf(path: Path, weights: Weights) -> None:
    """Q4_0 for the linear layers of the blocks, F16 for embedding and head, F32 for the rest."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("same weights")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(configuration("qwen2")["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    kinds = [gguf.TokenType.NORMAL] * (VOCAB - len(CONTROL)) + [gguf.TokenType.CONTROL] * len(CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*byte_letters(), *("".join(pair) for pair in MERGES), *CONTROL])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(VOCAB - 2)
    writer.add_pad_token_id(VOCAB - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, values in weights.items():
        if isinstance(values, Quantised):
            writer.add_tensor(gguf_name(name), q4_0(values), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(gguf_name(name), values if values.ndim == 2 else values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer, _, kind = name.rpartition(".")
    if layer in top:
        return f"{top[layer]}.{kind}"
    _, _, index, part = layer.split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[part]}.{kind}"


def q4_0(layer: Quantised) -> np.ndarray:
    """uint8 [N, K / 32 * 18]."""
    q = layer.q.reshape(*layer.d.shape, 2, BLOCK // 2)
    nibbles = q[:, :, 0] | q[:, :, 1] << 4
    return np.concatenate([layer.d[:, :, None].view(np.uint8), nibbles], axis=2).reshape(len(q), -1)


def write_genai(folder: Path, source: Path) -> None:
    """Runs the builder; what it notes about this machine is removed."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
        command += ["-p", "int4", "-e", "cpu", "-c", cache, "--extra_options", "nodes_to_exclude=/lm_head/MatMul"]
        subprocess.run(command, check=True)
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    clean(model)
    path.write_bytes(model.SerializeToString())


def greedy(weights: Weights, prompt: list[int]) -> tuple[list[int], float]:
    """The likeliest tokens after a prompt, and the least distance of a likeliest logit to the next one, in standard
    deviations of the logits.
    """
    model = Qwen2ForCausalLM(Qwen2Config(**configuration("qwen2"))).eval()
    state = {name: v.values() if isinstance(v, Quantised) else v.astype(np.float32) for name, v in weights.items()}
    model.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    ids, margin, past = list(prompt), np.inf, None
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            result = model(torch.tensor([ids if past is None else ids[-1:]]), past_key_values=past, use_cache=True)
            past, logits = result.past_key_values, result.logits[0, -1]
            best = torch.topk(logits, 2)
            margin = min(margin, float((best.values[0] - best.values[1]) / logits.std()))
            ids.append(int(best.indices[0]))
    return ids[len(prompt) :], margin


def prompt_text(kind: str) -> str:
    """What the tokenizer gets for a prompt: the chat template's text, or the prompt itself."""
    text = PROMPTS[kind]
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if kind == "chat" else text


def write_json(path: Path, values: object) -> None:
    """Indented."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="three checkpoints with the same weights, for the tests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / "same_weights")
    out = parser.parse_args().out
    weights, tokenizer = make_weights(SEED), make_tokenizer()
    write_autoawq(out / "autoawq", weights)
    write_gguf(out / "model.gguf", weights)
    write_genai(out / "genai", out / "autoawq")
    answers = {}
    for kind, prompt in PROMPTS.items():
        ids = tokenizer.encode(prompt_text(kind), add_special_tokens=False).ids
        made, margin = greedy(weights, ids)
        text = tokenizer.decode(made)
        answers[kind] = {"prompt": prompt, "prompt_ids": ids, "ids": made, "text": text, "margin": round(margin, 4)}
        print(f"{kind}: {text!r}, margin {margin:.3f}")
    write_json(out / "greedy.json", answers)


if __name__ == "__main__":
    main()
