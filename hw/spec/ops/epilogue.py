# SPDX-License-Identifier: Apache-2.0
"""The epilogue of a descriptor: operations of the vector unit on results, on their way from the array to memory.

Each part is optional. In order, with the definitions of :mod:`hw.spec.numerics`:

1. ``scale``: each token is multiplied by its r, which an earlier descriptor with ``squares`` computed;
2. ``add``: a row of memory is added, one for each token (a residual), or the same for all of them (a bias);
3. ``rotary``: the pairs of neighbouring columns of the first heads are rotated; or ``silu``: a pair of columns, gate
   and up, becomes one column;
4. the results are written, unless ``quiet``;
5. ``second``: the results times one row (the weight of the norm that follows) are written too; or ``pieces``: maximum
   and argmax of every 256 columns are written;
6. ``squares``: the r of each token, for the descriptors that follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.operands import DATA_ALIGNMENT, FLOAT_BYTES
from hw.spec.numerics.float32 import add, mul
from hw.spec.numerics.vector import PARTIAL_SUMS, PIECE, norm_scale, piece_maxima, rotary, silu_mul
from hw.spec.ops.base import DescriptorField, DescriptorWords, Memory, State, float_rows, units

HEAD_UNIT = 16
"""A head has a multiple of this number of columns."""
MAX_HEAD = 256
"""Maximum number of columns of a head."""
PIECE_BYTES = 8
"""A piece's maximum and argmax in memory: float32, and uint32 from the piece's first column."""

_UNIT = DATA_ALIGNMENT
PITCH_BITS = 18
"""Bits of a pitch, in units of DATA_ALIGNMENT."""
FLAGS: tuple[DescriptorField, ...] = (
    DescriptorField("scale", 12, 1, "multiply each token by its r, computed by an earlier descriptor"),
    DescriptorField("add", 13, 1, "add rows from memory"),
    DescriptorField("rotary", 14, 1, "rotate the pairs of columns of the first heads"),
    DescriptorField("silu", 15, 1, "columns 2i and 2i + 1 are gate and up; SiLU(gate) * up is column i of the results"),
    DescriptorField("quiet", 16, 1, "do not write the results"),
    DescriptorField("second", 17, 1, "write the results times a row from memory, too"),
    DescriptorField("squares", 18, 1, "compute each token's r from the sum of the squares of its results"),
    DescriptorField("pieces", 19, 1, f"write maximum and argmax of every {PIECE} columns of the results"),
)
"""The parts of the epilogue that a descriptor may have."""
EPILOGUE_FIELDS: tuple[DescriptorField, ...] = (
    *FLAGS,
    DescriptorField("head", 84, 9, f"rotary: columns of a head, a multiple of {HEAD_UNIT} up to {MAX_HEAD}; else 0"),
    DescriptorField("result_pitch", 256, PITCH_BITS, units(_UNIT, "from one row of results to the next"), _UNIT),
    DescriptorField("rotary_heads", 276, 12, "rotary: number of heads, from the first column on; else 0"),
    DescriptorField("addend", 288, 32, units(_UNIT, "add: address of the rows"), _UNIT),
    DescriptorField(
        "addend_pitch", 320, PITCH_BITS, units(_UNIT, "add: from one row to the next", "0: all tokens have one row"),
        _UNIT,
    ),
    DescriptorField("second_pitch", 338, 14, units(_UNIT, "second, pieces: from one row to the next"), _UNIT),
    DescriptorField("factor", 352, 32, units(_UNIT, "second: address of the row that all tokens have"), _UNIT),
    DescriptorField("second_results", 384, 32, units(_UNIT, "second, pieces: address of the output"), _UNIT),
    DescriptorField(
        "table", 416, 32, units(_UNIT, "rotary: address of the rows cos, sin of pair 0, of pair 1, ..."), _UNIT
    ),
    DescriptorField(
        "table_pitch", 448, PITCH_BITS, units(_UNIT, "rotary: from one row to the next", "0: all tokens have one row"),
        _UNIT,
    ),
    DescriptorField("eps", 480, 32, "squares: r = 1 / sqrt(mean of the squares + eps), the bits of a float32"),
)  # fmt: skip
"""The fields of the epilogue in every descriptor."""
ABSENT_FIELDS = tuple(field for field in EPILOGUE_FIELDS if field.name != "result_pitch")
"""The fields that hardware without a vector unit does not have."""


@dataclass(frozen=True, kw_only=True)
class EpilogueWords(DescriptorWords):
    """The epilogue of a descriptor; the attributes are those of :data:`EPILOGUE_FIELDS`.

    Addresses and pitches in bytes. The default is no epilogue.
    """

    scale: int = 0
    add: int = 0
    rotary: int = 0
    silu: int = 0
    quiet: int = 0
    second: int = 0
    squares: int = 0
    pieces: int = 0
    head: int = 0
    result_pitch: int = 0
    rotary_heads: int = 0
    addend: int = 0
    addend_pitch: int = 0
    second_pitch: int = 0
    factor: int = 0
    second_results: int = 0
    table: int = 0
    table_pitch: int = 0
    eps: int = 0

    def epilogue(self) -> dict[str, int]:
        """The values of the epilogue's fields."""
        return {field.name: getattr(self, field.name) for field in fields(EpilogueWords)}


def float_bits(value: float) -> int:
    """The bits of the float32 that is nearest to a number."""
    return int(np.float32(value).view(np.uint32))


def results_columns(descriptor: Mapping[str, int]) -> int:
    """Columns of the results: N, or N / 2 with ``silu``."""
    return descriptor["out_features"] >> descriptor["silu"]


def piece_count(descriptor: Mapping[str, int]) -> int:
    """Pieces of a row of results."""
    return ceil_div(results_columns(descriptor), PIECE)


def epilogue_is_wrong(config: AcceleratorConfig, descriptor: Mapping[str, int]) -> bool:
    """Whether the epilogue is impossible, or contradicts itself; the counts of the layer are in their bounds."""
    d, several = descriptor, descriptor["tokens"] > 1
    columns = results_columns(d)
    heads = d["rotary_heads"] * d["head"]
    second_bytes = FLOAT_BYTES * columns if d["second"] else PIECE_BYTES * piece_count(d) * d["pieces"]
    addend_bytes, table_bytes = FLOAT_BYTES * d["out_features"] * d["add"], FLOAT_BYTES * d["head"]
    return any(
        (
            # After SiLU a transfer of results has half as many columns, which none of these needs in a decoder.
            d["silu"] and (d["rotary"] or d["second"] or d["pieces"] or d["squares"]),
            d["second"] and d["pieces"],
            # Completion is the last acknowledgement of a write.
            d["quiet"] and not (d["second"] or d["pieces"]),
            d["silu"] and d["out_features"] % 2,
            d["squares"] and d["out_features"] % PARTIAL_SUMS,
            bool(d["rotary"]) != bool(heads),
            not d["rotary"] and (d["head"] or d["rotary_heads"]),
            d["head"] % HEAD_UNIT or d["head"] > MAX_HEAD,
            heads > d["out_features"],
            # Only one token: pitches have no effect. A pitch of 0 means one row for all tokens.
            several and not d["quiet"] and d["result_pitch"] < FLOAT_BYTES * columns,
            several and d["second_pitch"] < second_bytes,
            several and 0 < d["addend_pitch"] < addend_bytes,
            several and 0 < d["table_pitch"] < table_bytes,
        )
    )


class Operands(NamedTuple):
    """What the epilogue reads from memory; None where the descriptor has no such part."""

    addend: np.ndarray | None = None
    """float32 [M, N]."""
    table: np.ndarray | None = None
    """float32 [M, head]: cosine and sine of each pair in turn."""
    factor: np.ndarray | None = None
    """float32 [1, columns of the results]."""


class Outputs(NamedTuple):
    """The results of the epilogue; None where the descriptor has no such part."""

    results: np.ndarray
    """float32 [M, columns]."""
    second: np.ndarray | None = None
    """float32 [M, columns]; with ``pieces`` uint32 [M, 2 * pieces], the bits of maximum and argmax of each in turn."""
    r: np.ndarray | None = None
    """float32 [M]."""


def apply_epilogue(
    descriptor: Mapping[str, int], values: np.ndarray, operands: Operands, r: np.ndarray | None = None
) -> Outputs:
    """The epilogue of results ``values``, float32 [M, N], bit for bit; see the module.

    r: float32 [M or more], of earlier descriptors.
    """
    d = descriptor
    if d["scale"]:
        assert r is not None and len(r) >= len(values), "an earlier descriptor computes r"
        values = mul(values, r[: len(values), None])
    if operands.addend is not None:
        values = add(values, operands.addend)
    if operands.table is not None:
        values = _rotate(values, d["rotary_heads"], operands.table)
    if d["silu"]:
        values = silu_mul(values[:, ::2], values[:, 1::2])
    second = None if operands.factor is None else mul(values, operands.factor)
    if d["pieces"]:
        maxima, places = piece_maxima(values)
        pairs = np.stack([maxima.view(np.uint32), places.astype(np.uint32)], axis=-1)
        second = pairs.reshape(len(values), -1)
    eps = float(np.uint32(d["eps"]).view(np.float32))
    return Outputs(values, second, norm_scale(values, eps) if d["squares"] else None)


def _rotate(values: np.ndarray, heads: int, table: np.ndarray) -> np.ndarray:
    """The first heads rotated, pair by pair; the other columns as they are."""
    rows, head = len(values), table.shape[-1]
    turned = values.copy()
    pairs = values[:, : heads * head].reshape(rows, heads, head // 2, 2)
    cosine, sine = table[:, None, ::2], table[:, None, 1::2]
    both = rotary(pairs[..., 0], pairs[..., 1], cosine, sine)
    turned[:, : heads * head] = np.stack(both, axis=-1).reshape(rows, -1)
    return turned


def write_outputs(descriptor: Mapping[str, int], values: np.ndarray, memory: Memory, state: State) -> None:
    """Reads the epilogue's operands, computes it for ``values``, float32 [M, N], and writes its outputs and its r."""
    d, tokens = descriptor, len(values)
    operands = Operands(
        _rows(d["add"], memory, d["addend"], d["addend_pitch"], tokens, d["out_features"]),
        _rows(d["rotary"], memory, d["table"], d["table_pitch"], tokens, d["head"]),
        _rows(d["second"], memory, d["factor"], 0, 1, results_columns(d)),
    )
    outputs = apply_epilogue(d, values, operands, state.r)
    if not d["quiet"]:
        float_rows(memory, d["results"], d["result_pitch"], *outputs.results.shape)[:] = outputs.results
    if outputs.second is not None:
        place = float_rows(memory, d["second_results"], d["second_pitch"], *outputs.second.shape)
        place[:] = outputs.second.view(np.float32)
    if outputs.r is not None:
        # The r of other tokens stays.
        before = outputs.r[:0] if state.r is None else state.r[tokens:]
        state.r = np.concatenate([outputs.r, before])


def _rows(wanted: int, memory: Memory, address: int, pitch: int, tokens: int, columns: int) -> np.ndarray | None:
    """A copy of an operand, if the descriptor has it. With a pitch of 0 all of its rows are the same one."""
    return float_rows(memory, address, pitch, tokens, columns).copy() if wanted else None


assert FLOAT_BYTES * MAX_N <= _UNIT << 14, "a row fits the pitch of the second output"
