# SPDX-License-Identifier: Apache-2.0
"""The processing element multiplies, adds and passes values on, each after the stated number of cycles."""

import cocotb
import numpy as np

from sim.bench.dut import begin, config, latency, ports, trace
from sim.bench.streams import rng

COUNT = 2000


@cocotb.test()
async def test_multiply_accumulate(dut):
    """A new weight, activation and psum in every cycle, including the extreme values of all three."""
    c, random = config(), rng()
    bound = (c.tile - 1) * c.weight_max * c.activation_max
    row, word = ports()["weights_in"]["width"], ports()["psum_in"]["width"]
    assert word >= c.psum_bits
    activations = random.integers(-c.activation_max, c.activation_max, COUNT, endpoint=True)
    activations[::7] = random.choice([-c.activation_max, c.activation_max], len(activations[::7]))
    weights = [int.from_bytes(random.bytes(row // 8 + 1), "little") % (1 << row) for _ in range(COUNT)]
    weights[::5] = [(1 << row) - 1] * len(weights[::5])
    psums = random.integers(-bound, bound, COUNT, endpoint=True)
    psums[::3] = random.choice([-bound, bound], len(psums[::3]))
    mask = (1 << word) - 1
    await begin(dut)
    inputs = {"activation_in": activations & mask, "psum_in": psums & mask, "weights_in": weights}
    record = await trace(dut, inputs, ["psum_out", "activation_out", "weights_out"])

    # The weight is the lowest one of the row, because this element is column 0.
    q = np.array([weight & c.weight_max for weight in weights])
    wait, hop = latency(), latency("hop")
    products = (activations * q)[: COUNT - wait]
    expected = products + psums[wait - hop : COUNT - hop]
    seen = record.elements("psum_out", range(wait, COUNT))[:, 0]
    assert np.array_equal(seen, expected & mask)
    assert record.raw("activation_out", range(hop, COUNT)) == (activations & mask).tolist()[: COUNT - hop]
    assert record.raw("weights_out", range(hop, COUNT)) == weights[: COUNT - hop]
