# SPDX-License-Identifier: Apache-2.0
"""The format of a model file, by its first bytes. Names are not reliable: Ollama's blobs have no suffix."""

from enum import Enum
from pathlib import Path

from sw.common.errors import UserError, one_line

HEAD_BYTES = 64
NOT_PYTORCH = "which is not read: save the model with safe_serialization=True"
WEB_PAGE = "a web page, not a model: the download went wrong"
GGML = "in GGML's format from before GGUF, which is not read: llama.cpp's convert scripts make a GGUF file"
OTHERS: dict[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: `git lfs pull` fetches it",
    **dict.fromkeys((b"<!doctype html", b"<html"), WEB_PAGE),
    **dict.fromkeys((b"lmgg", b"tjgg", b"fmgg"), GGML),
    b"pk\x03\x04": f"a PyTorch or zip file, {NOT_PYTORCH}",
    b"\x80\x02": f"a pickle, {NOT_PYTORCH}",
}
"""First bytes, in lower case -> the kind of a file that is not a supported model, and what to do."""


class Kind(Enum):
    """Formats of a model in one file."""

    ONNX = "ONNX"
    GGUF = "GGUF"
    SAFETENSORS = "safetensors"


def file_kind(path: Path) -> Kind:
    """The format of a file. ONNX has no magic number: a file of no other known format is taken as ONNX, and the ONNX
    reader checks it.

    Raises UserError if the file cannot be read, is empty, or is of a known kind that is not supported.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None
    if not head:
        raise UserError(f"{path} is empty")
    if head.startswith(b"GGUF"):
        return Kind.GGUF
    # A length of 8 bytes, then the header's JSON object.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return Kind.SAFETENSORS
    text = head.lower().lstrip()
    for start, what in OTHERS.items():
        if text.startswith(start):
            raise UserError(f"{path} is {what}")
    for suffix, kind in ((".gguf", "GGUF"), (".safetensors", "safetensors")):
        if path.suffix.lower() == suffix:
            raise UserError(f"{path} is not a {kind} file in spite of its name: it is damaged or something else")
    return Kind.ONNX
