# SPDX-License-Identifier: Apache-2.0
"""Simulated cycles equal those of docs/figures.json: a slower design and an outdated page are both detected."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hw.spec.config import AcceleratorConfig
from sw import bench
from sw.bench import Bench, Shape, measure_layer, shapes
from sw.common.errors import UserError
from sw.pages.regressions import compare
from sw.pages.store import load, save

ROOT = Path(__file__).resolve().parents[3]
ROWS = ("layers", "gemm", "tokens", "attention")
"""Sections that are lists of rows."""
ROW = {"name": "qkv", "memory": "ideal", "tile": 16, "m": 1, "k": 896, "n": 1152, "cycles": 100, "cycles_in_a_row": 9.5}


@pytest.mark.simulator
def test_cycles_of_layers():
    """README's layers at tile 16 in ideal memory, without the lm_head, whose simulation takes as long as all others."""
    with (run := Bench(AcceleratorConfig(), "ideal")).device:
        rows = [measure_layer(run, shape) for shape in shapes(16) if shape.name != "lm_head"]
    assert len(rows) >= 6
    worse, better = compare(load(), {"layers": rows})
    assert worse == [], "more cycles than docs/figures.json says"
    assert better == [], "fewer cycles than docs/figures.json says: run python -m sw.bench --update"


@pytest.mark.simulator
@pytest.mark.full
@pytest.mark.timeout(7200)
def test_cycles_of_everything():
    """All simulated cycles of README's tables, whole tokens and the whole runtime included."""
    command = [sys.executable, "-m", "sw.bench", "--check", "--only", "layers,gemm,tokens,decoders,attention"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=7000, check=False)
    assert done.returncode == 0, done.stderr
    assert "better:" not in done.stderr, done.stderr


def test_compare():
    sections = {"layers": {"command": "", "config": "", "figures": [ROW]}}
    assert compare(sections, {"layers": [dict(ROW)], "tools": {"seconds": 9.0}}) == ([], [])
    worse, better = compare(sections, {"layers": [{**ROW, "cycles": 101, "cycles_in_a_row": 9.25}]})
    row = "layers, qkv, memory ideal, tile 16, m 1, k 896, n 1152"
    assert worse == [f"{row}: cycles: 101 cycles, figures.json says 100"]
    assert better == [f"{row}: cycles_in_a_row: 9.25 cycles, figures.json says 9.5"]
    with pytest.raises(UserError, match=r"has no figure for layers, qkv, memory ideal, tile 32, .*: cycles"):
        compare(sections, {"layers": [{**ROW, "tile": 32}]})


def test_compare_knows_every_count_of_the_file():
    """Counts are those of layers alone and in a row, tokens, the GEMM and the whole runtime; seconds are not counts."""
    sections = load()
    report = {name: json.loads(json.dumps(sections[name]["figures"])) for name in ROWS}
    report["decoders"] = json.loads(json.dumps(sections["decoders"]["figures"]))
    assert compare(sections, report) == ([], [])
    for rows in (report[name] for name in ROWS):
        for row in rows:
            row["cycles"] += 1
            row["cycles_per_cpu_second"] = 1e9
    report["decoders"]["qwen"]["cycles"] += 1
    report["decoders"]["host"][0]["host"] = 1e9
    worse, better = compare(sections, report)
    assert better == []
    assert len(worse) == sum(len(report[name]) for name in ROWS) + 1


def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[dict], *options: str) -> int:
    """Runs sw.bench on a file that holds ROW, with invented measurements."""
    path = tmp_path / "figures.json"
    save({"layers": {"command": "", "config": "", "figures": [ROW]}}, path)
    monkeypatch.setattr(bench, "PARTS", {"layers": lambda status: rows, "tools": lambda status: {"seconds": 1.0}})
    monkeypatch.setattr(bench, "REPORT", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "load", lambda: load(path))
    monkeypatch.setattr(bench, "save", lambda sections: save(sections, path))
    monkeypatch.setattr(sys, "argv", ["sw.bench", "--json", *options])
    monkeypatch.chdir(ROOT)
    return bench.main()


def test_check_fails_for_more_cycles_only(monkeypatch, tmp_path: Path, capsys):
    assert run_main(monkeypatch, tmp_path, [{**ROW, "cycles": 101}], "--check") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["layers"][0]["cycles"] == 101
    assert re.search(r"^error: layers, qkv, .*: 101 cycles, figures.json says 100$", err, re.MULTILINE)
    assert run_main(monkeypatch, tmp_path, [{**ROW, "cycles": 99}], "--check") == 0
    assert "better: layers, qkv" in capsys.readouterr().err
    assert run_main(monkeypatch, tmp_path, [ROW], "--check") == 0
    assert capsys.readouterr().err == ""
    assert run_main(monkeypatch, tmp_path, [{**ROW, "cycles": 101}]) == 0


def test_update_writes_what_is_quoted(monkeypatch, tmp_path: Path, capsys):
    assert run_main(monkeypatch, tmp_path, [{**ROW, "cycles": 99}], "--update") == 0
    sections = load(tmp_path / "figures.json")
    assert list(sections) == ["layers"] and sections["layers"]["figures"][0]["cycles"] == 99


def test_only(monkeypatch, tmp_path: Path, capsys):
    assert run_main(monkeypatch, tmp_path, [ROW], "--only", "tools") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["tools"]
    with pytest.raises(UserError, match="argument --only: there are layers, tools, not 'all'"):
        run_main(monkeypatch, tmp_path, [ROW], "--only", "layers,all")


def test_tables_of_a_part(capsys):
    """Every part of a report can be printed alone."""
    sections = load()
    for name in ("layers", "gemm", "tokens", "simulation", "decoders"):
        bench.print_tables({name: sections[name]["figures"]})
    out = capsys.readouterr().out
    tokens = [f"{row['cycles']:,}" for row in sections["tokens"]["figures"]]
    assert "50.5" in out and "66,330" in out and all(count in out for count in tokens)


def test_gemm_is_the_papers():
    assert bench.GEMM == (64, 768, 3072) and bench.GEMM_HZ == 100e6
    for row in load()["gemm"]["figures"]:
        operations = 2 * row["m"] * row["k"] * row["n"]
        assert row["gflops"] == pytest.approx(operations / row["cycles"] * bench.GEMM_HZ / 1e9)
        assert Shape("", row["m"], row["k"], row["n"]) == Shape("", *bench.GEMM)
