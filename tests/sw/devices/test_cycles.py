# SPDX-License-Identifier: Apache-2.0
"""The performance model against the RTL: the measured cycles are those of the simulated accelerator."""

import numpy as np
import pytest

from hw.spec.config import ConfigError
from hw.spec.control.descriptor import weight_bytes
from hw.spec.cycles import cycles
from hw.spec.memory.geometry import fit_layer
from sw.devices import make_config
from sw.devices.base import LinearJob, result_bytes
from sw.devices.rtl import RtlDevice

pytestmark = pytest.mark.simulator

# test_devices, which another worker runs at the same time, has the same hardware in the opposite order. So no worker
# waits while the other one builds.
CONFIGS = {
    "tile16": dict(tile=16),
    "tile8": dict(tile=8, ports=2, port_width=64, activation_bits=12, zero_point="fixed", max_k=1024),
    "tile4": dict(tile=4, ports=1, max_k=1024, max_tokens=5),
}
FULL = {
    "narrow": dict(tile=8, ports=2, port_width=32, max_k=1024, lanes=8),
    "lanes": dict(tile=16, max_k=1024, lanes=4),
    "tile32": dict(tile=32, zero_point="fixed"),
    # Eight results per cycle leave the array, and the port takes one.
    "slow_writes": dict(tile=32, ports=4, port_width=32, max_k=1024, lanes=8),
}
CASES = [*CONFIGS, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)]
# K, N, group_size
SHAPES = [(896, 128, 128), (896, 1152, 128), (896, 896, 64), (1024, 256, 128), (320, 37, 32), (640, 300, 64)]
TOLERANCE = 0.02


@pytest.fixture(scope="module", params=CASES)
def device(request):
    with RtlDevice(make_config(**(CONFIGS | FULL)[request.param]), memory="ideal") as opened:
        yield opened


def measured(device, layout, tokens):
    """Cycles of a layer of noise: cycles do not depend on values."""
    rng = np.random.default_rng(1)
    weights, results = device.alloc(weight_bytes(layout)), device.alloc(result_bytes(layout, tokens))
    device.write(weights, rng.integers(0, 256, weights.size, np.uint8))
    x = rng.standard_normal(tokens * layout.k).astype(np.float32)
    activations = device.alloc(x.nbytes)
    device.write(activations, x)
    job = LinearJob("layer", layout, tokens, weights, activations, results)
    (completion,) = device.wait(device.submit([job]), 120)
    for buffer in (weights, activations, results):
        device.free(buffer)
    return completion.cycles


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prediction(device, shape):
    k, n, group_size = shape
    try:
        layout = fit_layer(device.config, k, n, group_size)
    except ConfigError as error:
        pytest.skip(str(error))
    for tokens in sorted({1, 2, 5, device.config.max_tokens}):
        took, predicted = measured(device, layout, tokens), cycles(device.config, tokens, k, n, group_size)
        # Where a word takes many beats, the prediction of a very short layer is off by up to a word.
        allowed = max(TOLERANCE * took, layout.stream.beats_per_word)
        assert abs(predicted - took) <= allowed, f"M {tokens} took {took} cycles, predicted were {predicted}"


def test_long_layer():
    """The shape with the most activations."""
    config = make_config(tile=16)
    with RtlDevice(config, memory="ideal") as device:
        layout = fit_layer(config, 4864, 896, 128)
        for tokens in (1, 16):
            took, predicted = measured(device, layout, tokens), cycles(config, tokens, 4864, 896)
            assert abs(predicted - took) <= TOLERANCE * took
