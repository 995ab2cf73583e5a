# SPDX-License-Identifier: Apache-2.0
"""The accelerator with a vector unit: descriptors with epilogues, compared with :meth:`hw.spec.ops.base.Op.execute`.

The definition executes the descriptors one after another on an image of the memory. After the hardware has executed
them, the whole memory must be equal to that image.
"""

from dataclasses import replace

import cocotb
import numpy as np

from hw.spec.control.descriptor import DATA_ALIGNMENT, Descriptor, VectorDescriptor, Wait, result_pitch
from hw.spec.control.refusal import refusal
from hw.spec.control.registers import ErrorCode
from hw.spec.ops import OPS
from hw.spec.ops.base import Opcode, State
from hw.spec.ops.epilogue import PIECE_BYTES, piece_count, results_columns
from sim.bench.accelerator_driver import MEMORY, AcceleratorDriver, fit, pauses
from sim.bench.dut import config
from sim.bench.epilogues import KINDS, numbers, random_epilogue
from sim.bench.streams import cycle, rng
from sim.harness import settings

LONG = settings().get("long", False)
"""More and longer random programs."""
AnyDescriptor = Descriptor | VectorDescriptor


class _Image:
    """The driver's image of the memory, by addresses. Implements :class:`hw.spec.ops.base.Memory`."""

    def __init__(self, driver: AcceleratorDriver):
        self.bytes = driver.image

    def view(self, address: int, size: int) -> np.ndarray:
        start = address % MEMORY
        assert start + size <= MEMORY
        return self.bytes[start : start + size]


class _Program:
    """Descriptors in order, and their operands in the driver's memory."""

    def __init__(self, driver: AcceleratorDriver, random: np.random.Generator):
        self.driver, self.random, self.c = driver, random, config()
        self.descriptors: list[AnyDescriptor] = []
        self.scaled_tokens = 0
        """Tokens for which r is known."""

    def put(self, values: np.ndarray, pitch: int = 0) -> tuple[int, int]:
        """Rows of float32 in free memory: their address, and their pitch; at least that of ``result_pitch``."""
        rows, columns = values.shape
        pitch = pitch or result_pitch(columns) + DATA_ALIGNMENT * int(self.random.integers(0, 3))
        address = self.driver._take(rows * pitch, 0)
        for index, row in enumerate(values):
            self.driver.write(address + index * pitch, row.tobytes())
        return address, pitch

    def _epilogue(self, parts: tuple[str, ...], tokens: int, columns: int, hard: bool) -> dict[str, int]:
        """The fields of a random epilogue, whose operands are put into memory."""
        epilogue = random_epilogue(self.random, parts, tokens, columns, hard)
        fields, operands = dict(epilogue.fields), epilogue.operands
        for name, values in (("addend", operands.addend), ("table", operands.table)):
            if values is not None:
                address, pitch = self.put(values)
                fields |= {name: address, f"{name}_pitch": 0 if name in epilogue.single else pitch}
        if operands.factor is not None:
            fields["factor"], _ = self.put(operands.factor[None])
        size = 4 * results_columns(fields) * fields["second"] + PIECE_BYTES * piece_count(fields) * fields["pieces"]
        if size:
            fields["second_pitch"] = result_pitch(-(-size // 4))
            fields["second_results"] = self.driver._take(tokens * fields["second_pitch"], 0)
        for name in ("tokens", "out_features", "result_pitch"):
            del fields[name]
        return fields

    def add(
        self, parts: tuple[str, ...], tokens: int, n: int, vector: bool = False, hard: bool = False, **fields
    ) -> None:
        """A descriptor with these parts."""
        if "scale" in parts:
            tokens = min(tokens, self.scaled_tokens)
        if vector:
            source, pitch = self.put(numbers(self.random, tokens, n, hard=hard))
            results = self.driver._take(tokens * result_pitch(n), 0)
            made: AnyDescriptor = VectorDescriptor(
                tokens=tokens,
                out_features=n,
                activations=source,
                source_pitch=pitch,
                results=results,
                result_pitch=result_pitch(n),
            )
        else:
            layer = fit(int(self.random.choice([32, 64, 96, 200])), n, 32)
            work = self.driver.place(layer, tokens, "random")
            made = work.descriptor
        made = replace(made, **self._epilogue(parts, tokens, n, hard), **fields)
        assert refusal(self.c, made.to_words(), None) == ErrorCode.NONE, made
        self.descriptors.append(made)
        if "squares" in parts:
            self.scaled_tokens = tokens

    def expect(self) -> None:
        """Executes the descriptors on the driver's image of the memory."""
        image, state = _Image(self.driver), State()
        for made in self.descriptors:
            op = OPS[Opcode(made.opcode)]
            op.execute(self.c, {field.name: getattr(made, field.name) for field in op.fields}, image, state)

    async def run(self, room: int = 12) -> None:
        """Runs all descriptors, and compares the memory."""
        self.expect()
        await self.driver.start([], room)
        for index, made in enumerate(self.descriptors):
            while index - await self.driver.completed() >= room:
                await cycle(self.driver.dut.clk, 20)
            await self.driver.push(made.to_words())
        for _ in range(20_000):
            if await self.driver.completed() == len(self.descriptors):
                break
            assert await self.driver.get("error_code") == 0
            await cycle(self.driver.dut.clk, 20)
        else:
            raise TimeoutError(f"{await self.driver.completed()} of {len(self.descriptors)} descriptors are complete")
        assert await self.driver.get("status") == 0
        found = np.frombuffer(bytes(self.driver.memory), np.uint8)
        wrong = np.flatnonzero(found != self.driver.image)
        assert not len(wrong), f"{len(wrong)} bytes differ, the first is in the {self._near(wrong[0])}"

    def _near(self, place: int) -> str:
        """The descriptor whose output is the nearest one before a place."""
        address, best = self.driver.base + int(place), (-1, "")
        for index, made in enumerate(self.descriptors):
            for name in ("results", "second_results"):
                start = getattr(made, name)
                if best[0] < start <= address:
                    best = start, f"{name} of descriptor {index}, {made}"
        return best[1]


def _shape(random: np.random.Generator, parts: tuple[str, ...]) -> tuple[int, int]:
    """Random M and N."""
    n = int(random.choice([1, 2, 15, 17, 48, 100, 256, 272, 300]))
    if {"rotary", "squares"} & set(parts):
        n = max(16, n // 16 * 16)
    return int(random.integers(1, config().max_tokens, endpoint=True)), max(2, n // 2 * 2) if "silu" in parts else n


@cocotb.test()
@cocotb.parametrize(stalls=[False, True], hard=[False, True])
async def programs(dut, stalls, hard):
    """Random descriptors with all kinds of epilogues and waits, at the end of the address space."""
    random = rng(1)
    driver = await AcceleratorDriver.create(dut, pauses(3) if stalls else None)
    program = _Program(driver, random)
    program.add(("quiet", "second", "squares"), config().max_tokens, 64, vector=True)
    kinds = [*KINDS, *(KINDS[int(random.integers(len(KINDS)))] for _ in range(30 if LONG else 3))]
    for parts in kinds:
        vector, wait = bool(random.integers(3) == 0), Wait(int(random.integers(3)))
        program.add(parts, *_shape(random, parts), vector=vector, hard=hard, wait=wait)
    await program.run()


@cocotb.test()
async def chain(dut):
    """A block as a decoder has it: each descriptor reads what the ones before have written, on chip and in memory."""
    random, c = rng(1), config()
    driver = await AcceleratorDriver.create(dut)
    program = _Program(driver, random)
    tokens, hidden, inner = c.max_tokens, 64, 96
    x, pitch = program.put(numbers(random, tokens, hidden), result_pitch(hidden))
    program.add(("quiet", "second", "squares"), tokens, hidden, vector=True)
    program.descriptors[-1] = replace(program.descriptors[-1], activations=x, source_pitch=pitch)
    for _ in range(2):
        normed = program.descriptors[-1].second_results
        for parts, k, n in ((("scale", "silu"), hidden, 2 * inner), (("add", "second", "squares"), inner, hidden)):
            layer = fit(k, n, 32)
            assert layer.k == k
            before = program.descriptors[-1]
            work = driver.place(layer, tokens, "moderate")
            fields = program._epilogue(parts, tokens, n, False) | {"wait": Wait.ACTIVATIONS, "result_pitch": 4 * k}
            source = normed if "silu" in parts else before.results
            out = n // 2 if "silu" in parts else n
            fields |= {"activations": source, "result_pitch": result_pitch(out)}
            if "add" in parts:
                fields |= {"addend": x, "addend_pitch": pitch, "second_pitch": result_pitch(n)}
            program.descriptors.append(replace(work.descriptor, **fields))
            x, pitch = (work.descriptor.results, result_pitch(out)) if "add" in parts else (x, pitch)
    await program.run()
