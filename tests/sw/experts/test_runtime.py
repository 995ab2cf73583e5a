# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts on devices: the definition in sw.model.experts bit for bit, and no weights that nobody chose."""

import math

import numpy as np
import onnx
import pytest
from onnxruntime import OrtValue

from sw.checkpoints.adapter import Adapter, LowRank
from sw.common.errors import UserError
from sw.devices import open_device
from sw.graph.experts.match import find_mixtures
from sw.graph.file import OnnxFile
from sw.graph.float_linears import find_sites
from sw.graph.linears import find_linears
from sw.graph.match import match_decoder
from sw.model.experts import EXPERT, Routing, swiglu
from sw.model.parts import Mismatch
from sw.runtime import Decoder
from sw.runtime.experts import ExpertBatch, PlacedExpert, Scratch, choose
from sw.runtime.placement import place
from sw.runtime.usage import Usage
from tests.sw.fixtures.linears import expected, same_bits
from tests.sw.fixtures.random_decoder import CONFIG, write_random
from tests.sw.runtime.test_decoder import IDS, hardware, in_blocks, relative, whole_graph

ROUTING = Routing(count=5, used=2, size=48, dense=frozenset({0}))
# Experts with two planes of weights, where gate and up read the same activations and where they do not.
FORMATS = {"expert.1.down_proj": (8, 32), "expert.2.up_proj": (8, 32), "expert.3.gate_proj": (4, 64)}
CONTEXT = 32
SEED = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two blocks, of which the second has experts."""
    return write_random(tmp_path_factory.mktemp("experts"), FORMATS, routing=ROUTING)


@pytest.fixture
def mixture(model):
    """The layers of each expert, and a function that opens the mixture on a device."""
    linears = find_linears(model)
    part = find_mixtures(linears.file)[0]
    index = {product: number for number, (_, product) in enumerate(linears.tensors)}
    experts = [
        dict(zip(EXPERT, (linears[index[product]] for product in (expert.gate, expert.up, expert.down)), strict=True))
        for expert in part.experts
    ]

    def open_on(device):
        placed = [PlacedExpert(*(place(device, layers[name]) for name in EXPERT)) for layers in experts]
        batch = ExpertBatch(device, part, placed, Scratch(device))

        def run(x, weights):
            """y float32 [M, hidden], and the beats of the weights that were read."""
            usage, values = Usage(), {}
            values[part.input] = OrtValue.ortvalue_from_numpy(x[None])
            values[part.weights] = OrtValue.ortvalue_from_numpy(weights[None])
            batch.run(len(x), False, values, {}, usage)
            return values[part.output].numpy()[0].copy(), usage.beats

        return run, placed

    return experts, open_on


def defined(config, experts, x, weights) -> np.ndarray:
    """The definition in sw.model.experts, number by number."""
    rows = []
    for token, given in zip(x, weights, strict=True):
        total = np.zeros(len(token), np.float32)
        for layers, weight in zip(experts, given, strict=True):
            if weight == 0:
                continue
            gate, up = (expected(config, layers[name], token[None])[0] for name in ("gate_proj", "up_proj"))
            silu = np.array([g / (1 + math.exp(-g)) for g in map(float, gate)]).astype(np.float32)
            total = total + weight * expected(config, layers["down_proj"], (silu * up)[None])[0]
        rows.append(total)
    return np.array(rows)


def routed(tokens: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Activations, and weights of two experts for each token."""
    x = rng.standard_normal((tokens, CONFIG.hidden_size)).astype(np.float32)
    weights = np.zeros((tokens, ROUTING.count), np.float32)
    for row in weights:
        row[rng.permutation(ROUTING.count)[: ROUTING.used]] = rng.uniform(0.1, 1, ROUTING.used)
    return x, weights


@pytest.mark.parametrize("device", ["reference", pytest.param("rtl", marks=pytest.mark.simulator)])
def test_definition(mixture, device):
    """The result of a token is that of the definition, for any division of the tokens into calls."""
    experts, open_on = mixture
    x, weights = routed(8, np.random.default_rng(SEED))
    wanted = defined(hardware(), experts, x, weights)
    with open_device(device, hardware(), "hostile") as opened:
        run, _ = open_on(opened)
        for sizes in ((8,), (1, 7), (3, 1, 4)):
            ends = np.cumsum(sizes)
            parts = [run(x[end - size : end], weights[end - size : end])[0] for size, end in zip(sizes, ends)]
            assert same_bits(np.concatenate(parts), wanted), f"seed {SEED}, calls of {sizes} tokens"


def test_what_is_read(mixture):
    """Each chosen expert is read once in a call. All others may hold anything."""
    _, open_on = mixture
    x, weights = routed(8, np.random.default_rng(SEED))
    weights[:, [0, 3]] = 0
    with open_device("reference", hardware()) as device:
        run, placed = open_on(device)
        beats = [sum(layer.layout.beats for layer in expert) for expert in placed]
        wanted, read = run(x, weights)
        assert read == beats[1] + beats[2] + beats[4] < sum(beats)
        for expert in (0, 3):
            for layer in placed[expert]:
                device.write(layer.weights, np.full(layer.weights.size, 0xFF, np.uint8))
        assert same_bits(run(x, weights)[0], wanted)
        alone = weights[:1].copy()
        assert run(x[:1], alone)[1] == sum(beats[expert] for expert in np.flatnonzero(alone[0]))
        nobody, read = run(x, np.zeros_like(weights))
        assert read == 0 and not nobody.any()


def test_swiglu():
    """SiLU is that of float64, rounded once, for all magnitudes; a large negative gate gives a zero."""
    rng = np.random.default_rng(SEED)
    gate = (rng.standard_normal(5000) * np.exp(rng.uniform(-9, 4, 5000))).astype(np.float32)
    up = rng.standard_normal(5000).astype(np.float32)
    silu = np.array([g / (1 + math.exp(-g)) for g in map(float, gate)]).astype(np.float32)
    assert same_bits(swiglu(gate, up), silu * up), f"seed {SEED}"
    assert swiglu(np.array([-1e4, 1e4], np.float32), np.ones(2, np.float32)).tolist() == [0, 1e4]


def test_router_stays_float(tmp_path):
    """sw.quantize leaves out a router, however many experts it has."""
    path = write_random(tmp_path, routing=Routing(count=16, used=2, size=32), head="float")
    assert [site.name for site in find_sites(OnnxFile(path))] == ["/lm_head/FusedMatMul"]


def test_order():
    """Experts are in ascending order, with the rows of their tokens."""
    weights = np.array([[0, 0.5, 0.5], [0.25, 0, 0.75], [0, 1, 0]], np.float32)
    found = [(part.expert, part.tokens.tolist(), part.first) for part in choose(weights)]
    assert found == [(0, [1], 0), (1, [0, 2], 1), (2, [0, 1], 3)]


def test_decoder(model):
    """The whole model: as onnxruntime, which computes all experts; and a token reads two of five."""
    with open_device("reference", hardware()) as device:
        decoder = Decoder(model, device, context=CONTEXT)
        assert relative(in_blocks(decoder), whole_graph(model)) < 1e-3
        before = decoder.usage.copy()
        decoder.forward(IDS[:1])
        read = decoder.usage.beats - before.beats
        linears = find_linears(model)
        beats = {layer.output_name: place(device, layer).layout.beats for layer in linears}
    part = find_mixtures(linears.file)[0]
    of_each = [sum(beats[product] for product in (e.gate, e.up, e.down)) for e in part.experts]
    rest = sum(beats.values()) - sum(of_each)
    pairs = {rest + a + b for i, a in enumerate(of_each) for b in of_each[i + 1 :]}
    assert read in pairs and read < sum(beats.values())


@pytest.mark.simulator
def test_decoder_in_rtl(model):
    """The simulated hardware gives the reference's logits bit for bit, and reads as much."""
    logits, usages = [], []
    for name in ("reference", "rtl"):
        with open_device(name, hardware(), "hostile") as device:
            decoder = Decoder(model, device, context=CONTEXT)
            logits.append(in_blocks(decoder))
            usages.append(decoder.usage)
    assert same_bits(logits[0], logits[1])
    assert usages[0].beats == usages[1].beats <= usages[1].cycles


def test_adapters(model, tmp_path):
    """An adapter of attention is used beside experts; one of an expert is refused, because nothing would add it."""
    rng = np.random.default_rng(SEED)

    def adapter(module: str, n: int) -> Adapter:
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, CONFIG.hidden_size), (n, 4)))
        return Adapter(tmp_path, {f"model.layers.1.{module}": LowRank(a, b, 1.0)}, "digest")

    with open_device("reference", hardware()) as device:
        decoder = Decoder(model, device, context=CONTEXT, adapters={"one": adapter("self_attn.q_proj", 64)})
        plain = decoder.forward(IDS[:4])
        decoder.adapter = "one"
        assert relative(decoder.forward(IDS[:4]), plain) > 1e-3
        with pytest.raises(UserError, match=r"experts\.0\.up_proj, which is no quantized layer"):
            Decoder(model, device, context=CONTEXT, adapters={"one": adapter("mlp.experts.0.up_proj", 48)})


def test_programs_are_refused(model):
    found = match_decoder(OnnxFile(model))
    assert isinstance(found, Mismatch)
    assert found.part == "layers.1.mlp" and found.problem == "a mixture of experts, whose router chooses on the host"


def swap_order(nodes: list[onnx.NodeProto]) -> None:
    """The experts are added in another order."""
    adds = [node for node in nodes if "/experts." in node.name and node.op_type == "Add"]
    adds[0].input[1], adds[1].input[1] = adds[1].input[1], adds[0].input[1]
    rest = [node for node in nodes if node not in adds]
    place = max(index for index, node in enumerate(rest) if "/experts." in node.name) + 1
    nodes[:] = [*rest[:place], *adds, *rest[place:]]


def other_input(nodes: list[onnx.NodeProto], name: str) -> None:
    """Layers of an expert read another tensor than the other layers."""
    for node in nodes:
        if node.op_type == "MatMulNBits" and name in node.name:
            node.input[0] = "/model/layers.1/input_layernorm/output_0"


def other_activation(nodes: list[onnx.NodeProto]) -> None:
    """SiLU of another tensor than gate."""
    activations = [node for node in nodes if "/experts.1/act_fn" in node.name and node.op_type == "Sigmoid"]
    activations[0].op_type = "Tanh"


CHANGES = {
    "order": swap_order,
    "input of up": lambda nodes: other_input(nodes, "/experts.1/up_proj"),
    "input of an expert": lambda nodes: (other_input(nodes, "/experts.1/up"), other_input(nodes, "/experts.1/gate")),
    "activation": other_activation,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_forms_are_no_mixtures(change, model, tmp_path):
    """onnxruntime computes their sum, and the device all layers of all experts."""
    path = tmp_path / "model.onnx"
    file = onnx.load(model)
    nodes = list(file.graph.node)
    change(nodes)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del file.graph.node[:]
    file.graph.node.extend(copies)
    onnx.save(file, path)
    assert len(find_mixtures(OnnxFile(model))) == 1
    assert not find_mixtures(OnnxFile(path))
    with open_device("reference", hardware()) as device:
        rows = in_blocks(Decoder(path, device, context=CONTEXT))
        assert relative(rows, whole_graph(path)) < 1e-3


@pytest.mark.parametrize("operator", ["Split", "ScatterElements", "TopK", "ConstantOfShape", "Sigmoid", "Softmax"])
def test_damaged_nodes(operator, model, tmp_path):
    """Nodes without inputs, or with one output, are no mixture and no exception."""
    for count in (0, 1):
        file = onnx.load(model)
        for node in file.graph.node:
            if node.op_type == operator:
                del node.input[count:]
                del node.output[1:]
        onnx.save(file, tmp_path / "model.onnx")
        find_mixtures(OnnxFile(tmp_path / "model.onnx"))
