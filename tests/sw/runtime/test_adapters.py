# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: exact by the definition of their two layers, close to a merged model, switched between requests."""

import json

import numpy as np
import pytest
from onnxruntime import OrtValue

from hw.spec.cycles import layer_cycles
from sw import generate
from sw.checkpoints.adapter import read_adapter
from sw.checkpoints.huggingface import decoder_config
from sw.checkpoints.settings import read_settings
from sw.common.errors import UserError
from sw.devices import make_config, open_device
from sw.devices.pack import Shape, plan_layer
from sw.devices.reference import ReferenceDevice
from sw.export.huggingface import export_checkpoint
from sw.graph.linears import find_linears
from sw.model.linear import Outline, QuantizedLinear
from sw.model.lm_head import quantize_int8
from sw.pages.store import load
from sw.runtime import Decoder
from sw.runtime.adapters import AdapterBatch, AdapterLayer, adapter_layers, module_name
from sw.runtime.placement import Batch, place
from sw.runtime.setup import make_decoder
from sw.runtime.usage import Usage
from tests.sw.fixtures.adapters import adapter_config, modules, write_adapter
from tests.sw.fixtures.checkpoints import (
    IDS,
    LINEARS,
    float_tensors,
    make_checkpoint,
    reference_logits,
    relative_error,
)
from tests.sw.fixtures.linears import expected, random_activations, random_linear, same_bits
from tests.sw.runtime.test_placement import named

CONFIG = make_config(tile=8, max_tokens=8, max_k=1024)
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def shapes(layers=(0, 1), names=LINEARS) -> dict[str, tuple[int, int]]:
    return {module: SHAPES[module.split(".", 3)[3]] for module in modules(layers, names)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, exported graph, its float weights)"""
    folder = tmp_path_factory.mktemp("base")
    tensors = make_checkpoint(folder / "in")
    path = export_checkpoint(folder / "in", folder / "out")
    weights = float_tensors(tensors, 2)
    weights["lm_head.weight"] = find_linears(path)[-1].dequantize()
    return folder / "in", path, weights


def merged_logits(base, pairs, factor: float) -> np.ndarray:
    """The float model whose weights contain the update."""
    folder, _, weights = base
    merged = dict(weights)
    for module, (a, b) in pairs.items():
        merged[f"{module}.weight"] = merged[f"{module}.weight"] + factor * b.astype(np.float64) @ a
    return reference_logits(merged, decoder_config(read_settings(folder / "config.json")), IDS)


@pytest.mark.parametrize("rank", [1, 3, 8, 20, 64, 72])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_are_exact(rank, dtype, bias):
    """y = base + B (A x), each as hw.spec.numerics defines it, and the sums in float32; twice in the same buffers."""
    rng = np.random.default_rng(rank)
    k, n, tokens = 72, 48, 5
    own = rng.standard_normal(n).astype(np.float32) if bias else None
    layers = [named(random_linear(rng, n, k, 32), "x", name, own) for name in ("one", "two", "other")]
    a, b = (quantize_int8(rng.standard_normal(shape).astype(np.float32)) for shape in ((rank, k), (n, rank)))
    with ReferenceDevice(CONFIG) as device:
        placed = [place(device, layer) for layer in layers]
        batch = Batch(device, placed, frozenset(), frozenset(), frozenset({"one", "two"}))
        update = AdapterBatch(device, "name", [(each, AdapterLayer(a, b)) for each in placed[:2]], frozenset())
        places: dict[str, OrtValue] = {}
        for _ in range(2):
            x = (random_activations(rng, tokens, k) / 64).astype(dtype)
            values = places | {"x": OrtValue.ortvalue_from_numpy(x[None])}
            batch.run(tokens, False, values, places, Usage())
            update.run(tokens, False, values, places, Usage())
            found = {name: values[name].numpy()[0].copy() for name in ("one", "two", "other")}
            between = expected(CONFIG, a, x.astype(np.float32)).astype(dtype)
            added = expected(CONFIG, b, between.astype(np.float32)).astype(dtype)
            for layer in layers:
                y = expected(CONFIG, layer, x.astype(np.float32))
                with np.errstate(over="ignore"):
                    y = (y if own is None else y + own).astype(dtype)
                y = y if layer.name == "other" else y + added
                assert found[layer.name].dtype == dtype
                assert same_bits(found[layer.name].astype(np.float32), y.astype(np.float32)), layer.name


def test_sums_are_in_the_hosts_memory():
    """The host does not write where the device writes: a cache could hold its sum back over the next result."""
    rng = np.random.default_rng(1)
    layer = named(random_linear(rng, 64, 64, 32), "x", "one")
    a, b = (quantize_int8(rng.standard_normal(shape).astype(np.float32)) for shape in ((4, 64), (64, 4)))
    with ReferenceDevice(CONFIG) as device:
        placed = place(device, layer)
        batch = Batch(device, [placed], frozenset(), frozenset(), frozenset({"one"}))
        update = AdapterBatch(device, "name", [(placed, AdapterLayer(a, b))], frozenset())
        places: dict[str, OrtValue] = {}
        x = rng.standard_normal((1, 1, 64)).astype(np.float32)
        values = {"x": OrtValue.ortvalue_from_numpy(x)}
        batch.run(1, False, values, places, Usage())
        update.run(1, False, values, places, Usage())
        ((_, buffer),) = batch._groups[0][1]
        assert same_bits(device.view(buffer)[: 4 * 64].view(np.float32)[None], expected(CONFIG, layer, x[0]))


@pytest.mark.parametrize("names", [LINEARS, LINEARS[:1], ["mlp.down_proj"]], ids=["all", "q", "down"])
@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_model(base, names, rank, rslora, tmp_path):
    """As close to the float model with merged weights as the rounding of A and B to int8 allows, and as the base is to
    its own; the base model is far away. In blocks of tokens, too.
    """
    config = adapter_config(rank, alpha=6, use_rslora=rslora)
    pairs = write_adapter(tmp_path / "a", shapes(names=names), config, size=0.5)
    adapter = read_adapter(tmp_path / "a")
    rounded = adapter_layers(adapter, {module: shapes()[module] for module in pairs})
    logits = merged_logits(
        base, {name: (each.a.dequantize(), each.b.dequantize()) for name, each in rounded.items()}, 1
    )
    exact = merged_logits(base, pairs, 6 / (rank**0.5 if rslora else rank))
    assert relative_error(logits, exact) < 4e-2
    with open_device("reference", CONFIG) as device:
        decoder = Decoder(base[1], device, context=32, adapters={"a": adapter})
        plain = decoder.forward(IDS, True)
        decoder.adapter = "a"
        assert relative_error(decoder.forward(IDS, True), logits) < 2e-3
        assert relative_error(plain, logits) > 0.1
        beats = decoder.usage.beats
        decoder.reset()
        found = [decoder.forward(IDS[:3])[-1]]
        decoder.prefill(IDS[3:5])
        found += [decoder.forward([token])[-1] for token in IDS[5:]]
        assert relative_error(np.array(found), logits[[2, 5, 6]]) < 2e-3
        assert decoder.usage.beats > beats


def test_switching(base, tmp_path):
    """Each request has the results of a decoder with its adapter alone, bit for bit, and starts with an empty cache."""
    config = adapter_config(4)
    write_adapter(tmp_path / "a", shapes(), config, seed=1)
    write_adapter(tmp_path / "b", shapes([1], LINEARS[3:]), adapter_config(3), seed=2)
    both = {name: read_adapter(tmp_path / name) for name in "ab"}
    alone = {}
    with open_device("reference", CONFIG) as device:
        alone[None] = Decoder(base[1], device, context=32).forward(IDS, True)
        forms = {Decoder(base[1], device, context=32).cache_form}
        for name, adapter in both.items():
            decoder = Decoder(base[1], device, context=32, adapters={name: adapter})
            decoder.adapter = name
            alone[name] = decoder.forward(IDS, True)
        assert len({values.tobytes() for values in alone.values()}) == 3
        decoder = Decoder(base[1], device, context=32, adapters=both)
        for name in (None, "a", "b", "a", None, "b"):
            decoder.adapter = name
            forms.add(decoder.cache_form)
            if decoder.length:
                decoder.reset()
            assert same_bits(decoder.forward(IDS, True), alone[name]), name
        assert decoder.length == len(IDS)
        decoder.adapter = "b"
        assert decoder.length == len(IDS)
        decoder.adapter = "a"
        assert (decoder.length, decoder.adapter) == (0, "a")
        assert len(forms) == 3
        with pytest.raises(UserError, match="there is no adapter c, but a, b"):
            decoder.adapter = "c"


def test_names():
    assert module_name("/model/layers.0/self_attn/q_proj/MatMulNBits") == "model.layers.0.self_attn.q_proj"
    assert module_name("/model/layers.0/attn/q_proj/MatMul_Q4") == "model.layers.0.self_attn.q_proj"
    assert module_name("/lm_head/MatMulNBits") == "lm_head"
    assert module_name("lm_head") == "lm_head"


def test_other_models(base, tmp_path):
    write_adapter(tmp_path / "a", {"model.layers.7.mlp.up_proj": (96, 64)}, adapter_config())
    write_adapter(tmp_path / "b", {"model.layers.0.mlp.up_proj": (96, 32)}, adapter_config())
    with open_device("reference", CONFIG) as device:
        with pytest.raises(UserError, match=r"a adapts model\.layers\.7\.mlp\.up_proj, which is no quantized layer of"):
            Decoder(base[1], device, context=32, adapters={"a": read_adapter(tmp_path / "a")})
        with pytest.raises(UserError, match=r"b adapts model\.layers\.0\.mlp\.up_proj as a layer \[96, 32\], and the"):
            Decoder(base[1], device, context=32, adapters={"b": read_adapter(tmp_path / "b")})
    with pytest.raises(UserError, match="an adapter needs an accelerator, not --device onnxruntime"):
        Decoder(base[1], None, context=32, adapters={"a": read_adapter(tmp_path / "a")})


def test_head(base, tmp_path):
    """The head's update is computed for the last token alone, as the head is."""
    pairs = write_adapter(tmp_path / "a", {"lm_head": (264, 64)}, adapter_config(4), size=0.2)
    logits = merged_logits(base, pairs, 2.0)
    with open_device("reference", CONFIG) as device:
        decoder = Decoder(base[1], device, context=32, adapters={"a": read_adapter(tmp_path / "a")})
        decoder.adapter = "a"
        assert relative_error(decoder.forward(IDS), logits[-1:]) < 2e-2


def test_hybrid_instead_of_programs(base, tmp_path):
    """One line says why there are no programs."""
    write_adapter(tmp_path / "a", shapes([0]), adapter_config())
    told: list[str] = []
    config = make_config(tile=8, max_tokens=8, max_k=1024, operators="decoder")
    with open_device("reference", config) as device:
        decoder = make_decoder(base[1], device, context=32, tell=told.append, adapter=read_adapter(tmp_path / "a"))
        assert isinstance(decoder, Decoder) and decoder.adapter == str(tmp_path / "a")
    assert told == [f"the accelerator runs the linear layers alone, because of the adapter {tmp_path / 'a'}"]


def test_command(base, tmp_path, capsys, monkeypatch):
    """sw.generate --adapter: other tokens than without, and the hardware fits the adapter's layers, too."""
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    write_adapter(tmp_path / "a", shapes(), adapter_config(16, alpha=64), size=2.0)
    command = ["--model", str(base[0]), "--prompt", "hello", "--raw", "--device", "reference", "--json"]
    texts = []
    for options in ([], ["--adapter", str(tmp_path / "a")]):
        assert generate.main([*command, "--max-new-tokens", "6", *options]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["ids"] != texts[1]["ids"]
    assert (texts[0]["adapter"], texts[1]["adapter"]) == (None, str(tmp_path / "a"))
    with pytest.raises(UserError, match="--adapter needs an accelerator, not --device onnxruntime"):
        generate.main([*command[:-2], "onnxruntime", "--adapter", str(tmp_path / "a")])


def test_layers_of_the_adapter(tmp_path):
    """The factor is in B, so that the host only adds."""
    pairs = write_adapter(tmp_path / "a", {"x": (8, 64)}, adapter_config(4, alpha=2))
    ((name, layer),) = adapter_layers(read_adapter(tmp_path / "a"), {"/x/MatMulNBits": (8, 64)}).items()
    assert name == "/x/MatMulNBits"
    assert np.abs(layer.a.dequantize() - pairs["x"][0]).max() < np.abs(pairs["x"][0]).max() / 250
    assert np.abs(layer.b.dequantize() - pairs["x"][1] / 2).max() < np.abs(pairs["x"][1]).max() / 500


def adapter_cycles(rank: int) -> dict[str, int]:
    """Cycles of the device for 1 and 16 tokens of SmolLM2-135M: of the model, and of an adapter of some layers."""
    config = make_config()
    sizes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    sizes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}

    def cycles(tokens: int, layer: Shape) -> int:
        return layer_cycles(plan_layer(config, layer).layout, tokens)

    def int8(n: int, k: int) -> QuantizedLinear:
        return quantize_int8(np.zeros((n, k), np.float32))

    found = {"rank": rank}
    for tokens in (1, 16):
        base = [Outline("", n, k, 64, 4, np.array([[8.0]])) for n, k in sizes.values()]
        head = Outline("", 49152, 576, 64, 8, np.array([[128.0]]))
        found[f"model_{tokens}"] = 30 * sum(cycles(tokens, layer) for layer in base) + cycles(1, head)
        for which, names in (("all", sizes), ("q_v", ("q", "v"))):
            pairs = [int8(*shape) for name in names for shape in ((rank, sizes[name][1]), (sizes[name][0], rank))]
            found[f"{which}_{tokens}"] = 30 * sum(cycles(tokens, layer) for layer in pairs)
    return found


def test_cost():
    """docs/figures.json states the cycles of adapters."""
    rows = load()["adapter"]["figures"]
    assert [row["rank"] for row in rows] == [8, 16, 32, 64]
    for row in rows:
        assert adapter_cycles(row["rank"]) == row
