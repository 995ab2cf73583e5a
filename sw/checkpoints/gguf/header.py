# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: its metadata, and the place, shape and format of every tensor.

Source: docs/gguf.md of ggml. The Python package gguf reads the same, but makes numpy arrays of every token, which takes
20 s and 700 MB for a vocabulary of 262,144, and it does not check counts: a damaged one keeps it busy for ever. Here
every count is compared with the bytes that are left before anything is read. Block sizes and types are the package's.
"""

import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from sw.common.errors import UserError, one_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_AXES = 4
"""GGML_MAX_DIMS of ggml."""
PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
"""Formats whose elements numpy has; the elements of all others are read as bytes."""
NUMBERS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
LEAST_FIELD, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
"""Bytes of the shortest metadata field and of the shortest description of a tensor."""


class Damaged(ValueError):
    """A header that contradicts itself or the size of its file. The message names rule and value."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. Its data is read when it is asked for, and not kept.

    Members
    -------
    path, offset: the file, and the place of the data in bytes. shape: rows first, so K is the last axis.
    kind: the format's name in ggml, such as "Q4_K".
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, K elements."""
        return self._row_items * np.dtype(PLAIN.get(self.kind, np.uint8)).itemsize

    @property
    def _row_items(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        k = self.shape[-1]
        return k if self.kind in PLAIN else k // block * size

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The data, or that of some rows: floats [N, K], or uint8 [N, bytes of a row] if the format has blocks.

        Raises UserError if the file cannot be read any more.
        """
        start, stop, _ = rows.indices(self.shape[0] if len(self.shape) > 1 else 1)
        shape = (stop - start, *self.shape[1:-1], self._row_items) if len(self.shape) > 1 else (self._row_items,)
        inner = int(np.prod(self.shape[1:-1], dtype=np.int64))
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start * inner * self.row_bytes)
                count = int(np.prod(shape, dtype=np.int64))
                data = np.fromfile(file, PLAIN.get(self.kind, np.uint8), count)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({one_line(error)})") from None
        if data.size != count:
            raise UserError(f"{self.path} has become shorter: tensor {self.name} ends beyond its end")
        return data.reshape(shape)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata by key, and tensors by name, in the file's order.

    Texts are bytes, because they may not be valid UTF-8. Raises UserError if the file cannot be read, is not GGUF,
    is damaged or truncated, or is big-endian.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _header(path, _Cursor(data))
    except Damaged as error:
        raise UserError(f"{path} is not a complete GGUF file ({error})") from None
    except (OSError, ValueError) as error:
        # An empty file cannot be mapped.
        raise UserError(f"{path} is not a complete GGUF file ({one_line(error)})") from None


class _Cursor:
    """Reads a file's values in turn. Raises Damaged before it would read beyond the end."""

    def __init__(self, data: mmap):
        self.data, self.place, self.size = data, 0, len(data)

    def need(self, count: int, what: str) -> None:
        """Raises Damaged unless `count` more bytes are there."""
        if count > self.size - self.place:
            raise Damaged(f"{what} takes {count:,} bytes from {self.place:,} on, and the file has {self.size:,}")

    def number(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        self.need(size, what)
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += size
        return value

    def text(self, what: str) -> bytes:
        length = self.number("<Q", what)
        self.need(length, what)
        self.place += length
        return self.data[self.place - length : self.place]

    def name(self, what: str) -> str:
        try:
            return self.text(what).decode()
        except UnicodeDecodeError as error:
            raise Damaged(f"{what} is not UTF-8: {error}") from None

    def texts(self, count: int, what: str) -> list[bytes]:
        self.need(8 * count, what)
        unpack, data, place, size, found = struct.Struct("<Q").unpack_from, self.data, self.place, self.size, []
        for _ in range(count):
            if place + 8 > size:
                self.place = place
                self.need(8, what)
            start = place + 8
            place = start + unpack(data, place)[0]
            if place > size:
                self.place = start
                self.need(place - start, what)
            found.append(data[start:place])
        self.place = place
        return found

    def value(self, what: str) -> Any:
        """A typed value: a number, a text (bytes), or a list of one of them."""
        kind = self._type(what)
        if kind is not GGUFValueType.ARRAY:
            return self._values(kind, 1, what)[0]
        kind = self._type(what)
        if kind is GGUFValueType.ARRAY:
            raise Damaged(f"{what} is a list of lists")
        return self._values(kind, self.number("<Q", what), what)

    def _type(self, what: str) -> GGUFValueType:
        number = self.number("<I", what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise Damaged(f"{what} has the type {number}, which does not exist") from None

    def _values(self, kind: GGUFValueType, count: int, what: str) -> list[Any]:
        if kind is GGUFValueType.STRING:
            return self.texts(count, what)
        dtype = np.dtype(NUMBERS[kind])
        self.need(count * dtype.itemsize, what)
        values = np.frombuffer(self.data[self.place : self.place + count * dtype.itemsize], dtype)
        self.place += values.nbytes
        return values.tolist()


def _header(path: Path, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor.need(4, "the magic number")
    cursor.place = 4
    if cursor.data[:4] != MAGIC:
        raise Damaged("it does not begin with GGUF")
    version = cursor.number("<I", "the version")
    if version & 0xFFFF == 0:
        hint = "`gguf-convert-endian FILE little`, of the Python package gguf, converts it in place"
        raise UserError(f"{path} is big-endian, which is not read ({hint})")
    if version not in VERSIONS:
        raise Damaged(f"version {version} is not supported, {' and '.join(map(str, VERSIONS))} are")
    tensor_count, field_count = (cursor.number("<Q", "the number of tensors and fields") for _ in range(2))
    cursor.need(field_count * LEAST_FIELD + tensor_count * LEAST_TENSOR, f"{tensor_count:,} tensors' description")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.name("the name of a metadata field")
        if key in fields:
            raise Damaged(f"metadata {key} occurs twice")
        fields[key] = cursor.value(f"metadata {key}")
    alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise Damaged(f"general.alignment is a power of two, not {str(alignment)[:40]}")
    described = [_tensor(path, cursor) for _ in range(tensor_count)]
    start = -(-cursor.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for tensor in described:
        if tensor.name in tensors:
            raise Damaged(f"tensor {tensor.name} occurs twice")
        if tensor.offset % alignment:
            raise Damaged(f"tensor {tensor.name} begins at {tensor.offset}, no multiple of {alignment}")
        size = int(np.prod([1, *tensor.shape[:-1]], dtype=object)) * tensor.row_bytes
        if start + tensor.offset + size > cursor.size:
            place = f"{size:,} bytes from {start + tensor.offset:,} on"
            raise Damaged(f"tensor {tensor.name} takes {place}, and the file has {cursor.size:,}")
        tensors[tensor.name] = GgufTensor(path, tensor.name, tensor.kind, tensor.shape, start + tensor.offset)
    return fields, tensors


def _tensor(path: Path, cursor: _Cursor) -> GgufTensor:
    """A tensor's description; its offset is that from the start of the data."""
    name = cursor.name("the name of a tensor")
    what = f"the description of tensor {name[:80]}"
    axes = cursor.number("<I", what)
    if axes > MAX_AXES:
        raise Damaged(f"tensor {name[:80]} has {axes:,} axes, at most {MAX_AXES} are possible")
    # ggml's sizes are 1 beyond the last axis.
    shape = tuple(cursor.number("<Q", what) for _ in range(axes))[::-1] or (1,)
    if 0 in shape:
        raise Damaged(f"tensor {name[:80]} is {list(shape)}, and has no elements")
    number = cursor.number("<I", what)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise Damaged(f"tensor {name[:80]} has the format {number}, which is not known") from None
    block = GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise Damaged(f"tensor {name[:80]} is {list(shape)}, and {kind.name} has blocks of {block} along the last axis")
    return GgufTensor(path, name, kind.name, shape, cursor.number("<Q", what))
