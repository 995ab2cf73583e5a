# SPDX-License-Identifier: Apache-2.0
"""A lossless form of a head or embedding of 8 or 4 bits in a Hugging Face folder, which has float tables only.

The table is a float tensor there, like any other: w = (q - 2^(bits - 1)) * s, rounded to float16. Beside it are the
scales, from which our reader gets the integers back, because the rounding changes w / s by less than 1/2. Other
programs ignore them:
    config.json                       "integer_tables": {tensor: {"bits": 8, "group_size": 64}}
    <tensor>.scales.npy               float32 or float16 [N, ceil(K / group_size)], numpy's own format
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sw.checkpoints.safetensors_file import NewTensor
from sw.checkpoints.settings import Settings
from sw.common.arrays import slices
from sw.common.errors import UserError, one_line
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import Table

KEY = "integer_tables"
BITS = (4, 8)


def float_table(tensor: str, table: QuantizedLinear) -> NewTensor:
    """The table as float16, or as float32 if float16 would change an integer (tiny or huge scales).

    Raises UserError for a table that cannot be recovered from its floats and scales: one with zero points of its own,
    or with integers that are lost because their scale is zero.
    """
    if not table.has_integer_zero_points or np.any(table.zero_points != _middle(table.bits)):
        raise UserError(f"layer {table.name}: a table with zero points of its own has no float form in this folder")
    for kind, dtype in (("F16", np.float16), ("F32", np.float32)):
        if _is_lossless(table, dtype):
            return NewTensor(tensor, kind, (table.n, table.k), lambda dtype=dtype: _float_rows(table, dtype))
    raise UserError(f"layer {table.name}: its scales are too small to distinguish its integers in float32")


def write_scales(folder: Path, tensor: str, table: QuantizedLinear) -> dict[str, Any]:
    """Writes the scales and returns the tensor's entry below "integer_tables" in config.json."""
    with np.errstate(over="ignore"):
        halves = table.scales.astype(np.float16)
    np.save(_path(folder, tensor), halves if np.array_equal(halves, table.scales) else table.scales, allow_pickle=False)
    return {"bits": table.bits, "group_size": table.group_size}


def integer_table(folder: Path, settings: Settings, tensor: str, values: np.ndarray) -> Table:
    """A folder's float tensor [N, K] as its original integers, or unchanged if config.json has no entry for it.

    Raises UserError for a damaged entry, and for a tensor that does not match the scales.
    """
    form = settings.part(KEY).part(tensor)
    if settings.part(KEY).get(tensor) is None:
        return values
    bits, group = form.integer("bits"), form.integer("group_size")
    if bits not in BITS:
        raise form.wrong("bits", " or ".join(map(str, BITS)))
    if group < 16 or group & (group - 1):
        raise form.wrong("group_size", "a power of two from 16")
    path = _path(folder, tensor)
    try:
        scales = np.load(path, allow_pickle=False)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None
    wanted = (values.shape[0], -(-values.shape[-1] // group))
    if not isinstance(scales, np.ndarray) or scales.dtype not in (np.float16, np.float32) or scales.shape != wanted:
        raise UserError(f"{path} holds no float16 or float32 {list(wanted)}, the scales of {tensor}")
    scales = scales.astype(np.float32)
    q = np.empty(values.shape, np.uint8)
    for rows in slices(len(q)):
        steps = _steps(np.asarray(values[rows], np.float32), scales[rows], group) + _middle(bits)
        if not (steps.min() >= 0 and steps.max() < 1 << bits):
            raise UserError(f"{path} is of another model: {tensor} is not {bits}-bit integers times these scales")
        q[rows] = steps
    return QuantizedLinear(
        tensor.removesuffix(".weight"), q, scales, np.full(wanted, _middle(bits), np.uint8), group, bits
    )


def _path(folder: Path, tensor: str) -> Path:
    return folder / f"{tensor}.scales.npy"


def _middle(bits: int) -> int:
    return 1 << (bits - 1)


def _steps(values: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """float32 [N, K] divided by its scale and rounded; 0 where the scale is 0."""
    step = np.repeat(scales, group, axis=1)[:, : values.shape[1]]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.rint(np.divide(values, step, out=np.zeros_like(values), where=step != 0))


def _float_rows(table: QuantizedLinear, dtype: type[np.floating]) -> Iterator[np.ndarray]:
    with np.errstate(over="ignore"):
        for rows in slices(table.n):
            yield table.dequantize(rows).astype(dtype)


def _is_lossless(table: QuantizedLinear, dtype: type[np.floating]) -> bool:
    start = 0
    for values in _float_rows(table, dtype):
        rows = slice(start, start + len(values))
        start = rows.stop
        steps = _steps(values.astype(np.float32), table.scales[rows], table.group_size)
        if not np.array_equal(steps + _middle(table.bits), table.q[rows]):
            return False
    return True
