# SPDX-License-Identifier: Apache-2.0
"""The quantizer on a tiny model of every family: all layers, every fold, and what runs of the result."""

import json
import pydoc_data.topics

import numpy as np
import onnxruntime
import pytest

from sw import quantize as sw_quantize
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from sw.graph.match import match_decoder
from sw.model.families import FAMILIES
from sw.model.parts import Decoder, Mismatch
from sw.program.obstacles import Obstacle, check_decoder
from tests.sw.fixtures.checkpoints import empty_cache, relative_error, step
from tests.sw.fixtures.families.awq_folders import MODULES
from tests.sw.fixtures.families.models import CONFIGS, PROMPT, configuration, write_family

SMALL = ("--bits", "8", "--group-size", "32", "--calibration-windows", "4", "--windows", "2", "--length", "16")


def logits_of(path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return step(session, PROMPT, empty_cache(session), len(PROMPT))[0]


QUICK = ("qwen3", "gemma3")
"""The models that are not in `make test-full` alone."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in CONFIGS if name != "gemma3_27b"],
)
def test_family(name, tmp_path, capsys):
    weights = write_family(tmp_path / "in", name)
    for file, topic in (("one", "lambda"), ("other", "while")):
        (tmp_path / file).write_text(pydoc_data.topics.topics[topic])
    texts = ["--calibration", str(tmp_path / "one"), "--perplexity", str(tmp_path / "other")]
    assert sw_quantize.main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), *SMALL, *texts, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    path = tmp_path / "out" / "model.onnx"
    count = sum(tensor.endswith(MODULES) for tensor in weights)
    family = FAMILIES[configuration(name)["model_type"]]
    assert (
        len(report["layers"]) == (28 if family.fused else count)
        and len(find_linears(path)) == len(report["layers"]) + 1
    )
    if family.experts is None:
        assert all(layer["fold"] for layer in report["layers"])
    found, wanted = logits_of(path), logits_of(float_model(tmp_path / "in", tmp_path / "float"))
    # Rounding may make a router choose another expert for a token or two, and it changes the weights of experts too:
    # rounding to nearest alone gives this tiny Mixtral an error of 0.06.
    errors = sorted(relative_error(*rows) for rows in zip(found, wanted))
    assert errors[-3] < 0.1 if family.experts else relative_error(found, wanted) < 0.05
    file = OnnxFile(path)
    decoder = match_decoder(file)
    because = family.hybrid_because
    if because or name == "llama_biased":
        with pytest.raises(Obstacle, match=because or "o_proj: a bias besides the residual"):
            check_decoder(file, decoder, 64)
    else:
        assert isinstance(decoder, Decoder) and not isinstance(check_decoder(file, decoder, 64), Mismatch)


def test_no_autoawq_folder(tmp_path):
    """One line, before anything is quantized."""
    write_family(tmp_path / "in", "qwen3")
    options = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--format", "autoawq"]
    with pytest.raises(UserError, match="AutoAWQ folders are written for llama and qwen2 alone, not for qwen3"):
        sw_quantize.main(options)
    assert [item.name for item in tmp_path.iterdir()] == ["in"]
