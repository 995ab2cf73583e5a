# SPDX-License-Identifier: Apache-2.0
"""Quantized models of every family on the reference device: programs where the registry says so, else one line."""

import numpy as np
import onnxruntime
import pytest

from hw.spec.config import AcceleratorConfig
from sw.devices import open_device
from sw.export.floats import float_model
from sw.export.huggingface import export_checkpoint
from sw.model.families import FAMILIES
from sw.runtime import Decoder, ProgramDecoder
from sw.runtime.setup import make_decoder
from tests.sw.fixtures.checkpoints import empty_cache, relative_error, step
from tests.sw.fixtures.families.awq_folders import write_family_awq
from tests.sw.fixtures.families.models import CONFIGS, PROMPT, configuration

CONTEXT = 40


@pytest.fixture(scope="module", params=CONFIGS)
def packed(request, tmp_path_factory):
    """Name, AutoAWQ folder and its exported graph."""
    folder = tmp_path_factory.mktemp(request.param)
    write_family_awq(folder / "in", request.param)
    return request.param, folder / "in", export_checkpoint(folder / "in", folder / "out", lm_head="float")


def logits_of(path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return step(session, PROMPT, empty_cache(session), len(PROMPT))[0]


def test_packed_checkpoint(packed, tmp_path):
    """It computes the same as the float checkpoint with its dequantized weights."""
    _, folder, path = packed
    assert relative_error(logits_of(path), logits_of(float_model(folder / "float", tmp_path / "out"))) < 1e-5


@pytest.mark.parametrize("score_words", [0, 1024])
def test_device(packed, score_words):
    """Logits of the prompt, in pieces, on hardware without and with attention."""
    name, _, path = packed
    family = FAMILIES[configuration(name)["model_type"]]
    options = {"operators": "decoder", "tile": 8, "max_tokens": 8, "max_k": 2048, "score_words": score_words}
    config, told = AcceleratorConfig(**options), []
    with open_device("reference", config) as device:
        decoder = make_decoder(path, device, context=CONTEXT, tell=told.append)
        if family.hybrid_because or name == "llama_biased":
            reason = family.hybrid_because or "o_proj: a bias besides the residual"
            assert type(decoder) is Decoder
            assert len(told) == 1 and reason in told[0] and "\n" not in told[0]
        else:
            assert type(decoder) is ProgramDecoder and decoder.whole == bool(score_words)
            assert not told
        rows = np.concatenate([decoder.forward(piece.tolist(), every=True) for piece in np.array_split(PROMPT, 6)])
    # Activations have 16 bits, and on hardware with attention the cache 8.
    assert relative_error(rows, logits_of(path)) < (6e-2 if score_words else 1e-3)
