# SPDX-License-Identifier: Apache-2.0
"""Layers between two stages: copies and conversions between a tensor and the device's memory change no bit."""

from dataclasses import replace

import numpy as np
import pytest
from onnxruntime import OrtValue

from sw.devices import make_config
from sw.devices.reference import ReferenceDevice
from sw.runtime.placement import Batch, place
from sw.runtime.usage import Usage
from tests.sw.fixtures.linears import expected, random_activations, random_linear, same_bits

CONFIG = make_config(tile=8, max_tokens=6, max_k=1024)


@pytest.fixture
def device():
    with ReferenceDevice(CONFIG) as opened:
        yield opened


def named(linear, source, target, bias=None):
    """The layer as an ONNX node of these tensors; bias: float32 [N] that the node adds."""
    return replace(linear, name=target, input_name=source, output_name=target, bias=bias, bias_in_node=bias is not None)


class Calls:
    """Calls a batch as the decoder does.

    places: tensors that have the same place in all calls of one kind, by kind.
    """

    def __init__(self, device, linears, heads=(), made=("x",)):
        self.batch = Batch(device, [place(device, linear) for linear in linears], frozenset(heads), frozenset(made))
        self.places: dict[tuple[int, bool], dict[str, OrtValue]] = {}

    def run(self, x, last=False) -> dict[str, np.ndarray]:
        """Results by name from the activations x [1, M, K], in any place."""
        tokens = x.shape[1]
        places = self.places.setdefault((tokens, last), {})
        values = places | {"x": OrtValue.ortvalue_from_numpy(x)}
        if "x" in places:
            # A session that is told to write there does the same.
            places["x"].numpy()[:] = x
            values["x"] = places["x"]
        self.batch.run(tokens, last, values, places, Usage())
        # Copies, because such an array does not keep its tensor alive.
        return {name: value.numpy().copy() for name, value in values.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [64, 76], ids=["whole groups", "padding"])
@pytest.mark.parametrize("bias", [False, True], ids=["product", "bias"])
def test_results(device, bias, k, bits, tokens, dtype):
    """Results are right with padding, planes, float16 and biases, in every combination, twice with the same buffers."""
    rng = np.random.default_rng(1)
    added = rng.standard_normal(33).astype(np.float32) if bias else None
    linear = named(random_linear(rng, 33, k, 32, bits=bits), "x", "y", added)
    calls = Calls(device, [linear])
    for _ in range(3):
        x = rng.standard_normal((1, tokens, k)).astype(dtype)
        y = calls.run(x)["y"]
        wanted = expected(CONFIG, linear, x[0].astype(np.float32))
        if bias:
            wanted = wanted + added
        assert y.shape == (1, tokens, 33) and y.dtype == dtype
        with np.errstate(over="ignore"):
            assert np.array_equal(y[0], wanted.astype(dtype))
        # Only tensors that a session can write in the device's layout, and those without any copy.
        assert ("x" in calls.places[tokens, False]) == (k == 64 and bits == 4 and dtype == np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_dirty_memory(device, bits):
    """Earlier contents of the device's memory do not get into the padding."""
    rng = np.random.default_rng(2)
    # These bytes are a float32 that is not a number.
    device.memory.memory[: 1 << 20] = 255
    linear = named(random_linear(rng, 16, 76, 32, bits=bits), "x", "y")
    x = random_activations(rng, 2, 76)
    assert same_bits(Calls(device, [linear]).run(x[None])["y"][0], expected(CONFIG, linear, x))


def test_tensor_that_no_stage_makes(device):
    """The graph's inputs and other layers' results may be in another place in every call."""
    rng = np.random.default_rng(3)
    linear = named(random_linear(rng, 16, 64, 32), "x", "y")
    calls = Calls(device, [linear], made=())
    for _ in range(2):
        x = random_activations(rng, 2, 64)
        assert same_bits(calls.run(x[None])["y"][0], expected(CONFIG, linear, x))
    assert set(calls.places[2, False]) == {"y"}


def test_groups_of_one_input(device, monkeypatch):
    """In one batch, only layers that read activations in the same layout share them."""
    rng = np.random.default_rng(4)
    shapes = [("a", 4, 32), ("b", 8, 32), ("c", 4, 32), ("d", 4, 64)]
    linears = [named(random_linear(rng, 20, 128, group, bits=bits), "x", name) for name, bits, group in shapes]
    jobs = []
    prepare = device.prepare
    monkeypatch.setattr(device, "prepare", lambda batch: jobs.extend(batch) or prepare(batch))
    calls = Calls(device, linears)
    for _ in range(2):
        x = random_activations(rng, 3, 128)
        values = calls.run(x[None])
        for linear in linears:
            assert same_bits(values[linear.name][0], expected(CONFIG, linear, x)), linear.name
    reuse = {job.name: job.reuse for job in jobs}
    assert [job.name for job in jobs if job.reuse] == ["c"] and len(jobs) == 4 == len(reuse)


def test_head(device):
    """The caller may request only the last token of a head, and all tokens of the other layers."""
    rng = np.random.default_rng(5)
    linears = [named(random_linear(rng, 20, 64, 32), "x", name) for name in ("logits", "other")]
    calls = Calls(device, linears, heads=["logits"])
    for last in (True, False, True):
        x = random_activations(rng, 4, 64)
        values = calls.run(x[None], last)
        rows = x[-1:] if last else x
        assert same_bits(values["logits"][0], expected(CONFIG, linears[0], rows))
        assert same_bits(values["other"][0], expected(CONFIG, linears[1], x))
