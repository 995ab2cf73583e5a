# SPDX-License-Identifier: Apache-2.0
"""For wrong variables and unsupported paths make prints one line, before it installs or builds anything."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hw.spec.config import AcceleratorConfig, ConfigError
from sim import check_make
from sim.harness import PATH_CHARACTERS, SetupError, check_path

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = dict(re.findall(r"^([a-z-]+):[^=\n]*##.*\n((?:\t.*\n|[a-z]+(?: .*)?\n)*)", MAKEFILE, re.M))
"""Recipe by name of each target that `make help` lists; conditionals are part of it."""
SILENT = {"help", "clean"}
"""Targets that install nothing, so they work everywhere."""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make on PATH")


WITH_TILE = [target for target, reads in check_make.TARGETS.items() if "TILE" in reads]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files of a checkout that the checks need, without a .venv, and a Python that only prints its arguments.

    It has no site-packages, like Python on a fresh machine.
    """
    folder = tmp_path_factory.mktemp("checkout")
    fill(folder)
    return folder


def fill(folder: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("hw", "sim"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    stub = folder / "stub"
    stub.write_text(
        f'#!/bin/sh\ncase "$1 $2" in -c*|-V*|"-m sim.check_make") exec "{sys.executable}" -S "$@";; esac\n'
        'echo "INSTALLS: $*"\nexit 9\n'
    )
    stub.chmod(0o755)


def make(folder: Path, *arguments: str, python: str | None = "./stub") -> tuple[int, str, list[str]]:
    """Exit status, stdout and error lines."""
    environment = {"PATH": os.environ["PATH"]}
    words = ["make", *arguments] + ([] if python is None else [f"PYTHON={python}"])
    run = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout, [line for line in run.stderr.splitlines() if not line.startswith("make: ***")]


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        *((target, "TILE=7", "tile is one of 4, 8, 16, 32, not 7") for target in WITH_TILE),
        *((target, "TILE=x y", "tile is one of 4, 8, 16, 32, not 'x y'") for target in WITH_TILE),
        ("demo", "PROMPT=", 'PROMPT is empty; ask something with PROMPT="..."'),
        ("sim", "SIM=modelsim", "SIM is verilator or icarus, or several with a comma, not 'modelsim'"),
        ("sim", "SIM=", "SIM is verilator or icarus, or several with a comma, not ''"),
        ("bitstream", "BOARD=KV260", "BOARD is kv260 or ulx3s, not 'KV260'"),
        ("bitstream", "BOARD=", "BOARD is kv260 or ulx3s, not ''"),
        ("ip", "BOARD=ulx3s", "BOARD is kv260, not 'ulx3s'"),
        ("resources", "BOARD=ulx3s", "BOARD is kv260, not 'ulx3s'"),
        ("wave", "SEED=x", "SEED is a whole number from 0, not 'x'"),
        ("wave", "BENCH=", "BENCH is empty; name a bench with BENCH=tb_fifo (python -m sim.run --list prints all)"),
        ("bench", "CHECK=2", "CHECK is 1 or nothing, not '2'"),
        ("sim", "tile=8", "make has no variable tile; there is TILE"),
        ("demo", "PROMT=x", "make has no variable PROMT; there is PROMPT"),
    ],
)
def test_wrong_value(checkout, target, given, message):
    assert make(checkout, target, given) == (2, "", [f"error: {message}"])


def test_tile_of_the_board(checkout):
    message = "error: TILE is 4 or 8 for BOARD=ulx3s, not 16"
    assert make(checkout, "bitstream", "BOARD=ulx3s", "TILE=16") == (2, "", [message])


@pytest.mark.parametrize(
    ("target", "python"),
    [
        *((target, "no-such-python") for target in sorted(set(TARGETS) - SILENT)),
        *(("venv", python) for python in ("", "false", "two words; ls")),
    ],
)
def test_wrong_python(checkout, target, python):
    status, out, (error,) = make(checkout, target, python=python)
    assert (status, out) == (2, "")
    found = "is no Python, Python 3.11 or newer is needed" if python == "false" else f"no '{python}' on PATH"
    assert found in error and error.startswith("error: ") and "PYTHON=python3.11" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "TILE=4", 'PROMPT=what\'s "this"; $$(ls)?'),
        ("sim", "TILE=32", "SIM=verilator,icarus"),
        ("bitstream", "BOARD=ulx3s", "TILE=8"),
        ("bitstream", "TILE=16"),
        ("ip", "TILE="),
        ("resources", "TILE=8", "BOARD=kv260"),
        # Variables that these targets do not read, and names that have a meaning for other programs.
        ("lint", "TILE=7", "BOARD=x", "CXX=clang++", "V=1"),
    ],
    ids=" ".join,
)
def test_right_values(checkout, arguments):
    """The checks pass, and make begins the installation."""
    status, out, errors = make(checkout, *arguments)
    assert "INSTALLS: -m venv" in out or any("virtual environments" in line for line in errors)
    assert status == 2


@pytest.mark.parametrize("name", ["a b", "a$b", "a#b", "a:b", "a'b", 'a"b', "a;b", "a&b", "a(b", "a\\b", "aéb", "a\nb"])
def test_odd_path(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    fill(folder)
    status, out, (error,) = make(folder, "venv", python=sys.executable)
    assert (status, out) == (2, "")
    assert error.startswith("error: the path of this checkout has ")
    assert ("a space" if name == "a b" else repr(name[1])) in error
    assert not (folder / ".venv").exists()
    assert make(folder, "help", python=None)[0] == 0


def test_paths():
    check_path(Path("/home/some.one/src-1/grist_mill+x,y@z"))
    for character in map(chr, range(1, 256)):
        if character in PATH_CHARACTERS:
            check_path(Path(f"/a{character}b"))
        else:
            with pytest.raises(SetupError, match="the path of this checkout has"):
                check_path(Path(f"/a{character}b"))


def test_every_variable_is_checked():
    """Every variable that a target reads is checked for this target."""
    assert set(re.findall(r"^([A-Z]+)\s*\?=", MAKEFILE, re.M)) == set(check_make.NAMES)
    assert {"demo", "sim", "bitstream", "test", "help"} <= set(TARGETS)
    for target, recipe in TARGETS.items():
        read = {name for name in check_make.NAMES if f"$({name})" in recipe or f"$${name}" in recipe}
        assert read <= set(check_make.TARGETS.get(target, {})), target
    assert set(check_make.TARGETS) <= set(TARGETS)


def test_every_target_is_checked():
    """Every target depends on the stamp, except those that install nothing; the stamp depends on the check."""
    assert re.search(r"^\$\(STAMP\): .*\| variables$", MAKEFILE, re.M)
    for target in set(TARGETS) - SILENT:
        assert re.search(rf"^{target}: \$\(STAMP\)", MAKEFILE, re.M), target


def test_help_has_the_values():
    """`make help` runs before any Python, so its text is compared here."""
    tiles = []
    for tile in range(65):
        with contextlib.suppress(ConfigError):
            tiles.append(AcceleratorConfig(tile=tile).tile)
    listed = f"{', '.join(map(str, tiles[:-1]))} or {tiles[-1]}"
    assert f"TILE={listed} " in MAKEFILE
    assert f"BOARD={' or '.join((*check_make.BOARDS, *check_make.SELFTEST_BOARDS))} " in MAKEFILE
    assert f"SIM={','.join(check_make.SIMULATORS)} " in MAKEFILE
