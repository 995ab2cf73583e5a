# SPDX-License-Identifier: Apache-2.0
"""Writes the tensors of an ONNX graph: large tensors go directly to one external data file.

Tensors of another graph are copied piece by piece as bytes, whatever their element type.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import TensorProto, external_data_helper, helper

from sw.common.errors import UserError, one_line
from sw.graph.external_data import LOCATION, below_the_folder

# onnxruntime can map external data into memory if it begins at a page boundary.
ALIGNMENT = 4096
INLINE_BYTES = 1024
PIECE = 1 << 24


class TensorData:
    """The file `path`, opened for writing. Use as a context manager.

    folder: folder of the external data of tensors to be copied; by default that of the file.
    """

    def __init__(self, path: Path, folder: Path | None = None):
        self._name = path.name
        self._folder = folder or path.parent
        self._file = path.open("wb")

    def __enter__(self) -> "TensorData":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def store(self, name: str, values: np.ndarray) -> TensorProto:
        """A new tensor. Values of up to 1 KiB are stored in the graph itself."""
        # ascontiguousarray would make a scalar one-dimensional.
        values = np.asarray(values, order="C")
        tensor = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
        if values.nbytes <= INLINE_BYTES:
            tensor.raw_data = values.tobytes()
        else:
            begin = self._begin()
            values.tofile(self._file)
            self._refer(tensor, begin)
        return tensor

    def copy(self, tensor: TensorProto) -> TensorProto:
        """Copies a tensor of the other graph. Raises UserError if its data is missing, short or outside its folder."""
        copied = TensorProto()
        copied.CopyFrom(tensor)
        if external_data_helper.uses_external_data(tensor):
            begin = self._begin()
            for piece in self._external(tensor):
                self._file.write(piece)
        elif len(tensor.raw_data) > INLINE_BYTES:
            begin = self._begin()
            self._file.write(tensor.raw_data)
        else:
            return copied
        copied.ClearField("raw_data")
        self._refer(copied, begin)
        return copied

    def _begin(self) -> int:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        return self._file.tell()

    def _refer(self, tensor: TensorProto, begin: int) -> None:
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        location = {LOCATION: self._name, "offset": begin, "length": self._file.tell() - begin}
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))

    def _external(self, tensor: TensorProto) -> Iterator[bytes]:
        entries = {item.key: item.value for item in tensor.external_data}
        what = f"tensor {tensor.name}: external data file {entries.get(LOCATION)}"
        try:
            location = entries[LOCATION]
            offset = int(entries.get("offset", 0))
            length = int(entries["length"]) if "length" in entries else None
        except (KeyError, TypeError, ValueError):
            raise UserError(f"tensor {tensor.name} does not say where its external data is") from None
        path = self._folder / below_the_folder(location, what)
        try:
            with path.open("rb") as file:
                left = file.seek(0, 2) - offset if length is None else length
                file.seek(offset)
                while left > 0:
                    piece = file.read(min(left, PIECE))
                    if not piece:
                        raise UserError(f"{what} is truncated: {left} bytes are missing")
                    left -= len(piece)
                    yield piece
        except (OSError, ValueError) as error:
            raise UserError(f"{what} cannot be read ({one_line(error)})") from None
