# SPDX-License-Identifier: Apache-2.0
"""The house rules: who may import whom, no cycles, no file over 500 lines, a licence line in every file.

A board runs sw with numpy and onnxruntime only, and a reader finds the hardware's contract in hw.spec only. Both hold
as long as these tests do.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hw", "sim", "sw")
SPDX = "SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 500

# Importer -> what it may import besides the standard library and its own package. The longest matching prefix counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "hw": ("hw", "amaranth", "numpy", "pyosys"),
    "hw.spec": ("numpy",),
    "hw.rtl": ("hw.spec", "amaranth"),
    "hw.boards": ("hw.spec", "amaranth", "amaranth_boards"),
    "sim": ("hw.spec", "cocotb", "cocotb_test", "cocotb_tools", "cocotbext", "numpy"),
    "sw": ("hw.spec", "numpy", "rich", "onnx", "onnxruntime", "gguf", "tokenizers", "jinja2"),
    # What drives a device, so that another program can use it with numpy alone.
    "sw.devices": ("hw.spec", "sw", "numpy"),
    "sw.pack": ("hw.spec", "sw", "numpy"),
}


def _covers(prefix: str, module: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the three packages, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def forbidden(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a module that the table does not allow, as ``line: name``."""
    own = max((prefix for prefix in ALLOWED if _covers(prefix, module)), key=len)
    allowed = (own, *ALLOWED[own])
    return [
        f"{line}: {name}"
        for line, name in imports(source, module, is_package)
        if name.split(".")[0] not in sys.stdlib_module_names and not any(_covers(prefix, name) for prefix in allowed)
    ]


def graph(sources: Mapping[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Which of the given modules each one imports."""
    edges: dict[str, set[str]] = {}
    for module, source in sources.items():
        edges[module] = set()
        for _, name in imports(source, module, module in packages):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and target != module:
                edges[module].add(target)
    return edges


def cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """One import cycle, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges[module]):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := visit(module, []))), [])


def sources() -> list[Path]:
    """Every source file that a person wrote."""
    suffixes = {".py", ".v", ".vlt", ".cpp", ".cc", ".h", ".hpp", ".sh", ".tcl", ".xdc", ".lpf", ".toml"}
    files = [
        p
        for folder in (*PACKAGES, "tests", "constraints", "examples")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in suffixes
    ]
    return sorted(files) + [ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".ci" / "run"]


def has_spdx(text: str) -> bool:
    """Whether the licence line is the first one, or the second after ``#!``."""
    lines = text.splitlines()
    return bool(lines) and SPDX in (lines[1] if lines[0].startswith("#!") and len(lines) > 1 else lines[0])


def too_long(text: str) -> bool:
    """Whether a file has more lines than one idea takes."""
    return len(text.splitlines()) > MAX_LINES


@pytest.mark.parametrize("module", modules())
def test_imports(module: str):
    path = modules()[module]
    assert forbidden(path.read_text(), module, path.name == "__init__.py") == []


def test_no_cycles():
    found = modules()
    texts = {name: path.read_text() for name, path in found.items()}
    assert cycle(graph(texts, {name for name, path in found.items() if path.name == "__init__.py"})) == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files(path: Path):
    text = path.read_text()
    assert has_spdx(text), f"The first line lacks {SPDX!r}"
    assert not too_long(text), f"{len(text.splitlines())} lines, the limit is {MAX_LINES}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hw.spec.config", "from amaranth import Signal"),
        ("hw.spec.config", "from hw.rtl import pe"),
        ("hw.spec.config", "from ..rtl.pe import PE"),
        ("hw.rtl.pe", "import numpy as np"),
        ("hw.rtl.pe", "from sim import streams"),
        ("hw.rtl.pe", "from hw import build"),
        ("hw.boards.kv260", "from hw.rtl import top"),
        ("hw.build", "from sw import pack"),
        ("sim.run", "from hw.rtl.pe import PE"),
        ("sim.run", "import amaranth"),
        ("sim.run", "def f():\n    from sw.devices import rtl"),
        ("sw.runtime", "import amaranth"),
        ("sw.runtime", "from hw import rtl"),
        ("sw.devices.kv260", "import onnx"),
        ("sw.pack", "import importlib\nimportlib.import_module('hw.rtl.pe')"),
        ("sw.pack", "from sim.harness import run_bench"),
    ],
)
def test_forbidden_import_is_found(module: str, source: str):
    assert len(forbidden(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hw.spec.layout", "import math\nimport numpy as np\nfrom hw.spec import config\nfrom .config import X"),
        (
            "hw.rtl.pe",
            "from amaranth.lib import wiring\nfrom hw.spec.config import AcceleratorConfig\nfrom . import fifo",
        ),
        (
            "hw.build",
            "import argparse\nfrom hw.rtl import core\nfrom hw.spec import manifest\nfrom amaranth.back import rtlil",
        ),
        (
            "sim.tb.tb_pe",
            "import cocotb\nimport numpy as np\nfrom hw.spec import numerics\nfrom sim.streams import start",
        ),
        (
            "sw.devices.rtl",
            "import ctypes\nimport numpy as np\nfrom hw.spec.layout import pack\nfrom sw.devices import base",
        ),
        ("sw.onnx_import", "import onnx"),
    ],
)
def test_allowed_import_is_accepted(module: str, source: str):
    assert forbidden(source, module) == []


def test_cycle_is_found():
    texts = {"sw.a": "from sw import b", "sw.b": "import sw.c", "sw.c": "from .a import x", "sw": ""}
    assert cycle(graph(texts, {"sw"})) == ["sw.a", "sw.b", "sw.c", "sw.a"]
    assert cycle(graph({**texts, "sw.c": "import json"}, {"sw"})) == []


def test_bad_file_is_found():
    assert not has_spdx("")
    assert not has_spdx("import os\n# SPDX-License-Identifier: Apache-2.0\n")
    assert has_spdx("#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n")
    assert too_long("x\n" * 501)
    assert not too_long("x\n" * 500)


def test_all_packages_are_found():
    assert {"sim.run", "sim.harness"} <= set(modules())
