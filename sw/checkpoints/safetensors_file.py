# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: the tensors of a Hugging Face checkpoint, memory-mapped, in one file or in shards.

Format (github.com/huggingface/safetensors): the header's length (uint64, little endian), the header (JSON: name ->
dtype, shape, data_offsets [begin, end] within the data; __metadata__ is text), the data, little endian and row major.
Shards have an index, model.safetensors.index.json, whose weight_map gives the file of each tensor.

The package safetensors (0.8) is not used. For numpy it copies every tensor, where a view of the file takes no memory.
It gives BF16 only if ml_dtypes is loaded, writes only what is in memory as a whole, and most of its messages about a
damaged file do not name the tensor.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sw.common.arrays import is_finite
from sw.common.errors import UserError, one_line

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""Maximum length of a header in bytes, as in the format's own reader."""
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "I8": "|i1"}
FLOATS = ("F16", "BF16", "F32")


class SafetensorsFile:
    """One file. Raises UserError if it is missing or truncated, or if its header has impossible entries.

    names: the names of its tensors, in the file's order.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
                if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER):
                    raise UserError(f"{self.path} is not a complete safetensors file: its header is cut or too long")
                header = json.loads(file.read(length))
            self._data = np.asarray(np.memmap(self.path, np.uint8, mode="r"))[LENGTH_BYTES + length :]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({one_line(error)})") from None
        except (ValueError, RecursionError):
            raise UserError(f"{self.path} is not a safetensors file: its header is not JSON") from None
        if not isinstance(header, dict):
            raise UserError(f"{self.path} is not a safetensors file: its header is not an object")
        header.pop("__metadata__", None)
        self._tensors = {name: self._entry(name, entry) for name, entry in header.items()}
        self.names = list(self._tensors)

    def kind(self, name: str) -> str:
        """The format's name of the tensor's element type: F16, BF16, I32 and so on."""
        return self._tensors[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._tensors[name][1]

    def size(self, name: str) -> int:
        """The tensor's size in bytes."""
        _, _, begin, end = self._tensors[name]
        return end - begin

    def tensor(self, name: str, part: int | None = None) -> np.ndarray:
        """A view of the file; for BF16, which numpy does not support, a float32 copy. part: index of the first axis.

        Raises UserError for element types that are not in DTYPES.
        """
        kind, shape, begin, end = self._tensors[name]
        if kind not in DTYPES:
            raise UserError(f"{self.path}: tensor {name} is {kind}; {', '.join(DTYPES)} are read")
        values = self._data[begin:end].view(DTYPES[kind]).reshape(shape)
        values = values if part is None else values[part]
        if kind == "BF16":
            # BF16 is the upper half of a float32. Shift in place, because a head's table has hundreds of megabytes.
            bits = values.astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        return values

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        if not isinstance(entry, dict):
            raise self._impossible(name, "its entry is not an object")
        kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(kind, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self._impossible(name, "it lacks a dtype, a shape or two data_offsets")
        begin, end = offsets
        if not begin <= end <= len(self._data):
            raise self._impossible(name, f"it is at {begin} to {end} of {len(self._data)} bytes of data")
        # The other axes of an empty tensor may have any size; numpy refuses sizes that are too large.
        beyond = math.prod(size or 1 for size in shape) > max(len(self._data), 1)
        if kind in DTYPES and (beyond or math.prod(shape) * np.dtype(DTYPES[kind]).itemsize != end - begin):
            raise self._impossible(name, f"{kind} {shape} does not take {end - begin} bytes")
        return kind, tuple(shape), begin, end

    def _impossible(self, name: str, problem: str) -> UserError:
        return UserError(f"{self.path} is damaged: tensor {name[:200]}: {problem}")


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. dtype: the format's name of the type. parts: yields the values, some rows at a time, in the
    type that DTYPES gives (for BF16: the bits).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def write_safetensors(path: Path, tensors: Sequence[NewTensor], advance: Callable[[], None] | None = None) -> None:
    """Writes one file; memory holds one part of a tensor at a time. advance: called after each tensor."""
    header, end = {}, 0
    for tensor in tensors:
        offsets = [end, end + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for tensor in tensors:
            for part in tensor.parts():
                part.tofile(file)
            if advance is not None:
                advance()


class Checkpoint:
    """All tensors of a folder, from the files that transformers would read: model.safetensors if it exists, else the
    shards that the index names, else all *.safetensors files.

    Raises UserError if there is no file, a shard is missing, a file is damaged, or two files have a tensor of the same
    name.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._files: dict[str, SafetensorsFile] = {}
        for path in self._shards():
            file = SafetensorsFile(path)
            if twice := [name for name in file.names if name in self._files]:
                other = self._files[twice[0]].path.name
                raise UserError(
                    f"{self.folder}: tensor {twice[0]} is in {other} and in {path.name}: remove one of them"
                )
            self._files |= dict.fromkeys(file.names, file)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str, part: int | None = None) -> np.ndarray:
        """See SafetensorsFile.tensor. Raises UserError if there is no tensor of this name."""
        return self._file(name).tensor(name, part)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises UserError if there is no tensor of this name."""
        return self._file(name).shape(name)

    def integers(self, name: str, kinds: Sequence[str] = ("I32",)) -> np.ndarray:
        """A tensor of integers. kinds: the format's names of the types. Raises UserError for other types."""
        kind = self._file(name).kind(name)
        if kind not in kinds:
            raise UserError(f"{self.folder}: tensor {name} is {kind}, not {' or '.join(kinds)}")
        return self.tensor(name)

    def table(self, name: str, part: int | None = None) -> np.ndarray:
        """A tensor of floats: float16 if it is stored so, else float32. part: index of the first axis.

        Raises UserError for other types and for values that are not finite.
        """
        kind = self._file(name).kind(name)
        if kind not in FLOATS:
            raise UserError(f"{self.folder}: tensor {name} is {kind}, not one of {', '.join(FLOATS)}")
        values = self.tensor(name, part)
        if values.ndim == 0 or not is_finite(values):
            raise UserError(f"{self.folder}: tensor {name} holds values that are not finite, or a single one")
        return values

    def floats(self, name: str, part: int | None = None) -> np.ndarray:
        """A tensor of floats, or a part by its index of the first axis, as a contiguous float32 copy."""
        return np.array(self.table(name, part), np.float32)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}")
        return self._files[name]

    def _shards(self) -> list[Path]:
        found = sorted(self.folder.glob("*.safetensors"))
        # An index beside a complete file is from a time when there were shards, and is ignored.
        if self.folder / WHOLE in found:
            return [self.folder / WHOLE]
        index = self.folder / INDEX
        if not index.is_file():
            if not found:
                raise UserError(f"{self.folder} has no .safetensors files")
            return found
        try:
            names = json.loads(index.read_bytes())["weight_map"].values()
            shards = [self.folder / name for name in sorted(set(names))]
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is no index of shards: it has no weight_map of file names") from None
        missing = [path for path in shards if path not in found]
        if missing:
            raise UserError(f"{self.folder} is not complete: {missing[0].name}, which {INDEX} names, is missing")
        return shards


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )
