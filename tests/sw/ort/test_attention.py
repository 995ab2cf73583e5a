# SPDX-License-Identifier: Apache-2.0
"""Attention alone against numpy in float64, with a cache, for one token and several."""

from dataclasses import replace

import numpy as np
import pytest
from onnxruntime import OrtValue

from sw.graph.file import OnnxFile
from sw.model.parts import Attention
from sw.ort.attention import AttentionSession, shape_of
from tests.sw.runtime.test_decoder import DATA

HEADS, KV_HEADS, SIZE, CONTEXT = 4, 2, 8, 16


PLAIN = Attention(
    node="", output="", heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, scale=0.3, softcap=0.0, window=None,
    past_key="", past_value="", present_key="", present_value="", seqlens_k="", total_sequence_length="",
)  # fmt: skip


def in_numpy(qkv: np.ndarray, a: Attention) -> np.ndarray:
    """float64 [tokens, heads * size] of all tokens at once."""
    heads = qkv.astype(np.float64).reshape(len(qkv), -1, SIZE)
    q, k, v = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
    k, v = (np.repeat(values, HEADS // KV_HEADS, axis=1) for values in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * a.scale
    if a.softcap:
        scores = a.softcap * np.tanh(scores / a.softcap)
    back = np.arange(len(qkv))[:, None] - np.arange(len(qkv))
    scores = np.where((back < 0) | (back >= (a.window or CONTEXT)), -np.inf, scores)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(axis=-1, keepdims=True), v).reshape(len(qkv), -1)


@pytest.mark.parametrize("changes", [{}, {"softcap": 2.0}, {"window": 3}, {"scale": 1.0}], ids=str)
def test_attention(changes):
    rng, a = np.random.default_rng(1), replace(PLAIN, **changes)
    qkv = rng.standard_normal((12, (HEADS + 2 * KV_HEADS) * SIZE)).astype(np.float32)
    session, total, found = AttentionSession(OnnxFile(DATA / "genai_qwen2_tied.onnx"), a), 0, []
    key, value = (np.zeros((1, KV_HEADS, CONTEXT, SIZE), np.float32) for _ in range(2))
    key, value = OrtValue.ortvalue_from_numpy(key), OrtValue.ortvalue_from_numpy(value)
    for tokens in (5, 1, 1, 4, 1):
        if not session.is_bound(tokens):
            arrays = np.empty((1, tokens, qkv.shape[1]), np.float32), np.empty((1, tokens, HEADS * SIZE), np.float32)
            session.bind(tokens, arrays[0], key, value, arrays[1])
            found.append((tokens, *arrays))
        source, output = next(arrays for count, *arrays in found if count == tokens)
        source[0] = qkv[total : total + tokens]
        total += tokens
        session.expect(total)
        session.run(tokens)
        wanted = in_numpy(qkv[:total], a)[-tokens:]
        assert np.abs(output[0] - wanted).max() < 1e-5


def test_shapes():
    """Blocks with the same shape have one session, whatever the names of their tensors."""
    assert shape_of(PLAIN) == shape_of(replace(PLAIN, past_key="other", node="n"))
    for name, value in {"heads": 2, "kv_heads": 1, "head_size": 4, "scale": 1.0, "softcap": 1.0, "window": 4}.items():
        assert shape_of(replace(PLAIN, **{name: value})) != shape_of(PLAIN)
