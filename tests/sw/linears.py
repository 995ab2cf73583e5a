# SPDX-License-Identifier: Apache-2.0
"""Random layers, and what a device must answer to them, straight from the definition in the model's own groups."""

from collections.abc import Collection, Sequence

import numpy as np

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.linear import quantise_activations, quantise_scales, to_float32
from sw.devices.base import (
    Buffer,
    Completion,
    Device,
    LinearJob,
    read_results,
    result_bytes,
    weight_bytes,
    weight_image,
)
from sw.linear import QuantizedLinear
from sw.pack import prepare

TIMEOUT = 120
"""Seconds that a batch may take."""


def random_linear(rng, n, k, group_size, bits=4, zero_point="integer", name="layer") -> QuantizedLinear:
    """A layer with scales of both signs over six orders of magnitude between rows, and a row of zeros."""
    groups = -(-k // group_size)
    scales = rng.standard_normal((n, groups)) * np.exp(rng.uniform(-7, 7, (n, 1)))
    scales[n // 2] = 0
    if zero_point == "integer":
        zero_points = rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8)
    else:
        zero_points = rng.uniform(-15, 15, (n, groups)).astype(np.float32)
    q = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    return QuantizedLinear(name, q, scales.astype(np.float32), zero_points, group_size, bits)


def random_activations(rng, tokens, k) -> np.ndarray:
    """float32 [tokens, k], tokens of very different size."""
    return (rng.standard_normal((tokens, k)) * np.exp(rng.uniform(-7, 7, (tokens, 1)))).astype(np.float32)


def expected(config: AcceleratorConfig, linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """float32 [M, N] in plain int64, without padding, splitting of groups or planes, or packing."""
    activations = quantise_activations(config, x)
    # What a plane's mantissas are multiplied with has to fit the same 16 bits.
    mantissas, rows = quantise_scales(
        linear.scales, 16 - config.weight_bits if linear.bits > config.weight_bits else 16
    )
    zero_points = np.rint(linear.zero_points.astype(np.float64) * 2**config.fraction_bits).astype(np.int64)
    total = np.zeros((len(x), linear.n), np.int64)
    for group in range(linear.groups):
        part = slice(group * linear.group_size, (group + 1) * linear.group_size)
        steps = (linear.q[:, part].astype(np.int64) << config.fraction_bits) - zero_points[:, group : group + 1]
        total += mantissas[:, group] * (activations.mantissas[:, part] @ steps.T)
    return to_float32(total, rows + activations.exponents[:, None] - 15 - config.fraction_bits)


def make_job(device: Device, linear: QuantizedLinear, x: np.ndarray, before: LinearJob | None = None) -> LinearJob:
    """A job in the device's memory; with `before`, one that reuses its activations."""
    layer = prepare(device.config, linear)
    weights = device.alloc(weight_bytes(layer.layout))
    device.write(weights, weight_image(layer.layout, layer.beats))
    if before is None:
        padded = layer.pad(x)
        activations = device.alloc(padded.nbytes)
        device.write(activations, padded)
    else:
        activations = before.activations
    results = device.alloc(result_bytes(layer.layout, len(x)))
    device.write(results, np.full(results.size // 4, np.nan, np.float32))
    return LinearJob(linear.name, layer.layout, len(x), weights, activations, results, before is not None)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays are equal bit for bit: 0 and -0 are not."""
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def free_jobs(device: Device, *jobs: LinearJob) -> None:
    """Gives the jobs' memory back."""
    buffers: set[Buffer] = {buffer for job in jobs for buffer in (job.weights, job.activations, job.results)}
    for buffer in buffers:
        device.free(buffer)


def run_exactly(
    device: Device, cases: Sequence[tuple[QuantizedLinear, np.ndarray]], reuse: Collection[int] = ()
) -> list[Completion]:
    """Runs (linear, x) as one batch, compares all results bit for bit, returns the completions.

    reuse: which cases take the activations of the case before.
    """
    jobs: list[LinearJob] = []
    for index, (linear, x) in enumerate(cases):
        jobs.append(make_job(device, linear, x, jobs[-1] if index in reuse else None))
    completions = device.wait(device.submit(jobs), TIMEOUT)
    for job, (linear, x) in zip(jobs, cases, strict=True):
        y = read_results(device, job)
        assert same_bits(y, expected(device.config, linear, x)), f"{linear.name} {linear.q.shape} M {len(x)}"
    assert [item.name for item in completions] == [linear.name for linear, _ in cases]
    assert [item.beats for item in completions] == [job.layout.beats for job in jobs]
    free_jobs(device, *jobs)
    return completions
