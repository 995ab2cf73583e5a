# SPDX-License-Identifier: Apache-2.0
"""The real activations of a model's linear layers, and onnxruntime's results for them.

A copy of the graph, in memory, gets the layers' tensors as additional outputs. onnxruntime then runs it on the CPU with
float32 arithmetic. accuracy_level is set to 0 in the copy: at 4, the value that exporters write, onnxruntime rounds the
activations to 8 bits itself, so its results would not be a reference.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

from sw.common.errors import UserError, one_line
from sw.graph.file import OnnxFile
from sw.graph.linears import Linears
from sw.model.linear import QuantizedLinear
from sw.ort.feeds import build_feeds
from sw.ort.session import exact_session


@dataclass(frozen=True, eq=False)
class Captured:
    """Input and output of one layer: x is float32 [M, K], y is float32 [M, N], the tensor `layer.output_name`.

    y contains the bias only if layer.bias_in_node; compare y with layer.float_output(x).
    """

    layer: QuantizedLinear
    x: np.ndarray
    y: np.ndarray


def capture_inputs(
    linears: Linears,
    input_ids: Sequence[int] | None = None,
    *,
    tokens: int = 8,
    seed: int = 0,
    threads: int = 0,
    limit_mib: int = 256,
) -> Iterator[Captured]:
    """Runs the layers' model over a token sequence (or over noise, see sw.ort.feeds) and yields each layer, in order.

    linears: all layers that sw.graph.linears found, or a slice of them.
    input_ids: the M tokens of one sequence. tokens, seed: size and seed of the noise for models without input_ids.
    threads: 0 for onnxruntime's own choice. limit_mib: memory for layers and tensors in MiB; a model that needs more
    is run several times (a single layer is never divided).
    Raises UserError if onnxruntime refuses the model or a layer's activations or outputs are not finite.
    """
    session, model_inputs = _open(linears, threads)
    feeds = build_feeds(linears.file, session, input_ids, tokens, seed)
    rows = len(input_ids) if input_ids else tokens
    for batch in _batches(linears, rows, limit_mib << 20):
        names = {name for layer in batch for name in (layer.input_name, layer.output_name)}
        wanted = sorted(names - model_inputs)
        try:
            values = feeds | dict(zip(wanted, map(np.asarray, session.run(wanted, feeds)), strict=True))
        except Exception as error:
            raise UserError(f"{linears.file.path}: onnxruntime failed to run it ({one_line(error)})") from error
        for layer in batch:
            x = _matrix(values[layer.input_name], layer.k, f"layer {layer.name}: its activations")
            y = _matrix(values[layer.output_name], layer.n, f"layer {layer.name}: its outputs")
            yield Captured(layer, x, y)


def _open(linears: Linears, threads: int) -> tuple[onnxruntime.InferenceSession, set[str]]:
    # Read the file again, because the session changes the graph, and the importer's copy must not change.
    file = OnnxFile(linears.file.path)
    model_inputs = {item.name for item in file.inputs}
    names = dict.fromkeys(name for pair in linears.tensors for name in pair)
    outputs = [name for name in names if name not in model_inputs]
    return exact_session(file, file.model, outputs, threads), model_inputs


def _batches(linears: Linears, rows: int, limit: int) -> Iterator[list[QuantizedLinear]]:
    batch: list[QuantizedLinear] = []
    held = 0
    for layer in linears:
        size = layer.q.nbytes + layer.scales.nbytes + layer.zero_points.nbytes + 4 * rows * (layer.n + layer.k)
        if batch and held + size > limit:
            yield batch
            batch, held = [], 0
        batch.append(layer)
        held += size
    if batch:
        yield batch


def _matrix(values: np.ndarray, columns: int, what: str) -> np.ndarray:
    if values.shape[-1] != columns:
        raise UserError(f"{what} are {list(values.shape)}, expected {columns} columns")
    matrix = np.ascontiguousarray(values.reshape(-1, columns), dtype=np.float32)
    if not np.isfinite(matrix).all():
        raise UserError(f"{what} are not finite (NaN or infinity)")
    return matrix
