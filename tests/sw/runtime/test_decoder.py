# SPDX-License-Identifier: Apache-2.0
"""Hybrid execution: a graph that is cut at its layers gives the tokens of the whole graph, for every exporter."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from hw.spec.config import AcceleratorConfig
from sw.common.errors import UserError
from sw.devices import make_config, open_device
from sw.devices.base import DeviceError
from sw.devices.reference import ReferenceDevice
from sw.export.gguf import export_gguf
from sw.graph.file import OnnxFile
from sw.ort.cache import KvCache, pair_names
from sw.ort.feeds import build_feeds
from sw.ort.session import exact_session
from sw.runtime import BaseDecoder, Decoder
from tests.sw.export.test_gguf import write_gguf
from tests.sw.fixtures.linears import same_bits

DATA = Path(__file__).parents[1] / "fixtures" / "data"
# One for each difference of graphs: cache in place or not, biases inside or outside of the nodes, shared tables.
FIXTURES = sorted(path.relative_to(DATA).with_suffix("").as_posix() for path in DATA.rglob("*.onnx"))
IDS = [int(value) for value in np.random.default_rng(1).integers(0, 256, 24)]
CONTEXT = 32


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    """A Llama of two blocks with fixed zero points, an odd vocabulary, and an int8 head."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "model.gguf")
    return export_gguf(folder / "model.gguf", folder / "onnx")


def hardware(zero_point="fixed", **changes) -> AcceleratorConfig:
    return make_config(tile=8, max_tokens=8, max_k=1024, zero_point=zero_point, **changes)


def whole_graph(path: Path, ids=IDS) -> np.ndarray:
    """Logits of all tokens in one call of the unchanged model: float32 [M, vocab]."""
    file = OnnxFile(path)
    session = exact_session(file, file.model)
    logits = session.run([session.get_outputs()[0].name], build_feeds(file, session, ids))[0]
    return np.asarray(logits, np.float32)[0]


def in_blocks(decoder: BaseDecoder, sizes=(8, 1, 1, 5, 8, 1), every=True) -> np.ndarray:
    """Logits of the same tokens, computed in blocks."""
    parts, start = [], 0
    for size in sizes:
        parts.append(decoder.forward(IDS[start : start + size], every))
        start += size
    return np.concatenate(parts)


def relative(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(values - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture(name):
    """Every exporter's graph gives the whole graph's logits without a device, and nearly the same with one."""
    path = DATA / f"{name}.onnx"
    expected = whole_graph(path)
    rough = "float16" in name
    with Decoder(path, None, context=CONTEXT) as decoder:
        assert relative(in_blocks(decoder), expected) < (1e-2 if rough else 2e-5)
    if "unquantized" in name:
        return
    with open_device("reference", hardware("integer")) as device:
        decoder = Decoder(path, device, context=CONTEXT)
        assert relative(in_blocks(decoder), expected) < (1e-2 if rough else 1e-3)
        assert decoder.usage.beats > 0


def test_logits(gguf_model):
    """All logits and the last alone are the same, also after a reset; the head is not computed for other tokens."""
    expected = whole_graph(gguf_model)
    with open_device("reference", hardware()) as device:
        decoder = Decoder(gguf_model, device, context=CONTEXT)
        assert decoder.block == 8
        logits = in_blocks(decoder)
        assert logits.shape == expected.shape and logits.dtype == np.float32
        assert relative(logits, expected) < 1e-3
        assert decoder.length == decoder.usage.tokens == 24
        decoder.reset()
        last = in_blocks(decoder, every=False)
        ends = np.cumsum([8, 1, 1, 5, 8, 1]) - 1
        assert np.array_equal(last.view(np.uint32), logits[ends].view(np.uint32))


def test_greedy(gguf_model):
    with Decoder(gguf_model, None, context=CONTEXT) as decoder:
        wanted = in_blocks(decoder, (8, 1), every=False).argmax(axis=1).tolist()
        decoder.reset()
        assert [decoder.greedy(IDS[:8]), decoder.greedy(IDS[8:9])] == wanted


def test_prefill(gguf_model, monkeypatch):
    """prefill leaves the same cache as forward, without computing the head and most of the last block."""
    with open_device("reference", hardware()) as device:
        decoder, jobs = Decoder(gguf_model, device, context=CONTEXT), []
        decoder.forward(IDS[:8])
        expected = decoder.forward(IDS[8:10])
        submit = device.submit
        monkeypatch.setattr(device, "submit", lambda batch: jobs.extend(batch.jobs) or submit(batch))
        for _ in range(2):
            decoder.reset()
            jobs.clear()
            decoder.prefill(IDS[:8])
            assert decoder.length == 8
            assert [job.name.split("/")[2:4] for job in jobs[-3:]] == [["layers.1", "self_attn"]] * 3
            assert len(jobs) == 7 + 3
            assert np.array_equal(decoder.forward(IDS[8:10]), expected)
    for name in ("torch_qwen2_opset23", "optimum_qwen2_float16"):
        decoder = Decoder(DATA / f"{name}.onnx", None, context=CONTEXT)
        decoder.forward(IDS[:8])
        expected = decoder.forward(IDS[8:10])
        decoder.reset()
        decoder.prefill(IDS[:8])
        assert np.array_equal(decoder.forward(IDS[8:10]), expected)


@pytest.mark.simulator
def test_devices_agree(gguf_model):
    """The simulated RTL gives the reference's logits bit for bit, and counts its cycles."""
    logits, usages = [], []
    for name in ("reference", "rtl"):
        with open_device(name, hardware(), memory="hostile") as device:
            decoder = Decoder(gguf_model, device, context=CONTEXT)
            logits.append(in_blocks(decoder))
            usages.append(decoder.usage)
    assert np.array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))
    assert usages[0].beats == usages[1].beats > 0
    assert usages[0].cycles == 0 < usages[1].beats <= usages[1].cycles
    for usage in usages:
        assert min(usage.device, usage.onnxruntime, usage.conversion, usage.driver) > 0
        assert usage.host == usage.onnxruntime + usage.conversion + usage.driver


def test_usage_of_one_call(gguf_model):
    with open_device("reference", hardware()) as device:
        decoder = Decoder(gguf_model, device, context=CONTEXT)
        decoder.forward(IDS[:3])
        before = decoder.usage.copy()
        decoder.forward(IDS[3:7])
        after = decoder.usage.since(before)
        assert (before.tokens, after.tokens) == (3, 4)
        # The number of tokens does not change the weight stream.
        assert after.beats == before.beats


def test_layers_that_share_activations_are_one_batch(gguf_model, monkeypatch):
    """q, k, v share one fetch, and gate, up another. A token submits four batches per block and one for the head."""
    with open_device("reference", hardware()) as device:
        decoder, batches = Decoder(gguf_model, device, context=CONTEXT), []
        submit = device.submit
        monkeypatch.setattr(device, "submit", lambda batch: batches.append(batch) or submit(batch))
        for _ in range(2):
            decoder.forward(IDS[:1])
    assert batches[:9] == batches[9:] and len(batches) == 18
    assert [[job.reuse for job in batch.jobs] for batch in batches[:4]] == [
        [False, True, True],
        [False],
        [False, True],
        [False],
    ]


def test_progress(gguf_model):
    seen = []
    with open_device("reference", hardware()) as device:
        Decoder(gguf_model, device, context=CONTEXT, progress=lambda *values: seen.append(values))
    assert [done for done, _, _ in seen] == list(range(15))
    assert {total for _, total, _ in seen} == {15}
    assert seen[0][2] == "/model/layers.0/self_attn/q_proj/MatMulNBits"


def test_cache_in_place(gguf_model):
    """GroupQueryAttention's cache never moves; other attention returns a new cache, which is passed on."""
    file = OnnxFile(gguf_model)
    cache = KvCache(file, 10)
    assert cache.in_place and not cache.feed()
    assert cache.inputs[:2] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert cache.outputs[:2] == ["present.0.key", "present.0.value"]
    assert {value.shape()[2] for value in cache.fixed.values()} == {10}
    # Another node reads it.
    file.graph.node.append(onnx.helper.make_node("Identity", ["past_key_values.0.key"], ["copy"]))
    file.consumers["past_key_values.0.key"].append(file.graph.node[-1])
    assert not KvCache(file, 10).in_place


def check_failure_keeps_the_cache(decoder: BaseDecoder, device: ReferenceDevice, monkeypatch):
    """The device fails in the middle of a call; then the same tokens can be computed again."""
    decoder.forward(IDS[:8])
    wanted = decoder.forward(IDS[8:10])
    decoder.reset()
    decoder.forward(IDS[:8])
    compute, calls = device._compute, []

    def fails(job):
        calls.append(job)
        if len(calls) == 7:
            raise DeviceError("no answer")
        compute(job)

    monkeypatch.setattr(device, "_compute", fails)
    with pytest.raises(DeviceError, match="no answer"):
        decoder.forward(IDS[8:10])
    assert decoder.length == 8
    found = decoder.forward(IDS[8:10])
    assert same_bits(found, wanted)
    assert np.array_equal(found, wanted)


def test_failures_keep_the_cache(gguf_model, monkeypatch):
    """After a failure the same tokens can be computed again."""
    with ReferenceDevice(hardware()) as device:
        check_failure_keeps_the_cache(Decoder(gguf_model, device, context=CONTEXT), device, monkeypatch)


def test_activations_that_are_not_finite(gguf_model, tmp_path):
    """They are refused, and the error names the layer that reads them."""
    model = onnx.load(gguf_model)
    norm = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("1.input_layernorm.weight"))
    norm.CopyFrom(onnx.numpy_helper.from_array(np.full(64, np.nan, np.float32), norm.name))
    onnx.save(model, tmp_path / "model.onnx")
    with open_device("reference", hardware()) as device:
        decoder = Decoder(tmp_path / "model.onnx", device, context=CONTEXT)
        with pytest.raises(DeviceError, match=r"^layer /model/layers.1/self_attn/\w_proj/MatMulNBits: .* finite"):
            decoder.forward(IDS[:1])


def test_limits(gguf_model):
    with pytest.raises(UserError, match=r"^the context is 1 token or more, not 0$"):
        Decoder(gguf_model, None, context=0)
    with open_device("reference", hardware()) as device:
        decoder = Decoder(gguf_model, device, context=10)
        with pytest.raises(UserError, match=r"^a call takes 1 to 8 tokens, not 9$"):
            decoder.forward(IDS[:9])
        with pytest.raises(UserError, match=r"^a call takes 1 to 8 tokens, not 0$"):
            decoder.forward([])
        decoder.forward(IDS[:8])
        with pytest.raises(UserError, match=r"^the context holds 10 tokens, and these would be 11$"):
            decoder.forward(IDS[8:11])
        assert decoder.forward(IDS[8:10]).shape[0] == 1


def test_layer_that_does_not_fit(gguf_model):
    with (
        open_device("reference", hardware("integer")) as device,
        pytest.raises(UserError, match=r'layer /model/layers.0/self_attn/q_proj/MatMulNBits: .*zero_point="fixed"'),
    ):
        Decoder(gguf_model, device, context=10)


def changed(path, tmp_path, change) -> Path:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def add_input(graph, name, kind=onnx.TensorProto.FLOAT, shape=(1,)):
    graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: add_input(graph, "pixels"), r"input pixels \(tensor\(float\)\) is none that a decoder has"),
        (
            lambda graph: add_input(graph, "past_key_values.2.key", shape=(1, 2, 0, 16)),
            r"5 inputs are a KV cache, and 4 outputs",
        ),
        (lambda graph: setattr(graph.input[0], "name", "ids"), "is no decoder: it has no input input_ids"),
    ],
    ids=["foreign input", "unpaired cache", "no tokens"],
)
def test_graphs_that_are_no_decoder(gguf_model, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Decoder(changed(gguf_model, tmp_path, change), None, context=8)


def cache_graph(nodes, inputs, outputs) -> OnnxFile:
    """A file with the parts of a graph that the cache reads."""
    make = onnx.helper.make_tensor_value_info
    file = OnnxFile.__new__(OnnxFile)
    file.path, file.graph = Path("m"), onnx.GraphProto()
    file.graph.input.extend(make(name, 1, [1, 2, "p", 8]) for name in inputs)
    file.graph.output.extend([make("logits", 1, [1, "s", 9]), *(make(name, 1, [1, 2, "t", 8]) for name in outputs)])
    file.graph.node.extend(nodes)
    file.consumers = {}
    for node in file.graph.node:
        for name in node.input:
            file.consumers.setdefault(name, []).append(node)
    return file


def test_cache_pairs():
    """Inputs and outputs are paired by the node that appends, or else by their order."""
    make = onnx.helper.make_node
    nodes = [make("Concat", ["k0", "new"], ["b"], axis=2), make("Concat", ["v0", "new"], ["a"], axis=2)]
    assert pair_names(cache_graph(nodes, ["k0", "v0"], ["a", "b"])) == [("k0", "b"), ("v0", "a")]
    nodes = [make("Attention", ["q", "k", "v", "", "k0", "v0"], ["y", "a", "b"])]
    assert pair_names(cache_graph(nodes, ["k0", "v0"], ["b", "a"])) == [("k0", "a"), ("v0", "b")]
    nodes = [make("ScatterND", ["k0", "at", "new"], ["b"])]
    assert pair_names(cache_graph(nodes, ["k0", "v0"], ["b", "a"])) == [("k0", "b"), ("v0", "a")]
    with pytest.raises(UserError, match="2 inputs are a KV cache, and 1 outputs"):
        pair_names(cache_graph([], ["k0", "v0"], ["a"]))


def test_sessions_do_not_spin():
    """Threads of onnxruntime that spin between two calls would take the simulation's processor."""
    file = OnnxFile(DATA / "genai_qwen2_symmetric.onnx")
    session = exact_session(file, file.model)
    assert isinstance(session, onnxruntime.InferenceSession)
    options = session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
