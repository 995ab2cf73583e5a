# SPDX-License-Identifier: Apache-2.0
"""Any model as a float ONNX decoder graph, which the quantizer calibrates on and rewrites.

A GGUF file of any block format, and a Hugging Face folder with float weights (safetensors),
become our own exporter's graph with FusedMatMul layers in float32, with its text files beside it. A tied head
multiplies with the embedding's table, which is stored once. A float ONNX export of any tool needs no conversion.
"""

from pathlib import Path

from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.settings import read_settings
from sw.common.errors import UserError
from sw.common.status_line import Progress
from sw.export.folder import EXPORTER_VERSION, write_folder
from sw.export.gguf import gguf_source
from sw.export.huggingface import checkpoint_source, expect_float
from sw.export.kind import Kind, file_kind
from sw.export.resolve import find_model
from sw.graph import dequantize_linear
from sw.graph.file import OnnxFile
from sw.graph.linears import UNSUPPORTED
from sw.model.source import DecoderSource

QUANTIZED = ("MatMulNBits", "GatherBlockQuantized", *UNSUPPORTED)


def float_model(source: str | Path, work: Path, progress: Progress | None = None) -> Path:
    """The path of a float model.onnx: `source` itself if it is one, else its export in directory `work`.

    source: a float ONNX file or a folder with one, a .gguf file, a folder with a float checkpoint, or the name of a
    packaged model (see sw.export.resolve). progress: called with the layers that are done and all layers. The export
    reads and writes one layer at a time; the largest object in memory is the embedding in float32.
    Raises UserError if the source is none of these, is damaged, or is quantized already (GGUF may be quantized).
    """
    path = find_model(source, floats=True)
    if path.is_dir():
        decoder = _checkpoint(path)
    elif file_kind(path) is Kind.GGUF:
        decoder = gguf_source(GgufFile(path, dequantize=True))
    else:
        _expect_float(OnnxFile(path))
        return path
    metadata = {"source": decoder.name, "exporter": f"gristmill float_export {EXPORTER_VERSION}"}
    return write_folder(work, decoder, metadata, "float", progress)


def _checkpoint(folder: Path) -> DecoderSource:
    settings = read_settings(folder / "config.json", required=True)
    expect_float(settings)
    return checkpoint_source(folder, settings, None)


def _expect_float(file: OnnxFile) -> None:
    for node in file.graph.node:
        if node.op_type in QUANTIZED or dequantize_linear.matches(file, node):
            kind = node.op_type if node.op_type in QUANTIZED else "DequantizeLinear"
            raise UserError(f"{file.path} is quantized already: {node.name or node.output[0]} has {kind} weights")
