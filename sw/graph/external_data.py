# SPDX-License-Identifier: Apache-2.0
"""Finds an ONNX file's external data, also in a folder with links into a Hugging Face cache.

ONNX requires external data beside the model or below its folder; otherwise a model could read any file of its
user. The Hugging Face cache (huggingface_hub, docs "Understand caching") breaks this rule in a known way:
snapshots/REVISION/ holds links to ../../blobs/HASH, so a model and its data lie in one folder of blobs under other
names. This module follows such links, and no others.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

import onnx
from onnx import TensorProto, external_data_helper

from sw.common.errors import UserError

LOCATION = "location"


def place_external_data(path: Path, model: onnx.ModelProto) -> Path:
    """The folder that the locations of the model's external data are relative to; locations are rewritten if needed.

    path: the ONNX file. model: its content; changed only if links lead to its data in a Hugging Face cache.
    Raises UserError for a location that is absolute or goes up, and for a link that leads out of the model's folder
    and its cache. A missing file is no error here: the code that reads it reports the layer.
    """
    folder = path.absolute().parent
    real = folder.resolve()
    cache = _hub_cache(folder)
    tensors = list(_external_tensors(model.graph))
    linked = False
    # One tensor of each file is enough.
    for location, tensor in {_location(tensor): tensor for tensor in tensors}.items():
        what = f"{path}: tensor {tensor.name}: external data file {location}"
        name = below_the_folder(location, what)
        try:
            target = (folder / name).resolve()
        except (OSError, RuntimeError, ValueError):
            # A loop of links, or a name that no file can have: the code that reads the tensor reports it.
            continue
        if not target.is_relative_to(real):
            if cache is None or not target.is_relative_to(cache / "blobs"):
                raise UserError(f"{what} is a link that leaves the model's folder")
            linked = True
    if not linked or cache is None:
        return folder
    for tensor in tensors:
        target = (folder / _location(tensor)).resolve()
        for entry in tensor.external_data:
            if entry.key == LOCATION:
                entry.value = target.relative_to(cache).as_posix()
    return cache


def external_locations(model: onnx.ModelProto) -> list[str]:
    """The files of the model's external data, relative to the folder of :func:`place_external_data`."""
    return sorted({_location(tensor) for tensor in _external_tensors(model.graph)})


def below_the_folder(location: str, what: str) -> PurePath:
    """A location of external data as a path. what: begins the message of the UserError if it is absolute or goes up."""
    name = PurePath(location)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{what} is not beside the model")
    return name


def _hub_cache(folder: Path) -> Path | None:
    """The repository's folder in a Hugging Face cache that a folder of a snapshot belongs to."""
    for parent in folder.parents:
        if parent.name == "snapshots":
            root = parent.parent.resolve()
            return root if (root / "blobs").is_dir() else None
    return None


def _location(tensor: TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == LOCATION), "")


def _external_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from filter(external_data_helper.uses_external_data, graph.initializer)
    yield from external_inside(graph.node)


def external_inside(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    """The tensors with external data that nodes carry as attributes or in their subgraphs."""
    for node in nodes:
        for attribute in node.attribute:
            tensors = [attribute.t, *attribute.tensors]
            for graph in [attribute.g, *attribute.graphs]:
                tensors += graph.initializer
                yield from external_inside(graph.node)
            yield from filter(external_data_helper.uses_external_data, tensors)
