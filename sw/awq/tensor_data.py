# SPDX-License-Identifier: Apache-2.0
"""The tensors of an ONNX graph that is being written: large ones go to one external data file, at once.

What another graph holds is copied piece by piece, in whatever element type, without being understood.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper

from sw.errors import UserError, one_line
from sw.onnx_file import OnnxFile
from sw.onnx_writer import ALIGNMENT, INLINE_BYTES

PIECE = 1 << 24


class TensorData:
    """The file `path`, opened for writing. Use as a context manager.

    folder: where the external data of tensors to be copied is.
    """

    def __init__(self, path: Path, folder: Path):
        self._name = path.name
        self._folder = folder
        self._file = path.open("wb")

    def __enter__(self) -> "TensorData":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def store(self, name: str, values: np.ndarray) -> TensorProto:
        """A new tensor; below 1 KiB its values stay inside."""
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
        """A tensor of the other graph. Raises UserError if its data is missing, too short or outside its folder."""
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
        location = {"location": self._name, "offset": begin, "length": self._file.tell() - begin}
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))

    def _external(self, tensor: TensorProto) -> Iterator[bytes]:
        entries = {item.key: item.value for item in tensor.external_data}
        what = f"tensor {tensor.name}: external data file {entries.get('location')}"
        try:
            location = PurePath(entries["location"])
            offset = int(entries.get("offset", 0))
            length = int(entries["length"]) if "length" in entries else None
        except (KeyError, TypeError, ValueError):
            raise UserError(f"tensor {tensor.name} does not say where its external data is") from None
        if location.is_absolute() or ".." in location.parts:
            raise UserError(f"{what} is not beside the model")
        try:
            with (self._folder / location).open("rb") as file:
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


def expect_names(file: OnnxFile) -> None:
    """Raises UserError if a name in the graph is no text, as damage leaves it: protobuf hands it out as bytes."""
    graph = file.graph
    names = [name for node in graph.node for name in (node.name, node.op_type, *node.input, *node.output)]
    names += [item.name for items in (graph.initializer, graph.input, graph.output) for item in items]
    names += [text for item in file.model.metadata_props for text in (item.key, item.value)]
    if not all(isinstance(name, str) for name in names) or not all(node.output for node in graph.node):
        raise UserError(f"{file.path} is damaged: a name in its graph is no text, or a node has no output")


def external_inside(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    """The tensors with external data that nodes carry as attributes or in their subgraphs."""
    for node in nodes:
        for attribute in node.attribute:
            tensors = [attribute.t, *attribute.tensors]
            for graph in [attribute.g, *attribute.graphs]:
                tensors += graph.initializer
                yield from external_inside(graph.node)
            yield from filter(external_data_helper.uses_external_data, tensors)


def names_read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """The tensors that nodes read, those of their subgraphs (If, Loop) included; some more than once."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from names_read(graph.node)
                # A branch may hand on a tensor of the graph around it.
                yield from (output.name for output in graph.output)
