# SPDX-License-Identifier: Apache-2.0
"""The stages of a cut graph as onnxruntime sessions."""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnxruntime import OrtValue

from sw.common.errors import UserError, one_line
from sw.graph.file import OnnxFile
from sw.ort.cut import Stage
from sw.ort.session import exact_session

SHARED_BYTES = 1 << 16
"""A constant of at least this size that several stages read (a rotary table, for example) is held once for all."""
THREADED_ELEMENTS = 1 << 20
"""A stage with a constant of at least this many elements (a float lm_head, for example) runs on all processors; other
stages are too small for more than one."""
ELEMENTS = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(int64)": onnx.TensorProto.INT64,
    "tensor(int32)": onnx.TensorProto.INT32,
    "tensor(bool)": onnx.TensorProto.BOOL,
}


@dataclass
class _Bound:
    """A binding, and the tensors to bind again for every run. outputs: (index in the stage's outputs, name)."""

    binding: onnxruntime.IOBinding
    inputs: list[str]
    outputs: list[tuple[int, str]]


class StageSession:
    """One stage: a session, and for every kind of call a binding to fixed buffers.

    Members
    -------
    stage: the nodes that the session computes.
    types: onnxruntime's names for the types of the outputs ("tensor(float)").
    """

    def __init__(self, stage: Stage, session: onnxruntime.InferenceSession, constants: Mapping[str, OrtValue]):
        self.stage = stage
        self.session = session
        self.types = {item.name: item.type for item in session.get_outputs()}
        self._constants = constants
        self._bound: dict[Hashable, _Bound] = {}

    def run(self, call: Hashable, values: dict[str, OrtValue], fixed: Mapping[str, OrtValue]) -> None:
        """Reads the inputs from `values` and adds the outputs to it.

        call: a key for the shapes of the tensors in `fixed`; for one key these tensors are always in the same buffers.
        Raises UserError if onnxruntime fails.
        """
        bound = self._bound.get(call)
        if bound is None:
            bound = self._bound[call] = self._bind()
        binding = bound.binding
        for name in bound.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for _, name in bound.outputs:
            if name in fixed:
                binding.bind_ortvalue_output(name, fixed[name])
            else:
                binding.bind_output(name, "cpu")
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise UserError(f"onnxruntime failed to run the model ({one_line(error)})") from error
        if bound.outputs:
            made = binding.get_outputs()
            for index, name in bound.outputs:
                values[name] = made[index]
        bound.inputs = [name for name in bound.inputs if name not in fixed]
        bound.outputs = [(index, name) for index, name in bound.outputs if name not in fixed]

    def _bind(self) -> _Bound:
        binding = self.session.io_binding()
        for name, value in self._constants.items():
            binding.bind_ortvalue_input(name, value)
        return _Bound(binding, self.stage.inputs, list(enumerate(self.stage.outputs)))


class Constants:
    """A model's initializers for its stages: small ones are in each session, large shared ones are held once."""

    def __init__(self, file: OnnxFile, stages: list[Stage]):
        self._file = file
        self._tensors = {tensor.name: tensor for tensor in file.graph.initializer}
        readers: dict[str, int] = {}
        for stage in stages:
            for name in stage.constants:
                readers[name] = readers.get(name, 0) + 1
        large = (name for name, count in readers.items() if count > 1 and self._bytes(name) >= SHARED_BYTES)
        self._shared = {name: OrtValue.ortvalue_from_numpy(self._read(name)) for name in large}

    def shared(self, stage: Stage) -> dict[str, OrtValue]:
        """The shared constants, which are inputs of a stage's session."""
        return {name: self._shared[name] for name in stage.constants if name in self._shared}

    def own(self, stage: Stage) -> list[onnx.TensorProto]:
        """The constants that are part of a stage's session."""
        return [self._tensors[name] for name in stage.constants if name not in self._shared]

    def elements(self, stage: Stage) -> int:
        """Number of elements of the largest constant that a matrix product of the stage reads."""
        products = [node for node in stage.nodes if "MatMul" in node.op_type or node.op_type == "Gemm"]
        names = {name for node in products for name in node.input if name in self._tensors}
        return max((int(np.prod(self._tensors[name].dims)) for name in names), default=0)

    def element_type(self, name: str) -> int:
        """The TensorProto type of a constant."""
        return self._tensors[name].data_type

    def _bytes(self, name: str) -> int:
        tensor = self._tensors[name]
        return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize

    def _read(self, name: str) -> np.ndarray:
        return self._file.constant(name, name)


def open_stage(file: OnnxFile, stage: Stage, constants: Constants, types: Mapping[str, str]) -> StageSession:
    """A session for a stage. types: onnxruntime's names for the types of its inputs.

    Raises UserError if onnxruntime refuses the stage.
    """
    shared = constants.shared(stage)
    inputs = []
    for name in stage.inputs:
        if types[name] not in ELEMENTS:
            raise UserError(
                f"{file.path}: tensor {name} between two stages is {types[name]}, which cannot be passed on"
            )
        inputs.append(onnx.helper.make_tensor_value_info(name, ELEMENTS[types[name]], None))
    inputs += [onnx.helper.make_tensor_value_info(name, constants.element_type(name), None) for name in shared]
    outputs = [onnx.ValueInfoProto(name=name) for name in stage.outputs]
    graph = onnx.helper.make_graph(stage.nodes, "stage", inputs, outputs, constants.own(stage))
    model = onnx.helper.make_model(
        graph,
        ir_version=file.model.ir_version,
        opset_imports=file.model.opset_import,
        functions=file.model.functions,
    )
    threads = (os.cpu_count() or 1) if constants.elements(stage) >= THREADED_ELEMENTS else 1
    return StageSession(stage, exact_session(file, model, threads=threads), shared)


def float_array(value: OrtValue) -> np.ndarray:
    """A tensor's elements in their own type, without a copy."""
    array = value.numpy()
    if array.dtype not in (np.float32, np.float16):
        raise UserError(f"a linear layer's activations are {array.dtype}, and float32 or float16 can be accelerated")
    return array
