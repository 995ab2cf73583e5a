# SPDX-License-Identifier: Apache-2.0
"""Code that benches share: the hardware's contract from its manifest, clock and reset, and recorded cycles."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge

from hw.spec.config import AcceleratorConfig
from sim.bench import streams
from sim.bench.packing import Layout, unpack_elements
from sim.harness import manifest

__all__ = ["Trace", "begin", "check_pipeline", "config", "latency", "payload", "ports", "trace"]


def config() -> AcceleratorConfig:
    """Parameters of the hardware under test."""
    return AcceleratorConfig.from_dict(manifest()["config"])


def latency(name: str = "latency") -> int:
    """A property of the block, from its manifest."""
    return manifest()["properties"][name]


def ports() -> dict[str, Any]:
    """Every port and every stream's payload, from the manifest."""
    return {**manifest()["ports"], **manifest()["streams"]}


def payload(port: str) -> Layout:
    """Fields of a port, or of the payload of a stream."""
    return Layout(ports()[port]["fields"])


async def begin(dut: Any) -> None:
    """Start the clock and reset; a block without a resettable state has no reset port."""
    if hasattr(dut, "rst"):
        await streams.start(dut)
    else:
        Clock(dut.clk, 4, unit="ns").start()
        await streams.cycle(dut.clk, 4)


class Trace:
    """Values of output ports, one per cycle; those of cycle t belong to the inputs' values t."""

    def __init__(self, names: Sequence[str]):
        self.bits: dict[str, list[str]] = {name: [] for name in names}

    def raw(self, name: str, cycles: Sequence[int] | np.ndarray, low: int = 0, high: int | None = None) -> list[int]:
        """Bits ``low`` to ``high`` of the port in some cycles, unsigned; an undefined bit is an error."""
        values = []
        for t in cycles:
            bits = self.bits[name][t]
            bits = bits[len(bits) - (high or len(bits)) : len(bits) - low]
            if set(bits) - {"0", "1"}:
                raise AssertionError(f"{name} is not a number in cycle {t}: {bits[:64]}")
            values.append(int(bits, 2))
        return values

    def elements(self, name: str, cycles: Sequence[int] | np.ndarray) -> np.ndarray:
        """The port's elements, int64 [cycles, elements]."""
        _, width, signed, count = ports()[name]["fields"].get("element", next(iter(ports()[name]["fields"].values())))
        return unpack_elements(self.raw(name, cycles), width // count, count, signed)

    def columns(self, name: str, cycles: Sequence[int] | np.ndarray, column: int) -> np.ndarray:
        """One element of the port, [cycles]."""
        _, width, signed, count = ports()[name]["fields"]["element"]
        each = width // count
        parts = self.raw(name, cycles, column * each, (column + 1) * each)
        return unpack_elements(parts, each, 1, signed)[:, 0]

    def fields(self, name: str, cycles: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The port's fields, each [cycles]."""
        return payload(name).unpack(self.raw(name, cycles))


async def trace(dut: Any, inputs: Mapping[str, Sequence[int] | np.ndarray], outputs: Sequence[str]) -> Trace:
    """Drive the inputs cycle by cycle and record the outputs of every cycle; all lists have the same length."""
    edge = RisingEdge(dut.clk)
    drives = [(getattr(dut, name), list(map(int, values))) for name, values in inputs.items()]
    (length,) = {len(values) for _, values in drives}
    record = Trace(outputs)
    reads = [(getattr(dut, name), record.bits[name]) for name in outputs]
    for t in range(length):
        for handle, values in drives:
            if t == 0 or values[t] != values[t - 1]:
                handle.value = values[t]
        await edge
        for handle, seen in reads:
            seen.append(str(handle.value))
    return record


async def check_pipeline(dut: Any, inputs: Mapping[str, np.ndarray], expected: np.ndarray, gaps: float, random) -> None:
    """Gives one set of inputs per cycle, or with gaps, to a block with ``valid`` and ``result``, and compares all bits.

    Without a valid input the ports have random values, which must have no effect.
    """
    wait, count = latency(), len(expected)
    cycles = np.arange(count) + np.cumsum(random.random(count) < gaps)
    total = cycles[-1] + 1 + wait
    driven = {"valid": np.zeros(total, int)}
    driven["valid"][cycles] = 1
    for name, values in inputs.items():
        driven[name] = random.integers(0, 1 << ports()[name]["width"], total)
        driven[name][cycles] = values
    await begin(dut)
    record = await trace(dut, driven, ["result"])
    seen = np.array(record.raw("result", cycles + wait))
    wrong = np.flatnonzero(seen != expected)
    if len(wrong):
        first = wrong[0]
        given = ", ".join(f"{name} {values[first]:#x}" for name, values in inputs.items())
        raise AssertionError(
            f"{given} gave {seen[first]:#x}, not {expected[first]:#x}; {len(wrong)} of {count} are wrong"
        )
