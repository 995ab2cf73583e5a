# SPDX-License-Identifier: Apache-2.0
"""Programs with attention: caches in the memory of the bench, appends, scores and values."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hw.spec.control.registers import CACHE_UNIT
from hw.spec.memory.kv_cache import KeyCache, ValueCache
from hw.spec.memory.operands import WEIGHT_ALIGNMENT, result_pitch
from hw.spec.ops import Wait
from hw.spec.ops.append import AppendDescriptor
from hw.spec.ops.epilogue import float_bits
from hw.spec.ops.scores import ScoresDescriptor
from hw.spec.ops.values import ValuesDescriptor
from sim.bench.accelerator_driver import AcceleratorDriver
from sim.bench.programs import Program

__all__ = ["AttentionProgram", "Head", "allow_caches"]


@dataclass
class Head:
    """The cache of one KV head in memory. written : positions that are in it."""

    keys: KeyCache
    values: ValueCache
    places: tuple[int, int, int]
    """Addresses of keys, of values, and of the values' exponents."""
    written: int = field(default=0)

    @property
    def size(self) -> int:
        """Elements of a head."""
        return self.keys.head_size

    @property
    def slots(self) -> int:
        """Positions that the cache can hold."""
        return self.keys.positions


async def allow_caches(driver: AcceleratorDriver) -> None:
    """Allows appends to write anywhere in the memory of the bench."""
    await driver.set("cache_first", driver.base // CACHE_UNIT)
    await driver.set("cache_end", (driver.base + len(driver.memory)) // CACHE_UNIT)


class AttentionProgram(Program):
    """A program with attention."""

    def head(self, size: int, slots: int, bits: int) -> Head:
        """An empty cache in memory."""
        keys, values = KeyCache(self.c, size, slots, bits), ValueCache(self.c, size, slots)
        images = keys.image(), values.image(), np.zeros(values.exponent_bytes, np.uint8)
        places = []
        for image in images:
            address = self.driver.take(len(image), WEIGHT_ALIGNMENT)
            self.driver.write(address, image.tobytes())
            places.append(address)
        return Head(keys, values, tuple(places))  # pyright: ignore[reportArgumentType]

    def numbers(self, rows: int, columns: int, spread: int = 3) -> np.ndarray:
        """Random float32 numbers of different magnitudes."""
        random = self.random
        exponents = random.integers(-spread, spread, (rows, 1)) + random.integers(-spread, spread, columns)
        return (random.standard_normal((rows, columns)) * 2.0**exponents).astype(np.float32)

    def append_positions(self, head: Head, count: int, wait: Wait = Wait.NOTHING, centre: bool = False) -> None:
        """Appends random keys and values."""
        keys, values, exponents = head.places
        for cache, address in ((head.keys, keys), (head.values, values)):
            of_keys = isinstance(cache, KeyCache)
            rows, pitch = self.put(self.numbers(count, head.size))
            more: dict[str, int] = {}
            if of_keys and centre:
                more = {"add": 1, "addend": self.put(self.numbers(1, head.size))[0]}
            self.append(
                AppendDescriptor(
                    keys=int(of_keys),
                    planes=cache.planes,
                    tokens=count,
                    out_features=head.size,
                    activations=rows,
                    activation_pitch=pitch,
                    weights=address,
                    weights_stride=cache.stride,
                    slot=head.written % head.slots,
                    slots=head.slots,
                    exponents=0 if of_keys else exponents,
                    wait=wait,
                    **more,
                )
            )
        head.written += count

    def scores(self, head: Head, rows: int, bank: int, wait: Wait = Wait.WEIGHTS, **fields: int) -> ScoresDescriptor:
        """Scores of random queries for all positions; fields: ``window``, ``causal``."""
        queries, pitch = self.put(self.numbers(rows, head.size, 1))
        made = ScoresDescriptor.from_cache(
            head.keys,
            min(head.written, head.slots),
            tokens=rows,
            activations=queries,
            activation_pitch=pitch,
            weights=head.places[0],
            turn=(head.written - 1) % head.slots + 1,
            score_factor=float_bits(2.0 ** -int(self.random.integers(0, 9))),
            bank=bank,
            wait=wait,
            **fields,
        )
        self.append(made)
        return made

    def values(self, head: Head, rows: int, bank: int, wait: Wait = Wait.NOTHING, **fields: int) -> int:
        """The values for these scores; returns the address of the results."""
        pitch = result_pitch(head.size)
        results = self.driver.take(rows * pitch)
        made: Any = ValuesDescriptor(
            tokens=rows,
            out_features=head.size,
            positions=min(head.written, head.slots),
            slots=head.slots,
            weights=head.places[1],
            weights_stride=head.values.stride,
            exponents=head.places[2],
            results=results,
            result_pitch=pitch,
            bank=bank,
            wait=wait,
            **fields,
        )
        self.append(made)
        return results

    def attention(self, heads: list[Head], rows: int, **fields: int) -> None:
        """Scores and values of several KV heads, as a decoder has them: scores 0, scores 1, values 0, scores 2, ..."""
        for index, head in enumerate(heads):
            self.scores(head, rows, index % 2, Wait.NOTHING if index else Wait.WEIGHTS, **fields)
            if index:
                self.values(heads[index - 1], rows, (index - 1) % 2)
        self.values(heads[-1], rows, (len(heads) - 1) % 2)
