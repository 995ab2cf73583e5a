# SPDX-License-Identifier: Apache-2.0
"""Random epilogues: the fields of a descriptor, and operands with ordinary and extreme numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hw.spec.ops.epilogue import EPILOGUE_FIELDS, FLAGS, Operands, float_bits, results_columns
from sim.bench.floats import extremes, floats

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
