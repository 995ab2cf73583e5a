# SPDX-License-Identifier: Apache-2.0
"""Decoders as programs: bit for bit a composition of hw.spec.numerics, and close to onnxruntime."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

from hw.spec.config import AcceleratorConfig
from hw.spec.numerics.float32 import add, mul
from hw.spec.numerics.vector import norm_scale, rms_norm, rotary, silu_mul
from sw.common.errors import UserError
from sw.common.status_line import StatusLine
from sw.devices import make_config, open_device
from sw.devices.base import Device, DeviceError
from sw.devices.kv260 import KV260Device
from sw.devices.reference import ReferenceDevice
from sw.graph.file import OnnxFile
from sw.graph.linears import read_linear, read_norm
from sw.graph.match import match_decoder
from sw.model.linear import QuantizedLinear
from sw.model.parts import Attention, Norm, Projection
from sw.model.parts import Decoder as Parts
from sw.program.lower import Output
from sw.runtime import Decoder, ProgramDecoder
from sw.runtime.setup import make_decoder, open_decoder
from sw.text.sampling import Sampler
from tests.sw.fixtures.fake_board import FakeBoard
from tests.sw.fixtures.linears import expected, same_bits
from tests.sw.fixtures.random_decoder import CONFIG, MIXED, write_random
from tests.sw.runtime.test_decoder import (
    DATA,
    IDS,
    changed,
    check_failure_keeps_the_cache,
    in_blocks,
    relative,
    whole_graph,
)

CONTEXT = 32
SIZES = (8, 1, 1, 5, 8, 1)
ENDS = np.cumsum(SIZES) - 1
GRAPHS = {
    "plain": {},
    "mixed": {"formats": MIXED},
    "padded": {"formats": {"down_proj": (4, 128)}, "intermediate": 1120},
    "normed": {"head_size": 32, "head_norms": "qk"},
    "local": {"windows": (7, None), "local_rope_theta": 7.0, "embedding_scale": 3.0},
}


def hardware(**changes) -> AcceleratorConfig:
    return make_config(**{"operators": "decoder", "tile": 8, "max_tokens": 8, "max_k": 2048, **changes})


@pytest.fixture(scope="module", params=GRAPHS)
def model(request, tmp_path_factory):
    """Two blocks with QKV biases and a tied int8 head.

    mixed: with layers of 2, 4 and 8 bits. padded: down has whole groups of 128 with padding. normed: queries and keys
    have a norm of every head. local: a window and another rotation in the first block, and a scaled embedding.
    """
    return write_random(tmp_path_factory.mktemp(request.param), **GRAPHS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("plain"))


def programs(path, device) -> ProgramDecoder:
    return ProgramDecoder(OnnxFile(path), device, context=CONTEXT)


class Watched(ProgramDecoder):
    """Keeps what each attention reads and writes."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.embedded: list[np.ndarray] = []
        self.qkv: list[np.ndarray] = []
        self.attended: list[np.ndarray] = []

    def _begin(self, ids: Sequence[int], total: int) -> None:
        super()._begin(ids, total)
        self.embedded.append(self._programs.embedded.view(len(ids)).copy())

    def _attend(self, index: int, tokens: int) -> None:
        self.qkv.append(self._programs.qkv.view(tokens).copy())
        super()._attend(index, tokens)
        self.attended.append(self._programs.attended(index, tokens).copy())


def neighbours(heads: np.ndarray) -> np.ndarray:
    """[..., head_size] with the two elements of each rotated pair beside each other."""
    return np.stack(np.split(heads, 2, axis=-1), axis=-1).reshape(heads.shape)


class Composed:
    """The programs of a decoder as compositions of hw.spec.numerics, on the layers and rows of the graph itself."""

    def __init__(self, file: OnnxFile, config: AcceleratorConfig):
        self.file, self.config = file, config
        decoder = match_decoder(file)
        assert isinstance(decoder, Parts)
        self.decoder = decoder

    def product(self, part: Projection, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        layer = read_linear(self.file, part)
        assert isinstance(layer, QuantizedLinear)
        return expected(self.config, layer, x), layer.bias

    def after_norm(self, norm: Norm, x: np.ndarray, *parts: Projection) -> list[np.ndarray]:
        scaled, r = mul(x, read_norm(self.file, norm)), norm_scale(x, norm.epsilon)[:, None]
        products = (self.product(part, scaled) for part in parts)
        return [mul(y, r) if bias is None else add(mul(y, r), bias) for y, bias in products]

    def qkv(self, index: int, x: np.ndarray, first: int) -> np.ndarray:
        """first: position of the first token. Pairs of elements are neighbours."""
        block = self.decoder.blocks[index]
        q, k, v = self.after_norm(block.input_norm, x, block.q_proj, block.k_proj, block.v_proj)
        assert isinstance(block.attention, Attention) and block.rotary
        tables = [self.file.constant(name, name) for name in (block.rotary.cos, block.rotary.sin)]
        cosine, sine = (values[first : first + len(x), None] for values in tables)
        turned = []
        for values, norm in ((q, block.q_norm), (k, block.k_norm)):
            heads = neighbours(values.reshape(len(x), -1, block.attention.head_size))
            if norm:
                weight = neighbours(self.file.constant(norm.weight, norm.weight))
                heads = rms_norm(heads, weight, norm.epsilon)
            pairs = rotary(heads[..., ::2], heads[..., 1::2], cosine, sine)
            turned.append(np.stack(pairs, axis=-1).reshape(len(x), -1))
        return np.concatenate([*turned, v], axis=1)

    def rest(self, index: int, x: np.ndarray, attended: np.ndarray) -> np.ndarray:
        """The sum after a block. attended: the attention's output."""
        block = self.decoder.blocks[index]
        middle = add(self.product(block.o_proj, attended)[0], x)
        gate, up = self.after_norm(block.post_attention_norm, middle, block.gate_proj, block.up_proj)
        return add(self.product(block.down_proj, silu_mul(gate, up))[0], middle)

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.after_norm(self.decoder.final_norm, x, self.decoder.head)[0]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 1, 8, 3)], ids=str)
def test_composition(model, sizes):
    """Every program is bit for bit what the numerics of the contract give, for one token and for several."""
    file = OnnxFile(model)
    with open_device("reference", hardware()) as device:
        composed, decoder, start = Composed(file, device.config), Watched(file, device, context=CONTEXT), 0
        for size in sizes:
            for seen in (decoder.embedded, decoder.qkv, decoder.attended):
                seen.clear()
            logits = decoder.forward(IDS[start : start + size], every=True)
            (x,) = decoder.embedded
            for index in range(CONFIG.layer_count):
                assert same_bits(decoder.qkv[index], composed.qkv(index, x, start))
                attended = decoder.attended[index]
                # Layers of two planes have two copies.
                assert all(
                    same_bits(attended[:, 0].copy(), attended[:, plane].copy()) for plane in range(attended.shape[1])
                )
                x = composed.rest(index, x, attended[:, 0])
            assert same_bits(logits, composed.logits(x))
            start += size


def test_logits(model):
    """They are onnxruntime's but for the rounding of activations; the last alone and the largest alone are the same."""
    wanted = whole_graph(model)
    with open_device("reference", hardware()) as device:
        decoder = programs(model, device)
        assert decoder.block == 8
        logits = in_blocks(decoder)
        assert logits.shape == wanted.shape == (24, CONFIG.vocab_size)
        assert 0 < relative(logits, wanted) < 1e-3
        assert relative(in_blocks(Decoder(model, device, context=CONTEXT)), wanted) < 1e-3
        assert decoder.length == decoder.usage.tokens == 24
        decoder.reset()
        assert same_bits(in_blocks(decoder, every=False), logits[ENDS])
        decoder.reset()
        starts = ENDS + 1 - SIZES
        tokens = [decoder.greedy(IDS[start : start + size]) for start, size in zip(starts, SIZES)]
        assert tokens == logits[ENDS].argmax(axis=1).tolist()
        for top_p in (1, 0.8):
            decoder.reset()
            parts, sampler = Sampler(0.8, top_p, seed=3), Sampler(0.8, top_p, seed=3)
            tokens = [decoder.sample(IDS[start : start + size], parts) for start, size in zip(starts, SIZES)]
            assert tokens == [sampler(row) for row in logits[ENDS]]


@pytest.mark.parametrize("name", ["own export", "genai"])
def test_float_head(name, tmp_path):
    """It stays in onnxruntime. The device computes the norm before it."""
    path = DATA / "same_weights/genai/model.onnx" if name == "genai" else write_random(tmp_path, head="float")
    file, wanted = OnnxFile(path), whole_graph(path)
    with open_device("reference", hardware()) as device:
        decoder = programs(path, device)
        assert relative(in_blocks(decoder), wanted) < 1e-3
        norm = Composed(file, device.config).decoder.final_norm
        for size, output in ((3, Output.ALL), (3, Output.LAST)):
            decoder.reset()
            decoder.forward(IDS[:size], every=output is Output.ALL)
            rows = size if output is Output.ALL else 1
            scaled = decoder._programs._unscaled.view(rows).copy()
            normed = decoder._programs.results.view(rows).copy()
            # The last job multiplies by r, which the job before it has computed.
            assert [job.name for job in decoder._programs.jobs(2, size, output)][2:] == [
                "layers.1.mlp.down_proj",
                "norm",
            ]
            weight = read_norm(file, norm)
            x = scaled.astype(np.float64) / weight
            r = 1 / np.sqrt((x * x).mean(axis=1) + norm.epsilon)
            assert np.allclose(normed, scaled * r[:, None], rtol=1e-5)
        decoder.reset()
        last = in_blocks(decoder, every=False)
        assert relative(last, wanted[ENDS]) < 1e-3
        decoder.reset()
        assert decoder.greedy(IDS[:8]) == int(last[0].argmax())


def test_every_tile_gives_the_same(model):
    """Padding and planes depend on the hardware, results do not."""
    found = []
    for options in ({}, {"tile": 4, "ports": 1, "max_tokens": 24}, {"tile": 16, "max_tokens": 11}):
        with open_device("reference", hardware(**options)) as device:
            decoder = programs(model, device)
            sizes = SIZES if decoder.block < 24 else (24,)
            found.append(in_blocks(decoder, sizes))
    assert relative(found[1], found[0]) < 1e-5 and same_bits(found[2], found[0])


@contextmanager
def open_backend(name: str, folder: Path) -> Iterator[Device]:
    """A device; kv260 is a simulated board, whose caches a driver must clean and invalidate."""
    config = hardware(tile=4, ports=1)
    if name == "kv260":
        with closing(FakeBoard(folder, config, "hostile")) as board, KV260Device(host=board) as device:
            yield device
    else:
        with open_device(name, config, "hostile") as device:
            yield device


@pytest.mark.simulator
# tests/sw/program/test_head_norms.py has the norms of heads.
@pytest.mark.parametrize("model", ["plain", "mixed", "padded"], indirect=True)
def test_devices_agree(model, tmp_path):
    """The simulated hardware gives the reference's logits bit for bit, on the simulated board as well."""
    logits, tokens, usages = [], [], {}
    for name in ("reference", "rtl", "kv260"):
        with open_backend(name, tmp_path) as device:
            decoder = programs(model, device)
            every = in_blocks(decoder)
            decoder.reset()
            logits.append(np.concatenate([every, in_blocks(decoder, every=False)]))
            decoder.reset()
            decoder.prefill(IDS[:8])
            sampler = Sampler(0.9, 0.9, seed=1)
            tokens.append([*(decoder.greedy(IDS[:1]) for _ in range(3)), decoder.sample(IDS[:1], sampler)])
            usages[name] = decoder.usage
    for name, found, chosen in zip(usages, logits, tokens):
        assert same_bits(found, logits[0]), name
        assert chosen == tokens[0], name
    assert usages["reference"].cycles == 0 < usages["rtl"].beats <= usages["rtl"].cycles
    for usage in usages.values():
        assert min(usage.device, usage.onnxruntime, usage.conversion, usage.driver) > 0


def test_submissions(plain, monkeypatch):
    """A token has one submission for each block and one for the head; a prompt's earlier blocks do without the last."""
    with open_device("reference", hardware()) as device:
        decoder, batches = programs(plain, device), []
        submit = device.submit
        monkeypatch.setattr(device, "submit", lambda batch: batches.append(batch) or submit(batch))
        for _ in range(2):
            decoder.greedy(IDS[:1])
        assert len(batches) == 6 and batches[:3] == batches[3:]
        batches.clear()
        decoder.prefill(IDS[:8])
        assert [len(batch.jobs) for batch in batches] == [2, 4]


def test_prefill(model):
    """It leaves the same cache as forward."""
    with open_device("reference", hardware()) as device:
        decoder = programs(model, device)
        decoder.forward(IDS[:8])
        wanted = decoder.forward(IDS[8:10])
        decoder.reset()
        decoder.prefill(IDS[:8])
        assert decoder.length == 8
        assert same_bits(decoder.forward(IDS[8:10]), wanted)


def test_failures_keep_the_cache(plain, monkeypatch):
    with ReferenceDevice(hardware()) as device:
        check_failure_keeps_the_cache(programs(plain, device), device, monkeypatch)


def test_limits(plain):
    with open_device("reference", hardware()) as device:
        decoder = ProgramDecoder(OnnxFile(plain), device, context=10)
        for ids in ([], IDS[:9]):
            with pytest.raises(UserError, match=rf"^a call takes 1 to 8 tokens, not {len(ids)}$"):
                decoder.forward(ids)
        decoder.forward(IDS[:8])
        for call in (decoder.forward, decoder.greedy, decoder.prefill):
            with pytest.raises(UserError, match=r"^the context holds 10 tokens, and these would be 11$"):
                call(IDS[8:11])


def spoil(graph, name: str, value: float) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith(name))
    shape = onnx.numpy_helper.to_array(tensor).shape
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(shape, value, np.float32), tensor.name))


def test_values_that_are_not_finite(plain, tmp_path):
    """A layer that reads them is named; a largest logit that is no number is refused."""
    path = changed(plain, tmp_path, lambda graph: spoil(graph, "1.input_layernorm.weight", np.nan))
    with (
        open_device("reference", hardware()) as device,
        pytest.raises(DeviceError, match=r"^layer layers.1.self_attn.qkv_proj: .* finite"),
    ):
        programs(path, device).forward(IDS[:1])
    path = changed(plain, tmp_path, lambda graph: spoil(graph, "lm_head.scales", 1e37))
    with open_device("reference", hardware()) as device, pytest.raises(UserError, match="their maximum is inf"):
        programs(path, device).greedy(IDS[:1])


def test_fallback(plain, tmp_path):
    """Without the vector unit, or with operators that no program has, the linear layers run alone, and one line says
    why.
    """
    cases = [
        (plain, hardware(operators="linear"), Decoder, None),
        (plain, hardware(), ProgramDecoder, None),
        (DATA / "genai_qwen2_tied.onnx", hardware(), ProgramDecoder, None),
        (
            DATA / "torch_qwen2_opset18.onnx",
            hardware(),
            Decoder,
            "layers.0.self_attn: Softmax node_Softmax_",
        ),
        (
            write_random(tmp_path, {"up_proj": (8, 32)}),
            hardware(),
            Decoder,
            "layers.0.mlp: gate_proj and up_proj have different bits or groups",
        ),
    ]
    for path, config, kind, reason in cases:
        told: list[str] = []
        with open_device("reference", config) as device:
            before = device.alloc(1)
            device.free(before)
            decoder = make_decoder(path, device, context=CONTEXT, tell=told.append)
            assert type(decoder) is kind
            assert relative(in_blocks(decoder), whole_graph(path)) < 1e-3
        if reason is None:
            assert not told
        else:
            assert len(told) == 1 and "\n" not in told[0]
            assert told[0].startswith(f"the accelerator runs the linear layers alone, because of {reason}")


def test_host(plain, capsys):
    """The linear layers alone on hardware that has more, for comparison; one line says why."""
    config = hardware(score_words=8192)
    with StatusLine() as status, open_decoder(plain, "reference", "ideal", config, CONTEXT, status, host=True) as made:
        assert type(made) is Decoder
        hybrid = in_blocks(made)
    assert "note: the accelerator runs the linear layers alone: --operators host\n" in capsys.readouterr().err
    with open_device("reference", hardware(operators="linear")) as device:
        assert same_bits(hybrid, in_blocks(make_decoder(plain, device, context=CONTEXT)))


def test_memory_of_an_attempt_is_free_again(tmp_path):
    path = write_random(tmp_path, {"1.up_proj": (8, 32)})
    places = []
    for kind in ("decoder", "linear"):
        with open_device("reference", hardware(operators=kind)) as device:
            make_decoder(path, device, context=CONTEXT)
            places.append(device.alloc(1).address)
    assert places[0] == places[1]


def test_note(tmp_path, capsys):
    """It is one line on stderr."""
    path = write_random(tmp_path, biased=("o_proj",))
    with StatusLine() as status, open_decoder(path, "reference", "ideal", hardware(), CONTEXT, status) as decoder:
        assert type(decoder) is Decoder
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert lines == [
        "note: the accelerator runs the linear layers alone, because of layers.0.self_attn.o_proj: a bias besides the"
        " residual"
    ]


def test_progress(plain):
    seen = []
    with open_device("reference", hardware()) as device:
        ProgramDecoder(OnnxFile(plain), device, context=CONTEXT, progress=lambda *values: seen.append(values))
    assert [(done, total) for done, total, _ in seen] == [(index, 9) for index in range(9)]
    assert {name for _, _, name in seen} >= {"layers.0.self_attn.qkv_proj", "layers.1.mlp.gate_up_proj", "lm_head"}


def test_jobs(model):
    """Layers of one format are one job; copies are for second planes; each job waits for what it reads."""
    with open_device("reference", hardware()) as device:
        decoder = programs(model, device)
        first, middle, last = (
            [
                (job.name, job.wait.value, getattr(job, "reuse", None))
                for job in decoder._programs.jobs(index, 3, output)
            ]
            for index, output in enumerate((Output.LAST, Output.LAST, Output.BEST))
        )
    if "normed" in str(model):
        # 3 tokens: the heads of one token after the other, of q and of k.
        names = [f"layers.0.self_attn.{kind}_norm" for kind in "qqqkkk"]
        assert first[2::2] == [(f"{name}, squares", int(not index), None) for index, name in enumerate(names)]
        assert first[3::2] == [(name, 1, None) for name in names]
        assert [name for name, *_ in middle[4:]] == [name.replace(".0.", ".1.") for name, *_ in first[2:]]
    elif "mixed" not in str(model):
        assert first == [("layers.0.input_layernorm", 0, None), ("layers.0.self_attn.qkv_proj", 1, False)]
        assert [name for name, *_ in middle] == [
            "layers.0.self_attn.o_proj",
            "layers.0.mlp.gate_up_proj",
            "layers.0.mlp.down_proj",
            "layers.1.self_attn.qkv_proj",
        ]
        assert [name for name, *_ in last[2:]] == ["layers.1.mlp.down_proj", "norm, copy", "lm_head"]
        assert [wait for _, wait, _ in last] == [0, 1, 1, 1, 1]
    else:
        assert first == [
            ("layers.0.input_layernorm", 0, None),
            ("layers.0.input_layernorm, copy", 1, None),
            ("layers.0.input_layernorm, copy", 0, None),
            ("layers.0.self_attn.qk_proj", 1, False),
            ("layers.0.self_attn.v_proj", 0, False),
        ]
        assert sum("copy" in name for name, *_ in middle) == 1 + 1 + 2
