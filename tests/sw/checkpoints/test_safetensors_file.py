# SPDX-License-Identifier: Apache-2.0
"""Safetensors: every type is read exactly, and every kind of damage gives one line."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sw.checkpoints.safetensors_file import INDEX, Checkpoint, SafetensorsFile
from sw.common.errors import UserError
from tests.sw.fixtures.checkpoints import write_tensors


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_types(tmp_path):
    """This includes tensors at odd addresses: the format does not align data."""
    data = struct.pack("<ei", -1.5, -7) + struct.pack("<2H", 0x3FC0, 0xC2F7) + struct.pack("<2f", 3.25, -1e30)
    header = {
        "__metadata__": {"format": "pt"},
        "half": entry("F16", (1,), (0, 2)),
        "whole": entry("I32", (1, 1), (2, 6)),
        "brain": entry("BF16", (2,), (6, 10)),
        "single": entry("F32", (1, 2), (10, 18)),
        "scalar": entry("F32", (), (14, 18)),
        "empty": entry("F16", (0, 4), (18, 18)),
        "other": entry("F8_E4M3", (3,), (0, 3)),
    }
    for padding in (b"", b" ", b"  "):
        file = SafetensorsFile(write_raw(tmp_path / "a.safetensors", json.dumps(header).encode() + padding, data))
        assert file.names == list(header)[1:]
        assert file.tensor("half").tolist() == [-1.5]
        assert file.tensor("whole").tolist() == [[-7]]
        assert file.tensor("brain").tolist() == [1.5, -123.5]
        assert file.tensor("brain").dtype == np.float32
        assert np.array_equal(file.tensor("single"), np.array([[3.25, -1e30]], np.float32))
        assert file.tensor("scalar") == np.float32(-1e30)
        assert file.tensor("empty").shape == (0, 4)
        with pytest.raises(UserError, match="tensor other is F8_E4M3; F16, BF16, F32, I32, I64, I8 are read"):
            file.tensor("other")


DAMAGED = {
    "list": ([1], "its header is not an object"),
    "not JSON": (b"{nonsense", "its header is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "its header is not JSON"),
    "nested": (b"[" * 100_000, "its header is not JSON"),
    "no object": ({"a": 3}, "tensor a: its entry is not an object"),
    "no type": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "tensor a: it lacks a dtype"),
    "negative": ({"a": entry(shape=(-2,))}, "tensor a: it lacks"),
    "fraction": ({"a": entry(shape=(2.0,))}, "tensor a: it lacks"),
    "truth": ({"a": entry(shape=(True,))}, "tensor a: it lacks"),
    "one offset": ({"a": entry(offsets=(0,))}, "tensor a: it lacks"),
    "reversed": ({"a": entry(offsets=(8, 0))}, "tensor a: it is at 8 to 0 of 8 bytes"),
    "beyond": ({"a": entry(shape=(3,), offsets=(0, 12))}, "tensor a: it is at 0 to 12 of 8 bytes"),
    "too large": ({"a": entry(shape=(3,))}, r"tensor a: F32 \[3\] does not take 8 bytes"),
    "huge": ({"a": entry(shape=(2**40, 2**40))}, "does not take 8 bytes"),
    "huge and empty": ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, "does not take 0 bytes"),
}


@pytest.mark.parametrize(("header", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_header(header, message, tmp_path):
    path = write_raw(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(UserError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [2**64 - 1, 100_000_001, 200])
def test_header_longer_than_the_file(length, tmp_path):
    path = write_raw(tmp_path / "a.safetensors", {"a": entry()}, bytes(8), length)
    with pytest.raises(UserError, match="its header is cut or too long"):
        SafetensorsFile(path)


def test_every_truncation(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    data = path.read_bytes()
    SafetensorsFile(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"is not a complete safetensors file|is damaged"):
            SafetensorsFile(path)


def test_random_damage(tmp_path):
    """For any changed bytes the result is a tensor or one line."""
    rng = np.random.default_rng(1)
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int32)})
    good = np.frombuffer(path.read_bytes(), np.uint8)
    read = 0
    for _ in range(500):
        data = good.copy()
        data[rng.integers(0, len(data))] = rng.integers(0, 256)
        path.write_bytes(data.tobytes())
        try:
            file = SafetensorsFile(path)
            for name in file.names:
                file.tensor(name)
                read += 1
        except UserError:
            pass
    assert read > 20


def test_shards(tmp_path):
    write_tensors(tmp_path / "one.safetensors", {"a": np.full(2, 1, np.float32)})
    write_tensors(tmp_path / "two.safetensors", {"b": np.full((1, 2), 2, np.float16), "c": np.arange(3, dtype="i4")})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    for text in (None, json.dumps(index)):
        if text is not None:
            (tmp_path / INDEX).write_text(text)
        checkpoint = Checkpoint(tmp_path)
        assert "a" in checkpoint
        assert "d" not in checkpoint
        assert checkpoint.floats("b").dtype == np.float32
        assert checkpoint.table("b").dtype == np.float16
        assert checkpoint.integers("c").tolist() == [0, 1, 2]
        with pytest.raises(UserError, match="has no tensor d"):
            checkpoint.tensor("d")
        with pytest.raises(UserError, match="tensor a is F32, not I32"):
            checkpoint.integers("a")
        with pytest.raises(UserError, match="tensor c is I32, not one of F16, BF16, F32"):
            checkpoint.floats("c")


def test_values_that_are_not_finite(tmp_path):
    for name, value in (("a", np.nan), ("b", np.inf)):
        write_tensors(tmp_path / f"{name}.safetensors", {name: np.array([1, value], np.float16)})
    for name in "ab":
        with pytest.raises(UserError, match=f"tensor {name} holds values that are not finite"):
            Checkpoint(tmp_path).floats(name)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_bad_index(text, tmp_path):
    write_tensors(tmp_path / "one.safetensors", {"a": np.ones(2, np.float32)})
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match="is no index of shards"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["two.safetensors", "../one.safetensors"])
def test_missing_shard(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        write_tensors(place / "one.safetensors", {"a": np.ones(2, np.float32)})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=rf"is not complete: {Path(name).name}, which {INDEX} names, is missing"):
        Checkpoint(folder)
    with pytest.raises(UserError, match=r"has no \.safetensors files"):
        (tmp_path / "empty").mkdir()
        Checkpoint(tmp_path / "empty")
