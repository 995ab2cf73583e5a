# SPDX-License-Identifier: Apache-2.0
"""Hybrid execution: a language model's quantized linear layers run on a device, everything else in onnxruntime.

    ids -> stage 0 -> batch 0 -> stage 1 -> batch 1 -> ... -> logits

`cut` divides the graph into stages, the parts between accelerated layers. A stage is an onnxruntime session of its own
(`stages`). A batch is the set of layers whose inputs the stage before it makes (`placement`). It is one submission, so
q, k and v share activations, which the device fetches once. Activations and results are float32 in the device's memory,
which the sessions read and write without copies where the layouts agree. `decoder` feeds tokens and keeps the KV cache
(`cache`).
"""

from sw.runtime.decoder import Decoder
from sw.runtime.usage import Usage

__all__ = ["Decoder", "Usage"]
