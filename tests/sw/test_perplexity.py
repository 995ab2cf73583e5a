# SPDX-License-Identifier: Apache-2.0
"""Perplexity on every device equals its definition, computed from each whole window in one call."""

import json
import math
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sw import perplexity
from sw.common.errors import UserError
from sw.export.gguf import export_gguf
from sw.runtime import setup as decoder_setup
from sw.runtime.score import Score
from sw.text.scoring import cut_windows, negative_log_likelihood
from tests.sw.export.test_gguf import CONTEXT, TOKENS, empty_cache, step, write_gguf

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(pydoc_data.topics.topics[name] for name in ("assert", "lambda", "pass"))
BOS = TOKENS.index("<|im_start|>")
KEYS = ("model", "text", "memory", "config", "config_digest", "windows", "rows")
ROW_KEYS = ("device", "perplexity", "mean_nll", "tokens", "relative_difference", "cycles", "seconds")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two small decoders with random weights and a context of 32 tokens: texts of the second begin with BOS."""
    paths = {}
    for bos in (False, True):
        path = tmp_path_factory.mktemp("model")
        changes = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.bos_token_id": BOS}
        write_gguf(path / "m.gguf", kind="Q4_0", changes=changes)
        paths[bos] = export_gguf(path / "m.gguf", path / "out")
    return paths


@pytest.fixture(params=[False, True], ids=["plain", "bos"])
def bos(request):
    return request.param


@pytest.fixture
def model(exported):
    return exported[False]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text(TEXT)
    return path


def run(capsys, model, text, *arguments):
    """Runs the command line in this process; returns its JSON."""
    assert perplexity.main([str(model), "--text", str(text), *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def plain_nll(model, windows, beginning=()):
    """-ln p of the tokens 2 to L of every window, by plain onnxruntime with each window in one call."""
    session = onnxruntime.InferenceSession(model)
    values = []
    for window in windows:
        ids = [*beginning, *window]
        logits, _ = step(session, ids, empty_cache(session), len(ids))
        for position in range(len(beginning), len(ids) - 1):
            row = [float(value) for value in logits[position]]
            top = max(row)
            total = math.fsum(math.exp(value - top) for value in row)
            values.append(math.log(total) + top - row[ids[position + 1]])
    return values


@pytest.mark.parametrize(("device", "max_tokens"), [("onnxruntime", 64), ("reference", 64), ("reference", 5)])
def test_definition(device, max_tokens, bos, exported, text, capsys):
    """Four windows of 21 tokens give the same score in blocks of any length."""
    model = exported[bos]
    options = ("--device", device, "--windows", 4, "--length", 21, "--max-tokens", max_tokens)
    values = run(capsys, model, text, *options)
    # Every letter of this text is a token of its own, but "ab".
    ids = [TOKENS.index(token) for token in re.findall("ab|.", TEXT[:100].replace(" ", "Ġ").replace("\n", "Ċ"))]
    windows = [ids[start : start + 21] for start in range(0, 84, 21)]
    expected = plain_nll(model, windows, [BOS] if bos else [])
    assert tuple(values) == KEYS
    assert values["windows"] == [21] * 4
    (row,) = values["rows"]
    assert tuple(row) == ROW_KEYS
    assert (row["device"], row["tokens"], row["relative_difference"]) == (device, 80, 0)
    # The device has 16-bit activations, onnxruntime float32.
    assert row["mean_nll"] == pytest.approx(math.fsum(expected) / 80, rel=1e-5 if device == "onnxruntime" else 1e-3)
    assert row["perplexity"] == pytest.approx(math.exp(row["mean_nll"]))
    assert (values["config"] is None) == (device == "onnxruntime")


@pytest.mark.simulator
def test_several_devices(model, text, capsys):
    """Each device has a row, compared with the first; the RTL's results equal the reference's."""
    options = ("--tile", 8, "--score-words", 0, "--max-tokens", 16, "--windows", 1, "--length", 12, "--memory", "ideal")
    values = run(capsys, model, text, "--device", "onnxruntime,reference,rtl", *options)
    first, reference, rtl = values["rows"]
    assert [row["device"] for row in values["rows"]] == ["onnxruntime", "reference", "rtl"]
    assert values["memory"] == "ideal"
    assert first["relative_difference"] == 0
    assert reference["mean_nll"] == rtl["mean_nll"] != first["mean_nll"]
    ratio = reference["perplexity"] / first["perplexity"]
    assert reference["relative_difference"] == pytest.approx(ratio - 1)
    assert abs(reference["relative_difference"]) < 0.02
    assert rtl["cycles"] > 0 == reference["cycles"]


def test_default_hardware(model, text, capsys):
    """Blocks have the greatest length of any hardware, and windows with BOS are no longer than the model's context."""
    values = run(capsys, model, text, "--device", "reference", "--windows", 2)
    assert values["config"]["max_tokens"] == 64
    assert values["windows"] == [CONTEXT] * 2


def test_default_length_with_bos(exported, text, capsys):
    values = run(capsys, exported[True], text, "--device", "onnxruntime", "--windows", 2)
    assert values["windows"] == [CONTEXT - 1] * 2


def test_short_text(model, text):
    """A text that is too short for all windows is used as far as possible, and a line reports it."""
    arguments = [sys.executable, "-W", "error", "-m", "sw.perplexity", str(model), "--text", "-"]
    arguments += ["--device", "onnxruntime", "--length", "20"]

    def command(content):
        done = subprocess.run(arguments, cwd=ROOT, input=content, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    status, out, err = command(TEXT[:50].replace("ab", "xx"))
    assert status == 0
    assert "the text has 50 tokens: 3 of 8 windows, the last of 10 tokens" in err
    assert re.search(r"onnxruntime +[\d,]+\.\d{4} +\d+\.\d{6} +47 ", out)
    assert "window 3 of 3, perplexity" in err
    status, out, err = command("xy")
    assert (status, "1 of 8 windows, the last of 2 tokens" in err) == (0, True)
    for content in ("x", ""):
        message = f"error: the text has {len(content)} tokens, and at least 2 are needed: the first is not predicted\n"
        assert command(content) == (2, "", message)


def test_cut_windows():
    ids = list(range(10))
    assert cut_windows(ids, 8, 5) == [ids[:5], ids[5:]]
    assert cut_windows(ids, 1, 5) == [ids[:5]]
    assert cut_windows(ids, 3, 4) == [ids[:4], ids[4:8], ids[8:]]
    # A single token predicts nothing.
    assert cut_windows(ids, 8, 3) == [ids[:3], ids[3:6], ids[6:9]]
    assert cut_windows(ids, 9, 100) == [ids]
    assert cut_windows(ids[:1], 8, 5) == cut_windows([], 8, 5) == []


def test_negative_log_likelihood():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])).astype(np.float32)
    assert negative_log_likelihood(logits + 1000, np.array([1, 2])) == pytest.approx(-np.log([0.25, 0.7]), rel=1e-4)
    extreme = np.array([[3e38, -3e38]], np.float32)
    assert negative_log_likelihood(extreme, np.array([1])) == pytest.approx(6e38)
    assert negative_log_likelihood(extreme, np.array([0])) == [0]
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match="the model's logits are not finite"):
            negative_log_likelihood(np.array([[value, 1]], np.float32), np.array([1]))
    with pytest.raises(UserError, match="the text has token 2, and the model's vocabulary has 2"):
        negative_log_likelihood(extreme, np.array([2]))


def test_infinite_perplexity(model, text, monkeypatch, capsys):
    """JSON has no infinity."""
    monkeypatch.setattr("sw.runtime.score.negative_log_likelihood", lambda logits, targets: np.full(len(targets), 1e6))
    options = ("--device", "onnxruntime", "--windows", 1, "--length", 8)
    (row,) = run(capsys, model, text, *options)["rows"]
    assert (row["perplexity"], row["mean_nll"]) == (None, 1e6)
    assert Score("x", 2, 1400.1).perplexity == math.inf
    assert Score("x", 2, 2.0).perplexity == math.e
    assert perplexity.main([str(model), "--text", str(text), *map(str, options)]) == 0
    assert " inf " in capsys.readouterr().out


BAD = {
    "no text": ([], "the following arguments are required: --text"),
    "missing text": (["--text", "nowhere"], r"nowhere cannot be read \(.*\)"),
    "no UTF-8": (["--text", "latin"], "latin is not UTF-8"),
    "no model": (["nowhere", "--text", "text"], r"no such model: nowhere \(.*\)"),
    "windows": (["--text", "text", "--windows", "0"], "--windows is 1 or more, not 0"),
    "length": (["--text", "text", "--length", "1"], "--length is 2 or more, not 1: a window's first token .*"),
    "long": (
        ["--text", "text", "--length", "33"],
        r"--length is at most the model's own context \(32 tokens\), not 33",
    ),
    "device": (["--text", "text", "--device", "reference,fpga"], "no device is named fpga; there are .*, onnxruntime"),
    "empty device": (["--text", "text", "--device", "reference,"], "no device is named ; there are .*"),
    "memory": (["--text", "text", "--memory", "ideal"], "--memory is for --device rtl, not reference"),
    "hardware": (["--text", "text", "--max-tokens", "65"], "max_tokens is a whole number from 1 to 64, not 65"),
    "no tokenizer": (["mute", "--text", "text"], "mute has no tokenizer.json, and a model's text needs one"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, message, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "model.onnx").write_bytes(model.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoder_setup, "open_device", lambda *_, **__: pytest.fail("a device was opened"))
    options = arguments if "--device" in arguments else [*arguments, "--device", "reference"]
    with pytest.raises(UserError) as refused:
        perplexity.main(options if arguments[:1] in (["nowhere"], ["mute"]) else [str(model), *options])
    assert re.fullmatch(message, str(refused.value)), str(refused.value)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path, capsys):
    """A real model on real text: plausible, and the arithmetic of the linear layers costs next to nothing."""
    path = tmp_path / "text"
    path.write_text("\n".join(pydoc_data.topics.topics.values()))
    options = ("--device", "onnxruntime,reference", "--operators", "host", "--windows", 1, "--length", 64)
    first, reference = run(capsys, smollm2, path, *options)["rows"]
    assert first["tokens"] == 63
    assert 5 < first["perplexity"] < 500
    assert 0 < abs(reference["relative_difference"]) < 2e-3


@pytest.mark.full
@pytest.mark.parametrize(("operators", "most"), [("host", 1e-3), ("decoder", 3e-3)])
def test_smollm2_at_length(operators, most, smollm2, tmp_path, capsys):
    """Over 8 windows of 512 tokens the linear layers' arithmetic costs less than 0.1 %, the whole token's 0.3 %."""
    path = tmp_path / "text"
    path.write_text("\n".join(pydoc_data.topics.topics.values()))
    options = ("--device", "onnxruntime,reference", "--operators", operators)
    first, reference = run(capsys, smollm2, path, *options)["rows"]
    assert first["tokens"] == 8 * 511
    assert 0 < abs(reference["relative_difference"]) < most
