# SPDX-License-Identifier: Apache-2.0
"""Bytes that the accelerator reads for the weights of one token, or of one batch of tokens.

They are not the bytes of a file: the hardware's weights have one width (`weight_bits`), scales are 16 bits, and
narrower weights take as much as that width. An int8 head needs a width of 4 at least, because it runs as two planes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from hw.spec.config import AcceleratorConfig
from sw.awq.rounding import Form
from sw.common.errors import UserError
from sw.devices.pack import Shape, plan_layer
from sw.graph.linears import find_linears
from sw.graph.nodes import logits_name
from sw.runtime.hardware import AUTO, choose_config, layer_shapes

CHOSEN: dict[str, int | str] = dict.fromkeys(AUTO, "auto")
"""Hardware of which all that may depend on the model does."""


@dataclass(frozen=True)
class Stream:
    """Bytes of a model's weight stream.

    Members
    -------
    weight_bits: the least width of hardware that runs all layers. layers, head: bytes there; head is 0 if it is float.
    narrow: bytes of the layers without the head on hardware whose width is that of the layers' weights; None if a layer
        does not fit it.
    float16: bytes of the same layers' weights as float16.
    """

    weight_bits: int
    layers: int
    head: int
    narrow: int | None
    float16: int


def stream(model: Path, form: Form) -> Stream | None:
    """The stream of a model that was quantized in this form, on hardware of the default tile and ports.

    model: its ONNX file. Returns None if no such hardware runs it.
    """
    linears = find_linears(model)
    logits = logits_name(linears.file)
    shapes = list(zip(layer_shapes(linears), (output == logits for _, output in linears.tensors)))
    body = [replace(shape, bits=form.bits) for shape, is_head in shapes if not is_head]
    head = [shape for shape, is_head in shapes if is_head]
    try:
        config = choose_config([*body, *head], CHOSEN)
        layers, last = (sum(_bytes(config, shape) for shape in some) for some in (body, head))
    except UserError:
        return None
    try:
        own = choose_config(body, CHOSEN | {"weight_bits": form.bits})
        narrow = sum(_bytes(own, shape) for shape in body)
    except UserError:
        narrow = None
    return Stream(config.weight_bits, layers, last, narrow, sum(2 * shape.n * shape.k for shape in body))


def _bytes(config: AcceleratorConfig, shape: Shape) -> int:
    layout = plan_layer(config, shape).layout
    return layout.beats * config.beat_bytes
