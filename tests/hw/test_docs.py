# SPDX-License-Identifier: Apache-2.0
"""The generated page is up to date and complete, its links are valid, and its formulas equal the layout's."""

import re
from itertools import product
from pathlib import Path

import pytest

from hw import docs
from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.control.descriptor import DESCRIPTOR_WORDS, FIELDS
from hw.spec.control.registers import REGISTERS, ErrorCode
from hw.spec.memory.geometry import LayerLayout, ceil_div
from hw.spec.ops import OPS, Op

FOLDER = docs.PAGE.parent


def test_page_is_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert docs.main(["--check"]) == 0, "run python -m hw.docs"
    assert capsys.readouterr() == ("", "")


def test_check_finds_an_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "README.md"
    monkeypatch.setattr(docs, "PAGE", page)
    names = ("README.md", "attention.md", "gristmill.svd", "gristmill.h")

    def complaints(*names: str) -> str:
        return "".join(f"error: docs/{name} is not up to date; run python -m hw.docs\n" for name in names)

    assert docs.main(["--check"]) == 1
    assert capsys.readouterr() == ("", complaints(*names))
    assert list(tmp_path.iterdir()) == []
    assert docs.main([]) == 0
    assert page.read_text() == docs.page()
    assert docs.main(["--check"]) == 0
    for name in names:
        path = tmp_path / name
        good = path.read_text()
        path.write_text(good + "\n")
        assert docs.main(["--check"]) == 1
        assert capsys.readouterr() == ("", complaints(name))
        assert path.read_text() == good + "\n"
        path.write_text(good)


def test_everything_is_listed():
    page = docs.page() + docs.attention_page()
    for register in REGISTERS:
        row = next(line for line in page.splitlines() if f"**{register.name}**" in line)
        assert f"{register.offset:#05x}" in row and register.access.value in row and register.text in row
    fields = [field for register in REGISTERS for field in register.fields]
    parts = [field for op in OPS.values() for field in op.fields]
    for name, text in ((field.name, field.text) for field in [*fields, *parts]):
        assert name in page and text in page, name
    for code in ErrorCode:
        assert re.search(rf"^\| {code.value} \| {code.name} \|", page, re.MULTILINE)


def test_links_lead_somewhere():
    page = docs.page()
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in page.splitlines() if line.startswith("#")}
    links = set(re.findall(r"\]\(([^)]*)\)", page))
    assert {link[1:] for link in links if link.startswith("#")} <= headings
    files = {link for link in links if not link.startswith("#")}
    assert all((FOLDER / name).exists() for name in files)
    pages = {path.name for path in FOLDER.glob("*.md") if not path.name.endswith(".in.md")}
    others = pages - {docs.PAGE.name}
    assert others <= files, "a page in docs/ that the first page does not name"


def test_registers_in_the_text_exist():
    """A word in backticks before an offset names the register at that offset."""
    named = re.findall(r"`(\w+)(?:\.(\w+))?` \((0x[0-9a-f]{3})[,)]", docs.page())
    assert len(named) >= 8
    for name, field, offset in named:
        register = next(register for register in REGISTERS if register.name == name)
        assert register.offset == int(offset, 16)
        assert not field or register.field(field)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.opcode.name)
def test_diagram_has_every_bit(op: Op):
    """Each bit takes two characters: the borders in the diagram are at the borders of the fields."""
    lines = [line[7:-1] for line in docs.descriptor_diagram(op.fields).splitlines() if line.rstrip().endswith("|")]
    edges = {field.low for field in op.fields} | {field.low + field.width for field in op.fields}
    # Reserved words at the end are one line.
    assert len(lines) == min(DESCRIPTOR_WORDS, -(-max(edges) // 32) + 1)
    for word, line in enumerate(lines):
        assert len(line) == 63
        found = {32 * word + 31 - position // 2 for position in range(63) if line[position] == "|"}
        assert found == {edge for edge in edges if 32 * word < edge < 32 * word + 32}


def test_diagram_of_a_shorter_descriptor():
    """The reserved words at the end are one line."""
    fields = [field for field in FIELDS if field.low < 96]
    lines = [line for line in docs.descriptor_diagram(fields).splitlines() if line.rstrip().endswith("|")]
    assert len(lines) == 4 and lines[-1].split() == ["3-15", "|", "|"]


def test_words_of_the_example():
    words = [int(word, 16) for line in docs.example().splitlines() for word in line.split(":")[1].split()]
    assert len(words) == DESCRIPTOR_WORDS
    assert words[0] == 2 << 24 | 1 << 9 | 1
    assert words[2] == 1150
    # 72 output tiles of 5 + 112 beats of 16 bytes a port.
    assert words[3] == 112 << 16 | 5
    assert words[4:7] == [0x1000_0000 // 128, 0x1001_0000 // 128, 0x2000_0000 // 4096]
    assert words[7] >= 72 * 117 * 16 / 4096
    assert words[8] == ceil_div(4 * 1150, 128)
    assert not any(words[9:])


@pytest.mark.parametrize("tile", [4, 8, 16, 32])
def test_formulas(tile: int):
    """The page's formulas for header_beats, body_words, beats and the shortest group equal the layout's."""
    for bits, zero_point, ports, width in product(range(2, 9), ("integer", "fixed"), (1, 2, 4), (32, 64, 128)):
        config = AcceleratorConfig(
            tile=tile, weight_bits=bits, zero_point=zero_point, ports=ports, port_width=width, max_k=1024
        )
        z = bits if zero_point == "integer" else 16
        beat_bits, row_bits = ports * width, tile * bits
        beats_per_word = ceil_div(row_bits, beat_bits)
        rows = beats_per_word * beat_bits // row_bits
        slices_per_word = max(1, rows // tile)
        words_per_slice = ceil_div(tile, min(rows, slices_per_word * tile))
        for groups, group_slices, n in ((1, 1, 1), (3, 1, tile + 1), (1, 32 // tile, 5), (7, 128 // tile, 3 * tile)):
            legal = group_slices * words_per_slice > ceil_div(tile * (16 + z), beat_bits)
            size = group_slices * tile
            if not legal:
                with pytest.raises(ConfigError, match="scales are read"):
                    LayerLayout(config, k=groups * size, n=n, group_size=size)
                continue
            layer = LayerLayout(config, k=groups * size, n=n, group_size=size)
            assert layer.header_beats == ceil_div(8 * tile + groups * tile * (16 + z), beat_bits)
            assert layer.body_words == ceil_div(groups * group_slices, slices_per_word) * words_per_slice
            assert layer.beats == ceil_div(n, tile) * (layer.header_beats + layer.body_words * beats_per_word)
