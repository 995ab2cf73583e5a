# SPDX-License-Identifier: Apache-2.0
"""g_idx: the group of every input feature, which GPTQ writes for layers whose features were quantized out of order.

MatMulNBits, and the accelerator, have groups of neighbouring features. If g_idx is constant in blocks of neighbours,
the scales of the blocks are looked up, which is exact. With GPTQ's desc_act it is constant nowhere. Then the features
of the layer's input could be reordered, so that groups become neighbours, but each layer needs another order: q, k, v,
gate and up read the residual stream, which has one order for all blocks, and o reads heads, whose values stay together.
Only the input of down could be reordered, by the rows of gate and up. A model with desc_act has all these layers, so
this alone makes no model readable. A Gather before each layer would be exact, but it is no operation of the
accelerator, and the decoder would not run as programs. So features out of order are refused.
"""

import numpy as np

from sw.checkpoints.packed.words import MAX_SPLIT, MIN_BLOCK
from sw.checkpoints.safetensors_file import Checkpoint
from sw.common.errors import UserError


def read_order(checkpoint: Checkpoint, name: str, k: int, group_size: int, groups: int) -> tuple[np.ndarray, int]:
    """The group of every block of input features, and the block's size: the groups in order if there is no tensor.

    name: the tensor, int32 [K]; values of -1 mean that there is no order. Raises UserError for another shape, for
    numbers that are no groups, and for features out of order.
    """
    in_order = np.arange(groups)
    if name not in checkpoint:
        return in_order, group_size
    index = checkpoint.integers(name)
    if index.shape != (k,):
        raise UserError(f"{checkpoint.folder}: tensor {name} is {list(index.shape)}, and the layer has {k} inputs")
    if (index == -1).all() or np.array_equal(index, np.arange(k) // group_size):
        return in_order, group_size
    if index.min() < 0 or index.max() >= groups:
        bad = index[(index < 0) | (index >= groups)][0]
        raise UserError(f"{checkpoint.folder}: tensor {name} names group {bad}, and there are {groups}")
    block = MAX_SPLIT
    while block >= MIN_BLOCK:
        first = index[::block]
        if np.array_equal(np.repeat(first, block)[:k], index):
            return first, block
        block //= 2
    problem = "its features are in groups out of order (desc_act or actorder), and groups of neighbours are needed"
    raise UserError(f"{checkpoint.folder}: tensor {name}: {problem}; python -m sw.quantize quantizes the float model")
