# SPDX-License-Identifier: Apache-2.0
"""Small AutoAWQ checkpoints, and what must come of them: an element-wise reader and a decoder in plain numpy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sw.decoder_graph import DecoderConfig
from sw.synthetic import QWEN2_5_0_5B, write_autoawq

QWEN2: dict[str, Any] = QWEN2_5_0_5B | {
    "bos_token_id": 256,
    "eos_token_id": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 264,
    "quantization_config": QWEN2_5_0_5B["quantization_config"] | {"group_size": 32},
}
LLAMA: dict[str, Any] = QWEN2 | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
IDS = [72, 101, 108, 108, 111, 257, 3]
# Nibble -> column within a word, as AutoAWQ's gemm.py has it.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_config(base: Mapping[str, Any] = QWEN2, quantization: Mapping[str, Any] | None = None, **changes: Any) -> dict:
    """A config.json with other values; those of quantization_config by themselves."""
    return {**base, "quantization_config": {**base["quantization_config"], **(quantization or {})}, **changes}


def make_checkpoint(folder: Path, config: Mapping[str, Any] = QWEN2, **options: Any) -> dict[str, np.ndarray]:
    """Writes a checkpoint; returns its tensors as they are in the files, see read_tensors."""
    write_autoawq(folder, config, seed=5, **options)
    return read_tensors(folder)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, BF16 as float32, by the format's description and without the product's reader."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                kind = {"I32": "<i4", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
                values = np.frombuffer(data[begin:end], kind).reshape(entry["shape"])
                if entry["dtype"] == "BF16":
                    values = (values.astype("<u4") * np.uint32(65536)).view("<f4")
                tensors[name] = values
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of I32, F16 and F32 tensors."""
    header, data = {}, b""
    for name, values in tensors.items():
        kind = {"i": "I32", "f": f"F{8 * values.itemsize}"}[values.dtype.kind]
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": offsets}
        data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def nibble(words: np.ndarray, row: int, column: int) -> int:
    """The 4-bit value of one row and one output column."""
    word = int(words[row, column // 8]) % (1 << 32)
    return word >> 4 * ORDER.index(column % 8) & 15


def slow_linear(tensors: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q [N, K], zero points [N, G], scales [N, G]), element by element. Without qzeros every zero point is 8."""
    qweight, scales, qzeros = (tensors.get(f"{name}.{part}") for part in ("qweight", "scales", "qzeros"))
    assert qweight is not None
    assert scales is not None
    (k, n), groups = (len(qweight), 8 * qweight.shape[1]), len(scales)
    q = [[nibble(qweight, row, column) for row in range(k)] for column in range(n)]
    zero_points = [[8 if qzeros is None else nibble(qzeros, g, column) for g in range(groups)] for column in range(n)]
    return np.array(q), np.array(zero_points), scales.T.astype(np.float32)


def float_tensors(tensors: Mapping[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The checkpoint with every quantised layer as `name`.weight, float64 [N, K]."""
    result = {name: values for name, values in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name in (f"model.layers.{i}.{linear}" for i in range(layers) for linear in LINEARS):
        if f"{name}.qweight" in tensors:
            q, zero_points, scales = slow_linear(tensors, name)
            size = q.shape[1] // scales.shape[1]
            steps = q - np.repeat(zero_points, size, axis=1).astype(np.float64)
            result[f"{name}.weight"] = steps * np.repeat(scales, size, axis=1)
    return result


def reference_logits(
    tensors: Mapping[str, np.ndarray],
    config: DecoderConfig,
    ids: Sequence[int],
    *,
    neighbours: bool = False,
    frequencies: np.ndarray | None = None,
) -> np.ndarray:
    """The decoder in float64: [len(ids), vocab]. Tensors have Hugging Face's names; without lm_head it is tied.

    neighbours: rotate neighbouring elements, as ggml does for Llama, and not the halves of a head. frequencies:
    float64 [head_size / 2], the rotary ones if they are scaled.
    """
    size, theta = config.head_size, config.rope_theta
    if frequencies is None:
        frequencies = theta ** (-np.arange(0, size, 2) / size)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon) * tensors[f"{name}.weight"]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors.get(f"{name}.bias", 0)

    def rotate(x):
        angles = np.outer(np.arange(len(ids)), frequencies)[:, None, :]
        first, second = slice(0, size // 2), slice(size // 2, size)
        if neighbours:
            first, second = slice(0, size, 2), slice(1, size, 2)
        a, b = x[..., first], x[..., second]
        y = np.empty_like(x)
        y[..., first] = a * np.cos(angles) - b * np.sin(angles)
        y[..., second] = a * np.sin(angles) + b * np.cos(angles)
        return y

    x = tensors["model.embed_tokens.weight"][list(ids)].astype(np.float64)
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    repeats = config.head_count // config.kv_head_count
    for i in range(config.layer_count):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{name}_proj").reshape(len(ids), -1, size) for name in "qkv")
        q, k = rotate(q), np.repeat(rotate(k), repeats, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size) + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hij,jhd->ihd", weights, np.repeat(v, repeats, axis=1))
        x = x + linear(attended.reshape(len(ids), -1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    h = norm(x, "model.norm")
    return linear(h, "lm_head" if "lm_head.weight" in tensors else "model.embed_tokens")


def step(session, ids: Sequence[int], past: dict, total: int) -> tuple[np.ndarray, dict]:
    """One call of an exported decoder: (logits [len(ids), vocab], the cache for the next call)."""
    names = [output.name for output in session.get_outputs()]
    feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}
    outputs = dict(zip(names, session.run(None, feeds | past), strict=True))
    past = {name.replace("present", "past_key_values"): values for name, values in outputs.items() if name != "logits"}
    return outputs["logits"][0], past


def empty_cache(session) -> dict[str, np.ndarray]:
    """The past_key_values.* of a sequence's first call."""
    inputs = [item for item in session.get_inputs() if item.name.startswith("past_key_values.")]
    return {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in inputs}


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """max|values - expected| / max|expected|."""
    return float(np.abs(values - expected).max() / np.abs(expected).max())
