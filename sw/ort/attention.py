# SPDX-License-Identifier: Apache-2.0
"""Attention alone, in onnxruntime: GroupQueryAttention with its KV cache, on queries and keys that are rotated."""

from collections.abc import Hashable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime import OrtValue

from sw.common.errors import UserError, one_line
from sw.graph.file import OnnxFile
from sw.graph.nodes import CONTRIB
from sw.model.parts import Attention
from sw.ort.session import exact_session

QKV, PAST_KEY, PAST_VALUE, SEQLENS, TOTAL = "qkv", "past_key", "past_value", "seqlens_k", "total_sequence_length"
OUTPUT, PRESENT_KEY, PRESENT_VALUE = "output", "present_key", "present_value"


class AttentionSession:
    """The attention of all blocks that have the same shape.

    Keys and values are appended to the cache in place, as in sw.ort.cache. Raises UserError if onnxruntime refuses it.
    """

    def __init__(self, file: OnnxFile, attention: Attention):
        self._session = exact_session(file, _model(file, attention), threads=1)
        # Index of the last token with keys and values, and their number: the same memory for all calls.
        self._last, self._total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._counts = {
            SEQLENS: OrtValue.ortvalue_from_numpy(self._last),
            TOTAL: OrtValue.ortvalue_from_numpy(self._total),
        }
        self._bindings: dict[Hashable, onnxruntime.IOBinding] = {}

    def expect(self, total: int) -> None:
        """Sets the number of tokens in the cache after the next calls of `run`."""
        self._last[0], self._total[0] = total - 1, total

    def bind(self, call: Hashable, qkv: np.ndarray, key: OrtValue, value: OrtValue, output: np.ndarray) -> None:
        """Gives a kind of call its memory.

        qkv: float32 [1, tokens, columns of q, k and v]. key, value: the cache. output: float32 [1, tokens, columns of
        q]. Both arrays are contiguous, and are read and written by every call.
        """
        binding = self._session.io_binding()
        inputs = {QKV: OrtValue.ortvalue_from_numpy(qkv), PAST_KEY: key, PAST_VALUE: value, **self._counts}
        outputs = {OUTPUT: OrtValue.ortvalue_from_numpy(output), PRESENT_KEY: key, PRESENT_VALUE: value}
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor)
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, tensor)
        self._bindings[call] = binding

    def is_bound(self, call: Hashable) -> bool:
        """Whether `bind` has had this kind of call."""
        return call in self._bindings

    def run(self, call: Hashable) -> None:
        """Computes the attention in the memory of a kind of call. Raises UserError if onnxruntime fails."""
        try:
            self._session.run_with_iobinding(self._bindings[call])
        except Exception as error:
            raise UserError(f"onnxruntime failed to run the model ({one_line(error)})") from error


def shape_of(attention: Attention) -> tuple:
    """Blocks that are equal in this can have one session."""
    a = attention
    return a.heads, a.kv_heads, a.head_size, a.scale, a.softcap, a.window


def _model(file: OnnxFile, attention: Attention) -> onnx.ModelProto:
    heads, kv_heads, size, scale, softcap, window = shape_of(attention)
    cache = [1, kv_heads, "positions", size]
    floats = {QKV: [1, "tokens", (heads + 2 * kv_heads) * size], PAST_KEY: cache, PAST_VALUE: cache}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in floats.items()]
    inputs.append(helper.make_tensor_value_info(SEQLENS, TensorProto.INT32, [1]))
    inputs.append(helper.make_tensor_value_info(TOTAL, TensorProto.INT32, [1]))
    shapes = {OUTPUT: [1, "tokens", heads * size], PRESENT_KEY: cache, PRESENT_VALUE: cache}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    node = helper.make_node(
        "GroupQueryAttention",
        # Without key and value, the first input holds all three.
        [QKV, "", "", PAST_KEY, PAST_VALUE, SEQLENS, TOTAL],
        [OUTPUT, PRESENT_KEY, PRESENT_VALUE],
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
        softcap=softcap,
        local_window_size=-1 if window is None else window,
        do_rotary=0,
    )
    graph = helper.make_graph([node], "attention", inputs, outputs)
    return helper.make_model(graph, ir_version=file.model.ir_version, opset_imports=file.model.opset_import)
