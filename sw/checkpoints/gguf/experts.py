# SPDX-License-Identifier: Apache-2.0
"""The mixtures of experts of GGUF files, as llama.cpp reads them: Mixtral in architecture llama, and qwen3moe.

    blk.0.ffn_gate_inp [E, K]       the router
    blk.0.ffn_gate_exps, ffn_up_exps [E, N, K], ffn_down_exps [E, K, N]
    blk.0.ffn_gate.0, ffn_up.0, ffn_down.0 and so on, one tensor for each expert, in files of early 2024

llama.cpp divides the weights of a token's experts by their sum in both architectures. All layers have experts.
"""

from collections.abc import Iterator, Mapping

from sw.checkpoints.gguf.reader import GgufFile
from sw.common.errors import UserError
from sw.model.experts import EXPERT, Experts, Routing
from sw.model.families import FAMILIES, Family, of_architecture
from sw.model.lm_head import Linear

ROUTER = "ffn_gate_inp"
TENSORS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
MIXTRAL = "mixtral"


def family_of(model: GgufFile) -> tuple[str, Family]:
    """The model_type and family of a file: Mixtral has the architecture of Llama, and experts."""
    architecture = model.meta("general.architecture")
    if architecture == FAMILIES[MIXTRAL].architecture and model.integer(f"{architecture}.expert_count", 0):
        return MIXTRAL, FAMILIES[MIXTRAL]
    return of_architecture(architecture)


def read_routing(model: GgufFile) -> Routing | None:
    """What the metadata says about experts; None without experts. Raises UserError for impossible numbers."""
    architecture = model.meta("general.architecture")
    if family_of(model)[1].experts is None:
        return None
    count, used = (model.integer(f"{architecture}.{key}") for key in ("expert_count", "expert_used_count"))
    if not 1 <= used <= count:
        raise UserError(
            f"{model.path}: metadata {architecture}.expert_used_count is 1 to expert_count {count}, not {used}"
        )
    size = model.integer(f"{architecture}.feed_forward_length")
    return Routing(count, used, model.integer(f"{architecture}.expert_feed_forward_length", size))


def expert_tensors(routing: Routing) -> Iterator[str]:
    """The names of a block's tensors."""
    yield f"{ROUTER}.weight"
    for name in TENSORS.values():
        yield f"{name}_exps.weight"
        yield from (f"{name}.{index}.weight" for index in range(routing.count))


def read_experts(model: GgufFile, block: str, routing: Routing) -> Experts:
    """The mixture of a block, "blk.0" for example; an expert is read when it is asked for.

    Raises UserError, then or later, for missing tensors and for other numbers of experts.
    """
    router = model.float_tensor(f"{block}.{ROUTER}.weight")
    if router.ndim != 2 or len(router) != routing.count:
        problem = f"{block}.{ROUTER}.weight is {list(router.shape)}, and the model has {routing.count} experts"
        raise UserError(f"{model.path}: tensor {problem}")
    return Experts(router, _experts(model, block, routing))


def _experts(model: GgufFile, block: str, routing: Routing) -> Iterator[Mapping[str, Linear]]:
    apart = f"{block}.{TENSORS['gate_proj']}.0.weight" in model
    for index in range(routing.count):
        if apart:
            yield {name: model.linear(f"{block}.{TENSORS[name]}.{index}") for name in EXPERT}
        else:
            yield {name: model.expert(f"{block}.{TENSORS[name]}_exps", index, routing.count) for name in EXPERT}
