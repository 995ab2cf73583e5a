# SPDX-License-Identifier: Apache-2.0
"""Bytes before and after: counted by hand for a small model; the same tensors count on both sides."""

import math
from pathlib import Path

import pytest

from sw.awq.sizes import PAPER, PAPER_SMALLER, Sizes, compare, float16_bytes, written_bytes
from sw.checkpoints.autoawq_writer import write_autoawq_folder
from sw.common.errors import UserError
from sw.synthetic import QWEN2_5_0_5B, _tensors
from tests.sw.checkpoints.test_autoawq_writer import quantized
from tests.sw.fixtures.checkpoints import QWEN2, awq_config, read_tensors
from tests.sw.fixtures.float_twins import DATA, float_twin

LINEAR_WEIGHTS = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96)
VECTORS = 2 * (64 + 64 + 64 + 32 + 32) + 64
TABLE = 264 * 64


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_small_model(tied, tmp_path):
    path = quantized(tmp_path, awq_config(QWEN2, tie_word_embeddings=tied), dtype="F16")
    before = tmp_path / "graph" / "model.onnx"
    floats = sum(values.size for values in read_tensors(tmp_path / "float").values())
    assert float16_bytes(before) == 2 * floats == 2 * (LINEAR_WEIGHTS + VECTORS + (1 if tied else 2) * TABLE)
    # 4 bits, float32 scales of 32 weights, packed zero points (3 groups take two bytes); vectors in float32.
    groups = LINEAR_WEIGHTS // 32
    zero_points = 2 * ((64 + 32 + 32 + 64 + 2 * 96) + 2 * 64)
    layers = LINEAR_WEIGHTS // 2 + 4 * groups + zero_points
    # An int8 head with a scale for every 64 weights; untied there is a float16 embedding, too.
    tables = TABLE + 4 * TABLE // 64 + (0 if tied else 2 * TABLE)
    sizes = compare(before, path)
    assert sizes.after == written_bytes(path) == layers + tables + 4 * VECTORS
    assert sizes.before == float16_bytes(before)
    write_autoawq_folder(path, tmp_path / "awq")
    folder = compare(before, tmp_path / "awq").after
    scales = sum(item.stat().st_size for item in (tmp_path / "awq").glob("*.npy"))
    assert scales > 4 * TABLE // 64
    assert folder == scales + sum(values.nbytes for values in read_tensors(tmp_path / "awq").values())


def test_words():
    assert Sizes(988_065_536, 344_750_000).line() == "988.07 MB in float16, 344.75 MB quantized: 65.11 % smaller"
    assert str(PAPER_SMALLER) in PAPER


def test_the_papers_figure():
    """988 MB and 443.81 MiB are the sizes of the float16 file and of an AutoAWQ file of groups of 64, with headers."""
    quantization = QWEN2_5_0_5B["quantization_config"] | {"group_size": 64}
    float_config = {key: value for key, value in QWEN2_5_0_5B.items() if key != "quantization_config"}

    def size(config) -> int:
        return sum(tensor.size for tensor in _tensors(config, "F16", None))  # pyright: ignore[reportArgumentType]

    before, after = size(float_config), size(QWEN2_5_0_5B | {"quantization_config": quantization})
    assert round(before / 1e6) == 988
    header = 70_000
    assert after / 2**20 < 443.81 < (after + header) / 2**20
    assert math.isclose(100 * (1 - 443.81 / 988), PAPER_SMALLER, abs_tol=0.005)
    assert "52.90 %" in PAPER
    assert math.isclose(Sizes(before, after).smaller, 52.90, abs_tol=0.02)


def test_foreign_graph(tmp_path):
    """Rotary tables, shapes and indices do not count."""
    source = float_twin(DATA / "genai_qwen2_symmetric.onnx", tmp_path / "float.onnx")
    hidden, ffn, vocab, packed = 128, 352, 256, 256
    block = hidden * packed + packed + hidden * hidden + 3 * hidden * ffn + 2 * hidden
    assert float16_bytes(source) == 2 * (2 * block + 2 * vocab * hidden + hidden)


def test_damaged(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        compare(tmp_path / "none.onnx", tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        written_bytes(Path(tmp_path))
