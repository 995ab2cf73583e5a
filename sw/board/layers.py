# SPDX-License-Identifier: Apache-2.0
"""Layers that the doctor runs on a board: they check the interrupt, the results, programs and the speed of the memory.

Each check takes a device and the measured clock in Hz. It returns its result and how to fix it; the latter is empty if
nothing is wrong.
"""

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.control.descriptor import FLOAT_BYTES, weight_bytes
from hw.spec.cycles import layer_cycles
from hw.spec.memory.geometry import LayerLayout
from hw.spec.numerics.linear import quantize_activations
from hw.spec.ops import Wait
from sw.devices.base import Device, LinearJob, read_results, result_bytes, weight_image
from sw.devices.jobs import Epilogue, Rows, Second, VectorJob
from sw.devices.kv260 import KV260Device
from sw.devices.pack import integer_weights, prepare
from sw.devices.reference import ReferenceDevice, reference_linear
from sw.model.linear import QuantizedLinear

GROUP = 32
"""A multiple of every tile."""
SMALL_K, SMALL_N = 256, 67
STREAM_K, STREAM_N = 1024, 4096
"""Some megabytes of weights: enough to measure the rate, few enough to check the results quickly."""
PROGRAM_WIDTH, EPSILON = 256, 1e-6
TIMEOUT = 20.0
INTERRUPT_SECONDS = 1.0
LEAST_RATE = 0.7
"""Least rate, relative to an ideal memory. The simulated KV260 at 2133 MT/s reaches 0.89."""


def random_layer(config: AcceleratorConfig, seed: int, name: str, n: int, k: int) -> QuantizedLinear:
    """A layer that uses the full range of its formats: scales of both signs, all weights, zero points of the config."""
    rng = np.random.default_rng(seed)
    shape, top = (n, -(-k // GROUP)), 1 << config.weight_bits
    if config.zero_point == "integer":
        zero_points = rng.integers(0, top, shape).astype(np.uint8)
    else:
        zero_points = rng.uniform(0, top - 1, shape).astype(np.float32)
    q = rng.integers(0, top, (n, k)).astype(np.uint8)
    return QuantizedLinear(
        name, q, rng.standard_normal(shape).astype(np.float32), zero_points, GROUP, config.weight_bits
    )


class _Layer:
    """A random layer in a device's memory. Its buffers are freed at the end."""

    def __init__(self, device: KV260Device, name: str, n: int, k: int, tokens: int):
        self._device = device
        k = min(k, device.config.max_k)
        linear = random_layer(device.config, 1, name, n, k)
        packed = prepare(device.config, linear)
        x = np.random.default_rng(2).standard_normal((tokens, k)).astype(np.float32)
        padded = packed.pad(x)
        self.layout: LayerLayout = packed.layout
        weights = integer_weights(packed, linear)
        self.expected = reference_linear(device.config, weights, quantize_activations(device.config, padded))
        sizes = weight_bytes(self.layout), padded.nbytes, result_bytes(self.layout, tokens)
        buffers = [device.alloc(size) for size in sizes]
        device.write(buffers[0], weight_image(self.layout, packed.beats))
        device.write(buffers[1], padded)
        # A result that the device does not write stays NaN.
        device.write(buffers[2], np.full(sizes[2] // 4, np.nan, np.float32))
        self.job = LinearJob(name, self.layout, tokens, buffers[0], buffers[1], buffers[2])

    def __enter__(self) -> "_Layer":
        return self

    def __exit__(self, *exception: object) -> None:
        for buffer in (self.job.weights, self.job.activations, self.job.results):
            self._device.free(buffer)

    def differences(self) -> str:
        """A text about the differences between the results and the numpy definition; empty if they are equal."""
        found = read_results(self._device, self.job)
        differ = np.argwhere(found.view(np.uint32) != self.expected.view(np.uint32))
        if not len(differ):
            return ""
        m, n = differ[0]
        return (
            f"{len(differ):,} of {found.size:,} results of layer {self.job.name} are wrong,"
            f" for token {m} and row {n} it is {found[m, n]!s} instead of {self.expected[m, n]!s}"
        )


def interrupt_check(device: KV260Device, hz: float) -> tuple[str, str]:
    """Whether a finished layer raises the interrupt that the device tree names."""
    uio = device.platform.uio
    if uio is None or not uio.has_interrupt:
        return "the UIO device has none: the driver polls the registers instead, which takes a processor", (
            "the overlay's node needs interrupts = <0 89 4> and interrupt-parent"
        )
    while uio.wait(0):
        pass
    with _Layer(device, "interrupt", SMALL_N, SMALL_K, 1) as layer:
        ticket = device.submit([layer.job])
        # The interrupt is a level: if it is armed late, it fires at once.
        uio.arm()
        fired = uio.wait(INTERRUPT_SECONDS)
        device.wait(ticket, TIMEOUT)
    if fired:
        return "a layer raised it", ""
    return f"a layer was done, but none came in {INTERRUPT_SECONDS:g} s", (
        "the overlay's interrupts must be those of pl_ps_irq0; grep gristmill /proc/interrupts counts them"
    )


def result_check(device: KV260Device, hz: float) -> tuple[str, str]:
    """Whether the results of layers are exact, bit for bit, for one token and for max_tokens."""
    for tokens in (1, device.config.max_tokens):
        with _Layer(device, f"M {tokens}", SMALL_N, SMALL_K, tokens) as layer:
            device.wait(device.submit([layer.job]), TIMEOUT)
            if text := layer.differences():
                return text, "is the bitstream's slack positive at this clock? is u-dma-buf of version 3 or newer?"
    return f"layers for 1 and {device.config.max_tokens} tokens are exact, bit for bit", ""


def program_check(device: KV260Device, hz: float) -> tuple[str, str]:
    """Whether a program that the hardware fetches from memory has the results of the reference device, bit for bit.

    It is an RMSNorm and a layer that waits for it, multiplies by the norm's scale and adds the norm's input.
    """
    if not device.config.has_programs:
        return "this hardware has none: it was built with --operators linear", ""
    with ReferenceDevice(device.config) as reference:
        found, expected = (_run_program(each) for each in (device, reference))
    for name, values, wanted in zip(("the norm", "the layer"), found, expected, strict=True):
        if differ := int((values.view(np.uint32) != wanted.view(np.uint32)).sum()):
            return f"{differ:,} of {wanted.size:,} results of {name} in a program are wrong", (
                "single layers are right: read port 0 fetches the program; is the bitstream's slack positive?"
            )
    return f"a program with a norm and a layer for {device.config.max_tokens} tokens is exact, bit for bit", ""


def _run_program(device: Device) -> tuple[np.ndarray, np.ndarray]:
    """Runs the program of :func:`program_check`: the second output of its norm, and its layer's results."""
    config, random = device.config, np.random.default_rng(3)
    tokens, width, pitch = config.max_tokens, PROGRAM_WIDTH, PROGRAM_WIDTH * FLOAT_BYTES
    packed = prepare(config, random_layer(config, 3, "program", width, width))
    x = random.standard_normal((tokens, width)).astype(np.float32)
    factor = random.standard_normal(width).astype(np.float32)
    empty = np.full((tokens, width), np.nan, np.float32)
    arrays = weight_image(packed.layout, packed.beats), x, factor, empty, empty
    buffers = [device.alloc(array.nbytes) for array in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        device.write(buffer, array)
    weights, source, factors, normed, results = buffers
    norm = Epilogue(second=Second(factors, Rows(normed, pitch)), epsilon=EPSILON)
    last = Epilogue(scale=True, addend=Rows(source, pitch))
    jobs = (
        VectorJob("norm", tokens, width, Rows(source, pitch), epilogue=norm),
        LinearJob("program", packed.layout, tokens, weights, normed, results, False, Wait.ACTIVATIONS, last),
    )
    try:
        device.wait(device.submit(device.prepare(jobs)), TIMEOUT)
        return device.read(normed, np.float32, x.shape), device.read(results, np.float32, x.shape)
    finally:
        for buffer in buffers:
            device.free(buffer)


def stream_check(device: KV260Device, hz: float) -> tuple[str, str]:
    """The rate of the weight stream. The results of the layer are checked, too."""
    with _Layer(device, "stream", STREAM_N, STREAM_K, 1) as layer:
        (completion,) = device.wait(device.submit([layer.job]), TIMEOUT)
        if text := layer.differences():
            return text, "single layers are right: other traffic on the ports, or their address map"
        share = layer_cycles(layer.layout, 1) / completion.cycles
        rate = completion.beats * device.config.beat_bytes * hz / completion.cycles
        text = f"{rate / 1e9:.2f} GB/s of weights, {100 * share:.0f} % of the ports' bandwidth at this clock"
    if share < LEAST_RATE:
        return text, (
            "the overlay's config-afi must set the ports' widths; other traffic, such as a display's, takes its share"
        )
    return text, ""
