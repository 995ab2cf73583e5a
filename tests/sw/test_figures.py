# SPDX-License-Identifier: Apache-2.0
"""docs/figures.json and the pages made from it: pages are up to date; damaged markers and files give one line."""

import json
import re
from pathlib import Path

import pytest

from sw import figures
from sw.common.errors import UserError
from sw.pages import store
from sw.pages.markdown import render
from sw.pages.store import FILE, find, load, save, take
from sw.pages.tables import TABLES, WIDTHS, designs

SECTIONS = {
    "bench": {
        "command": "make bench",
        "config": "",
        "figures": [{"memory": "ideal", "tile": 16, "cycles": 1000}, {"memory": "ideal", "tile": 32, "cycles": 500}],
    },
    "other": {"command": "a", "config": "b", "figures": {"bytes": {"all": 2_500_000}, "ratio": 0.25}},
}


def test_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert figures.main(["--check"]) == 0, "run python -m sw.figures"
    assert capsys.readouterr() == ("", "")


def test_file_is_as_save_writes_it(tmp_path: Path):
    """So a diff of the file shows figures only."""
    save(load(), tmp_path / "figures.json")
    assert (tmp_path / "figures.json").read_text() == FILE.read_text()


def test_every_table_and_section_is_used():
    """Every figure in the file is quoted by a page, and every table is in a page."""
    text = "".join(path.read_text() for path in figures.pages())
    assert set(re.findall(r"^<!-- table: (\w+) -->$", text, re.MULTILINE)) == set(TABLES)
    used = set(re.findall(r"<!--= (\w+)\.", text))
    tables = {"ulx3s": {"ulx3s_tile_4", "ulx3s_tile_8", "ulx3s_paths", "ulx3s_simulated"}}
    tables["quantize_bits"] = set(WIDTHS) & set(load())
    tables |= {kind: set(designs(load(), kind)) for kind in ("levels", "resources")}
    assert set(load()) == used | (set(TABLES) - set(tables)) | set().union(*tables.values())


def test_sample_of_the_ulx3s_is_the_figure():
    """The line of the serial port is in a code block, which cannot hold a marker."""
    simulated = load()["ulx3s_simulated"]["figures"]["tile_4"]
    line = f"{simulated['results']} results, 0 wrong, {simulated['cycles']} cycles: pass"
    assert line in (store.ROOT / "docs" / "ulx3s.md").read_text()


def project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a copy of the pages and of the file, and lets the command use it."""
    (folder / "docs").mkdir()
    for path in figures.pages():
        (folder / path.relative_to(store.ROOT)).write_text(path.read_text())
    copy = folder / "docs" / "figures.json"
    copy.write_text(FILE.read_text())
    originals = figures.pages
    monkeypatch.setattr(figures, "ROOT", folder)
    monkeypatch.setattr(figures, "pages", lambda: originals(folder))
    monkeypatch.setattr(figures, "load", lambda: load(copy))
    monkeypatch.setattr(figures, "save", lambda sections: save(sections, copy))
    return copy


def test_old_page_is_found_and_written(tmp_path: Path, monkeypatch, capsys):
    copy = project(tmp_path, monkeypatch)
    assert figures.main(["--check"]) == 0
    sections = load(copy)
    sections["tokens"]["figures"][0]["cycles"] += 1
    sections["resources_tile_16_fixed"]["figures"]["total"]["LUT"] += 1
    save(sections, copy)
    before = (tmp_path / "README.md").read_text()
    assert figures.main(["--check"]) == 1
    names = [re.sub(r"error: (\S+) is not up.*", r"\1", line) for line in capsys.readouterr().err.splitlines()]
    assert names == ["README.md", "docs/resources.md"]
    assert (tmp_path / "README.md").read_text() == before
    assert figures.main([]) == 0 and figures.main(["--check"]) == 0
    cycles = sections["tokens"]["figures"][0]["cycles"]
    assert f"| ideal | {cycles:,} |" in (tmp_path / "README.md").read_text()


def test_number_changed_by_hand_is_found(tmp_path: Path, monkeypatch, capsys):
    project(tmp_path, monkeypatch)
    page = tmp_path / "README.md"
    page.write_text(re.sub(r"\d[\d,]*<!--= decoders", "9,999,999<!--= decoders", page.read_text(), count=1))
    assert figures.main(["--check"]) == 1
    assert "README.md is not up to date" in capsys.readouterr().err


def test_take(tmp_path: Path, monkeypatch):
    copy = project(tmp_path, monkeypatch)
    document = tmp_path / "quantize.json"
    new = {"perplexity": {"float": 20.0, "rtn": 30.0, "awq": 22.5}, "recovered": 0.75, "layers": [1, 2]}
    new |= {"bits": 4, "group_size": 64, "stream": {"layers": 2, "narrow": 2, "float16": 8}}
    document.write_text(json.dumps({**new, "bytes": {"float16": 4_000_000, "quantized": 1_000_000, "smaller": 75.0}}))
    assert figures.main(["--take", f"quantize={document}"]) == 0
    assert "layers" not in load(copy)["quantize"]["figures"]
    text = (tmp_path / "docs" / "quantize.md").read_text()
    assert "| AWQ and GPTQ | 22.5000 | +12.50 % |" in text and "recover 75.0<!--= quantize.recovered" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--take", "quantize"], "argument --take: SECTION=FILE is wanted, not 'quantize'"),
        (["--take", "quantize=missing.json"], r"missing\.json: .*No such file"),
        (["--take", "nothing=list.json"], r"figures\.json has no section nothing, but layers, gemm, "),
        (["--take", "quantize=list.json"], "section quantize of .* is a dict, not a list"),
        (
            ["--take", "quantize=dict.json"],
            "section quantize of .* needs bits, group_size, perplexity, recov",
        ),
        (["--check", "--take", "quantize=list.json"], "argument --take: not allowed with argument --check"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, tmp_path: Path, monkeypatch):
    copy = project(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("dict.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        figures.main(arguments)
    assert copy.read_text() == FILE.read_text()


def test_find():
    assert find(SECTIONS, "bench.32.cycles") == 500
    assert find(SECTIONS, "bench.ideal.16.cycles") == 1000
    assert find(SECTIONS, "other.bytes.all") == 2_500_000
    for path in ("bench.ideal.cycles", "bench.64.cycles", "other.bytes", "other.ratio.all", "none", "bench"):
        with pytest.raises(UserError, match=f"there is no single figure {path} in figures.json"):
            find(SECTIONS, path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("took 1<!--= bench.16.cycles -->.", "took 1,000<!--= bench.16.cycles -->."),
        ("(-5.0e-03<!--= other.ratio .1e -->)", "(2.5e-01<!--= other.ratio .1e -->)"),
        ("1<!--= other.ratio * 100 .0f --> %", "25<!--= other.ratio * 100 .0f --> %"),
        ("| 1<!--= other.bytes.all * 1e-6 .2f --> |", "| 2.50<!--= other.bytes.all * 1e-6 .2f --> |"),
        ("<!-- table: t -->\nold\n<!-- end -->\n", "<!-- table: t -->\nnew\n<!-- end -->\n"),
        ("<!-- table: t -->\n<!-- end -->\n", "<!-- table: t -->\nnew\n<!-- end -->\n"),
        ("nothing <!-- a comment -->", "nothing <!-- a comment -->"),
    ],
)
def test_render(before: str, after: str):
    tables = {"t": lambda sections: "new"}
    assert render(before, SECTIONS, tables) == after
    assert render(after, SECTIONS, tables) == after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: t -->\nold\n", "a table has no <!-- end -->"),
        ("<!-- table: two words -->\n<!-- end -->\n", "its name is damaged"),
        ("<!-- table: u -->\n<!-- end -->\n", "there is no table u, but t"),
        ("many<!--= other.ratio -->", "there is no number before <!--= other.ratio -->"),
        ("1<!--= other.ratio", "the marker of a figure is damaged"),
        ("1<!--= other.none -->", "there is no single figure other.none"),
    ],
)
def test_damaged_markers(text: str, message: str):
    with pytest.raises(UserError, match=message):
        render(text, SECTIONS, {"t": lambda sections: "new"})


@pytest.mark.parametrize("text", ["", "{", '{"a": {"command": "x", "figures": 1}}'])
def test_damaged_file(text: str, tmp_path: Path):
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        load(path)
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "none.json")


def test_take_keeps_other_sections():
    sections = json.loads(json.dumps(SECTIONS))
    take(sections, "bench", [{"memory": "ideal", "tile": 16, "cycles": 7}])
    assert sections["bench"]["figures"][0]["cycles"] == 7 and sections["other"] == SECTIONS["other"]
