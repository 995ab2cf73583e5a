# SPDX-License-Identifier: Apache-2.0
"""Models by their names on the Hugging Face Hub: org/name, org/name@revision, org/name:FILE.

huggingface_hub does the work: its cache (HF_HOME, HF_HUB_CACHE), its token (HF_TOKEN, `hf auth login`), its mirror
(HF_ENDPOINT), its progress. A model whose files are in the cache is used without a request, so that it never changes
by itself; `hf download org/name` updates it. Otherwise the files that an export needs are downloaded, no others.
"""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sw.checkpoints.gguf.parts import PART
from sw.checkpoints.safetensors_file import INDEX, WHOLE
from sw.common.errors import UserError, one_line
from sw.export.layouts import ONNX, choose_graph

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^:@\s]+))?(:(?P<file>\S[^:]*))?", re.ASCII)
FILES = (".gguf", ONNX)
"""Suffixes of a FILE."""
NOT_NAMES = (*FILES, ".safetensors", ".json", ".bin")
"""A text with such an ending is a path, although org/name has the same form."""
TEXTS = (".json", ".jinja", ".npy")
"""Suffixes of the files beside the weights: settings, tokenizer, chat template, scales of integer tables."""
PROJECTOR = "mmproj"
CONSOLIDATED = "consolidated"
"""Mistral's own form of the weights, a second time."""
TIMEOUT = 20.0
"""Seconds until the hub must answer the first request."""
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
ELSEWHERE = "or name a local file or folder"


@dataclass(frozen=True)
class HubName:
    """A MODEL argument of the form org/name[@revision][:FILE]. revision: None for the default branch."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


class _Unreachable(UserError):
    """The hub cannot be reached, or must not."""


def hub_name(text: str) -> HubName | None:
    """The name in a MODEL argument, or None if it has another form or is rather a path."""
    match = NAME.fullmatch(text)
    if match is None or match["repo"].lower().endswith(NOT_NAMES):
        return None
    return HubName(match["repo"], match["revision"], match["file"])


def fetch(name: HubName, floats: bool, check: Callable[[Path], None]) -> Path:
    """The local path of a model: an ONNX file, a GGUF file, or a folder with *.safetensors.

    floats: of several graphs take the float one. check: called with a folder that has a checkpoint's settings, but not
    yet its tensors; it raises UserError if the checkpoint cannot be used. Raises UserError if there is no such model,
    if it cannot be reached or read, and if it is unclear which of its files is meant.
    """
    try:
        import huggingface_hub as hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"{name} needs the Python package huggingface_hub, which is not installed") from None
    # Its warnings would be lines of their own beside the one line of an error.
    hub.logging.set_verbosity_error()
    cached = _in_cache(hub, name, floats)
    if cached is not None:
        return cached
    try:
        with _errors(hub, name):
            info = hub.HfApi().model_info(name.repo, revision=name.revision, timeout=TIMEOUT)
    except _Unreachable:
        snapshot = _snapshot(hub, name, floats)
        if snapshot is None:
            raise
        return snapshot
    model, files = _needed(name, [item.rfilename for item in info.siblings or []], floats)
    if not model:
        check(_download(hub, name, [file for file in files if file.endswith(TEXTS)]))
    return _download(hub, name, files) / model


def _download(hub: Any, name: HubName, files: Sequence[str]) -> Path:
    """The snapshot's folder, in which these files are now."""
    with _errors(hub, name, begun=True):
        return Path(hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=_patterns(files)))


def repository(path: Path) -> str | None:
    """The name of the repository, without its organization, of whose snapshot in the cache `path` is the folder."""
    if path.parent.name != "snapshots" or not path.parent.parent.name.startswith("models--"):
        return None
    return path.parent.parent.name.rpartition("--")[2]


def _in_cache(hub: Any, name: HubName, floats: bool) -> Path | None:
    """The model if all its files are in the cache, by the list of files that the last download left there."""
    try:
        names = [item.path for item in hub.get_cached_repo_tree(name.repo, revision=name.revision)]
        model, files = _needed(name, names, floats)
        patterns = _patterns(files)
        snapshot = hub.snapshot_download(
            name.repo, revision=name.revision, allow_patterns=patterns, local_files_only=True
        )
    except (hub.errors.CachedRepoTreeNotFoundError, hub.errors.LocalEntryNotFoundError):
        return None
    except (hub.errors.HFValidationError, OSError, ValueError) as error:
        raise UserError(f"{name} is no name of a model ({one_line(error)})") from None
    return Path(snapshot, model)


def _snapshot(hub: Any, name: HubName, floats: bool) -> Path | None:
    """The model in a snapshot that another program downloaded, which leaves no list of files; None if it has no model.

    Whether all files are there shows when they are read.
    """
    try:
        folder = Path(hub.snapshot_download(name.repo, revision=name.revision, local_files_only=True))
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return folder / _needed(name, names, floats)[0]
    except (UserError, OSError):
        return None


def _needed(name: HubName, names: Sequence[str], floats: bool) -> tuple[str, list[str]]:
    """The model's path in the repository ("" for its root), and the files that it needs. names: all files."""
    names = sorted(names)
    texts = [item for item in names if "/" not in item and item.endswith(TEXTS)]
    models = [item for item in names if item.lower().endswith(".gguf") and PROJECTOR not in item.lower()]
    firsts = [item for item in models if _parts(item, models)[0] == item]
    if name.file is not None:
        if name.file not in names or not name.file.lower().endswith(FILES):
            found = firsts or [item for item in names if item.endswith(ONNX)]
            what = "GGUF files: " + ", ".join(firsts) if firsts else "ONNX files: " + (", ".join(found) or "none")
            raise UserError(f"{name} has no file {name.file[:200]}; its {what}")
        if name.file.lower().endswith(".gguf"):
            return name.file, _parts(name.file, names)
        return name.file, [*texts, *_with_data(name.file, names)]
    graph = choose_graph(str(name), names, floats)
    if graph is not None:
        return graph, [*texts, *_with_data(graph, names)]
    tensors = [item for item in names if "/" not in item and item.endswith(".safetensors")]
    if WHOLE in tensors:
        return "", [*texts, WHOLE]
    if tensors:
        return "", [*texts, *(item for item in tensors if INDEX not in names or not item.startswith(CONSOLIDATED))]
    if len(firsts) == 1:
        return firsts[0], _parts(firsts[0], models)
    if firsts:
        raise UserError(f"{name} has {len(firsts)} GGUF models, name one as {name}:FILE ({', '.join(firsts)})")
    raise UserError(f"{name} holds no model: no .onnx, .safetensors or GGUF file")


def _parts(file: str, names: Sequence[str]) -> list[str]:
    """All files of the GGUF model to which a file belongs."""
    match = PART.fullmatch(file)
    if match is None:
        return [file]
    same = [(part, PART.fullmatch(part)) for part in names]
    parts = [part for part, other in same if other and all(other[key] == match[key] for key in ("name", "count"))]
    return sorted(parts) or [file]


def _with_data(graph: str, names: Sequence[str]) -> list[str]:
    """A graph and the files of its external data, whose names begin with its own, with or without the suffix."""
    path = PurePosixPath(graph)
    folder = graph.removesuffix(path.name)
    starts = [f"{folder}{stem}{end}" for stem in (path.name, path.stem) for end in (".data", "_data")]
    return [graph, *(item for item in names if item.startswith(tuple(starts)))]


def _patterns(files: Sequence[str]) -> list[str]:
    """Files as patterns: a name may have characters that a pattern would interpret."""
    return [glob.escape(file) for file in files]


@contextmanager
def _errors(hub: Any, name: HubName, begun: bool = False) -> Iterator[None]:
    """Every failure of a download as one line. begun: whether the hub has answered before."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    missing = f"{name} is neither a path nor in the local Hugging Face cache ({hub.constants.HF_HUB_CACHE})"
    try:
        yield
    except errors.GatedRepoError:
        problem = f"{name} is gated: accept its terms at {endpoint}/{name.repo}, then {LOGIN}"
        raise UserError(problem) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name.repo} has no revision {name.revision} ({endpoint})") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError(f"{name} is private, or does not exist: {LOGIN} (401 from {endpoint})") from None
        if status == 404:
            raise UserError(f"no such model: {name} is neither a path nor on the hub ({endpoint})") from None
        raise UserError(f"{name} cannot be downloaded: {endpoint} answers {status}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name} is no name of a model ({one_line(error)})") from None
    except errors.OfflineModeIsEnabled:
        raise _Unreachable(f"{missing}, and HF_HUB_OFFLINE forbids downloads: unset it, {ELSEWHERE}") from None
    except Exception as error:
        # huggingface_hub lets the errors of its HTTP client pass, which is not the same package in all its versions.
        cause = (one_line(error) or type(error).__name__)[:200]
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise UserError(f"{name} cannot be stored in {hub.constants.HF_HUB_CACHE} ({cause})") from None
        if isinstance(error, OSError | ValueError) and not isinstance(error, ConnectionError | TimeoutError):
            raise UserError(f"{name} cannot be downloaded from {endpoint} ({cause})") from None
        if begun:
            raise UserError(
                f"{name}: the download from {endpoint} broke off ({cause}); run it again to go on"
            ) from None
        raise _Unreachable(f"{missing}, and {endpoint} cannot be reached ({cause}): connect, {ELSEWHERE}") from None
