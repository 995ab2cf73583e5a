# SPDX-License-Identifier: Apache-2.0
"""onnxruntime sessions on the CPU that compute in float32, for reference and for all that no device does."""

from collections.abc import Sequence

import onnx
import onnxruntime

from sw.common.errors import UserError, one_line
from sw.graph.file import OnnxFile


def exact_session(
    file: OnnxFile, model: onnx.ModelProto, extra_outputs: Sequence[str] = (), threads: int = 0
) -> onnxruntime.InferenceSession:
    """A CPU session for `model` (which is changed) with more outputs, its MatMulNBits nodes at accuracy_level 0.

    At accuracy_level 4 (what exporters write) onnxruntime would round the activations to 8 bits itself.
    file: what the model is from; its external data is found where that says. threads: 0 for onnxruntime's own choice.
    Raises UserError if onnxruntime refuses the model.
    """
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra_outputs if name not in present)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    options = onnxruntime.SessionOptions()
    # Errors are raised as well, and reported once.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # An arena a session would hold a megabyte and more each, and a cut graph has a hundred of them.
    options.enable_cpu_mem_arena = False
    for key, value in {
        # Spinning threads would burn the processor that other work (the simulated device) needs between two runs.
        "session.intra_op.allow_spinning": "0",
        "session.qdq_matmulnbits_accuracy_level": "0",
        "session.model_external_initializers_file_folder_path": str(file.data_folder),
    }.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"{file.path}: onnxruntime refuses the model ({one_line(error)})") from error
