# SPDX-License-Identifier: Apache-2.0
"""GGUF models that mix block formats, as llama.cpp's Q4_K_M and its relatives do, from the file to the logits."""

from typing import Any

import onnxruntime
import pytest

from hw.spec.config import AcceleratorConfig
from sw.common.errors import UserError
from sw.devices import open_device
from sw.export.gguf import export_gguf
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears, read_linear
from sw.graph.match import match_decoder
from sw.model.linear import QuantizedLinear
from sw.model.parts import Decoder as Parts
from sw.runtime import Decoder, ProgramDecoder
from sw.runtime.hardware import choose_config, layer_shapes
from tests.sw.export.test_gguf import gguf_logits, write_gguf
from tests.sw.fixtures.checkpoints import IDS, empty_cache, relative_error, step

SHAPE: dict[str, Any] = {"hidden": 256, "ffn": 512}
MIXTURES: dict[str, dict] = {
    # Half of attn_v and ffn_down have more bits; a head that is also the embedding is Q6_K, an embedding alone Q4_K.
    "Q4_K_M": {"kind": "Q4_K", "table": "Q6_K", "kinds": {"blk.0.attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K"}},
    "Q4_K_M untied": {
        "kind": "Q4_K",
        "table": "Q6_K",
        "tied": False,
        "kinds": {"token_embd": "Q4_K", "blk.0.attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K"},
    },
    "Q5_K_M": {"kind": "Q5_K", "table": "Q6_K", "kinds": {"blk.0.attn_v": "Q6_K", "blk.0.ffn_down": "Q6_K"}},
    "Q3_K_M": {
        "kind": "Q3_K",
        "table": "Q6_K",
        "kinds": {
            "blk.0.attn_v": "Q5_K",
            "blk.1.attn_v": "Q4_K",
            "blk.0.ffn_down": "Q5_K",
            "blk.1.attn_output": "Q4_K",
        },
    },
    "Q2_K": {"kind": "Q2_K", "table": "Q6_K", "kinds": {"blk.0.attn_v": "Q4_K", "blk.0.ffn_down": "Q3_K"}},
    "IQ4_XS": {"kind": "IQ4_XS", "table": "Q6_K", "kinds": {"blk.0.attn_v": "Q5_K", "blk.1.ffn_down": "IQ4_NL"}},
    # What llama.cpp takes if K is no multiple of 256.
    "blocks of 32": {"kind": "Q5_0", "table": "Q8_0", "kinds": {"blk.0.attn_v": "Q5_1", "blk.1.ffn_down": "Q4_1"}},
    "one format": {"kind": "Q5_K", "table": "Q5_K"},
    "biases": {"family": "qwen2", "kind": "Q5_K", "table": "Q3_K", "kinds": {"blk.1.attn_k": "Q4_K"}},
    "Q2_K table": {"kind": "Q4_K", "table": "Q2_K", "tied": False},
}


@pytest.fixture(scope="module", params=MIXTURES)
def exported(request, tmp_path_factory):
    """The exported graph, the float logits of the file's weights, and the mixture."""
    folder = tmp_path_factory.mktemp("mixture")
    mixture = MIXTURES[request.param]
    tensors = write_gguf(folder / "m.gguf", **SHAPE, **mixture)
    return export_gguf(folder / "m.gguf", folder / "out"), gguf_logits(folder / "m.gguf", tensors), mixture


def test_onnxruntime(exported):
    """The graph alone, in any onnxruntime: float arithmetic with the file's weights."""
    path, expected, _ = exported
    session = onnxruntime.InferenceSession(path)
    logits, _ = step(session, IDS, empty_cache(session), len(IDS))
    assert relative_error(logits, expected) < 1e-5


def test_layers(exported):
    """Every layer has its own width and groups, also where onnxruntime needs two planes."""
    path, _, mixture = exported
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    file = OnnxFile(path)
    decoder = match_decoder(file)
    assert isinstance(decoder, Parts)
    for linear in find_linears(path):
        *_, block, _, module, _ = ("", "", *linear.name.split("/"))
        if module == "lm_head":
            kind, part = mixture["table"], decoder.head
        else:
            part = getattr(decoder.blocks[int(block[-1])], module)
            kind = mixture.get("kinds", {}).get(f"blk.{block[-1]}.{names[module]}", mixture["kind"])
        bits = 4 if kind in ("Q4_K", "Q4_1", "Q3_K", "Q2_K") else 8
        assert (linear.bits, linear.group_size) == (bits, 16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32)
        assert (part.n, part.k, part.input) == (linear.n, linear.k, linear.input_name)
        again = read_linear(file, part)
        assert isinstance(again, QuantizedLinear)
        assert (again.dequantize() == linear.dequantize()).all()


@pytest.mark.parametrize("runtime", [Decoder, ProgramDecoder])
def test_device(exported, runtime):
    """On the hardware that the model needs, as a hybrid and as a program, within the contract's roundings."""
    path, expected, _ = exported
    options = {"weight_bits": "auto", "zero_point": "auto", "max_k": "auto", "tile": 16}
    config = choose_config(layer_shapes(find_linears(path)), options | {"operators": "decoder"})
    assert (config.weight_bits, config.zero_point) == (4, "fixed")
    with open_device("reference", config) as device:
        if runtime is Decoder:
            decoder = Decoder(path, device, context=16)
        else:
            decoder = ProgramDecoder(OnnxFile(path), device, context=16)
        logits = decoder.forward(IDS, every=True)
    # The scales of 8-bit layers have 12 bits.
    assert relative_error(logits, expected) < 3e-3


def test_groups_of_16_and_tile_32(tmp_path):
    """Hardware with tile 32 cannot hold groups of 16: one line says so."""
    write_gguf(tmp_path / "m.gguf", **SHAPE, kind="Q6_K")
    path = export_gguf(tmp_path / "m.gguf", tmp_path / "out")
    options = {"weight_bits": "auto", "zero_point": "auto", "max_k": "auto", "tile": 32}
    with pytest.raises(UserError, match=r"of the tile \(32\), not 16; hardware built with --tile 16 takes it$"):
        choose_config(layer_shapes(find_linears(path)), options)
    assert choose_config(layer_shapes(find_linears(path)), options | {"tile": 16}) != AcceleratorConfig()
