# SPDX-License-Identifier: Apache-2.0
"""The simulated device, in which blocks without work have a clock that stops, is cycle for cycle the hardware."""

from contextlib import ExitStack

import numpy as np
import pytest

from hw.spec.config import option
from hw.spec.memory.faults import Fault
from hw.spec.memory.kv_cache import KEY_BITS, KeyCache, ValueCache
from hw.spec.ops import Wait
from sim.device.build import build
from sw.devices import make_config
from sw.devices.base import DeviceError
from sw.devices.jobs import (
    NOWHERE,
    AppendJob,
    Epilogue,
    Job,
    Keys,
    LinearJob,
    Rotation,
    Rows,
    ScoresJob,
    Second,
    Values,
    ValuesJob,
    VectorJob,
    View,
)
from sw.devices.jobs.operands import PAGE, Buffer
from sw.devices.rtl import RtlDevice
from tests.sw.devices.test_jobs import Bench
from tests.sw.fixtures.linears import TIMEOUT

pytestmark = [pytest.mark.simulator, pytest.mark.full]

CONFIGS = {
    "decoder": make_config(operators="decoder", tile=4, ports=1, max_k=1024, max_tokens=5),
    "linear": make_config(operators="linear", tile=4, ports=2, max_k=1024, max_tokens=5),
    "attention": make_config(operators="decoder", tile=4, ports=1, max_k=1024, max_tokens=5, score_words=2048),
}
PARTS = ("scale", "add", "rotation", "silu", "second", "squares", "pieces", "quiet")
FAULTS = (Fault.NONE, Fault.READ_ERROR, Fault.NONE, Fault.WRITE_ERROR, Fault.READ_SILENT, Fault.WRITE_SILENT)
EPSILON = 1e-5
CACHES = 1 << 21
"""Bytes of all caches of a batch."""


class RandomJobs(Bench):
    """Jobs with random shapes, epilogues and waits, the same for the same seed. Their outputs are in ``outputs``."""

    def __init__(self, device, seed: int):
        super().__init__(device, seed)
        self.scaled, self.outputs = 0, []
        self.caches, self.used = device.alloc(CACHES), 0

    def output(self, columns: int, tokens: int) -> Rows:
        columns = -(-columns // 32) * 32
        buffer = self.space(columns, tokens)
        self.outputs.append((buffer, columns, tokens))
        return Rows(buffer, 4 * columns)

    def cache(self, size: int) -> Buffer:
        """A part of the buffer of all caches."""
        start = self.used
        self.used += -(-size // PAGE) * PAGE
        self.outputs.append((self.caches.part(start), size // 4, 1))
        return self.caches.part(start)

    def attention(self, index: int) -> list[Job]:
        """Some positions of a KV head are appended to an empty cache; then scores and values of all rows."""
        config, tokens, size = self.device.config, int(self.rng.integers(1, 6)), 32 * int(self.rng.integers(1, 3))
        positions, bank, name = int(self.rng.integers(tokens, 300)), int(self.rng.integers(2)), f"attention {index}"
        keys = KeyCache(config, size, positions, int(self.rng.choice(KEY_BITS)))
        values = ValueCache(config, size, positions)
        places = [self.cache(keys.bytes), self.cache(values.bytes), self.cache(values.exponent_bytes)]
        for place, image in zip(places, (keys.image(), values.image(), np.zeros(values.exponent_bytes, np.uint8))):
            self.device.write(place, image)
        of_keys, of_values = Keys(keys, places[0]), Values(values, *places[1:])
        rows = [Rows(self.write(self.rows(size, tokens)), 4 * size) for _ in range(3)]
        output, slots = self.output(size, tokens), int(self.rng.integers(tokens, positions + 1))
        slot = int(self.rng.integers(positions - tokens + 1))
        return [
            AppendJob(f"{name}, keys", tokens, rows[0], of_keys, slot),
            AppendJob(f"{name}, values", tokens, rows[1], of_values, slot),
            ScoresJob(f"{name}, scores", tokens, rows[2], of_keys, View(slots, slots), 0.125, bank, Wait.WEIGHTS),
            ValuesJob(f"{name}, output", tokens, of_values, slots, output, bank),
        ]

    def operand(self, columns: int, tokens: int) -> Rows:
        columns = -(-columns // 32) * 32
        single = self.rng.random() < 0.3
        return Rows(self.write(self.rows(columns, 1 if single else tokens)), 0 if single else 4 * columns)

    def epilogue(self, values: int, tokens: int) -> tuple[Epilogue, bool]:
        """A random epilogue, and whether there are no results."""
        chosen = {part for part in PARTS if self.rng.random() < 0.35}
        if "silu" in chosen:
            chosen -= {"rotation", "squares", "second", "pieces"}
        if "pieces" in chosen:
            chosen -= {"second"}
        columns = values // 2 if "silu" in chosen else values
        quiet = "quiet" in chosen and bool({"second", "pieces"} & chosen)
        if tokens > self.scaled:
            chosen -= {"scale"}
        if "squares" in chosen:
            self.scaled = max(tokens, self.scaled)
        rotation = Rotation(self.operand(16, tokens), 16, values // 16) if "rotation" in chosen else None
        factor = self.write(self.rows(columns, 1))
        return Epilogue(
            scale="scale" in chosen,
            addend=self.operand(values, tokens) if "add" in chosen else None,
            rotation=rotation,
            silu="silu" in chosen,
            second=Second(factor, self.output(columns, tokens)) if "second" in chosen else None,
            pieces=self.output(-(-columns // 256) * 2, tokens) if "pieces" in chosen else None,
            epsilon=EPSILON if "squares" in chosen else None,
        ), quiet

    def job(self, index: int) -> Job:
        tokens, values = int(self.rng.integers(1, 6)), 16 * int(self.rng.integers(1, 40))
        epilogue, quiet = Epilogue(), False
        if self.device.config.has_vector_unit:
            epilogue, quiet = self.epilogue(values, tokens)
        results = self.output(values >> epilogue.silu, tokens) if not quiet else Rows(NOWHERE)
        wait, name = Wait(int(self.rng.integers(3))), f"job {index}"
        if self.device.config.has_vector_unit and self.rng.random() < 0.3:
            source = self.operand(values, tokens)
            return VectorJob(name, tokens, values, source, results.buffer, wait, epilogue, results.pitch)
        k = 32 * int(self.rng.integers(1, 20))
        _, layout, weights = self.linear(values, k, name)
        x = self.write(self.rows(layout.k, tokens))
        return LinearJob(name, layout, tokens, weights, x, results.buffer, False, wait, epilogue, results.pitch)


def observe(device: RtlDevice, seed: int, fault: Fault) -> list:
    """What can be seen of random jobs: cycles, outputs, bus accesses, and the error if a part of memory has a fault."""
    device.registers.write("timeout", 20_000)
    jobs = RandomJobs(device, seed)
    batch, seen = [], []
    for index in range(12):
        batch += jobs.attention(index) if device.config.has_attention and index % 3 == 1 else [jobs.job(index)]
    if device.config.has_attention:
        device.allow_appends(jobs.caches)
    if fault != Fault.NONE:
        writes = fault in (Fault.WRITE_ERROR, Fault.WRITE_SILENT)
        broken = (batch[6].writes() if writes else batch[6].reads())[-1].buffer
        device.platform.fault(fault, broken.address, broken.size)
        with pytest.raises(DeviceError) as error:
            device.wait(device.submit(batch), TIMEOUT)
        device.platform.fault(Fault.NONE)
        seen.append(str(error.value))
    done = device.wait(device.submit(batch), TIMEOUT)
    seen += [(item.name, item.cycles, item.beats) for item in done]
    seen += [device.read(buffer, np.uint32, (tokens, columns)).tolist() for buffer, columns, tokens in jobs.outputs]
    counts = device.platform.statistics()
    return [*seen, *(getattr(counts, name) for name in ("read_bytes", "write_bytes", "refreshes", "row_misses"))]


@pytest.mark.parametrize("memory", ["ideal", "hostile"])
@pytest.mark.parametrize("operators", CONFIGS)
def test_same_cycles(operators, memory):
    """The same registers, results, errors and cycles as of hardware in which no clock stops."""
    config = CONFIGS[operators]
    options = [f"{option(name)}={value}" for name, value in config.to_dict().items()]
    made = [build(options, target) for target in ("simulation", "generic")]
    with ExitStack() as stack:
        gated, plain = (
            stack.enter_context(RtlDevice(config, memory=memory, files=(files.library, files.manifest)))
            for files in made
        )
        for seed in range(30):
            fault = FAULTS[seed % len(FAULTS)]
            assert observe(gated, seed, fault) == observe(plain, seed, fault), seed
