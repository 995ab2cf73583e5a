# SPDX-License-Identifier: Apache-2.0
"""The command line: a model's layers on a device are exact and close to onnxruntime, and every refusal is one line."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hw.spec.config import AcceleratorConfig
from hw.spec.cycles import cycles
from sw import layers
from sw.common.errors import UserError
from sw.console.layers_report import _short
from sw.devices.arena import Arena
from sw.devices.base import DeviceError
from sw.devices.library import MEMORIES
from sw.devices.reference import ReferenceDevice
from sw.graph.linears import find_linears
from sw.layers import PROMPT, main, prompt_ids
from sw.runtime.hardware import choose_config, layer_shapes

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = Path(__file__).parent / "fixtures" / "data"
SYMMETRIC, ASYMMETRIC = (str(DATA / f"genai_qwen2_{name}.onnx") for name in ("symmetric", "asymmetric"))
LAYER_KEYS = {
    *("name", "m", "k", "n", "group_size", "weight_bits", "cycles", "beats", "bus_use"),
    *("exact", "max_abs_error", "relative_error"),
}
TOTAL_KEYS = {
    *("layers", "exact", "cycles", "beats", "bus_use", "max_abs_error", "relative_error"),
    *("cycles_per_second", "device_seconds", "seconds"),
}
AUTO: dict[str, int | str] = {"weight_bits": "auto", "zero_point": "auto", "max_k": "auto"}


def command(*arguments, **environment):
    """The command line as a user calls it: (status, stdout, stderr)."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sw.layers", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return run.returncode, run.stdout, run.stderr


def document(capsys, *arguments):
    """Runs the command line in this process: (status, its JSON)."""
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def float_model(path, *, zero_points="none", block=32, k=64, scale=0.1, bits=4):
    """x [tokens, k] -> MatMulNBits layer0 -> MatMulNBits layer1, 32 outputs each."""
    rng = np.random.default_rng(3)
    tensors, nodes = {}, []
    for i, (size, source, target) in enumerate([(k, "x", "h"), (32, "h", "y")]):
        groups = -(-size // block)
        tensors[f"B{i}"] = rng.integers(0, 256, (32, groups, block * bits // 8), np.uint8)
        tensors[f"s{i}"] = (rng.standard_normal((32, groups)) * scale).astype(np.float32)
        inputs = [source, f"B{i}", f"s{i}"]
        if zero_points != "none":
            values = rng.uniform(0, 15, (32, groups)).astype(np.float32)
            tensors[f"z{i}"] = np.rint(values) if zero_points == "whole" else values
            inputs.append(f"z{i}")
        attributes: dict[str, Any] = dict(K=size, N=32, bits=bits, block_size=block)
        nodes.append(
            helper.make_node("MatMulNBits", inputs, [target], f"layer{i}", domain="com.microsoft", **attributes)
        )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 32])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return str(path)


@pytest.mark.parametrize("device", ["reference", "rtl"])
@pytest.mark.parametrize("model", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_genai_builder(model, device, capsys):
    """Models from onnxruntime-genai's builder: every layer is exact and close to onnxruntime."""
    status, values = document(capsys, model, "--device", device, "--tile", 8, "--score-words", 0)
    assert status == 0
    keys = ("model", "device", "memory", "config", "config_digest", "tokens", "prompt_source")
    keys += ("layers", "attention", "totals")
    assert tuple(values) == keys
    assert values["device"] == device
    assert values["config"]["zero_point"] == "integer"
    assert values["config"]["tile"] == 8
    assert len(values["config_digest"]) == 64
    rows, totals = values["layers"], values["totals"]
    assert all(set(row) == LAYER_KEYS for row in rows)
    assert set(totals) == TOTAL_KEYS
    linears = list(find_linears(model))
    assert [row["name"] for row in rows] == [linear.name for linear in linears]
    assert [(row["n"], row["k"]) for row in rows] == [(linear.n, linear.k) for linear in linears]
    assert all((row["m"], row["group_size"], row["weight_bits"]) == (16, 32, 4) for row in rows)
    assert all(row["exact"] is True for row in rows)
    assert all(0 < row["relative_error"] < 1e-3 for row in rows)
    assert totals["layers"] == totals["exact"] == 11
    assert totals["relative_error"] == max(row["relative_error"] for row in rows)
    assert totals["beats"] == sum(row["beats"] for row in rows)
    assert totals["cycles"] == sum(row["cycles"] for row in rows)
    if device == "rtl":
        assert all(row["bus_use"] == pytest.approx(row["beats"] / row["cycles"]) for row in rows)
        assert totals["cycles_per_second"] > 0
    else:
        assert totals["cycles"] == totals["bus_use"] == totals["cycles_per_second"] == 0


@pytest.mark.simulator
def test_table():
    status, out, err = command(SYMMETRIC, "--device", "rtl", "--tile", "8", "--tokens", "1", "--limit", "3")
    assert status == 0
    assert "11 of" not in err
    assert "3 of 3 layers" in err
    lines = out.splitlines()
    assert all(word in lines[1] for word in ("layer", "beats", "cycles", "bus use", "exact", "error"))
    row = next(line for line in lines if "mlp/gate_proj" in line)
    assert re.search(r" 128 +352 +32 +4 +[\d,]+ +[\d,]+ +\d+\.\d % +yes +\d\.\de-0\d *$", row)
    assert "3 of 3 layers equal the numpy reference bit for bit" in out
    assert "cycles are simulated" in out
    assert "the prompt's bytes were its token ids" in out


def test_noise_is_named(tmp_path, capsys):
    """A graph without token ids gets noise, whatever files are beside it, and refuses a prompt."""
    path = float_model(tmp_path / "model.onnx")
    status, values = document(capsys, path, "--device", "reference", "--tokens", 3)
    assert (status, values["prompt_source"], values["tokens"]) == (0, "noise", 3)
    assert all(row["m"] == 3 and row["exact"] for row in values["layers"])
    assert main([path, "--device", "reference"]) == 0
    out = capsys.readouterr().out
    assert "the model reads no token ids (input_ids): its inputs were seeded noise" in out
    assert "the prompt's bytes" not in out
    with pytest.raises(UserError, match=r"reads no token ids \(input_ids\), so it cannot be fed a --prompt"):
        main([path, "--device", "reference", "--prompt", "hello"])


def test_json_alone_on_stdout():
    status, out, err = command(SYMMETRIC, "--device", "reference", "--limit", "2", "--json")
    assert status == 0
    assert len(json.loads(out)["layers"]) == 2
    assert "error" not in err


@pytest.mark.simulator
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory(memory, capsys):
    """The results are the same with every memory, for M 1 and more."""
    for tokens in (1, 16):
        options = ("--device", "rtl", "--tile", 8, "--score-words", 0, "--memory", memory, "--tokens", tokens)
        status, values = document(capsys, SYMMETRIC, *options)
        assert status == 0 and values["memory"] == memory
        assert values["totals"]["exact"] == values["totals"]["layers"] == 11


@pytest.mark.simulator
def test_difference_is_found(monkeypatch, capsys):
    """One wrong bit in one result gives status 1."""
    plain = layers.reference_linear

    def wrong(config, weights, activations):
        y = plain(config, weights, activations)
        if weights.q.shape[0] == 352:
            y.view(np.uint32)[3, 100] ^= 1
        return y

    monkeypatch.setattr(layers, "reference_linear", wrong)
    status, values = document(capsys, SYMMETRIC, "--device", "rtl", "--tile", 8, "--score-words", 0)
    assert status == 1
    assert [row["exact"] for row in values["layers"]] == [row["n"] != 352 for row in values["layers"]]
    assert values["totals"]["exact"] == 7
    assert main([SYMMETRIC, "--device", "rtl", "--tile", "8", "--score-words", "0"]) == 1
    out = capsys.readouterr().out
    assert out.count("NO") == 4
    assert "7 of 11 layers equal" in out


def test_errors_are_against_onnxruntime(monkeypatch, capsys, tmp_path):
    """max|y - y_ort| / max|y_ort|: twice the reference, error one half."""
    plain = layers.capture_inputs

    def doubled(*arguments, **options):
        for work in plain(*arguments, **options):
            yield replace(work, y=2 * work.y)

    monkeypatch.setattr(layers, "capture_inputs", doubled)
    _, values = document(capsys, float_model(tmp_path / "m.onnx"), "--device", "reference")
    assert [row["relative_error"] for row in values["layers"]] == pytest.approx([0.5, 0.5], rel=1e-3)


def test_auto_options(tmp_path, capsys):
    """The least hardware that the model needs."""

    def chosen(**options):
        config = choose_config(layer_shapes(find_linears(float_model(tmp_path / "m.onnx", **options))), AUTO)
        return config.weight_bits, config.zero_point

    assert chosen() == (4, "integer")
    assert chosen(zero_points="whole") == (4, "integer")
    assert chosen(zero_points="fractions") == (4, "fixed")
    assert chosen(bits=8) == (8, "integer")
    assert chosen(bits=2) == (2, "integer")


def test_options_and_tokens(tmp_path, capsys):
    path = float_model(tmp_path / "m.onnx", zero_points="fractions")
    for option in ([], ["--zero-point", "fixed", "--weight-bits", "6", "--tokens", "5"]):
        status, values = document(capsys, path, "--device", "reference", *option)
        assert status == 0
        assert values["config"]["weight_bits"] == (6 if option else 4)
        assert values["tokens"] == (5 if option else 16)


def test_prompt(smollm2, tmp_path):
    from_tokenizer, source = prompt_ids(smollm2, "The capital of France is")
    assert (source, len(from_tokenizer)) == ("tokenizer", 5)
    assert prompt_ids(tmp_path / "model.onnx", "Hé") == ([72, 195, 169], "bytes")
    # Long enough for the greatest max_tokens of any hardware.
    assert len(prompt_ids(smollm2, PROMPT)[0]) >= 64
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        prompt_ids(tmp_path / "model.onnx", "text")


def test_short_names():
    names = ["/model/layers.0/q/MatMul", "/model/layers.1/q/MatMul", "/model/layers.1/k/MatMul"]
    assert _short(names) == ["layers.0/q", "layers.1/q", "layers.1/k"]
    assert _short(["a/b"]) == ["a/b"]
    assert _short(["a", "a/b"]) == ["a", "a/b"]


def test_memory_is_given_back(monkeypatch):
    """The device holds at most two layers at a time, for every model."""
    held = []
    plain = Arena.alloc

    def watched(arena, size):
        buffer = plain(arena, size)
        held.append(len(arena._sizes))
        return buffer

    monkeypatch.setattr(Arena, "alloc", watched)
    assert main([SYMMETRIC, "--device", "reference", "--score-words", "0"]) == 0
    assert len(held) == 3 * 11
    assert max(held) == 6


BAD = {
    "no such model": (
        ["nowhere.onnx"],
        r"no such model: nowhere\.onnx \(an ONNX .* or smollm2\)",
    ),
    "truncated": (["truncated.onnx"], r"truncated\.onnx is not a complete ONNX file .*"),
    "block size": (
        ["block.onnx"],
        r"block\.onnx: layer .*/qkv_proj/.*: scales is .* block_size 64 need 512",
    ),
    "not finite": (["overflow.onnx"], r"layer layer0: its outputs are not finite \(NaN or infinity\)"),
    "max_k": (
        [SYMMETRIC, "--max-k", "128"],
        r"layer .*/down_proj.*: K is at most max_k \(128\), not 352; .* --max-k 352 takes it",
    ),
    "bits": (["bytes.onnx", "--weight-bits", "3"], r"layer layer0: .*8 bits.*"),
    "group": (
        ["small.onnx", "--tile", "32"],
        r"layer layer0: group_size is .* the tile \(32\), not 16; hardware built with --tile 16 takes it",
    ),
    "fraction": (["fractions.onnx", "--zero-point", "integer"], r'layer layer0: zero point .* zero_point="fixed"'),
    "unknown device": ([SYMMETRIC, "--device", "fpga"], "no device is named fpga; there are reference, rtl, kv260"),
    "no board": (
        [SYMMETRIC, "--device", "kv260"],
        r"/lib/firmware/xilinx/gristmill/manifest.json: no manifest there; .*",
    ),
    "memory": ([SYMMETRIC, "--device", "rtl", "--memory", "x"], "memory is one of ideal, kv260-2400, .*, not x"),
    "memory of another": ([SYMMETRIC, "--memory", "ideal"], "--memory is for --device rtl, not reference"),
    "tile": ([SYMMETRIC, "--tile", "12"], "tile is one of 4, 8, 16, 32, not 12"),
    "not a number": ([SYMMETRIC, "--tile", "x"], "argument --tile: invalid int value: 'x'"),
    "many tokens": ([SYMMETRIC, "--tokens", "17"], r"--tokens is at most max_tokens of the hardware \(16\), not 17"),
    "no tokens": ([SYMMETRIC, "--tokens", "0"], "--tokens is 1 or more, not 0"),
    "no layers": ([SYMMETRIC, "--limit", "-1"], "--limit is 1 or more, not -1"),
    "short prompt": (
        [SYMMETRIC, "--prompt", "Hi", "--tokens", "3"],
        "--tokens 3 needs a longer prompt: .*",
    ),
    "empty prompt": ([SYMMETRIC, "--prompt", ""], "the prompt is empty"),
    "no arguments": ([], "the following arguments are required: MODEL.*"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    """The error is one line, and comes before anything is built; no file is left."""
    whole = Path(SYMMETRIC).read_bytes()
    (tmp_path / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    model = onnx.load(SYMMETRIC)
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    next(attribute for attribute in node.attribute if attribute.name == "block_size").i = 64
    onnx.save(model, tmp_path / "block.onnx")
    float_model(tmp_path / "overflow.onnx", scale=1e38)
    float_model(tmp_path / "small.onnx", block=16)
    float_model(tmp_path / "fractions.onnx", zero_points="fractions")
    float_model(tmp_path / "bytes.onnx", bits=8)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    if "overflow.onnx" not in arguments:
        monkeypatch.setattr(layers, "open_device", lambda *_, **__: pytest.fail("a device was opened"))
    options = arguments if "--device" in arguments else [*arguments, "--device", "reference"]
    with pytest.raises(UserError) as refused:
        main([*options, "--json"])
    assert re.fullmatch(message, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["nowhere.onnx", "--device", "rtl"], {}, "error: no such model: nowhere.onnx (an ONNX "),
        ([SYMMETRIC, "--device", "rtl", "--tile", "16", "--max-k", "128"], {}, "error: layer /model/layers.0/mlp/down"),
        ([SYMMETRIC, "--device", "rtl"], {"PATH": "/nowhere"}, "error: the simulated device could not be built: "),
    ],
    ids=["no such model", "max_k", "missing compiler"],
)
def test_bad_input_of_the_command(arguments, environment, message):
    status, out, err = command(*arguments, **environment)
    assert status == 2
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def check_smollm2(values, count):
    rows = values["layers"]
    assert len(rows) == values["totals"]["exact"] == count
    assert values["config"]["zero_point"] == "fixed"
    assert values["prompt_source"] == "tokenizer"
    assert all(row["exact"] for row in rows)
    # The scales of an 8-bit layer on this hardware have 12 bits.
    assert all(row["relative_error"] < (2e-3 if row["weight_bits"] == 8 else 1e-3) for row in rows)
    # The prediction for ideal memory; the real memory adds its latency.
    config = AcceleratorConfig.from_dict(values["config"])
    for row in rows:
        planes = 2 if row["weight_bits"] > config.weight_bits else 1
        predicted = cycles(config, row["m"], planes * row["k"], row["n"], row["group_size"])
        assert predicted <= row["cycles"] <= 1.03 * predicted + 300


@pytest.mark.simulator
def test_smollm2(smollm2, capsys):
    """The first block of a real model, with the activations that a prompt gives it."""
    status, values = document(capsys, smollm2, "--device", "rtl", "--operators", "linear", "--limit", 7)
    assert status == 0
    check_smollm2(values, 7)
    projections = [name.split("/")[-2] for name in (row["name"] for row in values["layers"])]
    assert projections == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.simulator
@pytest.mark.full
@pytest.mark.parametrize("tokens", [1, 16])
def test_smollm2_complete(smollm2, capsys, tokens):
    status, values = document(capsys, smollm2, "--device", "rtl", "--operators", "linear", "--tokens", tokens)
    assert status == 0
    check_smollm2(values, 211)
    head = values["layers"][-1]
    assert (head["name"], head["weight_bits"]) == ("/lm_head/MatMulNBits", 8)
    assert values["config"]["weight_bits"] == 4


def test_interrupt_during_a_long_layer(monkeypatch):
    """An interrupt does not wait for a layer that takes minutes: closing the device ends it."""
    closed = threading.Event()

    def wait(device, ticket, timeout):
        assert closed.wait(30), "the device was not closed"
        raise DeviceError("closed")

    def works(*arguments, **options):
        yield next(plain(*arguments, **options))
        raise KeyboardInterrupt

    plain = layers.capture_inputs
    monkeypatch.setattr(layers, "capture_inputs", works)
    monkeypatch.setattr(ReferenceDevice, "wait", wait)
    monkeypatch.setattr(ReferenceDevice, "close", lambda device: closed.set())
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        main([SYMMETRIC, "--device", "reference"])
    assert closed.is_set()
    assert time.monotonic() - start < 20


@pytest.mark.simulator
def test_interrupt(smollm2):
    """Ctrl-C in the middle of a run ends it quickly, without a message, with status 130."""
    # A test run in the background of a shell inherits SIGINT ignored.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from runpy import run_module; run_module('sw.layers', run_name='__main__')"
    )
    arguments = [sys.executable, "-c", script, str(smollm2), "--device", "rtl", "--operators", "linear"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "of 211 layers" in line:
                break
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 5
    assert out == ""
    assert "Traceback" not in err
