# SPDX-License-Identifier: Apache-2.0
"""The first error: the most serious of several errors in one cycle is kept, and later errors change nothing."""

import cocotb
import numpy as np

from hw.spec.control.program import LENGTH_BITS
from hw.spec.control.registers import OF_ATTENTION, ErrorCode, errors_of
from sim.bench.dut import begin, config, trace
from sim.bench.streams import rng

BUS = (ErrorCode.READ_BUS, ErrorCode.WRITE_BUS, ErrorCode.READ_TIMEOUT, ErrorCode.WRITE_TIMEOUT)
ACTIVATIONS = (ErrorCode.NON_FINITE, ErrorCode.EXPONENT)
STOPPING = (*BUS, ErrorCode.UNDERRUN)
"""After these errors no descriptor that is under way completes."""
SERIOUS_FIRST = (
    *STOPPING,
    *ACTIVATIONS,
    ErrorCode.PROGRAM,
    *(code for code in errors_of(config()) if code in OF_ATTENTION),
)
"""A driver may rely on this order: a bus error hides a data error, and both hide a refused descriptor."""
REFUSALS = (ErrorCode.OPCODE, ErrorCode.SHAPE)
ADDRESS_BITS = 40


def _model(rst, faults, refused, begun, loading) -> tuple[list[int], list[int], list[int], list[int]]:
    """Code, address, ``failed`` and ``stops`` at the start of each cycle.

    ``faults`` has (raised, address) of each cycle by code.
    """
    codes, addresses, indices, code, address, failed = [], [], [], 0, 0, 0
    for t, reset in enumerate(rst):
        codes.append(code)
        addresses.append(address)
        indices.append(failed)
        if reset:
            code = address = failed = 0
        elif not code:
            code = refused[t]
            failed = begun[t] if code else 0
            for candidate in SERIOUS_FIRST:
                raised, at = faults[candidate][t]
                if raised:
                    code, address = int(candidate), at
                    failed = loading[t] if candidate in ACTIVATIONS else begun[t]
                    break
    return codes, addresses, indices, [int(code in STOPPING) for code in codes]


async def _compare(dut, rst, faults, refused) -> None:
    random = rng(3)
    # Both change in every cycle.
    begun, loading = (random.integers(0, 1 << LENGTH_BITS, len(rst)).tolist() for _ in range(2))
    inputs = {"rst": rst, "refused": refused, "begun": begun, "loading": loading}
    for code in errors_of(config()):
        inputs[f"faults_{code}"] = [raised | at << 1 for raised, at in faults.get(code, [(0, 0)] * len(rst))]
    for name, values in inputs.items():
        getattr(dut, name).value = values[0]
    await begin(dut)
    record, times = await trace(dut, inputs, ("code", "address", "failed", "stops")), range(len(rst))
    codes, addresses, indices, stops = _model(rst, faults, refused, begun, loading)
    assert record.raw("code", times) == codes
    assert record.raw("address", times) == addresses
    assert record.raw("failed", times) == indices
    assert record.raw("stops", times) == stops


@cocotb.test()
async def every_pair(dut):
    """If two errors occur in one cycle, the more serious one is kept, with its address."""
    random, rst, refused = rng(1), [], []
    faults = {code: [] for code in SERIOUS_FIRST}
    for one in SERIOUS_FIRST:
        for other in (*SERIOUS_FIRST, *REFUSALS):
            rst += [1, 0, 0]
            refused += [0, int(other) if other in REFUSALS else 0, 0]
            for code, values in faults.items():
                address = int(random.integers(0, 1 << ADDRESS_BITS))
                values += [(0, 0), (int(code in (one, other)), address), (0, address)]
    await _compare(dut, rst, faults, refused)


@cocotb.test()
async def random_errors(dut):
    """Random errors, several at a time: the first cycle with an error counts, until the reset."""
    random, cycles = rng(2), 4000
    rst = (random.random(cycles) < 0.1).astype(int).tolist()
    refused = np.where(random.random(cycles) < 0.1, random.choice(REFUSALS, cycles), 0).tolist()
    faults = {
        code: [
            (int(raised), int(address))
            for raised, address in zip(
                random.random(cycles) < 0.1, random.integers(0, 1 << ADDRESS_BITS, cycles), strict=True
            )
        ]
        for code in SERIOUS_FIRST
    }
    # The first inputs are there before the first cycle: no error among them.
    refused[0] = 0
    for values in faults.values():
        values[0] = (0, 0)
    await _compare(dut, rst, faults, refused)
