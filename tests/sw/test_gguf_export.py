# SPDX-License-Identifier: Apache-2.0
"""GGUF exports: exact weights for every block format, and graphs that compute what a plain numpy decoder computes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import gguf.vocab
import numpy as np
import onnxruntime
import pytest

from sw.errors import UserError
from sw.gguf_export import export_gguf
from sw.gguf_reader import GgufFile, decode_blocks
from sw.linear import QuantizedLinear
from sw.models import resolve_model
from sw.onnx_import import find_linears

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, CONTEXT = 64, 96, 4, 2, 2, 32
HEAD = HIDDEN // HEADS
THETA, EPSILON = 10000.0, 1e-5
TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0")}
BYTES = [letter for _, letter in sorted(gguf.vocab.bytes_to_unicode().items())]
TOKENS = [*BYTES, "ab", "<|im_start|>", "<|im_end|>"]


def write_gguf(path: Path, family="llama", kind="Q4_1", tied=True, pre="smollm", changes=None) -> dict[str, np.ndarray]:
    """A small model with random weights; returns its tensors as gguf itself dequantises them."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(THETA)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    for key, value in (changes or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    tensors = {}

    def add(name: str, shape: tuple[int, ...], quantised: bool = False) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        if not quantised:
            writer.add_tensor(name, values)
        else:
            data = gguf.quants.quantize(values / 8, TYPES[kind])
            writer.add_tensor(name, data, raw_dtype=TYPES[kind])
            values = gguf.quants.dequantize(data, TYPES[kind])
        tensors[name] = values

    add("token_embd.weight", (len(TOKENS), HIDDEN))
    add("output_norm.weight", (HIDDEN,))
    if not tied:
        add("output.weight", (len(TOKENS), HIDDEN), True)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", (HIDDEN,))
        add(f"blk.{i}.ffn_norm.weight", (HIDDEN,))
        for name, n in (("q", HIDDEN), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD)):
            add(f"blk.{i}.attn_{name}.weight", (n, HIDDEN), True)
            if family == "qwen2":
                add(f"blk.{i}.attn_{name}.bias", (n,))
        add(f"blk.{i}.attn_output.weight", (HIDDEN, HIDDEN), True)
        add(f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN), True)
        add(f"blk.{i}.ffn_up.weight", (FFN, HIDDEN), True)
        add(f"blk.{i}.ffn_down.weight", (HIDDEN, FFN), True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def reference_logits(tensors: dict[str, np.ndarray], ids: list[int], family: str) -> np.ndarray:
    """The decoder in float64, in ggml's order: Llama rotates neighbouring elements, Qwen2 the halves of a head."""

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * tensors[weight]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors.get(f"{name}.bias", 0)

    def rotate(x):
        angles = np.outer(np.arange(len(ids)), THETA ** (-np.arange(0, HEAD, 2) / HEAD))[:, None, :]
        pairs = (
            (np.s_[..., 0::2], np.s_[..., 1::2])
            if family == "llama"
            else (np.s_[..., : HEAD // 2], np.s_[..., HEAD // 2 :])
        )
        a, b = x[pairs[0]], x[pairs[1]]
        y = np.empty_like(x)
        y[pairs[0]] = a * np.cos(angles) - b * np.sin(angles)
        y[pairs[1]] = a * np.sin(angles) + b * np.cos(angles)
        return y

    x = tensors["token_embd.weight"][ids].astype(np.float64)
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(LAYERS):
        block = f"blk.{i}"
        h = norm(x, f"{block}.attn_norm.weight")
        q, k, v = (linear(h, f"{block}.attn_{name}").reshape(len(ids), -1, HEAD) for name in "qkv")
        q, k = rotate(q), np.repeat(rotate(k), HEADS // KV_HEADS, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(HEAD) + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hij,jhd->ihd", weights, np.repeat(v, HEADS // KV_HEADS, axis=1))
        x = x + linear(attended.reshape(len(ids), -1), f"{block}.attn_output")
        h = norm(x, f"{block}.ffn_norm.weight")
        gate = linear(h, f"{block}.ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{block}.ffn_up"), f"{block}.ffn_down")
    h = norm(x, "output_norm.weight")
    return linear(h, "output" if "output.weight" in tensors else "token_embd")


def step(session, ids, past, total):
    """One call: (logits [sequence, vocab], the cache for the next call)."""
    names = [output.name for output in session.get_outputs()]
    feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}
    outputs = dict(zip(names, session.run(None, feeds | past), strict=True))
    past = {name.replace("present", "past_key_values"): values for name, values in outputs.items() if name != "logits"}
    return outputs["logits"][0], past


def empty_cache(session):
    inputs = [item for item in session.get_inputs() if item.name.startswith("past_key_values.")]
    return {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in inputs}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits(family, kind, tied, tmp_path):
    tensors = write_gguf(tmp_path / "m.gguf", family, kind, tied)
    session = onnxruntime.InferenceSession(export_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    ids = [72, 101, 108, 108, 111, 257, 3]
    expected = reference_logits(tensors, ids, family)
    logits, _ = step(session, ids, empty_cache(session), len(ids))
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-5
    # The same in pieces, through the cache.
    past, total, pieces = empty_cache(session), 0, []
    for piece in (ids[:4], ids[4:5], ids[5:6], ids[6:]):
        total += len(piece)
        logits, past = step(session, piece, past, total)
        pieces.append(logits)
    assert np.abs(np.concatenate(pieces) - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_exact(kind):
    rng = np.random.default_rng(1)
    data = gguf.quants.quantize(rng.standard_normal((8, 96)).astype(np.float32), TYPES[kind])
    q, scales, zero_points, bits = decode_blocks(data, kind)
    weights = QuantizedLinear("w", q, scales, zero_points, 32, bits).dequantise()
    expected = gguf.quants.dequantize(data, TYPES[kind])
    # The float zero point of Q4_1 is rounded once, to 24 bits.
    tolerance = 3e-6 if kind == "Q4_1" else 0
    assert np.abs(weights - expected).max() <= tolerance * np.abs(expected).max()
    assert zero_points.dtype == (np.float32 if kind == "Q4_1" else np.uint8)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 6e-8])
def test_flat_q4_1_block(value):
    """d = 0: every weight is m exactly, although -m/d does not exist."""
    block = np.zeros((1, 20), np.uint8)
    block[0, 2:4] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    block[0, 4:] = 0xA7
    q, scales, zero_points, bits = decode_blocks(block, "Q4_1")
    weights = QuantizedLinear("w", q, scales, zero_points, 32, bits).dequantise()
    assert np.array_equal(weights, np.full((1, 32), np.float32(np.float16(value))))


def test_files(tmp_path):
    write_gguf(tmp_path / "m.gguf", "qwen2", tied=False)
    path = export_gguf(tmp_path / "m.gguf", tmp_path / "out" / "deep")
    assert sorted(item.name for item in path.parent.iterdir()) == [
        "config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    ]
    config = json.loads((path.parent / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["vocab_size"]) == (HIDDEN, HEAD, len(TOKENS))
    assert config["eos_token_id"] == [len(TOKENS) - 1]
    linears = find_linears(path)
    assert len(linears) == 7 * LAYERS + 1
    assert linears.names[7] == "/model/layers.1/self_attn/q_proj/MatMulNBits"
    assert linears.names[-1] == "/lm_head/MatMulNBits"
    assert linears[0].bias is not None
    assert not linears[0].bias_in_node
    assert resolve_model(path.parent) == path


def test_export_is_deterministic_and_replaces(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    first = export_gguf(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "out" / "note.txt").write_text("mine")
    before = [(first.parent / name).read_bytes() for name in ("model.onnx", "model.onnx.data", "tokenizer.json")]
    (tmp_path / "out" / "model.onnx").write_bytes(b"old")
    second = export_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [
        (second.parent / name).read_bytes() for name in ("model.onnx", "model.onnx.data", "tokenizer.json")
    ] == before
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"


BAD = {
    "family": ({"family": "gemma"}, "architecture 'gemma' is not supported"),
    "pre-tokenizer": ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of' is not supported"),
    "experts": ({"changes": {"llama.expert_count": 8}}, "mixture-of-experts"),
    "rotary scaling": ({"changes": {"llama.rope.scaling.type": "yarn"}}, "rotary scaling 'yarn'"),
    "partial rotary": ({"changes": {"llama.rope.dimension_count": 8}}, "rotary embedding over 8 of 16"),
    "shape": ({"changes": {"llama.attention.key_length": 32}}, "/model/layers.0/self_attn/q_proj is "),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_refused_models(options, message, tmp_path):
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(UserError, match=message):
        export_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(share, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="is not a complete GGUF file"):
        GgufFile(path)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sw.gguf_export", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_line(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    good = run_cli(str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out"))
    assert (good.returncode, good.stdout.strip(), good.stderr) == (0, str(tmp_path / "out" / "model.onnx"), "")
    (tmp_path / "bad.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    bad = run_cli(str(tmp_path / "bad.gguf"), "--out", str(tmp_path / "new" / "deep"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1
    blocked = run_cli(str(tmp_path / "m.gguf"), "--out", str(tmp_path / "bad.gguf" / "sub"))
    assert blocked.returncode == 2
    assert blocked.stderr.startswith("error: cannot write to ")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["bad.gguf", "m.gguf", "out"]


@pytest.mark.parametrize("limit", [3_000, 30_000], ids=["tokenizer", "weights"])
def test_full_disk(limit, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    write_gguf(tmp_path / "m.gguf")
    script = (
        "import resource, signal, sys; import sw.gguf_export as e; from sw.errors import run_cli\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = ['x', {str(tmp_path / 'm.gguf')!r}, '--out', {str(tmp_path / 'new' / 'out')!r}]\n"
        "run_cli(e.main)\n"
    )
    full = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert full.stderr.startswith("error: cannot write to ")
    assert full.stderr.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_export_leaves_nothing(number, status, tmp_path):
    """The signal comes while the weights are being written."""
    write_gguf(tmp_path / "m.gguf")
    script = (
        "import signal, sys, time; import sw.gguf_export as e; from sw.errors import run_cli\n"
        # A test run in the background of a shell inherits SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "e.write_decoder = lambda work, *a: [(work / 'model.onnx.data').write_bytes(b'half'), time.sleep(60)]\n"
        f"sys.argv = ['x', {str(tmp_path / 'm.gguf')!r}, '--out', {str(tmp_path / 'new' / 'out')!r}]\n"
        "run_cli(e.main)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("new/.*/model.onnx.data")):
        assert time.monotonic() < deadline, "the export did not start"
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert stderr == b""
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]
