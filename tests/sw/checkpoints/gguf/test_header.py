# SPDX-License-Identifier: Apache-2.0
"""Headers: the same values as the gguf package reads, and one line for every kind of damage."""

import random
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest

from sw.checkpoints.gguf.header import read_header
from sw.checkpoints.gguf.reader import GgufFile
from sw.common.errors import UserError
from sw.export.gguf import export_gguf
from tests.sw.export.test_gguf import ROOT, write_gguf

ARRAY, STRING, FLOAT64 = (int(gguf.GGUFValueType[name]) for name in ("ARRAY", "STRING", "FLOAT64"))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(fields=b"", field_count=0, tensors=b"", tensor_count=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, field_count) + fields + tensors


def tensor(name="x", shape=(32,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_values_are_those_of_the_gguf_package(tmp_path):
    path = tmp_path / "m.gguf"
    changes = {
        "a.float": -0.5,
        "a.flag": True,
        "a.negative": -(1 << 31),
        "a.texts": ["", "ä", "b" * 300],
        "a.empty": "",
    }
    write_gguf(path, kind="Q8_0", tied=False, changes=changes)
    fields, tensors = read_header(path)
    theirs = gguf.GGUFReader(path)
    assert list(fields) == [key for key in theirs.fields if not key.startswith("GGUF.")]
    model = GgufFile(path)
    for key in fields:
        value = model.meta(key)
        assert value == theirs.fields[key].contents(), key
        assert type(value) is type(theirs.fields[key].contents()), key
    assert list(tensors) == [item.name for item in theirs.tensors]
    for item in theirs.tensors:
        found = tensors[item.name]
        assert (found.kind, list(found.shape)) == (item.tensor_type.name, [int(size) for size in item.shape[::-1]])
        assert np.array_equal(found.read(), item.data)
        if len(found.shape) > 1:
            assert np.array_equal(found.read(slice(3, 9)), item.data[3:9])


def test_tensor_without_axes(tmp_path):
    (tmp_path / "m.gguf").write_bytes(header(b"", 0, tensor(shape=()), 1).ljust(64, b"\0") + np.float32(2.5).tobytes())
    assert np.array_equal(GgufFile(tmp_path / "m.gguf").float_tensor("x"), [2.5])


HUGE = 1 << 60
DAMAGE = {
    "empty": (b"", "cannot mmap an empty file"),
    "no magic": (b"GGXF" + bytes(40), "does not begin with GGUF"),
    "version": (header(version=1), "version 1 is not supported, 2 and 3 are"),
    "tensors": (header(tensor_count=HUGE), "1,152,921,504,606,846,976 tensors' description takes"),
    "fields": (header(field_count=HUGE), "description takes"),
    "key": (header(struct.pack("<Q", HUGE) + bytes(40), 1), "the name of a metadata field takes"),
    "key's text": (header(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40), 1), "metadata field is not UTF-8"),
    "type": (header(text("k") + struct.pack("<I", 99) + bytes(20), 1), "metadata k has the type 99"),
    "numbers": (
        header(text("k") + struct.pack("<IIQ", ARRAY, FLOAT64, HUGE) + bytes(20), 1),
        "metadata k takes 9,223,372,036,854,775,808 bytes",
    ),
    "texts": (header(text("k") + struct.pack("<IIQ", ARRAY, STRING, 1 << 40) + bytes(20), 1), "metadata k takes"),
    "a text": (header(text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, HUGE) + bytes(20), 1), "metadata k takes"),
    "lists": (header(text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(20), 1), "metadata k is a list of lists"),
    "twice": (header(2 * (text("k") + struct.pack("<IB", 0, 1)) + bytes(9), 2), "metadata k occurs twice"),
    "alignment": (
        header(text("general.alignment") + struct.pack("<II", 4, 24), 1),
        "general.alignment is a power of two, not 24",
    ),
    "axes": (header(b"", 0, text("x") + struct.pack("<I", 1 << 30) + bytes(60), 1), "tensor x has 1,073,741,824 axes"),
    "no elements": (header(b"", 0, tensor(shape=(32, 0)), 1), r"tensor x is \[0, 32\], and has no elements"),
    "overflow": (header(b"", 0, tensor(shape=(1 << 62, 1 << 62)), 1), "tensor x takes 85,070,591,730,234,615,865,843"),
    "format": (header(b"", 0, tensor(kind=77), 1), "tensor x has the format 77, which is not known"),
    "blocks": (header(b"", 0, tensor(shape=(40, 2), kind=12), 1), r"tensor x is \[2, 40\], and Q4_K has blocks of 256"),
    "offset": (header(b"", 0, tensor(offset=8), 1) + bytes(999), "tensor x begins at 8, no multiple of 32"),
    "data": (header(b"", 0, tensor(shape=(64,)), 1) + bytes(200), "tensor x takes 256 bytes from 64 on"),
    "same name": (header(b"", 0, 2 * tensor(), 2) + bytes(999), "tensor x occurs twice"),
}


@pytest.mark.parametrize(("content", "problem"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.timeout(10)
def test_damage(content, problem, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=rf"m\.gguf is not a complete GGUF file \(.*{problem}") as refused:
        read_header(tmp_path / "m.gguf")
    assert "\n" not in str(refused.value)


def test_file_that_becomes_shorter(tmp_path):
    """Data is read only when it is needed; the file may have changed until then."""
    path = tmp_path / "m.gguf"
    write_gguf(path)
    model = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"m\.gguf has become shorter: tensor blk\.1\.ffn_down\.weight ends beyond"):
        model.linear("blk.1.ffn_down")
    path.unlink()
    with pytest.raises(UserError, match=r"m\.gguf cannot be read"):
        model.float_tensor("output_norm.weight")


SHAPES = {
    "output_norm.weight": (32,),
    "token_embd.weight": (259,),
    "blk.0.attn_norm.weight": (64, 1),
    "blk.0.attn_q.weight": (64,),
    "blk.1.ffn_down.weight": (64, 96, 1),
    "blk.1.attn_k.bias": (31,),
    "rope_freqs.weight": (3,),
}


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", SHAPES)
def test_tensors_of_other_shapes(name, kind, tmp_path):
    """A tensor whose shape is not that of the metadata is refused by name, in every kind of format."""
    path, wrong = tmp_path / "m.gguf", np.zeros(SHAPES[name], np.float32)
    write_gguf(path, kind="Q8_0")
    theirs = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "wrong.gguf", "llama")
    for key, value in theirs.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = value.types[1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value.contents(), value.types[0], sub)
    dtype = gguf.GGMLQuantizationType[kind]
    for item in theirs.tensors:
        if item.name != name:
            writer.add_tensor(item.name, item.data, raw_dtype=item.tensor_type)
    if kind == "Q8_0" and wrong.shape[-1] % 32:
        kind = "F32"
    if kind == "Q8_0":
        writer.add_tensor(name, gguf.quants.quantize(wrong, dtype), raw_dtype=dtype)
    else:
        writer.add_tensor(name, wrong.astype(np.float16 if kind == "F16" else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError) as refused:
        export_gguf(tmp_path / "wrong.gguf", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(20))
def test_random_damage(seed, tmp_path):
    """A few damaged bytes of the header: the file is refused in one line, or exported with other values."""
    path, rng = tmp_path / "m.gguf", random.Random(seed)
    write_gguf(path, kind="Q4_K", table="Q6_K", hidden=256, ffn=256)
    data = bytearray(path.read_bytes())
    end = min(item.offset for item in read_header(path)[1].values())
    for _ in range(rng.randrange(1, 4)):
        place = rng.choice([rng.randrange(8, end), rng.randrange(8, 600), rng.randrange(end - 1500, end)])
        data[place] = rng.choice([0, 255, rng.randrange(256), data[place] ^ 1 << rng.randrange(8)])
    path.write_bytes(data)
    try:
        export_gguf(path, tmp_path / "out")
    except UserError as error:
        assert "\n" not in str(error), f"seed {seed}"
        assert not (tmp_path / "out").exists(), f"seed {seed}"


def test_command_line(tmp_path):
    """One line, exit status 2, no traceback."""
    (tmp_path / "m.gguf").write_bytes(DAMAGE["numbers"][0])
    command = [sys.executable, "-m", "sw.gguf_export", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "is not a complete GGUF file (metadata k takes" in done.stderr
