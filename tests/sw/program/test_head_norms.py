# SPDX-License-Identifier: Apache-2.0
"""Norms of every head: which of queries and keys have one, how many jobs they take, and the forms of a graph."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sw.devices import open_device
from sw.graph.file import OnnxFile
from sw.graph.rewrite import write_quantized
from sw.program.lower import Output
from sw.runtime import ProgramDecoder
from tests.sw.fixtures.builder_graphs import Form, builder_graph
from tests.sw.fixtures.float_twins import quantize_all
from tests.sw.fixtures.linears import same_bits
from tests.sw.fixtures.random_decoder import MIXED, write_random
from tests.sw.runtime.test_decoder import IDS, in_blocks, relative, whole_graph
from tests.sw.runtime.test_programs import CONTEXT, Composed, Watched, hardware, programs

SIZE = 32
GRAPHS = {
    # q is not rotated by its layer and k is, so they are two layers.
    "q alone": ({"head_norms": "q"}, ["q", "kv"], ["q"]),
    "k alone": ({"head_norms": "k"}, ["qkv"], ["k"]),
    # The planes of v are two.
    "formats": ({"head_norms": "qk", "formats": MIXED}, ["qk", "v"], ["q", "k"]),
    "no biases": ({"head_norms": "qk", "biased": ()}, ["qkv"], ["q", "k"]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_composition(name, tmp_path):
    """q, k and v are bit for bit the contract's numerics; the logits are onnxruntime's."""
    options, layers, norms = GRAPHS[name]
    path = write_random(tmp_path, head_size=SIZE, **options)
    file, start = OnnxFile(path), 0
    with open_device("reference", hardware()) as device:
        composed, decoder = Composed(file, device.config), Watched(file, device, context=CONTEXT)
        made = [job.name.rpartition(".")[2] for job in decoder._programs.jobs(0, 1, Output.LAST)]
        wanted = [f"{group}_proj" for group in layers]
        assert [item for item in made if item.endswith("proj")] == wanted
        assert made[-2 * len(norms) :] == [f"{kind}_norm{end}" for kind in norms for end in (", squares", "")]
        found = []
        for size in (5, 1, 3):
            decoder.embedded.clear()
            decoder.qkv.clear()
            found.append(decoder.forward(IDS[start : start + size], every=True))
            assert same_bits(decoder.qkv[0], composed.qkv(0, decoder.embedded[0], start))
            start += size
        assert relative(np.concatenate(found), whole_graph(path, IDS[:start])) < 1e-3


@pytest.mark.parametrize(
    ("max_tokens", "tokens", "rows"),
    [
        # One token: all 4 heads of q and both of k at once; 3 rows at most: q in two parts.
        (8, 1, [4, 2]),
        (3, 1, [3, 1, 2]),
        # 3 tokens: 3 of q and 3 of k, as many as heads. 4 tokens: every head, of all tokens.
        (8, 3, [4, 4, 4, 2, 2, 2]),
        (8, 4, [4, 4, 4, 4, 4, 4]),
        (8, 8, [8, 8, 8, 8, 8, 8]),
        (3, 3, [3, 3, 3, 3, 3, 3]),
    ],
)
def test_rows(max_tokens, tokens, rows, tmp_path):
    """A pair of jobs has the heads of a token or the tokens of a head; the results are the same."""
    path = write_random(tmp_path, head_size=SIZE, head_norms="qk")
    file = OnnxFile(path)
    with open_device("reference", hardware(max_tokens=max_tokens)) as device:
        decoder = Watched(file, device, context=CONTEXT)
        jobs = [job for job in decoder._programs.jobs(0, tokens, Output.LAST) if "_norm" in job.name]
        assert [job.tokens for job in jobs[1::2]] == [job.tokens for job in jobs[::2]] == rows
        # Every other job waits for the one before it, and the first one for the linear layers.
        assert [job.wait.value for job in jobs] == [1, 1] + [0, 1] * (len(rows) - 1)
        decoder.forward(IDS[:tokens])
        (x,) = decoder.embedded
        assert same_bits(decoder.qkv[0], Composed(file, device.config).qkv(0, x, 0))


def builder_model(folder: Path, **form) -> Path:
    folder.mkdir(exist_ok=True)
    path = builder_graph(folder / "float.onnx", Form(head_size=SIZE, **form))
    layers = {name: partial(lambda layer: layer, layer) for name, layer in quantize_all(path).items()}
    return write_quantized(path, folder / "out", layers, {}, {})


@pytest.mark.parametrize("interleaved", [0, 1])
def test_forms_of_the_builder(interleaved, tmp_path):
    """Rotated apart or in the attention's node, the norms before it or in it: all have the same programs."""
    attributes = (("rotary_interleaved", interleaved),)
    forms = {
        "apart": {"rotary": "apart", "head_norms": "apart"},
        "rotary in the attention": {"head_norms": "apart"},
        # onnxruntime has no kernel of it on the CPU.
        "in the attention": {"head_norms": "attention"},
    }
    logits = {}
    for name, form in forms.items():
        path = builder_model(tmp_path / name, attributes=attributes, **form)
        with open_device("reference", hardware()) as device:
            decoder = programs(path, device)
            assert isinstance(decoder, ProgramDecoder)
            logits[name] = in_blocks(decoder)
        if name != "in the attention":
            assert relative(logits[name], whole_graph(path)) < 1e-3
    assert all(same_bits(found, logits["apart"]) for found in logits.values())


def test_without_a_rotation(tmp_path):
    path = builder_model(tmp_path, rotary="none", head_norms="apart")
    with open_device("reference", hardware()) as device:
        assert relative(in_blocks(programs(path, device)), whole_graph(path)) < 1e-3


@pytest.mark.simulator
def test_devices_agree(tmp_path):
    """The simulated hardware gives the reference's logits bit for bit, with rows of a token and rows of a head."""
    path = write_random(tmp_path, head_size=SIZE, head_norms="qk")
    logits = []
    for name in ("reference", "rtl"):
        with open_device(name, hardware(tile=4, ports=1, max_tokens=5, max_k=1024), "hostile") as device:
            logits.append(in_blocks(programs(path, device), (5, 1, 1)))
    assert same_bits(logits[1], logits[0])
