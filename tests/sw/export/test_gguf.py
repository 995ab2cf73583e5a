# SPDX-License-Identifier: Apache-2.0
"""GGUF exports: exact weights for every block format, and graphs with the results of a plain numpy decoder."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import gguf.vocab
import numpy as np
import onnx
import onnxruntime
import pytest

from sw.checkpoints.gguf.reader import GgufFile
from sw.common.errors import UserError
from sw.export.gguf import decoder_config, export_gguf
from sw.export.resolve import resolve_model
from sw.graph.linears import find_linears
from tests.sw.fixtures.checkpoints import IDS, empty_cache, reference_logits, relative_error, step
from tests.sw.fixtures.gguf_quantizer import quantize

ROOT = Path(__file__).resolve().parents[3]
HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, CONTEXT = 64, 96, 4, 2, 2, 32
HEAD = HIDDEN // HEADS
THETA, EPSILON = 10000.0, 1e-5
TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0")}
BYTES = [letter for _, letter in sorted(gguf.vocab.bytes_to_unicode().items())]
TOKENS = [*BYTES, "ab", "<|im_start|>", "<|im_end|>"]


def write_gguf(
    path: Path,
    family="llama",
    kind="Q4_1",
    tied=True,
    pre="smollm",
    changes=None,
    table="F32",
    tokenizer="gpt2",
    hidden=HIDDEN,
    ffn=FFN,
    kinds: dict[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """A small model with random weights; returns its tensors as gguf itself dequantizes them.

    kind: format of the linear layers. table: format of the embedding and, if it is not tied, of the head. hidden, ffn:
    the shape. kinds: other formats by the name of the tensor without ".weight".
    """
    rng = np.random.default_rng(5)
    kv = hidden // HEADS * KV_HEADS
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(THETA)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    for key, value in (changes or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    tensors = {}

    def add(name: str, shape: tuple[int, ...], kind: str = "F32") -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        kind = (kinds or {}).get(name.removesuffix(".weight"), kind)
        dtype = gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            data = quantize(values / 8, kind)
            writer.add_tensor(name, data, raw_dtype=dtype)
            values = gguf.quants.dequantize(data, dtype)
        tensors[name] = values

    add("token_embd.weight", (len(TOKENS), hidden), table)
    add("output_norm.weight", (hidden,))
    if not tied:
        add("output.weight", (len(TOKENS), hidden), table)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", (hidden,))
        add(f"blk.{i}.ffn_norm.weight", (hidden,))
        for name, n in (("q", hidden), ("k", kv), ("v", kv)):
            add(f"blk.{i}.attn_{name}.weight", (n, hidden), kind)
            if family == "qwen2":
                add(f"blk.{i}.attn_{name}.bias", (n,))
        add(f"blk.{i}.attn_output.weight", (hidden, hidden), kind)
        add(f"blk.{i}.ffn_gate.weight", (ffn, hidden), kind)
        add(f"blk.{i}.ffn_up.weight", (ffn, hidden), kind)
        add(f"blk.{i}.ffn_down.weight", (hidden, ffn), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


# ggml's name of a tensor -> Hugging Face's
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = {}
    for name, values in tensors.items():
        *block, layer, kind = name.split(".")
        result[".".join([*(["model", "layers", block[1]] if block else []), NAMES[layer], kind])] = values
    return result


def gguf_logits(path: Path, tensors: dict[str, np.ndarray], head: np.ndarray | None = None) -> np.ndarray:
    """The logits of the file's decoder, by default with the head of the file."""
    model = GgufFile(path)
    values = renamed(tensors) | ({} if head is None else {"lm_head.weight": head})
    neighbours = model.meta("general.architecture") == "llama"
    return reference_logits(values, decoder_config(model), IDS, neighbours=neighbours)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits(family, kind, tied, tmp_path):
    source = tmp_path / "m.gguf"
    tensors = write_gguf(source, family, kind, tied, table=kind)
    session = onnxruntime.InferenceSession(export_gguf(source, tmp_path / "out"))
    expected = gguf_logits(source, tensors)
    logits, _ = step(session, IDS, empty_cache(session), len(IDS))
    assert relative_error(logits, expected) < 1e-5
    # The same tokens in pieces, with the cache.
    past, total, pieces = empty_cache(session), 0, []
    for piece in (IDS[:4], IDS[4:5], IDS[5:6], IDS[6:]):
        total += len(piece)
        logits, past = step(session, piece, past, total)
        pieces.append(logits)
    assert relative_error(np.concatenate(pieces), expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("table", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("mode", ["int8", "float"])
def test_heads(table, tied, mode, tmp_path):
    """The head for each kind of table, and what embedding and head share; quantized weights do not change."""
    source = tmp_path / "m.gguf"
    tensors = write_gguf(source, tied=tied, kind="Q8_0", table=table)
    path = export_gguf(source, tmp_path / "out", lm_head=mode)
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    types = {tensor.name: onnx.helper.tensor_dtype_to_string(tensor.data_type) for tensor in model.graph.initializer}
    linears = find_linears(path)
    quantized = table.startswith("Q")
    heads = [name for name in nodes if name.startswith("/lm_head")]
    assert heads == ["/lm_head/MatMulNBits" if quantized or mode == "int8" else "/lm_head/FusedMatMul"]
    (head,) = (nodes[name] for name in heads)
    assert list(head.output) == ["logits"]

    def inputs(prefix: str) -> set[str]:
        return {name for node in nodes.values() if node.name.startswith(prefix) for name in node.input if name in types}

    shared = inputs("/lm_head") & inputs("/model/embed_tokens")
    if not tied or table == "Q4_1" or (not quantized and mode == "int8"):
        assert shared == set()
    else:
        assert shared == inputs("/lm_head")
    float_type = "TensorProto.FLOAT16" if table == "F16" and not (tied and mode == "float") else "TensorProto.FLOAT"
    if table in ("Q8_0", "Q4_0"):
        assert "model.embed_tokens.weight" not in types
        assert types["model.embed_tokens.qweight"] == "TensorProto.UINT8"
    else:
        assert types["model.embed_tokens.weight"] == float_type
    weights = None
    if head.op_type == "MatMulNBits":
        layer = linears[-1]
        assert (linears.names[-1], layer.output_name) == ("/lm_head/MatMulNBits", "logits")
        assert (layer.bits, layer.group_size) == ((4 if "4" in table else 8), 32 if quantized else 64)
        weights = layer.dequantize()
        if table in ("Q8_0", "Q4_0"):
            assert np.array_equal(weights, tensors["token_embd.weight" if tied else "output.weight"])
    # The embedding's output has exactly the values of the file.
    rows = nodes["/model/layers.0/input_layernorm/SimplifiedLayerNormalization"].input[0]
    model.graph.output.append(onnx.ValueInfoProto(name=rows))
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path)
    feeds = {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), np.int64)}
    values, logits = (np.asarray(v) for v in session.run([rows, "logits"], feeds | empty_cache(session)))
    assert np.array_equal(values[0], tensors["token_embd.weight"][IDS])
    assert relative_error(logits[0], gguf_logits(source, tensors, weights)) < 1e-5


@pytest.mark.parametrize("kind", TYPES)
def test_block_that_is_not_finite(kind, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, kind=kind)
    data = bytearray(path.read_bytes())
    (tensor,) = [item for item in gguf.GGUFReader(path).tensors if item.name == "blk.1.ffn_up.weight"]
    data[tensor.data_offset : tensor.data_offset + 4] = np.full(2, np.inf, np.float16).tobytes()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"tensor blk\.1\.ffn_up\.weight: a (scale|minimum) is not finite"):
        export_gguf(path, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["m.gguf"]


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
    "experts": ({"family": "qwen2", "changes": {"qwen2.expert_count": 8}}, "mixture-of-experts"),
    "rotary scaling": ({"changes": {"llama.rope.scaling.type": "yarn"}}, "rotary scaling 'yarn'"),
    "partial rotary": ({"changes": {"llama.rope.dimension_count": 8}}, "rotary embedding over 8 of 16"),
    "first token": (
        {"changes": {"tokenizer.ggml.bos_token_id": 999, "tokenizer.ggml.add_bos_token": True}},
        "bos_token_id is 999, and there are 259 tokens",
    ),
    "no heads": ({"changes": {"llama.attention.head_count_kv": 0}}, "kv_head_count of the model is 0, not a positive"),
    "heads of each layer": (
        {"changes": {"llama.attention.head_count_kv": [2, 1]}},
        r"metadata llama.attention.head_count_kv is a whole number, not \[2, 1\]",
    ),
    "theta": (
        {"changes": {"llama.rope.freq_base": "big"}},
        "metadata llama.rope.freq_base is a number, not big",
    ),
    "tokens": ({"changes": {"tokenizer.ggml.tokens": "abc"}}, "tokenizer.ggml.tokens is a list of texts, not abc"),
    "merges": ({"changes": {"tokenizer.ggml.merges": [1]}}, r"tokenizer.ggml.merges is a list of texts, not \[1\]"),
    "token types": (
        {"changes": {"tokenizer.ggml.token_type": [1, 1]}},
        "the tokenizer has 259 tokens and 2 token types",
    ),
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


def test_damaged_text(tmp_path):
    """A truncated character: the gguf package decodes a text only when it is read."""
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes().replace("Ġ".encode(), b"\xc4\xc4"))
    with pytest.raises(UserError, match=r"metadata tokenizer\.ggml\.tokens cannot be read"):
        export_gguf(path, tmp_path / "out")


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
    """A limit on the size of files simulates the full disk."""
    write_gguf(tmp_path / "m.gguf")
    script = (
        "import resource, signal, sys; import sw.gguf_export as e; from sw.common.errors import run_cli\n"
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
def test_interrupted_export_leaves_no_files(number, status, tmp_path):
    """The signal comes while the weights are being written."""
    write_gguf(tmp_path / "m.gguf")
    script = (
        "import signal, sys, time; import sw.export.folder as f, sw.gguf_export as e\n"
        "from sw.common.errors import run_cli\n"
        # If a shell runs the tests in the background, SIGINT is ignored by default.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "f.write_decoder = lambda work, *a, **o: [(work / 'model.onnx.data').write_bytes(b'half'), time.sleep(60)]\n"
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
