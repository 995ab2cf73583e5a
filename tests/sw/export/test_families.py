# SPDX-License-Identifier: Apache-2.0
"""Float checkpoints and GGUF files of every family against transformers (fixtures/families/models.py)."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sw.checkpoints.gguf.reader import GgufFile
from sw.export.floats import float_model
from sw.export.gguf import decoder_config, export_gguf
from tests.sw.fixtures.checkpoints import empty_cache, step
from tests.sw.fixtures.families.gguf_files import MODELS, write_family_gguf
from tests.sw.fixtures.families.models import CONFIGS, PROMPT, ROWS, expected, write_family


def check(path: Path, name: str, pieces: int = 1) -> None:
    """The graph's logits of the prompt in pieces, and its greedy text, are those of transformers."""
    logits, tokens = expected(name)
    session = onnxruntime.InferenceSession(path)
    past, total, found = empty_cache(session), 0, []
    for piece in np.array_split(PROMPT, pieces):
        total += len(piece)
        rows, past = step(session, piece.tolist(), past, total)
        found.append(rows)
    rows = np.concatenate(found)
    assert np.abs(rows[ROWS] - logits).max() < 1e-4
    text = [int(rows[-1].argmax())]
    while len(text) < len(tokens):
        total += 1
        rows, past = step(session, text[-1:], past, total)
        text.append(int(rows[-1].argmax()))
    assert text == tokens


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_float_checkpoint(name, pieces, tmp_path):
    write_family(tmp_path / "in", name)
    check(float_model(tmp_path / "in", tmp_path / "out"), name, pieces)


@pytest.mark.parametrize("name", MODELS)
def test_gguf(name, tmp_path):
    write_family_gguf(tmp_path / "m.gguf", name)
    check(export_gguf(tmp_path / "m.gguf", tmp_path / "out", lm_head="float"), name)


def test_scores_of_gemma_27b(tmp_path):
    """GGUF has no key for their scale; llama.cpp knows the model by its 62 layers."""
    for layers, size in ((4, 32), (62, 16)):
        write_family_gguf(tmp_path / "m.gguf", "gemma3", block_count=layers)
        assert decoder_config(GgufFile(tmp_path / "m.gguf")).attention_scale == size**-0.5
