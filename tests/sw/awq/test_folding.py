# SPDX-License-Identifier: Apache-2.0
"""Folding a scale does not change the results of a float model, for the graphs of all exporters."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from sw.awq.calibration import walk
from sw.awq.folding import Fold, find_fold
from sw.awq.graph import FloatSite, Group, find_sites
from sw.export.floats import float_model
from sw.graph.file import OnnxFile
from sw.runtime import Decoder
from tests.sw.export.test_gguf import write_gguf
from tests.sw.fixtures.float_graphs import EXPORTERS, float_type, set_constant, write_float_graph

OWN = ("own_llama", "own_qwen2")
TOKENS = 24
# For packed q, k and v and for separate layers: the two norms, v and up of two blocks.
EXPECTED = {"gamma": 4, "v": 2, "up": 2}


@dataclass(frozen=True, eq=False)
class Found:
    """A graph's folds. groups: with the layers' weights, which the walk through the graph has read."""

    path: Path
    folds: list[tuple[Group, Fold | None]]


@pytest.fixture(scope="module", params=[*EXPORTERS, *OWN])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in OWN:
        write_gguf(folder / "m.gguf", request.param.removeprefix("own_"), "Q4_1")
        path = float_model(folder / "m.gguf", folder / "float")
    else:
        path = write_float_graph(request.param, folder / "model.onnx")
    return Found(path, find_folds(path))


def find_folds(path: Path) -> list[tuple[Group, Fold | None]]:
    """Every group of layers except the head, with its fold; the graph is run with float weights."""
    file = OnnxFile(path)
    ids = np.random.default_rng(3).integers(0, 255, (2, TOKENS)).tolist()
    folds = []
    for step in walk(file, find_sites(file), ids):
        for group in step.groups:
            if not group.sites[0].is_head:
                folds.append((group, find_fold(file, step, group)))
            for site in group.sites:
                own = file.constant(site.bias, "").reshape(-1) if site.bias and site.node.op_type == "Gemm" else None
                step.compute(site, [site.weight(file)] * len(ids), own)
    return folds


def test_all_are_found(found):
    kinds = []
    for index, (group, fold) in enumerate(found.folds):
        if index == 0 and found.path.parent.name.startswith("optimum_qwen20"):
            # One tensor is the weight of all five norms: of this one directly, and of the others through Identity.
            assert fold is None
            kinds.append("gamma")
            continue
        assert fold is not None, f"no place for the scale of {[site.name for site in group.sites]}"
        # Rows of up are consecutive; each head of v belongs to several query heads.
        straight = fold.rows is not None and (np.diff(fold.rows) == 1).all()
        kinds.append("gamma" if fold.rows is None else "up" if straight else "v")
    assert {kind: kinds.count(kind) for kind in EXPECTED} == EXPECTED


def test_nothing_changes(found, tmp_path):
    """Scales from 1/16 to 16 in all places at once; a second block of tokens reads the scaled cache."""
    model = onnx.load(found.path)
    onnx.save(scaled(found, model), tmp_path / "model.onnx")
    for name in ("config.json", "genai_config.json"):
        if (found.path.parent / name).exists():
            (tmp_path / name).write_bytes((found.path.parent / name).read_bytes())
    before, after = logits(found.path), logits(tmp_path / "model.onnx")
    half = "float16" in found.path.parent.name
    assert np.abs(after - before).max() <= (5e-2 if half else 2e-4) * np.abs(before).max()
    assert np.abs(before).max() > 0.1


def test_every_scale_matters(found, tmp_path):
    """A change without its counterpart changes the results: so the test above can fail."""
    before = logits(found.path)
    for index, (_, fold) in enumerate(found.folds):
        if fold is None:
            continue
        onnx.save(scaled(found, onnx.load(found.path), only=index, half=True), tmp_path / "model.onnx")
        assert np.abs(logits(tmp_path / "model.onnx") - before).max() > 1e-2 * np.abs(before).max(), fold.name


def scaled(found: Found, model: onnx.ModelProto, only: int | None = None, half: bool = False) -> onnx.ModelProto:
    """The model with scales. only: scale one group. half: scale its layers, but not the place of the fold."""
    file = OnnxFile(found.path)
    rng = np.random.default_rng(7)
    nodes = {node.output[0]: node for node in model.graph.node}
    weights: dict[str, tuple[FloatSite, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    for index, (group, fold) in enumerate(found.folds):
        if fold is None:
            continue
        classes = np.arange(group.k) if fold.rows is None else np.unique(fold.rows, return_inverse=True)[1]
        scale = (2.0 ** rng.uniform(-4, 4, classes.max() + 1)).astype(np.float32)[classes]
        if only not in (None, index):
            continue
        for site in group.sites:
            _, weight = weights.get(site.name, (site, site.weight(file)))
            weights[site.name] = site, weight * scale
        if half:
            continue
        if fold.site is None:
            value = others.get(fold.gamma, file.constant(fold.gamma, ""))
            others[fold.gamma] = (value / scale.reshape(value.shape)).astype(value.dtype)
        else:
            factors = fold.factors(scale)
            _, weight = weights.get(fold.site.name, (fold.site, fold.site.weight(file)))
            weights[fold.site.name] = fold.site, weight / factors[:, None]
            if fold.site.bias:
                value = others.get(fold.site.bias, file.constant(fold.site.bias, ""))
                others[fold.site.bias] = (value / factors.reshape(value.shape)).astype(value.dtype)
    for site, weight in weights.values():
        dtype = float_type(file, nodes[site.node.output[0]])
        set_constant(model, nodes[site.node.output[0]], 1, (weight if site.transposed else weight.T).astype(dtype))
    for name, value in others.items():
        (node,) = [node for node in model.graph.node if name in node.input]
        set_constant(model, node, list(node.input).index(name), value)
    return model


def logits(path: Path) -> np.ndarray:
    """Logits of some tokens in two blocks, float32 [tokens, vocab]."""
    ids = np.random.default_rng(5).integers(0, 255, TOKENS).tolist()
    with Decoder(path, None, context=TOKENS) as decoder:
        return np.concatenate([decoder.forward(part, every=True) for part in (ids[:16], ids[16:])])
