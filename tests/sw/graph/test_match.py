# SPDX-License-Identifier: Apache-2.0
"""The matcher: the found parts compute the same as the graph, and a mismatch names the node that does not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.huggingface import decoder_config
from sw.checkpoints.packed.formats import layer_format
from sw.checkpoints.settings import read_settings
from sw.common.errors import UserError
from sw.export.floats import float_model
from sw.export.gguf import export_gguf, gguf_source
from sw.export.huggingface import checkpoint_source, export_checkpoint
from sw.graph.file import OnnxFile
from sw.graph.linears import read_layer
from sw.graph.match import match_decoder
from sw.model.decoder import PROJECTIONS, DecoderShape
from sw.model.linear import QuantizedLinear
from sw.model.parts import Attention, Decoder, Mismatch
from sw.synthetic import write_float
from tests.sw.fixtures.builder_graphs import Form, builder_graph
from tests.sw.fixtures.checkpoints import LLAMA, QWEN2, awq_config, make_checkpoint
from tests.sw.fixtures.float_twins import DATA, logits
from tests.sw.fixtures.numpy_decoder import NumpyDecoder

IDS = [3 + 7 * i for i in range(12)]
"""The token ids with which `logits` runs a graph."""
GENAI = ["genai_qwen2_symmetric", "genai_qwen2_asymmetric", "genai_qwen2_qdq", "genai_qwen2_tied"]
NAMED = ["optimum_qwen2", "optimum_qwen2_float16", "optimum_qwen2_unquantized"]
NAMELESS = ["torch_llama_opset20", "torch_qwen2_opset18", "torch_qwen2_opset21", "torch_qwen2_opset23"]
NAMELESS += ["transformers_qwen2"]


def matched(path: Path) -> Decoder:
    found = match_decoder(OnnxFile(path))
    assert isinstance(found, Decoder), str(found)
    return found


def reason(path: Path) -> str:
    found = match_decoder(OnnxFile(path))
    assert isinstance(found, Mismatch)
    return str(found)


def computes_the_same(path: Path, table: np.ndarray) -> Decoder:
    """The parts alone give onnxruntime's logits."""
    file, decoder = OnnxFile(path), matched(path)
    assert decoder.mismatches == []
    expected = logits(path).reshape(len(IDS), -1)
    found = NumpyDecoder(file, decoder).logits(table, IDS)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    return decoder


FORMS = {
    "apart": Form(),
    "packed": Form(packed=True),
    "packed with biases": Form(packed=True, biased=True),
    "biases": Form(biased=True),
    "gate and up joined": Form(joined=True),
    "rotary apart": Form(rotary="apart", biased=True),
    "no rotary": Form(rotary="none"),
    "head norms": Form(rotary="apart", head_norms="apart"),
    "head norms before the attention": Form(head_norms="apart"),
    "neighbours": Form(attributes=(("rotary_interleaved", 1),)),
    "neighbours apart": Form(rotary="apart", attributes=(("rotary_interleaved", 1),)),
    "window": Form(packed=True, attributes=(("local_window_size", 5),)),
    "softcap": Form(attributes=(("softcap", 0.25),)),
    "scale": Form(attributes=(("scale", 0.5),)),
    "scale by default": Form(attributes=(("scale", 0.0),)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_the_builder(form, tmp_path):
    path = builder_graph(tmp_path / "model.onnx", form)
    file = OnnxFile(path)
    decoder = computes_the_same(path, file.constant("model.embed_tokens.weight", ""))
    block = decoder.blocks[1]
    assert (block.q_proj.product == block.k_proj.product == block.v_proj.product) == form.packed
    assert (block.gate_proj.product == block.up_proj.product) == form.joined
    assert (block.q_norm is not None) == (form.head_norms == "apart")
    assert bool(block.q_proj.bias) == form.biased
    assert block.rotary is None or block.rotary.position_ids == ("position_ids" if form.rotary == "apart" else "")
    assert isinstance(block.attention, Attention)
    assert block.attention.past_value == "past_key_values.1.value"
    assert block.attention.present_key == "present.1.key"
    assert (block.attention.seqlens_k, block.attention.total_sequence_length) == ("seqlens_k", "total_sequence_length")


def test_norms_inside_the_attention(tmp_path):
    """GroupQueryAttention of onnxruntime 1.31 has inputs for these norms, but no kernel on the CPU."""
    decoder = matched(builder_graph(tmp_path / "model.onnx", Form(head_norms="attention")))
    norms = [(block.q_norm, block.k_norm) for block in decoder.blocks]
    assert [q.weight for q, _ in norms if q] == [f"/model/layers.{i}/attn.q_norm.weight" for i in range(2)]
    assert [k.weight for _, k in norms if k] == [f"/model/layers.{i}/attn.k_norm.weight" for i in range(2)]


@pytest.mark.parametrize("name", GENAI[:3])
def test_builder(name):
    file = OnnxFile(DATA / f"{name}.onnx")
    decoder = computes_the_same(file.path, file.constant("model.embed_tokens.weight", ""))
    assert decoder.shape == DecoderShape(128, 352, 2, 4, 2, 32, 256, float(np.float32(1e-6)))
    rows = [(part.first_row, part.n) for part in list(decoder.blocks[0].projections.values())[:3]]
    assert rows == [(0, 128), (128, 64), (192, 64)]


def test_tied_builder():
    decoder = matched(DATA / "genai_qwen2_tied.onnx")
    assert decoder.embedding.operator == "GatherBlockQuantized"
    assert decoder.shape == matched(DATA / "genai_qwen2_symmetric.onnx").shape


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize("export", ["awq", "float"])
def test_our_exports(export, family, tied, tmp_path):
    """Quantized and float exports compute the same as their parts, and have the shape in config.json."""
    config = awq_config(family, tie_word_embeddings=tied)
    if export == "awq":
        make_checkpoint(tmp_path / "in", config)
        path = export_checkpoint(tmp_path / "in", tmp_path / "out", lm_head="float")
    else:
        write_float(tmp_path / "in", config, seed=5)
        path = float_model(tmp_path / "in", tmp_path / "out")
    file = OnnxFile(path)
    decoder = computes_the_same(path, file.constant("model.embed_tokens.weight", ""))
    expected = decoder_config(read_settings(tmp_path / "in" / "config.json"))
    assert decoder.shape is not None
    for name, value in vars(decoder.shape).items():
        assert value == pytest.approx(getattr(expected, name), rel=1e-6), name


def test_one_model_of_two_checkpoints(tmp_path):
    """GGUF and AutoAWQ files of one model become a DecoderSource each, with equal parts."""
    folder = DATA / "same_weights"
    awq = matched(export_checkpoint(folder / "autoawq", tmp_path / "a"))
    gguf = matched(export_gguf(folder / "model.gguf", tmp_path / "g"))
    assert awq == gguf
    assert gguf.shape == matched(folder / "genai" / "model.onnx").shape
    assert gguf.blocks[0] != gguf.blocks[1]


@pytest.mark.parametrize("kind", ["autoawq", "gguf", "genai"])
def test_weights_are_those_of_the_checkpoint(kind, tmp_path):
    """A matched block has the weights of the DecoderSource from which its graph was made, bit for bit.

    The builder of onnxruntime-genai packed q, k and v, and read the same weights.
    """
    folder = DATA / "same_weights"
    settings = read_settings(folder / "autoawq" / "config.json")
    source = checkpoint_source(folder / "autoawq", settings, layer_format(settings))
    if kind == "gguf":
        source = gguf_source(GgufFile(folder / "model.gguf"))
        path = export_gguf(folder / "model.gguf", tmp_path / "out")
    else:
        path = folder / "genai" / "model.onnx"
        path = export_checkpoint(folder / "autoawq", tmp_path / "out") if kind == "autoawq" else path
    file, decoder = OnnxFile(path), matched(path)
    layers = list(source.layers)
    assert len(layers) == len(decoder.blocks) == 2
    for expected, block in zip(layers, decoder.blocks):
        found = read_layer(file, block)
        assert np.array_equal(found.input_norm, expected.input_norm)
        assert np.array_equal(found.post_attention_norm, expected.post_attention_norm)
        for name in PROJECTIONS:
            a, b = getattr(found, name), getattr(expected, name)
            assert isinstance(a, QuantizedLinear)
            assert isinstance(b, QuantizedLinear)
            assert (a.group_size, a.bits) == (b.group_size, b.bits)
            assert np.array_equal(a.q, b.q), name
            assert np.array_equal(a.scales, b.scales)
            assert np.array_equal(a.zero_points, b.zero_points)
            assert (a.bias is None) == (b.bias is None) == (name not in ("q_proj", "k_proj", "v_proj"))
            assert a.bias is None or np.array_equal(a.bias, np.asarray(b.bias))


def test_a_real_model(smollm2):
    decoder = matched(smollm2)
    assert decoder.shape == DecoderShape(576, 1536, 30, 9, 3, 64, 49152, float(np.float32(1e-5)))
    for index, block in enumerate(decoder.blocks):
        for name, layer in block.projections.items():
            assert layer.name == f"/model/layers.{index}/{name.replace('.', '/')}/MatMulNBits"
    assert decoder.head.name == "/lm_head/MatMulNBits"


@pytest.mark.parametrize("name", NAMED)
def test_parts_are_what_names_say(name):
    """Attention of other operators: all parts around it are matched, and the reason names the attention."""
    decoder = matched(DATA / f"{name}.onnx")
    for index, block in enumerate(decoder.blocks):
        for module, layer in block.projections.items():
            assert layer.name.startswith(f"/model/layers.{index}/{module.replace('.', '/')}/MatMul")
        assert block.post_attention_norm.weight == f"model.layers.{index}.post_attention_layernorm.weight"
    assert decoder.final_norm.weight == "model.norm.weight"
    assert decoder.shape is None
    expected = "layers.1.self_attn: Softmax /model/layers.1/self_attn/Softmax: attention by operators that are not "
    assert str(decoder.mismatches[1]) == expected + "GroupQueryAttention"


@pytest.mark.parametrize("name", NAMELESS)
def test_parts_without_names(name):
    """torch.onnx keeps the order of the layers in the code, and the names of biases and norms."""
    decoder = matched(DATA / f"{name}.onnx")
    made = [output for node in onnx.load(DATA / f"{name}.onnx").graph.node for output in node.output]
    places = [made.index(layer.product) for block in decoder.blocks for layer in block.projections.values()]
    assert places == sorted(places)
    for index, block in enumerate(decoder.blocks):
        assert block.input_norm.weight.endswith(f"model.layers.{index}.input_layernorm.weight")
        for module, layer in list(block.projections.items())[:3]:
            assert layer.bias == "" if "llama" in name else layer.bias.endswith(f"layers.{index}.{module}.bias")
    operator = "Attention" if "opset23" in name else "Softmax"
    assert [item.operator for item in decoder.mismatches] == [operator] * 2


def test_joined_layers_need_one_attention_node():
    said = reason(DATA / "transformers_llama_fused.onnx")
    assert said.startswith("layers.0.self_attn.q_proj: Split node_Split_763: 1 linear layers read the norm's ")


Nodes = Callable[[str], onnx.NodeProto]


def changed(change: Callable[[onnx.GraphProto, Nodes], None], path: Path, form: Form = FORMS["apart"]) -> Path:
    """A builder's graph after `change`, a function that is called with the graph and its nodes by name."""
    model = onnx.load(builder_graph(path, form))
    nodes = {node.name: node for node in model.graph.node}
    change(model.graph, lambda name: nodes[f"/model/layers.1/{name}"])
    onnx.save(model, path)
    return path


def _remove(name: str):
    return lambda graph, node: graph.node.remove(node(name))


def _between(operator: str, name: str, place: int):
    """Inserts another operator before an input of a node."""

    def change(graph: onnx.GraphProto, node: Nodes) -> None:
        target = node(name)
        made = onnx.helper.make_node(operator, [target.input[place]], ["odd"], name="odd_one")
        target.input[place] = "odd"
        graph.node.insert(list(graph.node).index(target), made)

    return change


def _instead(name: str, place: int, tensor: str):
    def change(graph: onnx.GraphProto, node: Nodes) -> None:
        node(name).input[place] = tensor

    return change


def _attribute(**values):
    def change(graph: onnx.GraphProto, node: Nodes) -> None:
        attention = node("attn/GroupQueryAttention")
        kept = [item for item in attention.attribute if item.name not in values]
        del attention.attribute[:]
        attention.attribute.extend([*kept, *(onnx.helper.make_attribute(*item) for item in values.items())])

    return change


POST = "post_attention_layernorm/SkipSimplifiedLayerNormalization"
INPUT = "input_layernorm/SkipSimplifiedLayerNormalization"
ATTENTION = "GroupQueryAttention /model/layers.1/attn/GroupQueryAttention: "
L = "/model/layers.1"
REASONS = {
    "no o_proj": (_remove("attn/o_proj/MatMul/MatMul"), f"o_proj: no node makes the tensor {L}/attn/o_proj/"),
    "no attention": (
        _remove("attn/GroupQueryAttention"),
        f"self_attn: no node makes the tensor {L}/attn/GroupQueryAttention/output_0",
    ),
    "no sigmoid": (_remove("mlp/act_fn/Sigmoid"), f"mlp: Mul {L}/mlp/act_fn/Mul/Mul: it is not x * sigmoid(x)"),
    "no up": (_remove("mlp/up_proj/MatMul/MatMul"), f"up_proj: no node makes the tensor {L}/mlp/up_proj"),
    "no norm": (
        _remove(POST),
        "layers.1.self_attn: SkipSimplifiedLayerNormalization /model/layers.2/final_norm_layernorm/",
    ),
    "before a residual": (_between("Relu", POST, 1), "layers.1.self_attn.o_proj: Relu odd_one: where the output of"),
    "before keys": (_between("Relu", "attn/GroupQueryAttention", 1), "self_attn.k_proj: Relu odd_one: where the"),
    "before values": (_between("Relu", "attn/GroupQueryAttention", 2), "self_attn.v_proj: Relu odd_one: where the"),
    "before down": (
        _between("Relu", "mlp/down_proj/MatMul/MatMul", 0),
        "layers.1.mlp: Relu odd_one: where the product of",
    ),
    "before up": (_between("Relu", "mlp/Mul", 1), "layers.1.mlp.up_proj: Relu odd_one: where the output of"),
    "before gate": (_between("Neg", "mlp/Mul", 0), "layers.1.mlp: Neg odd_one: it is not x * sigmoid(x) of gate"),
    "before the norm": (
        _between("Neg", "attn/q_proj/MatMul/MatMul", 0),
        f"MatMul {L}/attn/q_proj/MatMul/MatMul: it reads odd",
    ),
    "residual of the norm": (
        _instead(POST, 0, f"{L}/input_layernorm/output_0"),
        f"it adds {L}/input_layernorm/output_0 and {L}/attn/o_proj/MatMul/output_0, not to the residual {L}/input",
    ),
    "residual of a block before": (
        _instead(INPUT, 0, "/model/layers.0/input_layernorm/output_3"),
        "layers.0.mlp: SkipSimplifiedLayerNormalization /model/layers.1/input_layernorm",
    ),
    "gate and up swapped": (
        _instead("mlp/act_fn/Sigmoid", 0, f"{L}/mlp/up_proj/MatMul/output_0"),
        f"layers.1.mlp: Mul {L}/mlp/act_fn/Mul/Mul: it is not x * sigmoid(x) of gate",
    ),
    "another activation": (
        lambda graph, node: setattr(node("mlp/act_fn/Sigmoid"), "op_type", "Tanh"),
        f"layers.1.mlp: Mul {L}/mlp/act_fn/Mul/Mul: it is not x * sigmoid(x) of gate",
    ),
    "q of another tensor": (
        _instead("attn/q_proj/MatMul/MatMul", 0, f"{L}/input_layernorm/output_3"),
        f"layers.1.self_attn.q_proj: MatMul {L}/attn/q_proj/MatMul/MatMul: it reads {L}/input_layernorm/output_3",
    ),
    "another reader": (
        lambda graph, node: graph.node.append(onnx.helper.make_node("Relu", [f"{L}/input_layernorm/output_0"], ["o"])),
        f"layers.1.self_attn: Relu o: it reads the norm's {L}/input_layernorm/output_0 too",
    ),
    "heads": (_attribute(kv_num_heads=3), f"layers.1.self_attn: {ATTENTION}4 heads are not a multiple of 3 key-value"),
    "sizes": (
        _attribute(kv_num_heads=4),
        f"layers.1.self_attn: {ATTENTION}4 and 4 heads do not divide q, k, v and o of",
    ),
    "embedding": (
        lambda graph, node: setattr(next(n for n in graph.node if "embed" in n.name), "op_type", "Relu"),
        "embed_tokens: 0 nodes choose rows of a constant table by input_ids, not one",
    ),
    "head": (
        lambda graph, node: graph.node[-1].input.__setitem__(1, f"{L}/input_layernorm/output_0"),
        "lm_head: MatMul /lm_head/MatMul/MatMul: where the output of a linear layer is expected",
    ),
}


@pytest.mark.parametrize(("change", "expected"), REASONS.values(), ids=REASONS)
def test_reasons(change, expected, tmp_path):
    assert expected in reason(changed(change, tmp_path / "model.onnx"))


UNUSUAL = {
    "before o_proj": (
        _between("Tanh", "attn/o_proj/MatMul/MatMul", 0),
        "Tanh odd_one: where the output of GroupQueryAttention is expected",
    ),
    "sinks": (_attribute(smooth_softmax=1), ATTENTION + "smooth_softmax is 1"),
    "all positions": (_attribute(causal=0), ATTENTION + "causal is 0"),
    "scores": (_attribute(qk_output=1), ATTENTION + "qk_output is 1"),
    "a bias of scores": (
        lambda graph, node: node("attn/GroupQueryAttention").input.extend(["", "mask"]),
        ATTENTION + "it has an input attention_bias",
    ),
    "no cache": (
        lambda graph, node: node("attn/GroupQueryAttention").input.__setitem__(3, ""),
        ATTENTION + "it has no KV cache",
    ),
}


@pytest.mark.parametrize(("change", "expected"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_attention(change, expected, tmp_path):
    """The layers around the attention are matched, and one line gives the reason."""
    decoder = matched(changed(change, tmp_path / "model.onnx"))
    assert [str(item) for item in decoder.mismatches] == [f"layers.1.self_attn: {expected}"]
    assert decoder.shape is None


@pytest.mark.parametrize("form", [Form(rotary="apart"), Form(head_norms="apart")], ids=["rotation", "norm"])
def test_norm_in_the_attention_after_others(form, tmp_path):
    """GroupQueryAttention's norm of every head follows a rotation or a norm before the node, where no part has one."""

    def change(graph, node):
        attention = node("attn/GroupQueryAttention")
        attention.input.extend([""] * (14 - len(attention.input)) + ["w", "w"])
        graph.initializer.append(numpy_helper.from_array(np.ones(16, np.float32), "w"))

    decoder = matched(changed(change, tmp_path / "model.onnx", form))
    expected = "layers.1.self_attn: " + ATTENTION + "it has a norm of heads that a norm or a rotation before it"
    assert [str(item)[: len(expected)] for item in decoder.mismatches] == [expected]


def test_different_rotations(tmp_path):
    def change(graph, node):
        node("attn/k_rotary/RotaryEmbedding").attribute[0].i ^= 1

    decoder = matched(changed(change, tmp_path / "model.onnx", FORMS["rotary apart"]))
    assert [item.problem for item in decoder.mismatches] == ["queries and keys are rotated differently"]


@pytest.mark.parametrize(
    ("change", "part", "layer"),
    [
        (("mlp/gate_proj", "mlp/up_proj"), "mlp.gate_proj", "mlp/up_proj"),
        (("self_attn/v_proj", "self_attn/k_proj"), "self_attn.k_proj", "self_attn/v_proj"),
    ],
    ids=["gate and up", "k and v"],
)
def test_roles_are_what_layers_do(change, part, layer, tmp_path):
    """The names of nodes do not count: optimum's nodes have their outputs swapped here."""
    model = onnx.load(DATA / "optimum_qwen2.onnx")
    nodes = {node.name: node for node in model.graph.node}
    a, b = (nodes[f"/model/layers.1/{name}/MatMul_Q4"] for name in change)
    a.output[0], b.output[0] = b.output[0], a.output[0]
    onnx.save(model, tmp_path / "model.onnx")
    found = matched(tmp_path / "model.onnx").blocks[1].projections[part]
    assert found.name == f"/model/layers.1/{layer}/MatMul_Q4"


@pytest.mark.parametrize(("name", "role"), [("q_proj", "q and k"), ("up_proj", "no up")])
def test_uncertain_roles(name, role, tmp_path):
    """q is in place of k, and their sizes differ; or gate is in place of up."""
    model = onnx.load(DATA / "optimum_qwen2.onnx")
    nodes = {node.name: node for node in model.graph.node}
    room = "mlp" if role == "no up" else "self_attn"
    node = nodes[f"/model/layers.1/{room}/{name}/MatMul_Q4"]
    if role == "no up":
        gate = nodes["/model/layers.1/mlp/gate_proj/MatMul_Q4"]
        node.CopyFrom(onnx.helper.make_node("Identity", [gate.output[0]], node.output))
    else:
        other = nodes["/model/layers.1/self_attn/k_proj/MatMul_Q4"]
        node.output[0], other.output[0] = other.output[0], node.output[0]
    onnx.save(model, tmp_path / "model.onnx")
    expected = "up_proj: MatMulNBits /model/layers.1/mlp/gate_proj/MatMul_Q4: it is layers.1.mlp.gate_proj too"
    if role != "no up":
        expected = "self_attn: Reshape /model/layers.1/self_attn/Reshape_7: q, k, v and o of 32, 64, 32 and 64 channels"
    assert expected in reason(tmp_path / "model.onnx")


def test_norm_of_other_operators_is_no_norm(tmp_path):
    """torch's norm with another exponent is not matched as a norm."""
    model = onnx.load(DATA / "torch_qwen2_opset18.onnx")
    power = next(node for node in model.graph.node if node.op_type == "Pow")
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, np.float32), "three"))
    power.input[1] = "three"
    onnx.save(model, tmp_path / "model.onnx")
    said = reason(tmp_path / "model.onnx")
    assert said == f"layers.0.input_layernorm: Pow {power.name}: where a root mean square norm is expected"


def _damage(model: onnx.ModelProto, pick: Callable[[int], int]) -> None:
    """Makes one random change to a node. pick: returns a random number below its argument."""
    nodes = model.graph.node
    node = nodes[pick(len(nodes))]
    tensors = [name for other in nodes for name in other.output]
    kind = pick(6)
    if kind == 0:
        nodes.remove(node)
    elif kind == 1 and node.input:
        del node.input[pick(len(node.input)) :]
    elif kind == 2 and node.input:
        node.input[pick(len(node.input))] = tensors[pick(len(tensors))]
    elif kind == 3:
        node.op_type = nodes[pick(len(nodes))].op_type
    elif kind == 4 and node.attribute:
        del node.attribute[pick(len(node.attribute))]
    elif kind == 5:
        node.domain = ["", "com.microsoft"][pick(2)]


@pytest.mark.parametrize("name", ["builder", "optimum_qwen2", "torch_qwen2_opset23", "genai_qwen2_qdq"])
def test_any_damage_has_a_reason(name, tmp_path):
    """Each damaged graph either matches or gives a reason of one line."""
    path = tmp_path / "model.onnx"
    if name == "builder":
        builder_graph(path, FORMS["head norms"])
    else:
        path.write_bytes((DATA / f"{name}.onnx").read_bytes())
    whole = path.read_bytes()
    others = 0
    for seed in range(60):
        model = onnx.load_from_string(whole)
        rng = np.random.default_rng(seed)
        for _ in range(1 + seed % 3):
            _damage(model, lambda top, rng=rng: int(rng.integers(top)))
        onnx.save(model, path)
        try:
            found = match_decoder(OnnxFile(path))
        except UserError as error:
            found = Mismatch("", str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        others += isinstance(found, Mismatch)
        assert "\n" not in str(found)
    assert others >= 5
