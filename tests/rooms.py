# SPDX-License-Identifier: Apache-2.0
"""The rooms (folders) of the source, and which room imports which. ``python -m tests.rooms`` prints the graph.

A room is a package. A module in ``hw/`` or ``sw/`` itself is a command. Every room imports only rooms before it in its
tree's order, and from the other trees only ``hw.spec``. `tests/test_imports.py` enforces this.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_MODULES = 15
"""Modules of one folder, ``__init__.py`` not counted."""

ORDER: dict[str, tuple[str, ...]] = {
    "hw": (
        "hw.spec.config",
        "hw.spec.numerics",
        "hw.spec.memory",
        "hw.spec.latencies",
        "hw.spec.cycles",
        "hw.spec.ops",
        "hw.spec.control",
        "hw.spec.timing",
        "hw.spec",
        "hw.boards",
        "hw.rtl.common",
        "hw.rtl.arithmetic",
        "hw.rtl.vector",
        "hw.rtl.core",
        "hw.rtl.memory",
        "hw.rtl.attention",
        "hw.rtl.control",
        "hw.rtl",
        "hw.interface",
        "hw.flows",
        "hw",
    ),
    "sim": ("sim", "sim.device", "sim.bench", "sim.tb"),
    "sw": (
        "sw.common",
        "sw.pages",
        "sw.model",
        "sw.graph",
        "sw.ort",
        "sw.text",
        "sw.checkpoints",
        "sw.export",
        "sw.devices",
        "sw.program",
        "sw.runtime",
        "sw.awq",
        "sw.board",
        "sw.console",
        "sw",
    ),
}
"""Rooms of each tree. A module is in the room whose name is the longest prefix of the module's name."""

OTHERS: dict[str, tuple[str, ...]] = {
    "hw": ("amaranth",),
    "hw.spec": ("numpy",),
    "hw.boards": ("amaranth", "amaranth_boards"),
    "hw.rtl": ("amaranth",),
    "hw.flows": ("amaranth", "numpy"),
    "sim": ("hw.spec", "cocotb_test"),
    "sim.device": ("hw.spec",),
    "sim.bench": ("hw.spec", "cocotb", "cocotbext", "numpy"),
    "sim.tb": ("hw.spec", "cocotb", "cocotbext", "numpy"),
    "sw": ("hw.spec", "numpy", "rich", "tokenizers"),
    "sw.common": ("hw.spec", "numpy"),
    "sw.model": ("numpy",),
    "sw.graph": ("numpy", "onnx"),
    "sw.ort": ("numpy", "onnx", "onnxruntime"),
    "sw.text": ("numpy", "tokenizers", "jinja2"),
    "sw.checkpoints": ("hw.spec", "numpy", "onnx", "gguf", "tokenizers"),
    "sw.export": ("numpy", "huggingface_hub"),
    "sw.devices": ("hw.spec", "numpy"),
    "sw.program": ("hw.spec", "numpy"),
    "sw.runtime": ("hw.spec", "numpy", "onnxruntime"),
    "sw.awq": ("hw.spec", "numpy", "onnx", "onnxruntime"),
    "sw.board": ("hw.spec", "numpy"),
    "sw.console": ("hw.spec", "rich"),
}
"""Package -> its imports besides the standard library and its own tree. The longest matching name counts."""


def covers(prefix: str, module: str) -> bool:
    """Whether a module is a package or is in the package."""
    return module == prefix or module.startswith(prefix + ".")


def room(module: str) -> str:
    """The room of a module of one of the trees."""
    return max((name for name in ORDER[module.split(".")[0]] if covers(name, module)), key=len)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the trees, by dotted name."""
    found = {}
    for tree in ORDER:
        for path in sorted((root / tree).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of a module, inside functions too."""
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


def source_imports() -> dict[str, list[tuple[int, str]]]:
    """The imports of every module of the trees."""
    return {name: list(imports(path.read_text(), name, path.name == "__init__.py")) for name, path in modules().items()}


def main() -> None:
    """Prints every room with its number of modules and the rooms that it imports; a forbidden import is marked."""
    found = source_imports()
    sizes = Counter(room(name) for name, path in modules().items() if path.name != "__init__.py")
    arrows: dict[str, set[str]] = {name: set() for order in ORDER.values() for name in order}
    for module, names in found.items():
        for _, name in names:
            if name.split(".")[0] in ORDER and room(name) != room(module):
                arrows[room(module)].add(room(name))
    for tree, order in ORDER.items():
        print(f"{tree}: {len(order)} rooms, {sum(len(arrows[name]) for name in order)} arrows between them")
        for name in order:
            later = order[order.index(name) :]
            marked = [f"{other} (BACK)" if other in later else other for other in sorted(arrows[name])]
            print(f"  {name:16} {sizes[name]:3} modules  <- {', '.join(marked) or 'nothing'}")
    folders = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    folder, size = folders.most_common(1)[0]
    print(f"{len(found)} modules; the largest folder is {folder.relative_to(ROOT)} with {size}")


if __name__ == "__main__":
    main()
