# SPDX-License-Identifier: Apache-2.0
"""One model in three formats gives the same text on the device as in transformers: see data/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest

from sw.export.resolve import resolve_model
from sw.generate import main
from sw.graph.linears import find_linears

FOLDER = Path(__file__).parent / "fixtures" / "data" / "same_weights"
FORMATS = ("autoawq", "genai", "model.gguf")
EXPECTED = json.loads((FOLDER / "greedy.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def generate(capsys, name, *options):
    status = main(["--model", str(FOLDER / name), "--max-new-tokens", "32", "--tile", "8", "--json", *options])
    assert status == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("name", FORMATS)
def test_same_text(name, kind, capsys):
    """Tokens and text, with and without the chat template, are the same for all files of the weights."""
    expected = EXPECTED[kind]
    options = ["--device", "reference", "--prompt", expected["prompt"], *(["--raw"] if kind == "raw" else [])]
    document = generate(capsys, name, *options)
    assert document["prompt_ids"] == expected["prompt_ids"]
    assert document["ids"] == expected["ids"]
    assert document["text"] == expected["text"]


@pytest.mark.simulator
def test_same_text_in_hardware(capsys):
    expected = EXPECTED["chat"]
    options = ["--device", "rtl", "--score-words", "0", "--prompt", expected["prompt"]]
    document = generate(capsys, "autoawq", *options)
    assert document["ids"] == expected["ids"]


def test_same_weights():
    """The layers hold the same integers and scales; equal text alone would not show this."""
    dequantized = {}
    for name in FORMATS:
        linears = find_linears(resolve_model(FOLDER / name))
        weights = [layer.dequantize() for layer in linears if not layer.name.startswith("/lm_head")]
        dequantized[name] = np.concatenate([np.sort(w, axis=None) for w in weights if len(w) == 96])
    for name in FORMATS[1:]:
        assert np.array_equal(dequantized[name], dequantized[FORMATS[0]])
