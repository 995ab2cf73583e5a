# SPDX-License-Identifier: Apache-2.0
"""The mixtures of experts of Hugging Face folders.

    layer.block_sparse_moe.gate, layer.block_sparse_moe.experts.0.w1 (gate), w3 (up), w2 (down)       Mixtral
    layer.mlp.gate, layer.mlp.experts.0.gate_proj, up_proj, down_proj                                  Qwen3-MoE
    layer.mlp.gate, layer.mlp.experts.gate_up_proj [E, 2 N, K] and down_proj [E, K, N], float          transformers 5
The last is how transformers 5 holds all of them in memory; it is read as well, because some tools write it.
"""

from collections.abc import Iterator, Mapping

from sw.checkpoints.packed.layers import LayerFormat, read_linear
from sw.checkpoints.safetensors_file import Checkpoint
from sw.common.errors import UserError
from sw.model.decoder import expect_shape
from sw.model.experts import EXPERT, Experts, Routing
from sw.model.families import Family
from sw.model.linear import FloatLinear
from sw.model.lm_head import Linear

WHOLE_ROUTER, WHOLE = "mlp.gate", "mlp.experts"


def read_experts(
    checkpoint: Checkpoint, layer: str, routing: Routing, form: LayerFormat | None, family: Family
) -> Experts:
    """The mixture of a layer, "model.layers.0" for example; an expert is read when it is asked for.

    form: as for `read_linear`. Raises UserError for a missing router, and then or later for missing or surplus experts.
    """
    modules = family.experts
    assert modules is not None, "only families with experts have a routing"
    if f"{layer}.{WHOLE}.gate_up_proj" in checkpoint:
        router, experts = f"{layer}.{WHOLE_ROUTER}", _whole(checkpoint, f"{layer}.{WHOLE}", routing)
    else:
        router = f"{layer}.{modules.router}"
        experts = _single(checkpoint, f"{layer}.{modules.experts}", modules.names, routing, form)
    weight = checkpoint.floats(f"{router}.weight")
    if weight.ndim != 2 or len(weight) != routing.count:
        problem = f"tensor {router}.weight is {list(weight.shape)}, and the model has {routing.count} experts"
        raise UserError(f"{checkpoint.folder}: {problem}")
    return Experts(weight, experts)


def _single(
    checkpoint: Checkpoint, path: str, names: tuple[str, ...], routing: Routing, form: LayerFormat | None
) -> Iterator[Mapping[str, Linear]]:
    found = {int(number) for name in checkpoint.names if (number := _number(name, f"{path}.")) is not None}
    if surplus := sorted(found - set(range(routing.count))):
        raise UserError(f"{checkpoint.folder}: {path}.{surplus[0]} is there, and the model has {routing.count} experts")
    if missing := sorted(set(range(routing.count)) - found):
        raise UserError(f"{checkpoint.folder}: {path}.{missing[0]} is missing: the model has {routing.count} experts")
    for index in range(routing.count):
        modules = zip(EXPERT, names, strict=True)
        yield {field: read_linear(checkpoint, f"{path}.{index}.{name}", form) for field, name in modules}


def _number(tensor: str, prefix: str) -> str | None:
    """The number of the expert that a tensor belongs to."""
    number = tensor.removeprefix(prefix).partition(".")[0] if tensor.startswith(prefix) else ""
    return number if number.isascii() and number.isdecimal() else None


def _whole(checkpoint: Checkpoint, path: str, routing: Routing) -> Iterator[Mapping[str, Linear]]:
    both, down = f"{path}.gate_up_proj", f"{path}.down_proj"
    shape = checkpoint.shape(both)
    hidden = shape[-1] if shape else 0
    expect_shape(both, shape, (routing.count, 2 * routing.size, hidden))
    expect_shape(down, checkpoint.shape(down), (routing.count, hidden, routing.size))
    for index in range(routing.count):
        first = checkpoint.floats(both, index)
        weights = (first[: routing.size], first[routing.size :], checkpoint.floats(down, index))
        layers = zip(EXPERT, weights, strict=True)
        yield {name: FloatLinear(f"{path}.{index}.{name}", weight) for name, weight in layers}
