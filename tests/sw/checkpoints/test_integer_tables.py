# SPDX-License-Identifier: Apache-2.0
"""Integer tables in folders of floats: every integer and scale is recovered, and damage gives one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sw.checkpoints.integer_tables import float_table, integer_table, write_scales
from sw.checkpoints.settings import Settings
from sw.common.arrays import ROWS_AT_ONCE
from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear
from sw.model.lm_head import quantize_int8

NAME = "lm_head.weight"


def random_table(spread: float, k: int = 96, rows: int = 300) -> QuantizedLinear:
    """int8 in groups of 32 or 64, scales over e^-spread to e^spread."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((rows, k)) * np.exp(rng.uniform(-spread, spread, (rows, 1)))
    return quantize_int8(weight.astype(np.float32))


def there_and_back(table: QuantizedLinear, folder: Path) -> tuple[QuantizedLinear, str]:
    """The table as it is read again, and the format of its floats."""
    tensor = float_table(NAME, table)
    values = np.concatenate(list(tensor.parts()))
    assert values.shape == tensor.shape
    form = json.loads(json.dumps(write_scales(folder, NAME, table)))
    settings = Settings(folder / "config.json", {"integer_tables": {NAME: form}})
    read = integer_table(folder, settings, NAME, values)
    assert isinstance(read, QuantizedLinear)
    return read, tensor.dtype


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        (random_table(0), "F16"),
        (random_table(4, k=72), "F16"),
        (random_table(4, rows=ROWS_AT_ONCE + 3), "F16"),
        # Beyond float16: subnormal steps, and weights above 65,504.
        (random_table(20), "F32"),
        (replace(random_table(0), scales=np.full((300, 3), 1e4, np.float32)), "F32"),
        (replace(random_table(0), scales=np.full((300, 3), -(2.0**-24), np.float32)), "F16"),
        (replace(random_table(0), scales=np.full((300, 3), -0.02, np.float32)), "F16"),
    ],
)
def test_exact(table, dtype, tmp_path):
    read, stored = there_and_back(table, tmp_path)
    assert stored == dtype
    assert np.array_equal(read.q, table.q)
    assert np.array_equal(read.scales, table.scales)
    assert np.array_equal(read.zero_points, table.zero_points)
    assert (read.bits, read.group_size) == (table.bits, table.group_size)


def test_four_bits(tmp_path):
    rng = np.random.default_rng(2)
    q, scales = rng.integers(0, 16, (40, 64)).astype(np.uint8), rng.standard_normal((40, 2)).astype(np.float16)
    table = QuantizedLinear("t", q, scales.astype(np.float32), np.full((40, 2), 8, np.uint8), 32, 4)
    read, _ = there_and_back(table, tmp_path)
    assert np.array_equal(read.q, q)
    assert np.load(tmp_path / f"{NAME}.scales.npy").dtype == np.float16


def test_tables_without_a_float_form():
    table = random_table(0)
    with pytest.raises(UserError, match="layer lm_head: a table with zero points of its own"):
        float_table(NAME, replace(table, zero_points=table.zero_points - 1))
    scales = table.scales.copy()
    scales[7, 2] = 0
    with pytest.raises(UserError, match="layer lm_head: its scales are too small"):
        float_table(NAME, replace(table, scales=scales))


def test_no_table(tmp_path):
    values = np.ones((4, 32), np.float16)
    for settings in ({}, {"integer_tables": None}, {"integer_tables": {"model.embed_tokens.weight": {}}}):
        assert integer_table(tmp_path, Settings(tmp_path, settings), NAME, values) is values


def _scales(change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)), allow_pickle=True)


FORM = {"bits": 8, "group_size": 32}
DAMAGED: dict[str, tuple[Any, Callable[[Path], Any] | None, str]] = {
    "tables": ([FORM], None, "integer_tables is an object"),
    "form": ({NAME: 8}, None, f"{NAME} is an object, not 8"),
    "no bits": ({NAME: {"group_size": 32}}, None, "bits is a whole number from 1, not null"),
    "bits": ({NAME: FORM | {"bits": 5}}, None, "bits is 4 or 8, not 5"),
    "group": ({NAME: FORM | {"group_size": 48}}, None, "group_size is a power of two from 16, not 48"),
    "other group": ({NAME: FORM | {"group_size": 64}}, None, r"holds no float16 or float32 \[300, 2\]"),
    "missing": ({NAME: FORM}, Path.unlink, r"lm_head\.weight\.scales\.npy cannot be read"),
    "cut": ({NAME: FORM}, lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
    "empty": ({NAME: FORM}, lambda path: path.write_bytes(b""), "cannot be read"),
    "no array": ({NAME: FORM}, lambda path: path.write_bytes(b"{}" * 99), "cannot be read"),
    "objects": ({NAME: FORM}, _scales(lambda scales: scales.astype(object)), "cannot be read"),
    "double": ({NAME: FORM}, _scales(lambda scales: scales.astype(float)), r"holds no float16 or float32 \[300, 3\]"),
    "rows": ({NAME: FORM}, _scales(lambda scales: scales[:-1]), r"holds no float16 or float32 \[300, 3\]"),
    "others": ({NAME: FORM}, _scales(lambda scales: scales / 2), "is of another model: lm_head.weight is not 8-bit"),
    "nan": ({NAME: FORM}, _scales(lambda scales: scales * np.float32(np.nan)), "is of another model"),
    "infinite": ({NAME: FORM}, _scales(lambda scales: scales / np.float32(1e-45)), "a scale is not finite"),
}


@pytest.mark.parametrize(("tables", "damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged(tables, damage, message, tmp_path):
    table = random_table(0)
    (part,) = float_table(NAME, table).parts()
    write_scales(tmp_path, NAME, table)
    if damage is not None:
        with np.errstate(all="ignore"):
            damage(tmp_path / f"{NAME}.scales.npy")
    with pytest.raises(UserError, match=message) as error:
        integer_table(tmp_path, Settings(tmp_path / "config.json", {"integer_tables": tables}), NAME, part)
    assert "\n" not in str(error.value)
