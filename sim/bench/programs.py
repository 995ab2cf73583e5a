# SPDX-License-Identifier: Apache-2.0
"""Programs for the accelerator with a vector unit: descriptors and their operands in the memory of the bench.

:meth:`hw.spec.ops.base.Op.execute` executes the descriptors one after another on an image of the memory. After the
hardware has executed them, the whole memory must be equal to that image.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from hw.spec.control.descriptor import DATA_ALIGNMENT, VectorDescriptor, Wait, result_pitch
from hw.spec.control.program import program_image
from hw.spec.control.refusal import Accepted
from hw.spec.control.registers import ErrorCode
from hw.spec.ops import OPS
from hw.spec.ops.base import Opcode, State
from hw.spec.ops.epilogue import PIECE_BYTES, piece_count, results_columns
from sim.bench.accelerator_driver import MEMORY, AcceleratorDriver, Work, fit
from sim.bench.descriptors import AnyDescriptor
from sim.bench.dut import config
from sim.bench.epilogues import KINDS, numbers, random_epilogue
from sim.bench.streams import cycle

__all__ = ["MemoryImage", "Program", "random_program"]


class MemoryImage:
    """The driver's image of the memory, by addresses. Implements :class:`hw.spec.ops.base.Memory`."""

    def __init__(self, driver: AcceleratorDriver):
        self.bytes = driver.image

    def view(self, address: int, size: int) -> np.ndarray:
        """See :class:`hw.spec.ops.base.Memory`."""
        start = address % MEMORY
        assert start + size <= MEMORY
        return self.bytes[start : start + size]


class Program:
    """Descriptors in order, and their operands in the driver's memory."""

    def __init__(self, driver: AcceleratorDriver, random: np.random.Generator):
        self.driver, self.random, self.c = driver, random, config()
        self.descriptors: list[Any] = []
        self.scaled_tokens = 0
        """Tokens for which r is known."""
        self.linear: Work | None = None
        """The last linear layer."""
        self.address = 0
        """Address of the descriptors in memory."""
        self.accepted = Accepted()

    def put(self, values: np.ndarray, pitch: int = 0) -> tuple[int, int]:
        """Rows of float32 in free memory: their address, and their pitch; at least that of ``result_pitch``."""
        rows, columns = values.shape
        pitch = pitch or result_pitch(columns) + DATA_ALIGNMENT * int(self.random.integers(0, 3))
        address = self.driver.take(rows * pitch)
        for index, row in enumerate(values):
            self.driver.write(address + index * pitch, row.tobytes())
        return address, pitch

    def epilogue(self, parts: tuple[str, ...], tokens: int, columns: int, hard: bool = False) -> dict[str, int]:
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
            fields["second_results"] = self.driver.take(tokens * fields["second_pitch"])
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
            results = self.driver.take(tokens * result_pitch(n))
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
            self.linear = self.driver.place(layer, tokens, "random")
            made = self.linear.descriptor
        made = replace(made, **self.epilogue(parts, tokens, n, hard), **fields)
        self.append(made)
        if "squares" in parts:
            self.scaled_tokens = tokens

    def add_again(self) -> None:
        """The last linear layer again, with its activations, other weights and no epilogue."""
        assert self.linear is not None
        self.linear = self.driver.place(self.linear.job.layer, self.linear.job.tokens, reuse=self.linear)
        self.append(self.linear.descriptor)

    def append(self, made: AnyDescriptor) -> None:
        """A descriptor whose operands are in memory."""
        assert self.accepted.take(self.c, made.to_words()) == ErrorCode.NONE, made
        self.descriptors.append(made)

    def expect(self, count: int | None = None) -> None:
        """Executes all descriptors, or the first ones, on the driver's image of the memory."""
        image, state = MemoryImage(self.driver), State()
        for made in self.descriptors[:count]:
            op = OPS[Opcode(made.opcode)]
            op.execute(self.c, {field.name: getattr(made, field.name) for field in op.fields}, image, state)

    def store(self) -> int:
        """Puts the descriptors into memory; returns their address."""
        image = program_image(made.to_words() for made in self.descriptors)
        self.address = self.driver.take(len(image))
        self.driver.write(self.address, image.tobytes())
        return self.address

    async def push(self, room: int = 12) -> None:
        """Pushes all descriptors into the window, at most ``room`` in the queue and in flight at a time."""
        await self.driver.start([], room)
        for index, made in enumerate(self.descriptors):
            while index - await self.driver.completed() >= room:
                await cycle(self.driver.dut.clk, 20)
            await self.driver.push(made.to_words())

    async def start(self) -> None:
        """Starts the program, which is in memory."""
        await self.driver.start([])
        await self.driver.start_program(self.address, len(self.descriptors))

    async def finish(self) -> None:
        """Waits until all descriptors are complete, and compares the memory with the image."""
        for _ in range(20_000):
            if await self.driver.completed() == len(self.descriptors):
                break
            assert await self.driver.get("error_code") == 0
            await cycle(self.driver.dut.clk, 20)
        else:
            raise TimeoutError(f"{await self.driver.completed()} of {len(self.descriptors)} descriptors are complete")
        assert await self.driver.get("status") == 0
        self.compare()

    async def run(self) -> None:
        """Stores and runs the program, and compares the memory."""
        self.store()
        self.expect()
        await self.start()
        await self.finish()

    def compare(self) -> None:
        """The whole memory equals the image."""
        found = np.frombuffer(bytes(self.driver.memory), np.uint8)
        wrong = np.flatnonzero(found != self.driver.image)
        assert not len(wrong), f"{len(wrong)} bytes differ, the first is in the {self._near(wrong[0])}"

    def _near(self, place: int) -> str:
        """The descriptor whose output is the nearest one before a place."""
        address, best = self.driver.base + int(place), (-1, "")
        for index, made in enumerate(self.descriptors):
            for name in ("results", "second_results", "weights", "exponents"):
                start = getattr(made, name, 0)
                if best[0] < start <= address:
                    best = start, f"{name} of descriptor {index}, {made}"
        return best[1]


def _shape(random: np.random.Generator, parts: tuple[str, ...]) -> tuple[int, int]:
    """Random M and N."""
    n = int(random.choice([1, 2, 15, 17, 48, 100, 256, 272, 300]))
    if {"rotary", "squares"} & set(parts):
        n = max(16, n // 16 * 16)
    return int(random.integers(1, config().max_tokens, endpoint=True)), max(2, n // 2 * 2) if "silu" in parts else n


def random_program(
    driver: AcceleratorDriver, random: np.random.Generator, more: int = 3, hard: bool = False
) -> Program:
    """A program of all kinds of epilogues and ``more`` random ones, with random waits; its first descriptor computes r.

    hard : some operands are extreme numbers
    """
    program = Program(driver, random)
    program.add(("quiet", "second", "squares"), config().max_tokens, 64, vector=True)
    for parts in [*KINDS, *(KINDS[int(random.integers(len(KINDS)))] for _ in range(more))]:
        vector, wait = bool(random.integers(3) == 0), Wait(int(random.integers(3)))
        program.add(parts, *_shape(random, parts), vector=vector, hard=hard, wait=wait)
    return program
