# SPDX-License-Identifier: Apache-2.0
"""The quantizer's command line on small decoders: its files, its reports and its refusals."""

import json
import math
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sw import generate, perplexity
from sw import layers as sw_layers
from sw import quantize as sw_quantize
from sw.awq.quantizer import LayerReport, quantize
from sw.awq.rounding import Form, nearest
from sw.awq.sizes import Sizes
from sw.common.errors import UserError
from sw.console.quantize_report import Report
from sw.export.floats import float_model
from sw.export.gguf import export_gguf
from sw.export.huggingface import export_checkpoint
from sw.graph.file import OnnxFile
from sw.graph.float_linears import find_sites
from sw.graph.linears import find_linears
from sw.runtime.score import Score
from sw.text.folder import read_tokenizer
from tests.sw.export.test_gguf import CONTEXT, write_gguf
from tests.sw.fixtures.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(pydoc_data.topics.topics[name] for name in ("assert", "lambda", "pass", "integers"))
OTHER = "".join(pydoc_data.topics.topics[name] for name in ("while", "break", "global"))
SMALL = ("--group-size", "32", "--calibration-windows", "4", "--windows", "3", "--length", "16")
LAYERS = 14
FORM_KEYS = ["bits", "group_size", "zero_point", "lm_head", "format"]
KEYS = [
    "source",
    "out",
    "method",
    "rounding",
    *FORM_KEYS,
    "calibration",
    "evaluation",
    "perplexity",
    "recovered",
    "bytes",
]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def source(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family) / "m.gguf"
    write_gguf(path, family, "Q8_0", table="Q8_0")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one").write_text(TEXT)
    (folder / "other").write_text(OTHER)
    return ["--calibration", str(folder / "one"), "--perplexity", str(folder / "other")]


def run(capsys, source, out, *options) -> dict:
    """Runs the command in this process; returns its JSON."""
    assert sw_quantize.main([str(source), "--out", str(out), *SMALL, *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def layers(path: Path) -> dict:
    return {layer.name: layer for layer in find_linears(path)}


def assert_equal(found: dict, expected: dict) -> None:
    """Checks that the layers are the same, integer for integer."""
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        for field in ("q", "scales", "zero_points"):
            assert np.array_equal(getattr(found[name], field), getattr(layer, field)), (name, field)


def test_result(source, texts, tmp_path, capsys):
    """The written folder is complete, and sw.perplexity and the reference device find the reported perplexity."""
    report = run(capsys, source, tmp_path / "out", *texts)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["config.json", "model.onnx", "model.onnx.data", "quantize.json", "tokenizer.json"]
    assert list(report) == [*KEYS, "stream", "seconds", "layers"]
    assert json.loads((tmp_path / "out" / "quantize.json").read_text()) == report
    made = layers(tmp_path / "out" / "model.onnx")
    assert len(made) == LAYERS + 1
    for name, layer in made.items():
        is_head = name == "/lm_head/MatMulNBits"
        assert (layer.bits, layer.group_size) == ((8, 32) if is_head else (4, 32))
        assert np.array_equal(layer.scales, layer.scales.astype(np.float16).astype(np.float32))
        assert layer.has_integer_zero_points
    assert [layer["name"].replace("FusedMatMul", "MatMulNBits") for layer in report["layers"]] == list(made)[:LAYERS]
    for layer in report["layers"]:
        assert 0 < layer["error"] < layer["error_rtn"] < 0.1
        assert layer["fold"]
    options = ["--text", texts[3], "--device", "onnxruntime,reference", "--windows", "3", "--length", "16", "--json"]
    assert perplexity.main([str(tmp_path / "out"), *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["perplexity"] == pytest.approx(report["perplexity"]["awq"], rel=1e-6)
    assert rows[1]["perplexity"] == pytest.approx(report["perplexity"]["awq"], rel=1e-2)
    assert perplexity.main([str(export_gguf(source, tmp_path / "float")), *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["perplexity"] == pytest.approx(report["perplexity"]["float"], rel=1e-5)


def test_compared_is_what_would_be_written(source, texts, tmp_path, capsys):
    """The perplexity of the second method, computed layer by layer, equals that of the model it writes as the first."""
    first = run(capsys, source, tmp_path / "first", *texts, "--method", "awq,rtn")
    second = run(capsys, source, tmp_path / "second", *texts, "--method", "rtn")
    assert list(first["perplexity"]) == ["float", "rtn", "awq"] and list(second["perplexity"]) == ["float", "rtn"]
    assert first["perplexity"]["rtn"] == pytest.approx(second["perplexity"]["rtn"], rel=1e-5)
    assert second["recovered"] is None
    third = run(capsys, source, tmp_path / "third", *texts, "--method", "rtn,awq")
    assert list(third["perplexity"]) == ["float", "awq", "rtn"]
    assert third["perplexity"]["rtn"] == second["perplexity"]["rtn"]
    # They differ only by the rounding of folded scales to float16.
    assert third["perplexity"]["awq"] == pytest.approx(first["perplexity"]["awq"], rel=1e-3)
    assert [layer["error_rtn"] for layer in second["layers"]] == [layer["error"] for layer in second["layers"]]
    assert not any(layer["fold"] for layer in second["layers"])


def test_nearest_rounds_the_float_weights(source, texts, tmp_path, capsys):
    run(capsys, source, tmp_path / "out", *texts, "--method", "rtn")
    file = OnnxFile(float_model(source, tmp_path / "float"))
    made = layers(tmp_path / "out" / "model.onnx")
    for site in find_sites(file)[:LAYERS]:
        expected = nearest(site.weight(file), Form(4, 32)).layer(site.name)
        assert_equal({"": made[site.name.replace("FusedMatMul", "MatMulNBits")]}, {"": expected})


@pytest.mark.parametrize(
    ("bits", "group", "kind"),
    [(2, 32, "integer"), (3, 32, "integer"), (8, 64, "integer"), (4, 128, "fixed"), (3, 64, "fixed"), (2, 64, "fixed")],
)
def test_forms(bits, group, kind, source, texts, tmp_path, capsys):
    """Every width, groups that do not divide K (96 by 64, 64 by 128), and float zero points."""
    options = ("--bits", bits, "--group-size", group, "--zero-point", kind)
    report = run(capsys, source, tmp_path / "out", *texts, *options)
    assert (report["bits"], report["group_size"], report["zero_point"]) == (bits, group, kind)
    for name, layer in layers(tmp_path / "out" / "model.onnx").items():
        if name == "/lm_head/MatMulNBits":
            continue
        assert (layer.bits, layer.group_size) == (4 if bits == 3 else bits, group)
        assert layer.q.max() <= (1 << bits) - 1
        assert layer.zero_points.dtype == (np.uint8 if kind == "integer" else np.float32)
        fixed = layer.zero_points * np.float32(2048)
        assert (np.array_equal(fixed, np.rint(fixed)) and layer.zero_points.max() < 16) or bits == 8
    stream = report["stream"]
    assert stream["weight_bits"] == (8 if bits == 8 else 4)
    # A slice of 3-bit weights is no power of two of bits, and takes the beats of 4 bits.
    assert stream["narrow"] < stream["layers"] if bits == 2 else stream["narrow"] == stream["layers"]
    # Without the cache of 8 bits, whose error is larger than that of activations.
    options = ["--text", texts[3], "--device", "onnxruntime,reference", "--operators", "host"]
    options += ["--windows", "3", "--length", "16", "--json"]
    assert perplexity.main([str(tmp_path / "out"), *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["perplexity"] == pytest.approx(report["perplexity"]["awq"], rel=1e-5)
    assert rows[1]["perplexity"] == pytest.approx(report["perplexity"]["awq"], rel=1e-2)


def test_float_head(source, texts, tmp_path, capsys):
    report = run(capsys, source, tmp_path / "out", *texts, "--lm-head", "float")
    assert len(layers(tmp_path / "out" / "model.onnx")) == LAYERS
    nodes = [node.name for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node]
    assert "/lm_head/FusedMatMul" in nodes
    assert report["lm_head"] == "float"


def test_autoawq_and_back(source, texts, tmp_path, capsys):
    """ONNX -> AutoAWQ -> ONNX keeps every q, z and s, and the logits."""
    report = run(capsys, source, tmp_path / "onnx", *texts)
    other = run(capsys, source, tmp_path / "awq", *texts, "--format", "autoawq")
    assert (tmp_path / "awq" / "model.safetensors").is_file() and not (tmp_path / "awq" / "model.onnx").exists()
    assert other["perplexity"] == report["perplexity"] and other["layers"] == report["layers"]
    again = export_checkpoint(tmp_path / "awq", tmp_path / "again")
    assert_equal(layers(again), layers(tmp_path / "onnx" / "model.onnx"))
    options = ["--text", texts[3], "--device", "onnxruntime", "--windows", "3", "--length", "16", "--json"]
    assert perplexity.main([str(again), *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["perplexity"] == pytest.approx(report["perplexity"]["awq"], rel=1e-5)


@pytest.mark.simulator
@pytest.mark.parametrize("form", ["onnx", "autoawq"])
def test_on_the_rtl(form, source, texts, tmp_path, capsys, monkeypatch):
    """Every layer of the result is exact on the generated hardware, and so are the model's tokens."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "out")
    run(capsys, source, out, *texts, "--format", form)
    hardware = ["--tile", "8", "--score-words", "0", "--json"]
    assert sw_layers.main([out, "--device", "rtl", "--tokens", "2", *hardware]) == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    assert len(found) == LAYERS + 1 and all(layer["exact"] for layer in found)
    ids = {}
    for device in ("reference", "rtl"):
        options = ["--model", out, "--prompt", "pass", "--raw", "--max-new-tokens", "4", "--device", device]
        assert generate.main([*options, *hardware]) == 0
        ids[device] = json.loads(capsys.readouterr().out)["ids"]
    assert ids["rtl"] == ids["reference"]


@pytest.mark.parametrize(
    ("perplexities", "recovered"),
    [((10, 14, 11), 0.75), ((10, 14, 15), -0.25), ((10, 10, 11), None), ((10, 9, 9), None), ((10, 14, None), None)],
)
def test_recovered(perplexities, recovered):
    """The fraction of rounding to nearest's loss that AWQ recovers; without a loss there is no figure."""
    scores = [Score(name, 1, math.log(value)) for name, value in zip(("float", "rtn", "awq"), perplexities) if value]
    sizes, layer = Sizes(100, 25), LayerReport("x", 64, 32, 0.02, 0.01)
    report = Report(
        "a", "b", Form(), "awq", "gptq", "int8", "onnx", "c", 1, "d", [2], scores, sizes, None, [layer], 1.0
    )
    assert report.recovered() == (None if recovered is None else pytest.approx(recovered))
    assert report.error_ratio() == pytest.approx(0.5)


def test_held_out(source, tmp_path, monkeypatch, capsys):
    """Without a second text the evaluation uses the end of the first, which calibration does not use."""
    seen = []

    def spy(file, form, texts, *arguments, **options):
        seen.append(texts)
        return quantize(file, form, texts, *arguments, **options)

    monkeypatch.setattr(sw_quantize, "quantize", spy)
    (tmp_path / "text").write_text(TEXT)
    options = ("--calibration", tmp_path / "text", "--length", CONTEXT, "--calibration-windows", 1000)
    report = run(capsys, source, tmp_path / "out", *options)
    ids = read_tokenizer(tmp_path / "out" / "tokenizer.json").encode(TEXT).ids
    whole = [ids[start : start + CONTEXT] for start in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    (texts,) = seen
    assert (texts.calibration, texts.evaluation) == (whole[:-3], whole[-3:])
    assert report["calibration"]["tokens"] == len(whole[:-3]) * CONTEXT
    assert report["evaluation"]["windows"] == [CONTEXT] * 3
    assert report["evaluation"]["text"].endswith("a part that calibration did not use")


def test_table(source, texts, tmp_path, capsys):
    assert sw_quantize.main([str(source), "--out", str(tmp_path / "out"), *SMALL, *texts]) == 0
    output = capsys.readouterr()
    for words in ("layers.0.self_attn.q_proj", "round to nearest", "MB quantized", "lm_head int8 in all"):
        assert words in output.out
    assert "calibrating: " in output.err and "min left" in output.err


def test_onnx_source(texts, tmp_path, capsys):
    """A float export by optimum keeps its inputs, its names and the files beside it."""
    write_gguf(tmp_path / "m.gguf", "llama")
    text_files = float_model(tmp_path / "m.gguf", tmp_path / "export").parent
    folder = tmp_path / "optimum"
    folder.mkdir()
    shutil.copyfile(ROOT / "tests/sw/fixtures/data/optimum_qwen2_unquantized.onnx", folder / "model.onnx")
    shutil.copyfile(text_files / "tokenizer.json", folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    report = run(capsys, folder, tmp_path / "out", *texts)
    before, after = (OnnxFile(path / "model.onnx") for path in (folder, tmp_path / "out"))
    for kind in ("input", "output"):
        names = [[item.name for item in getattr(file.graph, kind)] for file in (before, after)]
        assert names[0] == names[1]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert len(report["layers"]) == LAYERS
    assert all(layer["fold"] for layer in report["layers"])


def test_nothing_is_left(source, texts, tmp_path, monkeypatch):
    """A failure at any point, even at the end, leaves no file."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("quantize", "write_json"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sw_quantize, name, lambda *_, **__: stop())
            sw_quantize.main([str(source), "--out", str(tmp_path / "a" / "out"), *SMALL, *texts])
        assert list(tmp_path.iterdir()) == []


BAD = {
    "no source": (["nowhere"], "no such model: nowhere .*"),
    "damaged": (["damaged.gguf"], "damaged.gguf is not a complete GGUF file .*"),
    "quantized onnx": (["quantized"], "quantized/model.onnx is quantized already: .* has MatMulNBits weights"),
    "quantized folder": (["autoawq"], "autoawq is quantized already: .*awq"),
    "not empty": (["m.gguf", "--out", "quantized"], "quantized exists and is not empty"),
    "a file": (["m.gguf", "--out", "text"], "text exists and is not a directory"),
    "group": (["m.gguf", "--group-size", "48"], r"argument --group-size: invalid choice: 48 .*"),
    "bits": (["m.gguf", "--bits", "5"], r"argument --bits: invalid choice: 5 .*"),
    "method": (["m.gguf", "--method", "gptq"], "--method is awq or rtn, or both with a comma, not gptq"),
    "method twice": (["m.gguf", "--method", "awq,awq"], "--method names awq twice"),
    "fixed": (["m.gguf", "--bits", "8", "--zero-point", "fixed"], "--zero-point fixed is for --bits 2, 3 and 4: .*"),
    "rounding": (["m.gguf", "--rounding", "up"], r"argument --rounding: invalid choice: 'up' .*"),
    "autoawq": (["m.gguf", "--bits", "8", "--format", "autoawq"], "--format autoawq holds --bits 4 .*, not --bits 8"),
    "autoawq of 2 bits": (["m.gguf", "--bits", "2", "--format", "autoawq"], "--format autoawq .*, not --bits 2"),
    "empty": (["m.gguf", "--calibration", "empty"], "empty is empty: there is nothing to calibrate on"),
    "short": (
        ["m.gguf", "--calibration", "short"],
        r"short has \d+ tokens, and calibration needs 64 or more",
    ),
    "short, two texts": (
        ["m.gguf", "--calibration", "short", "--perplexity", "text"],
        r"short has \d+ tokens, and calibration needs 32 or more",
    ),
    "short evaluation": (["m.gguf", "--perplexity", "letter"], "letter has 1 tokens, and at least 2 are needed"),
    "no text": (["m.gguf", "--calibration", "nowhere"], r"nowhere cannot be read \(.*\)"),
    "no UTF-8": (["m.gguf", "--perplexity", "latin"], "latin is not UTF-8"),
    "same text": (
        ["m.gguf", "--calibration", "text", "--perplexity", "text"],
        "--perplexity text is the calibration text: name another, or none",
    ),
    "same content": (
        ["m.gguf", "--calibration", "text", "--perplexity", "copy"],
        "--perplexity copy is the calibration text: .*",
    ),
    "both stdin": (["m.gguf", "--calibration", "-", "--perplexity", "-"], "--perplexity - is the calibration text.*"),
    "windows": (["m.gguf", "--windows", "0"], "--windows is 1 or more, not 0"),
    "calibration windows": (["m.gguf", "--calibration-windows", "0"], "--calibration-windows is 1 or more, not 0"),
    "length": (["m.gguf", "--length", "1"], "--length is 2 or more, not 1: .*"),
    "long": (["m.gguf", "--length", "33"], r"--length is at most the model's own context \(32 tokens\), not 33"),
    "no layers": (["empty_graph"], ".* has no float linear layers .*"),
    "no tokenizer": (["mute.onnx"], ".* has no tokenizer.json, .*"),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with every wrong input, and a good model."""
    folder = tmp_path_factory.mktemp("bad")
    write_gguf(folder / "m.gguf")
    (folder / "damaged.gguf").write_bytes((folder / "m.gguf").read_bytes()[:5000])
    quantized = export_gguf(folder / "m.gguf", folder / "quantized")
    make_checkpoint(folder / "autoawq")
    for name, text in {"text": TEXT, "copy": TEXT, "empty": " \n", "short": "a b c", "letter": "a"}.items():
        (folder / name).write_text(text)
    (folder / "latin").write_bytes(b"caf\xe9")
    identity = onnx.helper.make_node("Identity", ["input_ids"], ["logits"])
    items = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1, "n"]) for name in ("input_ids", "logits")
    ]
    graph = onnx.helper.make_graph([identity], "g", items[:1], items[1:])
    (folder / "empty_graph").mkdir()
    onnx.save(onnx.helper.make_model(graph), folder / "empty_graph" / "model.onnx")
    shutil.copyfile(quantized.parent / "tokenizer.json", folder / "empty_graph" / "tokenizer.json")
    (folder / "alone").mkdir()
    shutil.copyfile(ROOT / "tests/sw/fixtures/data/optimum_qwen2_unquantized.onnx", folder / "mute.onnx")
    return folder


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, message, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    before = sorted(workshop.iterdir())
    with pytest.raises(UserError) as refused:
        sw_quantize.main([*arguments, *([] if "--out" in arguments else ["--out", "out"])])
    assert re.fullmatch(message, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""
    assert sorted(workshop.iterdir()) == before


def test_exit_status(tmp_path):
    """A wrong option gives one line, status 2 and no traceback in a process."""
    command = [sys.executable, "-m", "sw.quantize", "nowhere", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: no such model: nowhere .*\n", done.stderr)
