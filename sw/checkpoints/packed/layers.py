# SPDX-License-Identifier: Apache-2.0
"""One layer of a Hugging Face folder, quantized in the folder's format or float."""

from typing import Protocol

import numpy as np

from sw.checkpoints.safetensors_file import Checkpoint
from sw.common.errors import UserError
from sw.model.linear import FloatLinear, QuantizedLinear
from sw.model.lm_head import Linear

PACKED = ("qweight", "weight_packed")
"""Names of the tensors with the packed weights of a layer."""


class LayerFormat(Protocol):
    """How a folder holds its quantized layers. `name` is a module's name, as in model.layers.0.mlp.down_proj."""

    def is_quantized(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether the layer is quantized. Raises UserError if settings and tensors contradict each other."""
        ...

    def read(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear:
        """A quantized layer. Raises UserError for missing tensors, and for shapes and types that do not match."""
        ...


def read_linear(checkpoint: Checkpoint, name: str, form: LayerFormat | None) -> Linear:
    """The layer `name`: quantized, or the float tensor `name`.weight [N, K].

    form: None for a checkpoint without quantized layers. Raises UserError as LayerFormat does.
    """
    if form is not None and form.is_quantized(checkpoint, name):
        return form.read(checkpoint, name)
    weight, bias = checkpoint.floats(f"{name}.weight"), read_bias(checkpoint, name)
    if weight.ndim != 2 or (bias is not None and bias.shape != (len(weight),)):
        raise UserError(f"{checkpoint.folder}: the shapes of {name}.weight and bias do not fit")
    return FloatLinear(name, weight, bias)


def read_bias(checkpoint: Checkpoint, name: str) -> np.ndarray | None:
    """The bias of a layer, float32 [N], or None."""
    return checkpoint.floats(f"{name}.bias") if f"{name}.bias" in checkpoint else None


def has_words(checkpoint: Checkpoint, name: str, packed: str = "qweight") -> bool:
    """Whether a layer has packed words, by its tensors. Without any tensor it is quantized, and reading it fails.

    packed: the name of the words' tensor. Raises UserError if the layer has float weights as well.
    """
    packs, floats = f"{name}.{packed}" in checkpoint, f"{name}.weight" in checkpoint
    if packs and floats:
        raise UserError(f"{checkpoint.folder}: layer {name} has {packed} and weight: one of them is wrong")
    return packs or not floats
