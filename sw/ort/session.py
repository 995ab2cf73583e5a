# SPDX-License-Identifier: Apache-2.0
"""onnxruntime sessions on the CPU that compute in float32: the reference, and the operators that no device computes."""

from collections.abc import Sequence

import onnx
import onnxruntime

from sw.common.errors import UserError, one_line
from sw.graph.file import OnnxFile


def exact_session(
    file: OnnxFile, model: onnx.ModelProto, extra_outputs: Sequence[str] = (), threads: int = 0
) -> onnxruntime.InferenceSession:
    """A CPU session for `model` (which is changed) with more outputs, its MatMulNBits nodes at accuracy_level 0.

    At accuracy_level 4, the value that exporters write, onnxruntime would round the activations to 8 bits itself.
    file: the file of the model; it gives the folder of the external data. threads: 0 for onnxruntime's own choice.
    Raises UserError if onnxruntime refuses the model.
    """
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra_outputs if name not in present)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    options = onnxruntime.SessionOptions()
    # No log: every error is also raised as an exception, and reported there.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # An arena takes a megabyte or more per session, and a cut graph has a hundred sessions.
    options.enable_cpu_mem_arena = False
    for key, value in {
        # Between two runs, spinning threads would take processor time from other work (the simulated device).
        "session.intra_op.allow_spinning": "0",
        "session.qdq_matmulnbits_accuracy_level": "0",
        "session.model_external_initializers_file_folder_path": str(file.data_folder),
    }.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"{file.path}: onnxruntime refuses the model ({one_line(error)})") from error
