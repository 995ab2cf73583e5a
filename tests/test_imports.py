# SPDX-License-Identifier: Apache-2.0
"""The rules of the source: allowed imports, no cycles, small rooms, no long files, a licence line in every file.

A board runs sw with numpy and onnxruntime only, and the hardware's contract is in hw.spec only. These tests ensure
both. The order of the rooms is in `tests/rooms.py`.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.rooms import MAX_MODULES, ORDER, OTHERS, ROOT, covers, imports, modules, room, source_imports

SPDX = "SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 500
IMPORTS = source_imports()


def forbidden(module: str, names: Iterable[tuple[int, str]]) -> list[str]:
    """Imports of a module that the tables do not allow, as ``line: name``."""
    order, own = ORDER[module.split(".")[0]], room(module)
    others = OTHERS[max((name for name in OTHERS if covers(name, module)), key=len)]

    def allowed(name: str) -> bool:
        if covers(order[-1].split(".")[0], name):
            return order.index(room(name)) <= order.index(own)
        return name.split(".")[0] in sys.stdlib_module_names or any(covers(other, name) for other in others)

    return [f"{line}: {name}" for line, name in names if not allowed(name)]


def targets(module: str, edges: Mapping[str, Iterable[tuple[int, str]]]) -> set[str]:
    """Those of the given modules that a module imports."""
    names = {name if name in edges else name.rpartition(".")[0] for _, name in edges[module]}
    return {name for name in names if name in edges and name != module}


def cycle(edges: Mapping[str, Iterable[tuple[int, str]]]) -> list[str]:
    """One import cycle, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(targets(module, edges)):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := visit(module, []))), [])


def packages_behind(module: str, edges: Mapping[str, Iterable[tuple[int, str]]]) -> set[str]:
    """Third-party packages that a module and all its imports need."""
    seen, new = set(), {module}
    while new:
        seen |= new
        new = {target for name in new for target in targets(name, edges)} - seen
    names = {name.split(".")[0] for module in seen for _, name in edges[module]}
    return names - set(sys.stdlib_module_names) - set(ORDER)


def is_command(source: str) -> bool:
    """Whether a module has a main function and calls it when it runs as a program."""
    body = ast.parse(source).body
    has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
    return has_main and any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in body
    )


def crowded(paths: Iterable[Path]) -> dict[Path, int]:
    """Folders with more modules than a reader can survey."""
    count = Counter(path.parent for path in paths if path.suffix == ".py" and path.name != "__init__.py")
    return {folder: modules for folder, modules in count.items() if modules > MAX_MODULES}


def sources() -> list[Path]:
    """Every source file that is not generated."""
    suffixes = {".py", ".v", ".vlt", ".cpp", ".cc", ".h", ".hpp", ".sh", ".tcl", ".xdc", ".lpf", ".toml"}
    files = [
        p
        for folder in (*ORDER, "tests", "constraints", "examples")
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


@pytest.mark.parametrize("module", IMPORTS)
def test_imports(module: str):
    assert forbidden(module, IMPORTS[module]) == []


def test_no_cycles():
    assert cycle(IMPORTS) == []


@pytest.mark.parametrize("module", ["sw.doctor", "sw.devices"])
def test_a_board_needs_numpy_alone(module: str):
    assert packages_behind(module, IMPORTS) == {"numpy"}


@pytest.mark.parametrize("module", [name for name in IMPORTS if name.count(".") == 1 and not name.startswith("sim")])
def test_roots_hold_commands_and_rooms(module: str):
    path = modules()[module]
    assert path.name == "__init__.py" or is_command(path.read_text()), f"{module} is no command and belongs in a room"


def test_rooms_are_small():
    assert crowded(sources()) == {}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files(path: Path):
    text = path.read_text()
    assert has_spdx(text), f"The first line lacks {SPDX!r}"
    assert not too_long(text), f"{len(text.splitlines())} lines, the limit is {MAX_LINES}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hw.spec.config", "from amaranth import Signal"),
        ("hw.spec.config", "from hw.rtl.core import pe"),
        ("hw.spec.config", "from ..rtl.core.pe import PE"),
        ("hw.spec.config", "from .numerics import linear"),
        ("hw.spec.memory.geometry", "from hw.spec.ops import command"),
        ("hw.spec.control.registers", "from hw.spec import manifest"),
        ("hw.rtl.core.pe", "import numpy as np"),
        ("hw.rtl.core.pe", "from sim.bench import streams"),
        ("hw.rtl.core.pe", "from hw import build"),
        ("hw.rtl.core.pe", "from hw.rtl.memory.axi import ADDRESS_BITS"),
        ("hw.rtl.common.fifo", "from ..core import pe"),
        ("hw.rtl.memory.axi", "from hw.rtl import datapath"),
        ("hw.boards.kv260", "from hw.rtl import accelerator"),
        ("hw.flows.lower", "from hw.build import main"),
        ("hw.build", "from sw.devices import pack"),
        ("sim.run", "from hw.rtl.core.pe import PE"),
        ("sim.run", "import amaranth"),
        ("sim.run", "def f():\n    from sw.devices import rtl"),
        ("sim.harness", "from sim.bench import streams"),
        ("sim.bench.streams", "from sim.tb.core import tb_pe"),
        ("sw.runtime", "import amaranth"),
        ("sw.runtime", "from hw import rtl"),
        ("sw.devices.kv260", "import onnx"),
        ("sw.devices.pack", "import importlib\nimportlib.import_module('hw.rtl.core.pe')"),
        ("sw.devices.pack", "from sim.harness import run_bench"),
        ("sw.devices.pack", "from sw.runtime import decoder"),
        ("sw.graph.decoder", "from sw.checkpoints.autoawq import awq_format"),
        ("sw.runtime.score", "from ..console import perplexity_report"),
        ("sw.console.options", "from sw import generate"),
        ("sw.model.linear", "from sw.doctor import main"),
    ],
)
def test_forbidden_import_is_found(module: str, source: str):
    assert len(forbidden(module, imports(source, module))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "hw.spec.memory.geometry",
            "import math\nimport numpy as np\nfrom hw.spec import config\nfrom ..config import X\nfrom . import access",
        ),
        (
            "hw.rtl.core.pe",
            "from amaranth import lib\nfrom hw.spec.config import X\nfrom ..common import fifo\nfrom . import dsp48e2",
        ),
        (
            "hw.build",
            "import re\nfrom hw.rtl.core import core\nfrom hw.spec import manifest\nfrom amaranth.back import rtlil",
        ),
        (
            "sim.tb.core.tb_pe",
            "import cocotb\nimport numpy as np\nfrom hw.spec import config\nfrom sim.bench.streams import start",
        ),
        (
            "sw.devices.rtl",
            "import ctypes\nimport numpy as np\nfrom hw.spec.memory.packing import pack\nfrom sw.devices import base",
        ),
        ("sw.graph.linears", "import onnx\nfrom sw.model import linear"),
        ("sw.generate", "from sw.console import options\nfrom sw import perplexity"),
    ],
)
def test_allowed_import_is_accepted(module: str, source: str):
    assert forbidden(module, imports(source, module)) == []


def _edges(**texts: str) -> dict[str, list[tuple[int, str]]]:
    return {"sw": [], **{f"sw.{name}": list(imports(text, f"sw.{name}")) for name, text in texts.items()}}


def test_cycle_is_found():
    texts = {"a": "from sw import b", "b": "import sw.c", "c": "from .a import x"}
    assert cycle(_edges(**texts)) == ["sw.a", "sw.b", "sw.c", "sw.a"]
    assert cycle(_edges(**texts | {"c": "import json"})) == []


def test_package_behind_other_modules_is_found():
    edges = _edges(
        a="from sw.b import x", b="import os\nfrom .c import y", c="def f():\n    import onnx.helper", d="import rich"
    )
    assert packages_behind("sw.a", edges) == {"onnx"}


def test_command_is_told_from_a_library():
    command = "def main(): ...\n\n\nif __name__ == '__main__':\n    main()\n"
    assert is_command(command)
    assert not is_command("def main(): ...\n")
    assert not is_command(command.replace("main()", "other()"))


def test_crowded_folder_is_found():
    room = [Path("sw/a", f"m{index}.py") for index in range(MAX_MODULES)]
    assert crowded([*room, Path("sw/a/__init__.py"), Path("sw/a/b/m.py"), Path("sw/a/m.v")]) == {}
    assert crowded([*room, Path("sw/a/more.py")]) == {Path("sw/a"): MAX_MODULES + 1}


def test_bad_file_is_found():
    assert not has_spdx("")
    assert not has_spdx("import os\n# SPDX-License-Identifier: Apache-2.0\n")
    assert has_spdx("#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n")
    assert too_long("x\n" * 501)
    assert not too_long("x\n" * 500)


def test_all_packages_are_found():
    assert {"sim.run", "sim.harness", "hw.rtl.core.pe", "sw.common"} <= set(modules())
