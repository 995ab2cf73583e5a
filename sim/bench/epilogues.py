# SPDX-License-Identifier: Apache-2.0
"""Random epilogues: the fields of a descriptor, and operands with ordinary and extreme numbers; inverses of rows."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cocotb.triggers import FallingEdge, RisingEdge

from hw.spec.ops.epilogue import EPILOGUE_FIELDS, FLAGS, Operands, float_bits, results_columns
from hw.spec.ops.scores import BANKS
from sim.bench.dut import payload
from sim.bench.floats import extremes, floats
from sim.bench.streams import Stall, read, rng

NONE = {field.name: 0 for field in EPILOGUE_FIELDS}
"""No epilogue."""
KINDS: tuple[tuple[str, ...], ...] = (
    (),
    ("scale",),
    ("add",),
    ("scale", "add", "rotary"),
    ("scale", "silu"),
    ("add", "second", "squares"),
    ("scale", "pieces"),
    ("quiet", "pieces"),
    ("quiet", "second", "squares"),
    ("scale", "add", "rotary", "second", "squares"),
    ("add", "silu"),
)
"""Combinations of parts: those of a decoder, each part alone, and all together."""


def numbers(random: np.random.Generator, *shape: int, hard: bool = False) -> np.ndarray:
    """float32: ordinary numbers, of which some are extreme if ``hard``."""
    values = (random.standard_normal(shape) * 2.0 ** random.integers(-6, 6, shape)).astype(np.float32)
    if hard:
        chosen = random.random(shape) < 0.1
        values[chosen] = floats(random.choice(extremes(), int(chosen.sum())))
    return values


@dataclass(frozen=True)
class Epilogue:
    """The epilogue of one layer. fields: those of a descriptor, with ``tokens`` and ``out_features``."""

    fields: Mapping[str, int]
    operands: Operands
    single: frozenset[str] = frozenset()
    """Operands of one row for all tokens, among ``addend`` and ``table``."""

    @property
    def flags(self) -> int:
        """The parts, one bit for each of :data:`FLAGS`."""
        return sum(self.fields[field.name] << index for index, field in enumerate(FLAGS))


def random_epilogue(
    random: np.random.Generator, parts: tuple[str, ...], tokens: int, columns: int, hard: bool = False
) -> Epilogue:
    """An epilogue with these parts for M ``tokens`` and N ``columns``. With rotary, N is at least 16."""
    fields = NONE | dict.fromkeys(parts, 1) | {"tokens": tokens, "out_features": columns}
    single = frozenset(name for name in ("addend", "table") if random.random() < 0.3)
    rows = {name: 1 if name in single else tokens for name in ("addend", "table")}
    addend = numbers(random, rows["addend"], columns, hard=hard) if fields["add"] else None
    table = None
    if fields["rotary"]:
        head = int(random.choice([h for h in (16, 32, 64, 80, 96, 128, 256) if h <= columns]))
        fields |= {"head": head, "rotary_heads": int(random.integers(1, columns // head, endpoint=True))}
        angles = random.uniform(-4, 4, (rows["table"], head // 2))
        table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(rows["table"], head).astype(np.float32)
    if fields["squares"]:
        fields["eps"] = float_bits(float(random.choice([1e-5, 1e-6, 0.0])))
    factor = numbers(random, results_columns(fields), hard=hard) if fields["second"] else None
    return Epilogue(fields, Operands(addend, table, factor), single)


class InverseBanks:
    """1/S of the rows of both banks, as :class:`hw.rtl.attention.score_banks.ScoreBanks` gives them.

    They are known after a random time, until the bank is released. While they are not, there are random numbers.
    """

    def __init__(self, dut: Any, stall: Stall):
        self.dut, self.stall = dut, stall
        self.queues: list[deque[np.ndarray]] = [deque() for _ in range(BANKS)]
        dut.inverted.value = 0
        dut.inverse.value = 0

    def send(self, bank: int, inverses: np.ndarray) -> None:
        """Float32 [rows], which are known after those before in the same bank are released."""
        self.queues[bank].append(inverses.view(np.uint32))

    async def run(self) -> None:
        dut, known, random = self.dut, [False] * BANKS, rng(78)
        while True:
            await RisingEdge(dut.clk)
            if str(dut.rst.value) != "0":
                continue
            released = read(dut.released)
            for bank, queue in enumerate(self.queues):
                if released >> bank & 1:
                    assert known[bank], f"bank {bank} is released, and its inverses are not known"
                    queue.popleft()
                    known[bank] = False
                else:
                    known[bank] = known[bank] or (bool(queue) and not self.stall())
            dut.inverted.value = sum(flag << bank for bank, flag in enumerate(known))
            # In the same cycle as the row.
            await FallingEdge(dut.clk)
            row = {name: int(values[0]) for name, values in payload("row").unpack([read(dut.row)]).items()}
            inverse = int(random.integers(0, 1 << 32))
            if known[row["bank"]] and row["token"] < len(self.queues[row["bank"]][0]):
                inverse = int(self.queues[row["bank"]][0][row["token"]])
            dut.inverse.value = inverse
