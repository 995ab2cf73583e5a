# SPDX-License-Identifier: Apache-2.0
"""Runs a language model on a device: as programs (`programs`) where hardware and graph allow it, or else hybrid.

Hybrid execution (`decoder`): the quantized linear layers run on the device, everything else in onnxruntime.

    ids -> stage 0 -> batch 0 -> stage 1 -> batch 1 -> ... -> logits

`cut` divides the graph into stages, the parts between accelerated layers. A stage is an onnxruntime session of its own
(`stages`). A batch is the set of layers whose inputs the stage before it makes (`placement`). It is one submission, so
q, k and v share activations, which the device fetches once. Activations and results are float32 in the device's memory,
which the sessions read and write without copies where the layouts agree. `decoder` feeds tokens and keeps the KV cache
(`cache`).

Programs compute the same linear layers bit for bit, and the operators between them as hw.spec.numerics defines them.
"""

from sw.runtime.base import BaseDecoder
from sw.runtime.decoder import Decoder
from sw.runtime.programs import ProgramDecoder
from sw.runtime.usage import Usage

__all__ = ["BaseDecoder", "Decoder", "ProgramDecoder", "Usage"]
