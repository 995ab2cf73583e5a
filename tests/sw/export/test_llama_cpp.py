# SPDX-License-Identifier: Apache-2.0
"""GGUF against llama.cpp itself, where llama-cpp-python is installed: its own files, its logits, its tokenizers.

llama.cpp multiplies quantized weights with activations of 8 bits, which changes logits more than anything here does. So
its logits are those of the same file with float32 weights, for which it multiplies floats.
"""

import ctypes
import random
import unicodedata
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import onnxruntime
import pytest

from sw.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.gguf.tokenizer import read_gguf_tokenizer
from sw.devices import open_device
from sw.export.gguf import export_gguf
from sw.export.resolve import packaged_gguf
from sw.graph.file import OnnxFile
from sw.graph.linears import find_linears
from sw.runtime import ProgramDecoder
from sw.runtime.hardware import choose_config, layer_shapes
from tests.sw.export.test_gguf import write_gguf
from tests.sw.fixtures.checkpoints import IDS, empty_cache, relative_error, step
from tests.sw.fixtures.families.gguf_files import MODELS, write_family_gguf
from tests.sw.fixtures.families.models import PROMPT

pytestmark = [pytest.mark.full, pytest.mark.slow]
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install '.[oracle]' compiles llama.cpp, in ten minutes"
)
MIXTURES = {
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q4_K_S": {"Q4_K", "Q5_K", "Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "Q6_K": {"Q6_K"},
    "Q3_K_M": {"Q3_K", "Q4_K", "Q5_K", "Q6_K"},
    "Q2_K": {"Q2_K", "Q3_K", "Q6_K"},
    "Q8_0": {"Q8_0"},
    "Q4_0": {"Q4_0", "Q6_K"},
    "Q4_1": {"Q4_1", "Q6_K"},
    "Q5_0": {"Q5_0", "Q6_K"},
    "Q5_1": {"Q5_1", "Q6_K"},
    "IQ4_NL": {"IQ4_NL", "Q6_K"},
    "IQ4_XS": {"IQ4_XS", "Q6_K"},
}
"""llama.cpp's name of a mixture -> the formats that it chooses for the model of this test."""


def copy_fields(source: Path, writer: gguf.GGUFWriter, without: tuple[str, ...]) -> None:
    for key, value in gguf.GGUFReader(source).fields.items():
        if not key.startswith("GGUF.") and key not in without:
            sub = value.types[1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value.contents(), value.types[0], sub)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_floats(source: Path, path: Path) -> Path:
    """The same model with float32 weights."""
    writer = gguf.GGUFWriter(path, "llama")
    copy_fields(source, writer, ("general.architecture", "general.file_type", "general.quantization_version"))
    for tensor in gguf.GGUFReader(source).tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    finish(writer)
    return path


def llama_cpp_logits(path: Path) -> np.ndarray:
    """llama.cpp's logits of IDS, with a cache of float32: [len(IDS), vocab]."""
    model = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False, n_threads=1, verbose=False
    )
    model.eval(IDS)
    return np.array(model.scores[: len(IDS)])


@pytest.fixture(scope="module", params=MIXTURES)
def quantized(request, tmp_path_factory) -> tuple[str, Path]:
    """A file that llama.cpp quantized."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    write_gguf(folder / "float.gguf", kind="F32", table="F32", hidden=256, ffn=512, tied=False)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request.param}"), 1
    paths = [str(folder / f"{name}.gguf").encode() for name in ("float", "m")]
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0
    return request.param, folder / "m.gguf"


def test_logits(quantized, tmp_path):
    name, path = quantized
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == MIXTURES[name] | {"F32"}
    expected = llama_cpp_logits(as_floats(path, tmp_path / "float.gguf"))
    exported = export_gguf(path, tmp_path / "out")
    session = onnxruntime.InferenceSession(exported)
    logits, _ = step(session, IDS, empty_cache(session), len(IDS))
    assert relative_error(logits, expected) < 1e-3
    if name == "Q4_K_M":
        options = {"weight_bits": "auto", "zero_point": "auto", "max_k": "auto", "tile": 16, "operators": "decoder"}
        config = choose_config(layer_shapes(find_linears(exported)), options)
        with open_device("reference", config) as device:
            logits = ProgramDecoder(OnnxFile(exported), device, context=16).forward(IDS, every=True)
        # Activations of 16 bits, and scales of 12 bits in the layers of 8.
        assert relative_error(logits, expected) < 1e-2


CHANGES = {
    # llama.cpp ignores the window of Phi-3.
    "phi3": {"attention__sliding_window": 0},
    # It takes the long factors if its cache, which has a multiple of 256 positions, is longer than the first context.
    "phi4": {"context_length": 512, "rope__scaling__original_context_length": 256},
}


@pytest.mark.parametrize("name", MODELS)
def test_families(name, tmp_path):
    """The files with which other tests compare GGUF with transformers."""
    write_family_gguf(tmp_path / "m.gguf", name, **CHANGES.get(name, {}))
    path = export_gguf(tmp_path / "m.gguf", tmp_path / "out", lm_head="float")
    session = onnxruntime.InferenceSession(path)
    logits, _ = step(session, PROMPT, empty_cache(session), len(PROMPT))
    model = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False, n_threads=1
    )
    model.eval(PROMPT)
    assert relative_error(logits, np.array(model.scores[: len(PROMPT)])) < 1e-3


TEXTS = [
    "",
    "a  b   c",
    " leading\ttabs\t\tand\n\nlines\r\n\r\n  end  ",
    "I'll we'RE DON'T it's O'Neil 'S",
    "12345 67 1,234,567.89 3.14e-10 ١٢٣ ½ ²³",
    "def f(x):\n    return x**2  # note\n\n\tif not x:\n\t\tpass",
    "日本語のテキスト。中文字符測試 한국어",
    "Привет, мир! हिन्दी में पाठ ไทย عربي 123",
    "😀😃👨‍👩‍👧‍👦🇩🇪 HelloWorld XMLHttpRequest snake_case",
    "<|im_start|>user\nhi<|im_end|>\n...!!! --- === $$$ ^^^ ~~~ |||",
    "\u00a0nbsp\u3000ideographic “curly” – … ǆ ﬁ",
]


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    letters = "aB1 \n\t'é日.-_$😀<|>s²"
    return TEXTS + ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 40))) for _ in range(300)]


@cache
def vocabulary() -> dict[str, tuple]:
    """SmolLM2's tokenizer: value, type and type of elements of every field. The gguf package takes seconds for it."""
    return {
        key: (value.contents(), value.types[0], value.types[1] if len(value.types) > 1 else None)
        for key, value in gguf.GGUFReader(packaged_gguf("smollm2")).fields.items()
        if key.startswith("tokenizer.") and key != "tokenizer.ggml.pre"
    }


def write_vocabulary(path: Path, pre: str) -> None:
    """SmolLM2's vocabulary without weights, with another way of splitting text."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind, elements) in vocabulary().items():
        writer.add_key_value(key, value, kind, elements)
    writer.add_tokenizer_pre(pre)
    writer.add_vocab_size(len(vocabulary()["tokenizer.ggml.tokens"][0]))
    for add, value in {
        writer.add_context_length: 64,
        writer.add_embedding_length: 64,
        writer.add_block_count: 1,
        writer.add_feed_forward_length: 64,
        writer.add_head_count: 1,
        writer.add_layer_norm_rms_eps: 1e-5,
    }.items():
        add(value)
    finish(writer)


@pytest.mark.parametrize("pre", {kind: name for name, kind in PRE_TOKENIZERS.items()}.values())
def test_tokens(pre, tmp_path):
    """One name of every way of splitting: the same tokens for texts of many scripts, and random ones."""
    write_vocabulary(tmp_path / "v.gguf", pre)
    theirs = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    ours = read_gguf_tokenizer(GgufFile(tmp_path / "v.gguf"))
    for text in texts(1):
        text = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
        expected = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert ours.tokenizer.encode(text).ids == expected, repr(text)
