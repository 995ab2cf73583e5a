# SPDX-License-Identifier: Apache-2.0
"""One linear layer, y = x W^T, with int4 weights on the accelerator.

python examples/one_layer.py                    # on the reference device: numpy, bit-identical to the hardware
python examples/one_layer.py --device rtl       # on the generated Verilog, simulated with its memory
"""

import argparse
from collections.abc import Sequence

import numpy as np

from sw.common.errors import run_cli
from sw.devices import DEVICES, open_device
from sw.devices.base import LinearJob, read_results, result_bytes, weight_image
from sw.devices.pack import prepare
from sw.model.linear import QuantizedLinear

TOKENS, K, N, GROUP = 2, 896, 1152, 128


def random_layer(rng: np.random.Generator) -> QuantizedLinear:
    """A layer with weights (q - z) * s: 4-bit q, and a scale s and a zero point z for each group of K."""
    q = rng.integers(0, 16, (N, K), np.uint8)
    scales = rng.uniform(0.005, 0.02, (N, K // GROUP)).astype(np.float32)
    zero_points = rng.integers(6, 10, (N, K // GROUP), np.uint8)
    return QuantizedLinear("example", q, scales, zero_points, GROUP, bits=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="One linear layer on the accelerator.")
    parser.add_argument("--device", choices=DEVICES, default="reference")
    options = parser.parse_args(arguments)

    rng = np.random.default_rng(1)
    linear, x = random_layer(rng), rng.standard_normal((TOKENS, K)).astype(np.float32)

    with open_device(options.device, tile=16) as device:
        layer = prepare(device.config, linear)
        image, padded = weight_image(layer.layout, layer.beats), layer.pad(x)
        weights, activations = device.alloc(image.nbytes), device.alloc(padded.nbytes)
        results = device.alloc(result_bytes(layer.layout, TOKENS))
        device.write(weights, image)
        device.write(activations, padded)
        job = LinearJob("example", layer.layout, TOKENS, weights, activations, results)
        (done,) = device.wait(device.submit([job]), timeout=60)
        y = read_results(device, job)

    groups = np.arange(K) // GROUP
    exact = x @ ((linear.q - linear.zero_points[:, groups].astype(np.float32)) * linear.scales[:, groups]).T
    error = np.abs(y - exact).max() / np.abs(exact).max()
    print(f"y is float32 {list(y.shape)}, relative error {error:.1e} against the float32 product")
    print(f"{done.cycles:,} cycles, simulated" if done.cycles else "no cycles: the reference device has no hardware")


if __name__ == "__main__":
    run_cli(main)
