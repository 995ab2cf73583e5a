# SPDX-License-Identifier: Apache-2.0
"""Software: reads models, runs linear layers on a device, writes text. Needs numpy and hw.spec; never Amaranth."""

import os

# Before numpy is loaded: its matrix products here are small and run beside a simulation or onnxruntime, where a second
# BLAS thread mostly spins. One thread ran all layers of SmolLM2 three times as fast on two busy cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
