# SPDX-License-Identifier: Apache-2.0
"""The synthetic checkpoint has the real model's shape, is the same every time, and runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sw.synthetic import QWEN2_5_0_5B, QWEN2_5_0_5B_FLOAT, _tensors, encode, write_float
from tests.sw.fixtures.checkpoints import IDS, QWEN2, empty_cache, make_checkpoint, read_tensors, step

ROOT = Path(__file__).resolve().parents[2]
PEAK = """
import importlib, re, sys
importlib.import_module(sys.argv.pop(1)).main()
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""
"""It runs a command, and prints the most memory that the process has held, in KiB. getrusage would count that of its
parent and of all other children, too."""


def run_cli(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_shape_is_qwen2s():
    """Names and sizes of all tensors, without their values: 494,032,768 parameters, as the real model has."""
    tensors = {tensor.name: tensor for tensor in _tensors(QWEN2_5_0_5B, "F16", np.random.default_rng(0))}
    parameters = 0
    for name, tensor in tensors.items():
        k, n = (*tensor.shape, 1)[:2]
        if name.endswith("qweight"):
            assert (tensor.dtype, tensor.size) == ("I32", 4 * k * n)
            base = name.removesuffix("qweight")
            assert tensors[f"{base}scales"].shape == (k // 128, 8 * n)
            assert tensors[f"{base}qzeros"].shape == (k // 128, n)
            parameters += 8 * k * n
        elif not name.endswith(("qzeros", "scales")):
            assert (tensor.dtype, tensor.size) == ("F16", 2 * k * n)
            parameters += k * n
    assert parameters == 494_032_768
    assert sum(name.endswith("qweight") for name in tensors) == 7 * 24
    assert "lm_head.weight" not in tensors


def test_seed_and_shards(tmp_path):
    """The same seed gives the same values, however they are divided into files."""
    one = make_checkpoint(tmp_path / "one", QWEN2)
    two = make_checkpoint(tmp_path / "two", QWEN2, shards=3)
    assert list(one) == sorted(two, key=list(one).index)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    head = {name: values.std() for name, values in one.items() if name.endswith("qweight")}
    assert len(set(head.values())) == len(head)


def test_refuses(tmp_path):
    (tmp_path / "file").touch()
    for arguments in (["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "a"), "--seed", "-1"], []):
        bad = run_cli("sw.synthetic", *arguments)
        assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
        assert bad.stderr.startswith("error: ")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_encode_rounds_to_the_nearest():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(2.0**100)], np.float32)
    assert encode(values, "BF16").tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xF180]


@pytest.mark.full
def test_qwen2_complete(tmp_path):
    """The whole shape is written and exported within 2 GB, and onnxruntime runs it."""
    for module, arguments in (
        ("sw.synthetic", ["--out", str(tmp_path / "in")]),
        ("sw.awq_export", [str(tmp_path / "in"), "--out", str(tmp_path / "out")]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stderr.splitlines()[-1]) < 2 << 20
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    logits, _ = step(session, IDS, empty_cache(session), len(IDS))
    assert logits.shape == (len(IDS), 151936)
    assert np.isfinite(logits).all()
    assert len(set(logits.argmax(axis=1))) > len(IDS) // 2


def test_float_shape_is_qwen2s():
    """The same parameters as plain weights: 988 MB in BF16."""
    tensors = {tensor.name: tensor for tensor in _tensors(QWEN2_5_0_5B_FLOAT, "BF16", np.random.default_rng(0))}
    quantized = [tensor.name for tensor in _tensors(QWEN2_5_0_5B, "F16", np.random.default_rng(0))]
    plain = [name for name in quantized if not name.endswith(("qzeros", "scales"))]
    assert list(tensors) == [name.replace(".qweight", ".weight") for name in plain]
    assert sum(tensor.size for tensor in tensors.values()) == 2 * 494_032_768
    assert tensors["model.layers.23.mlp.down_proj.weight"].shape == (896, 4864)
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_float_checkpoint(dtype, name, tmp_path):
    """The weights neither amplify nor attenuate the activations, and config.json describes them."""
    write_float(tmp_path / "a", QWEN2, seed=5, dtype=dtype)
    write_float(tmp_path / "b", QWEN2, seed=5, dtype=dtype, shards=3)
    one, two = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert one.keys() == two.keys()
    assert all(np.array_equal(values, two[key]) for key, values in one.items())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["torch_dtype"] == name
    assert "quantization_config" not in config
    down = one["model.layers.1.mlp.down_proj.weight"]
    assert 0.9 < down.std() * 96**0.5 < 1.1
    o = one["model.layers.1.self_attn.o_proj.weight"]
    assert 0.2 < o.std() * 64**0.5 < 0.3


def test_dtype_needs_float(tmp_path):
    bad = run_cli("sw.synthetic", "--out", str(tmp_path / "a"), "--dtype", "F16")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: --dtype F16 needs --float: the AutoAWQ checkpoint has the real one's types\n"
    assert not list(tmp_path.iterdir())
