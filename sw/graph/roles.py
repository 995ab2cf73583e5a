# SPDX-License-Identifier: Apache-2.0
"""Which linear layer of a decoder is which, where an exporter (torch.onnx) lost the names of the modules.

What can be seen: q, k and v read one tensor, as do gate and up. Of these two, gate goes into the sigmoid of SiLU. Of
the former three, v and k go into the cache, v as it is and k rotated, and q does not. The order of the layers is that
of the code. Whatever looks different is not guessed at.
"""

from collections.abc import Sequence

from sw.graph.file import OnnxFile
from sw.graph.linears import Linears

BLOCK = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PLAIN = ("Add", "Reshape", "Transpose", "Concat", "Identity", "Cast", "Squeeze", "Unsqueeze")
"""What may be between v's product and the cache."""
ROTATION = (*PLAIN, "Mul", "Neg", "Slice", "Split", "Sub", "RotaryEmbedding")
"""The same for k."""
ATTENTION = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
KEY, VALUE = 1, 2
"""Inputs of an attention, which may rotate and cache them itself."""
GATES = ("Sigmoid", "Swish")


def find_roles(linears: Linears, layer_count: int) -> dict[str, int]:
    """Index of every layer by its role: 0.q_proj and so on, and lm_head. Empty if the graph does not look like that."""
    groups: list[list[int]] = []
    for index, (tensor, _) in enumerate(linears.tensors):
        if groups and linears.tensors[groups[-1][0]][0] == tensor:
            groups[-1].append(index)
        else:
            groups.append([index])
    outputs = {item.name for item in linears.file.graph.output}
    found: dict[str, int] = {}
    if len(groups) == layer_count * len(BLOCK) + 1 and len(groups[-1]) == 1:
        head = groups.pop()[0]
        if linears.tensors[head][1] not in outputs:
            return {}
        found["lm_head"] = head
    if len(groups) != layer_count * len(BLOCK):
        return {}
    for place, group in enumerate(groups):
        names = BLOCK[place % len(BLOCK)]
        members = _in_order(linears, group, names)
        if members is None:
            return {}
        found |= {f"{place // len(BLOCK)}.{name}": index for name, index in zip(names, members)}
    return found


def _in_order(linears: Linears, group: Sequence[int], names: Sequence[str]) -> Sequence[int] | None:
    """The members of a group in the order of their names; None if that is not certain."""
    products = [linears.tensors[index][1] for index in group]
    if len(group) != len(names):
        return None
    if names == BLOCK[0]:
        cached = [_is_cached(linears.file, product, ROTATION, (KEY, VALUE)) for product in products]
        plain = [_is_cached(linears.file, product, PLAIN, (VALUE,)) for product in products]
        return group if (cached, plain) == ([False, True, True], [False, False, True]) else None
    if names == BLOCK[2]:
        gates = [_reaches(linears.file, product, GATES) for product in products]
        return None if sum(gates) != 1 else group if gates[0] else group[::-1]
    return group


def _reaches(file: OnnxFile, tensor: str, operators: Sequence[str]) -> bool:
    return any(node.op_type in operators for node in file.consumers.get(tensor, []))


def _is_cached(file: OnnxFile, product: str, operators: Sequence[str], inputs: Sequence[int]) -> bool:
    """Whether a product gets into the cache by nothing but such operators, or into such an input of an attention."""
    outputs = {item.name for item in file.graph.output}
    left, seen = [product], set()
    while left:
        name = left.pop()
        if name in outputs:
            return True
        for node in file.consumers.get(name, []):
            if node.op_type in ATTENTION and any(list(node.input[i : i + 1]) == [name] for i in inputs):
                return True
            if node.op_type in operators:
                left += [item for item in node.output if item not in seen]
                seen |= set(node.output)
    return False
