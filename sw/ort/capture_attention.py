# SPDX-License-Identifier: Apache-2.0
"""The real queries, keys and values of a decoder's attention, and onnxruntime's results for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sw.common.errors import UserError, one_line
from sw.graph.attention import group_query_attention
from sw.graph.file import OnnxFile
from sw.model.parts import Attention, Rotary
from sw.ort.feeds import build_feeds
from sw.ort.session import exact_session


@dataclass(frozen=True, eq=False)
class CapturedAttention:
    """One block's attention over M tokens, the first of which has the position 0.

    Members
    -------
    q: float32 [M, heads, head_size]. k, v: float32 [M, kv_heads, head_size]. q and k are rotated.
    y: float32 [M, heads, head_size], the attention's output.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    y: np.ndarray


def capture_attention(
    path: OnnxFile, blocks: Sequence[tuple[Attention, Rotary | None]], input_ids: Sequence[int], threads: int = 0
) -> list[CapturedAttention]:
    """Runs the model over a token sequence, with an empty cache, and returns the tensors of these blocks.

    Raises UserError if onnxruntime refuses the model, or if values are not finite.
    """
    # The session changes the graph, and the caller's copy must not change.
    file = OnnxFile(path.path)
    queries = [query_of(file, attention) for attention, _ in blocks]
    names = [
        (query, attention.present_key, attention.present_value, attention.output)
        for query, (attention, _) in zip(queries, blocks, strict=True)
    ]
    inputs = {item.name for item in file.inputs}
    wanted = sorted({name for group in names for name in group} - inputs)
    session = exact_session(file, file.model, wanted, threads)
    feeds = build_feeds(file, session, input_ids)
    try:
        values = feeds | dict(zip(wanted, map(np.asarray, session.run(wanted, feeds)), strict=True))
    except Exception as error:
        raise UserError(f"{file.path}: onnxruntime failed to run it ({one_line(error)})") from error
    found = []
    for group, (attention, rotary) in zip(names, blocks, strict=True):
        query, key, value, output = (values[name].astype(np.float32) for name in group)
        size, tokens = attention.head_size, len(input_ids)
        # One tensor may hold q, k and v of all heads.
        q = query.reshape(tokens, -1, size)[:, : attention.heads]
        if rotary is not None and rotary.in_attention:
            q = rotated(path, rotary, q)
        k, v = (np.ascontiguousarray(cached[0].swapaxes(0, 1)) for cached in (key, value))
        captured = CapturedAttention(np.ascontiguousarray(q), k, v, output.reshape(tokens, attention.heads, size))
        if not all(np.isfinite(array).all() for array in (captured.q, captured.k, captured.v, captured.y)):
            raise UserError(f"attention {attention.node}: its tensors are not finite (NaN or infinity)")
        found.append(captured)
    return found


def query_of(file: OnnxFile, attention: Attention) -> str:
    """The tensor of the queries, before a rotation in the attention's node."""
    inputs = group_query_attention(file.producers[attention.output])
    assert inputs is not None, "an Attention is such a node"
    return inputs.query


def rotated(file: OnnxFile, rotary: Rotary, x: np.ndarray) -> np.ndarray:
    """float32 [M, heads, head_size] of the positions 0 to M - 1, rotated as the attention's node does it."""
    cos, sin = (file.constant(name, name).astype(np.float32)[: len(x), None] for name in (rotary.cos, rotary.sin))
    half, out = cos.shape[-1], x.copy()
    step = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if rotary.interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., step[0]], x[..., step[1]]
    out[..., step[0]], out[..., step[1]] = a * cos - b * sin, b * cos + a * sin
    return out
