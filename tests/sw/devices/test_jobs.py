# SPDX-License-Identifier: Apache-2.0
"""Jobs with epilogues: the results are compositions of hw.spec.numerics, and impossible jobs are refused."""

from dataclasses import replace

import numpy as np
import pytest

from hw.spec.numerics.float32 import add, mul
from hw.spec.numerics.vector import norm_scale, piece_maxima, rotary, silu_mul
from hw.spec.ops import Wait
from sw.devices import make_config, open_device
from sw.devices.base import Buffer, Device, DeviceError, weight_bytes, weight_image
from sw.devices.jobs import NOWHERE, Epilogue, Job, LinearJob, Rotation, Rows, Second, VectorJob
from sw.devices.pack import prepare
from tests.sw.fixtures.linears import TIMEOUT, expected, random_linear, same_bits

HIDDEN, TOKENS, PITCH = 64, 3, 4 * 64
EPSILON = 1e-5


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("reference", "ideal"), id="reference"),
        pytest.param(("rtl", "hostile"), id="rtl", marks=pytest.mark.simulator),
    ],
)
def device(request):
    name, memory = request.param
    with open_device(name, make_config(operators="decoder", tile=4, ports=1, max_k=1024, max_tokens=5), memory) as made:
        yield made


class Bench:
    """Writes operands to a device and keeps them, for a computation of the same in numpy."""

    def __init__(self, device: Device, seed: int):
        self.device, self.rng = device, np.random.default_rng(seed)
        print("seed", seed)

    def write(self, values: np.ndarray) -> Buffer:
        buffer = self.device.alloc(values.nbytes)
        self.device.write(buffer, values)
        return buffer

    def rows(self, columns: int, tokens: int = TOKENS) -> np.ndarray:
        return self.rng.standard_normal((tokens, columns)).astype(np.float32)

    def linear(self, n: int, k: int, name: str):
        linear = random_linear(self.rng, n, k, 32, name=name)
        linear = replace(linear, scales=(self.rng.uniform(0.5, 1.5, linear.scales.shape) / 40).astype(np.float32))
        layer = prepare(self.device.config, linear)
        weights = self.device.alloc(weight_bytes(layer.layout))
        self.device.write(weights, weight_image(layer.layout, layer.beats))
        return linear, layer.layout, weights

    def space(self, columns: int, tokens: int = TOKENS) -> Buffer:
        return self.write(np.full((tokens, columns), np.nan, np.float32))

    def run(self, *jobs: Job) -> None:
        done = self.device.wait(self.device.submit(jobs), TIMEOUT)
        assert [item.name for item in done] == [job.name for job in jobs]
        assert [item.beats for item in done] == [job.beats for job in jobs]

    def read(self, buffer: Buffer, columns: int, tokens: int = TOKENS) -> np.ndarray:
        return self.device.read(buffer, np.float32, (tokens, columns))


def test_chain(device):
    """Norm, layer with scale, bias and rotation, SiLU, residual with a second output: each waits for the one before."""
    bench = Bench(device, 1)
    x, weight, second_weight, bias = (bench.rows(HIDDEN, tokens) for tokens in (TOKENS, 1, 1, 1))
    angles = bench.rows(8)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(TOKENS, 16)
    padded = np.zeros((TOKENS, 32), np.float32)
    padded[:, :16] = table
    q, q_layout, q_weights = bench.linear(HIDDEN, HIDDEN, "q")
    up, up_layout, up_weights = bench.linear(2 * HIDDEN, HIDDEN, "up")
    down, down_layout, down_weights = bench.linear(HIDDEN, HIDDEN, "down")
    hidden, normed, q_results, gated, out, second = (
        bench.write(x), bench.space(HIDDEN), bench.space(HIDDEN), bench.space(HIDDEN), bench.space(HIDDEN),
        bench.space(HIDDEN),
    )  # fmt: skip
    rotation = Rotation(Rows(bench.write(padded), 128), 16, 3)
    norm = Epilogue(second=Second(bench.write(weight), Rows(normed, PITCH)), epsilon=EPSILON)
    last = Epilogue(
        addend=Rows(hidden, PITCH), second=Second(bench.write(second_weight), Rows(second, PITCH)), epsilon=EPSILON
    )
    after = Wait.ACTIVATIONS
    bench.run(
        VectorJob("norm", TOKENS, HIDDEN, Rows(hidden, PITCH), epilogue=norm),
        LinearJob(
            "q", q_layout, TOKENS, q_weights, normed, q_results, False, after,
            Epilogue(scale=True, addend=Rows(bench.write(bias)), rotation=rotation),
        ),
        LinearJob(
            "up", up_layout, TOKENS, up_weights, normed, gated, True, Wait.NOTHING, Epilogue(scale=True, silu=True)
        ),
        LinearJob("down", down_layout, TOKENS, down_weights, gated, out, False, after, last),
    )  # fmt: skip

    config = device.config
    r, scaled = norm_scale(x, EPSILON)[:, None], mul(x, weight)
    wanted = add(mul(expected(config, q, scaled), r), bias)
    pairs = wanted[:, :48].reshape(TOKENS, 3, 8, 2)
    turned = rotary(pairs[..., 0], pairs[..., 1], table[:, None, ::2], table[:, None, 1::2])
    wanted[:, :48] = np.stack(turned, axis=-1).reshape(TOKENS, 48)
    assert same_bits(bench.read(q_results, HIDDEN), wanted)
    values = mul(expected(config, up, scaled), r)
    wanted = silu_mul(values[:, ::2], values[:, 1::2])
    assert same_bits(bench.read(gated, HIDDEN), wanted)
    wanted = add(expected(config, down, wanted), x)
    assert same_bits(bench.read(out, HIDDEN), wanted)
    assert same_bits(bench.read(second, HIDDEN), mul(wanted, second_weight))


def test_pieces_and_copies(device):
    """A head that writes only the maxima of its pieces; a copy of rows to the second half of wider rows."""
    bench = Bench(device, 2)
    x = bench.rows(HIDDEN)
    head, layout, weights = bench.linear(700, HIDDEN, "head")
    pieces, wide = bench.space(32), bench.space(2 * HIDDEN)
    rows = bench.write(x)
    bench.run(
        LinearJob("head", layout, TOKENS, weights, rows, NOWHERE, epilogue=Epilogue(pieces=Rows(pieces, 128))),
        VectorJob("copy", TOKENS, HIDDEN, Rows(rows, PITCH), wide.part(PITCH), result_pitch=2 * PITCH),
    )
    maxima, places = piece_maxima(expected(device.config, head, x))
    found = bench.read(pieces, 32)
    assert same_bits(found[:, 0:6:2].copy(), maxima)
    assert np.array_equal(np.ascontiguousarray(found[:, 1:6:2]).view(np.uint32), places)
    assert np.isnan(found[:, 6:]).all()
    copied = bench.read(wide, 2 * HIDDEN)
    assert np.isnan(copied[:, :HIDDEN]).all() and same_bits(copied[:, HIDDEN:].copy(), x)


def test_scales_of_an_earlier_batch_do_not_count(device):
    bench = Bench(device, 3)
    buffer = bench.write(bench.rows(HIDDEN))
    job = VectorJob("x", TOKENS, HIDDEN, Rows(buffer, PITCH), bench.space(HIDDEN), epilogue=Epilogue(epsilon=EPSILON))
    bench.run(job)
    scaled = replace(job, name="y", epilogue=Epilogue(scale=True))
    bench.run(job, scaled)
    message = "^layer y scales its tokens, and no job before it computes their scales$"
    for batch in ([scaled], [replace(job, tokens=TOKENS - 1), scaled]):
        with pytest.raises(DeviceError, match=message):
            device.submit(batch)


def test_impossible_jobs(device):
    bench = Bench(device, 4)
    x, y, small = bench.write(bench.rows(HIDDEN)), bench.space(HIDDEN), device.alloc(8)
    _, layout, weights = bench.linear(HIDDEN, HIDDEN, "layer")
    job = LinearJob("layer", layout, TOKENS, weights, x, y, epilogue=Epilogue(epsilon=EPSILON))
    second = Second(x, Rows(y, PITCH))
    changes = [
        (dict(addend=Rows(small)), "its addend take 256 bytes, the buffer has 8"),
        (dict(second=Second(small, Rows(x, PITCH))), "its factor take 256 bytes, the buffer has 8"),
        (dict(second=second._replace(results=Rows(small, PITCH))), "its second output take 768 bytes"),
        (dict(pieces=Rows(small, 0)), "no hardware has its epilogue"),
        (dict(rotation=Rotation(Rows(x, PITCH), 24, 1)), "no hardware has its epilogue"),
        (dict(silu=True), "no hardware has its epilogue"),
        (dict(addend=Rows(Buffer(1 << 31, 4096))), "no buffer of 4,096 bytes is allocated at address 0x80000000"),
    ]
    for change, message in changes:
        with pytest.raises(DeviceError, match=message):
            device.submit([replace(job, epilogue=replace(job.epilogue, **change))])
    with pytest.raises(DeviceError, match="no hardware has its epilogue"):
        device.submit([replace(job, results=NOWHERE)])


def test_waits(device):
    """A job that reads results of its own batch waits for them, for weights with Wait.WEIGHTS."""
    bench = Bench(device, 5)
    _, layout, weights = bench.linear(HIDDEN, HIDDEN, "layer")
    x, y, z = (bench.write(bench.rows(HIDDEN)) for _ in range(3))
    first = VectorJob("first", TOKENS, HIDDEN, Rows(x, PITCH), y)
    table = bench.write(np.zeros(PITCH, np.uint8))
    later = [
        LinearJob("later", layout, TOKENS, weights, y, z),
        VectorJob("later", TOKENS, HIDDEN, Rows(y, PITCH), z),
        VectorJob("later", TOKENS, HIDDEN, Rows(x, PITCH), z, epilogue=Epilogue(addend=Rows(y))),
        VectorJob("later", TOKENS, HIDDEN, Rows(x, PITCH), z, epilogue=Epilogue(second=Second(y, Rows(table)))),
        VectorJob("later", TOKENS, HIDDEN, Rows(x, PITCH), z, epilogue=Epilogue(rotation=Rotation(Rows(y), 16, 2))),
    ]
    later[3] = replace(later[3], tokens=1)
    message = "^layer later reads results of its own batch, and does not wait for them$"
    for job in later:
        with pytest.raises(DeviceError, match=message):
            device.prepare([first, job])
        waiting = replace(job, wait=Wait.ACTIVATIONS)
        device.prepare([first, waiting])
        # The job between has waited for both.
        between = VectorJob("between", 1, HIDDEN, Rows(x, PITCH), device.alloc(PITCH), Wait.ACTIVATIONS)
        device.prepare([first, between, job])
        with pytest.raises(DeviceError, match=message):
            device.prepare([between, first, job])
    overwritten = replace(first, results=weights)
    job = LinearJob("later", layout, TOKENS, weights, x, z, wait=Wait.ACTIVATIONS)
    with pytest.raises(DeviceError, match=message):
        device.prepare([overwritten, job])
    device.prepare([overwritten, replace(job, wait=Wait.WEIGHTS)])


def test_parts_of_wider_rows(device):
    """A job may read other columns of the rows that an earlier one writes, but none of the same columns."""
    bench = Bench(device, 7)
    x, z = bench.write(bench.rows(HIDDEN)), bench.space(HIDDEN)
    wide = bench.write(np.zeros((TOKENS, 3 * HIDDEN), np.float32))
    first = VectorJob("first", TOKENS, HIDDEN, Rows(x, PITCH), wide.part(PITCH), result_pitch=3 * PITCH)
    for start, allowed in ((0, True), (128, False), (PITCH, False), (PITCH + 128, False), (2 * PITCH, True)):
        later = VectorJob("later", TOKENS, HIDDEN, Rows(wide.part(start), 3 * PITCH), z)
        if allowed:
            device.prepare([first, later])
        else:
            with pytest.raises(DeviceError, match="layer later reads results of its own batch"):
                device.prepare([first, later])
    # With another pitch, the rows are between each other.
    with pytest.raises(DeviceError, match="layer later reads results of its own batch"):
        device.prepare([first, VectorJob("later", TOKENS, HIDDEN, Rows(wide, 2 * PITCH), z)])


def test_hardware_without_vector_unit():
    with open_device("reference", make_config(tile=4, ports=1)) as device:
        bench = Bench(device, 6)
        x, y = bench.write(bench.rows(HIDDEN)), bench.space(HIDDEN)
        message = "^layer copy has an epilogue, and hardware with --operators linear has none$"
        with pytest.raises(DeviceError, match=message):
            device.submit([VectorJob("copy", TOKENS, HIDDEN, Rows(x, PITCH), y)])
