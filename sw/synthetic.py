# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a real model's exact shape with random weights, where the real one could not be obtained.

    python -m sw.synthetic --out DIR [--float [--dtype BF16|F16|F32]] [--seed N]

writes a checkpoint with the shape of Qwen/Qwen2.5-0.5B-Instruct-AWQ, which is in AutoAWQ's GEMM format, or with --float
the shape of its float model, Qwen/Qwen2.5-0.5B-Instruct. Every tensor has the real one's name, type and layout. The
weights are chosen so that activations neither overflow nor vanish. The model's text is noise; it serves for
measurements only. Its tokenizer has the 256 bytes and three special tokens, whose ids are the real ones.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from sw.checkpoints.autoawq import BITS, MIDDLE, pack_words
from sw.checkpoints.safetensors_file import INDEX, NewTensor, write_safetensors
from sw.common.atomic import atomic_directory
from sw.common.command_line import Parser
from sw.common.errors import UserError, run_cli
from sw.common.status_line import Progress, StatusLine

# config.json of Qwen/Qwen2.5-0.5B-Instruct-AWQ, as far as it concerns the model.
QWEN2_5_0_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "quantization_config": {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# config.json of Qwen/Qwen2.5-0.5B-Instruct.
QWEN2_5_0_5B_FLOAT = {key: value for key, value in QWEN2_5_0_5B.items() if key != "quantization_config"}
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPREAD = ((1 << 2 * BITS) - 1) ** 0.5 / 12**0.5
"""Standard deviation of uniform 4-bit numbers."""
EMBEDDING_SCALE = 0.1
BIAS_SCALE = 0.25
ATTENTION_SCALE = 0.25
"""Scale of attention's output. Attention averages over tokens; a larger scale would make all tokens nearly equal."""
ROWS_AT_ONCE = 8192


def write_qwen2_awq(folder: Path, *, seed: int = 0, progress: Progress | None = None) -> None:
    """Writes the shape of Qwen2.5-0.5B-Instruct-AWQ into `folder`, complete or not at all: 458 MB.

    progress: called with tensors done, and tensors in all. Raises UserError if the folder cannot be written.
    """
    write_autoawq(folder, QWEN2_5_0_5B, seed=seed, progress=progress)


def write_qwen2_float(folder: Path, *, seed: int = 0, dtype: str = "BF16", progress: Progress | None = None) -> None:
    """Writes the shape of Qwen2.5-0.5B-Instruct into `folder`, complete or not at all: 988 MB in BF16 or F16.

    dtype: BF16, F16 or F32. progress and errors: as for write_qwen2_awq.
    """
    write_float(folder, QWEN2_5_0_5B_FLOAT, seed=seed, dtype=dtype, progress=progress)


def write_float(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str = "BF16",
    shards: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes a float checkpoint into `folder`, complete or not at all.

    config: as for write_autoawq, but its quantization_config is left out and its torch_dtype is replaced. dtype:
    BF16, F16 or F32, for all tensors. shards, progress and errors: as for write_autoawq.
    """
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    values["torch_dtype"] = TORCH_DTYPES[dtype]
    _write(folder, values, seed, dtype, shards, progress)


def write_autoawq(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str = "F16",
    shards: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes an AutoAWQ GEMM checkpoint into `folder`, complete or not at all.

    config: its config.json, a Llama or Qwen2 model's, with quantization_config and plain whole numbers; eos_token_id is
    bos_token_id + 2. dtype: F16, BF16 or F32, for all tensors but integers and scales. shards: number of files.
    progress: as for write_qwen2_awq. Raises UserError if the folder cannot be written.
    """
    _write(folder, config, seed, dtype, shards, progress)


def _write(
    folder: Path, config: Mapping[str, Any], seed: int, dtype: str, shards: int, progress: Progress | None
) -> None:
    rng = np.random.default_rng(seed)
    tensors = list(_tensors(config, dtype, rng))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(tensors))

    with atomic_directory(folder) as work:
        _write_json(work / "config.json", dict(config))
        _write_text_files(work, config)
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        if shards == 1:
            names = ["model.safetensors"]
        weight_map = {}
        for i, name in enumerate(names):
            part = tensors[i * len(tensors) // shards : (i + 1) * len(tensors) // shards]
            write_safetensors(work / name, part, advance)
            weight_map |= {tensor.name: name for tensor in part}
        if shards > 1:
            size = sum(tensor.size for tensor in tensors)
            _write_json(work / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _tensors(config: Mapping[str, Any], dtype: str, rng: np.random.Generator) -> Iterator[NewTensor]:
    hidden, ffn, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = config.get("head_dim") or hidden // heads
    q_size, kv_size = heads * head, config["num_key_value_heads"] * head
    quantization = config.get("quantization_config")
    group = 0 if quantization is None else quantization["group_size"]
    biased = config["model_type"] == "qwen2"

    def normal(name: str, shape: tuple[int, ...], mean: float, scale: float) -> NewTensor:
        def parts() -> Iterator[np.ndarray]:
            for start in range(0, shape[0], ROWS_AT_ONCE):
                rows = min(ROWS_AT_ONCE, shape[0] - start)
                values = mean + np.float32(scale) * rng.standard_normal((rows, *shape[1:]), np.float32)
                yield encode(values, dtype)

        return NewTensor(name, dtype, shape, parts)

    def linear(name: str, k: int, n: int, bias: bool = False, scale: float = 1.0) -> Iterator[NewTensor]:
        if quantization is None:
            yield normal(f"{name}.weight", (n, k), 0, scale / k**0.5)
            if bias:
                yield normal(f"{name}.bias", (n,), 0, BIAS_SCALE)
            return
        groups = 1 if group == -1 else k // group

        def weights() -> Iterator[np.ndarray]:
            yield rng.integers(0, 1 << 32, (k, n // 8), np.uint32)

        def zero_points() -> Iterator[np.ndarray]:
            # 7 and 8 in equal numbers: if the mean of the weights is not zero, the mean of the activations overflows.
            yield pack_words(rng.integers(MIDDLE - 1, MIDDLE + 1, (n, groups)).astype(np.uint8))

        def scales() -> Iterator[np.ndarray]:
            yield (scale * rng.uniform(0.8, 1.2, (groups, n)) / (SPREAD * k**0.5)).astype(np.float16)

        yield NewTensor(f"{name}.qweight", "I32", (k, n // 8), weights)
        yield NewTensor(f"{name}.qzeros", "I32", (groups, n // 8), zero_points)
        yield NewTensor(f"{name}.scales", "F16", (groups, n), scales)
        if bias:
            yield normal(f"{name}.bias", (n,), 0, BIAS_SCALE)

    yield normal("model.embed_tokens.weight", (config["vocab_size"], hidden), 0, EMBEDDING_SCALE)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield normal(f"{layer}.input_layernorm.weight", (hidden,), 1, 0.1)
        yield from linear(f"{layer}.self_attn.q_proj", hidden, q_size, biased)
        yield from linear(f"{layer}.self_attn.k_proj", hidden, kv_size, biased)
        yield from linear(f"{layer}.self_attn.v_proj", hidden, kv_size, biased)
        yield from linear(f"{layer}.self_attn.o_proj", q_size, hidden, scale=ATTENTION_SCALE)
        yield normal(f"{layer}.post_attention_layernorm.weight", (hidden,), 1, 0.1)
        yield from linear(f"{layer}.mlp.gate_proj", hidden, ffn)
        yield from linear(f"{layer}.mlp.up_proj", hidden, ffn)
        yield from linear(f"{layer}.mlp.down_proj", ffn, hidden)
    yield normal("model.norm.weight", (hidden,), 1, 0.1)
    if not config.get("tie_word_embeddings", False):
        yield normal("lm_head.weight", (config["vocab_size"], hidden), 0, EMBEDDING_SCALE)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in a safetensors dtype: F16, F32, or BF16 as uint16 (finite values, to nearest even)."""
    if dtype != "BF16":
        return values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def _write_text_files(folder: Path, config: Mapping[str, Any]) -> None:
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    special = {"<|endoftext|>": bos, "<|im_start|>": bos + 1, "<|im_end|>": eos}
    # GPT-2's order of the bytes is the order of the characters that stand for them.
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in special.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**vocab, **special}, "merges": []},
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": [eos, bos]})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m sw.synthetic", description="Qwen2.5-0.5B-Instruct's shape, random weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--float", action="store_true", help="not quantized (default: AutoAWQ GEMM)")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, help="type of the weights, with --float (default: BF16)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    if options.seed < 0:
        raise UserError(f"--seed is 0 or more, not {options.seed}")
    if options.dtype and not options.float:
        raise UserError(f"--dtype {options.dtype} needs --float: the AutoAWQ checkpoint has the real one's types")
    with StatusLine() as status:

        def show(done: int, total: int) -> None:
            status.count("writing tensor {done} of {total}", done, total)

        if options.float:
            write_qwen2_float(options.out, seed=options.seed, dtype=options.dtype or "BF16", progress=show)
        else:
            write_qwen2_awq(options.out, seed=options.seed, progress=show)
    print(options.out)


if __name__ == "__main__":
    run_cli(main)
