# SPDX-License-Identifier: Apache-2.0
"""GGUF files of many kinds: in parts, without a suffix, with all metadata that llama.cpp uses."""

import heapq
import json
import random
from itertools import pairwise

import gguf
import numpy as np
import onnxruntime
import pytest
from gguf.constants import Keys
from tokenizers import Tokenizer

from sw import generate
from sw.checkpoints.gguf.keys import HONOURED, HONOURED_BY, NEUTRAL, NEUTRAL_BY, general, status
from sw.checkpoints.gguf.parts import gguf_parts
from sw.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.gguf.sentencepiece import SPACE, sentencepiece
from sw.checkpoints.gguf.tokenizer import read_gguf_tokenizer
from sw.common.errors import UserError
from sw.export.gguf import decoder_config, export_gguf, gguf_source
from sw.export.resolve import find_model, resolve_model
from sw.model.families import FAMILIES
from tests.sw.export.test_gguf import ROOT, TOKENS, renamed, write_gguf
from tests.sw.fixtures.checkpoints import IDS, empty_cache, reference_logits, relative_error, step
from tests.sw.fixtures.families.gguf_files import MODELS, write_family_gguf
from tests.sw.fixtures.families.models import configuration

BOS = TOKENS.index("<|im_start|>")
START = {"tokenizer.ggml.bos_token_id": BOS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))


def raw_ids(path, text="hi"):
    return read_gguf_tokenizer(GgufFile(path)).tokenizer.encode(text).ids


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "tekken"])
def test_bos_without_the_flag(pre, tmp_path):
    write_gguf(tmp_path / "m.gguf", pre=pre, changes=START)
    assert raw_ids(tmp_path / "m.gguf")[0] == BOS
    write_gguf(tmp_path / "n.gguf", pre=pre, changes=START | {"tokenizer.ggml.add_bos_token": False})
    assert raw_ids(tmp_path / "n.gguf")[0] != BOS
    write_gguf(tmp_path / "o.gguf", pre=pre)
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.bos_token_id is missing"):
        raw_ids(tmp_path / "o.gguf")


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "deepseek-r1-qwen", "gpt-2"])
def test_no_bos_by_default(pre, tmp_path):
    write_gguf(tmp_path / "m.gguf", pre=pre, changes=START)
    assert raw_ids(tmp_path / "m.gguf")[0] != BOS


@pytest.mark.parametrize(
    "changes",
    [{"llama.rope.scaling.factor": 4.0}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
     {"llama.rope.scale_linear": 4.0}],
)  # fmt: skip
def test_linear_scaling(changes, tmp_path):
    """A factor without a type means linear scaling: positions are divided by four."""
    tensors = write_gguf(tmp_path / "m.gguf", changes=changes)
    config = decoder_config(GgufFile(tmp_path / "m.gguf"))
    frequencies = config.rotary_frequencies() / 4
    expected = reference_logits(renamed(tensors), config, IDS, neighbours=True, frequencies=frequencies)
    session = onnxruntime.InferenceSession(export_gguf(tmp_path / "m.gguf", tmp_path / "out", lm_head="float"))
    logits, _ = step(session, IDS, empty_cache(session), len(IDS))
    assert relative_error(logits, expected) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }


def test_scaling_that_is_none_or_other(tmp_path):
    write_gguf(tmp_path / "m.gguf", changes={"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})
    assert decoder_config(GgufFile(tmp_path / "m.gguf")).rope_factors is None
    write_gguf(tmp_path / "n.gguf", changes={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UserError, match="rotary scaling 'yarn' is not supported, only linear"):
        decoder_config(GgufFile(tmp_path / "n.gguf"))


def split_gguf(source, folder, count=2, number_offset=0):
    """Splits the model in `source` into parts in `folder`, like llama.cpp's gguf-split."""
    reader = gguf.GGUFReader(source)
    parts = []
    for number in range(count):
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in reader.fields.items():
            if number == 0 and not key.startswith("GGUF.") and key != "general.architecture":
                kind = value.types[0]
                sub = value.types[1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, value.contents(), kind, sub)
        writer.add_key_value("split.no", number + number_offset, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.count", count, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.tensors.count", len(reader.tensors), gguf.GGUFValueType.INT32)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(path)
    return parts


def test_parts(tmp_path):
    write_gguf(tmp_path / "m.gguf", tied=False)
    (tmp_path / "parts").mkdir()
    parts = split_gguf(tmp_path / "m.gguf", tmp_path / "parts")
    whole = resolve_model(tmp_path / "m.gguf")
    for named in (parts[0], parts[1], tmp_path / "parts"):
        made = resolve_model(named)
        assert made.with_name("model.onnx.data").read_bytes() == whole.with_name("model.onnx.data").read_bytes()
    parts[1].unlink()
    with pytest.raises(UserError, match=r"is part 1 of 2, and m-00002-of-00002\.gguf is missing"):
        resolve_model(parts[0])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"is part 1 of 2 of a model: keep all parts in one folder"):
        resolve_model(tmp_path / "renamed.gguf")


def test_parts_that_do_not_fit(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    parts = split_gguf(tmp_path / "m.gguf", tmp_path, number_offset=1)
    with pytest.raises(UserError, match="its metadata says part 2 of 2, its name says part 1 of 2"):
        GgufFile(parts[0])
    assert gguf_parts(tmp_path / "plain.gguf") == [tmp_path / "plain.gguf"]
    with pytest.raises(UserError, match="is named part 3 of 2"):
        gguf_parts(tmp_path / "m-00003-of-00002.gguf")


def rewritten(path, keys=None, tensors=None):
    """Writes one part again, with other values of its split.* keys, or with the tensors of another file."""
    reader = gguf.GGUFReader(path)
    items = [(item.name, np.array(item.data), item.tensor_type) for item in (tensors or reader).tensors]
    fields = {key: (value.types[0], value.contents()) for key, value in reader.fields.items() if "split." in key}
    del reader
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in fields.items():
        writer.add_key_value(key, (keys or {}).get(key, value), kind)
    for name, data, kind in items:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_mixed_parts(tmp_path):
    """Three parts; then a part of another model, a part twice, and parts that are not all of the model."""
    write_gguf(tmp_path / "m.gguf")
    parts = split_gguf(tmp_path / "m.gguf", tmp_path, count=3)
    assert len(GgufFile(parts[2]).tensors) == len(gguf.GGUFReader(tmp_path / "m.gguf").tensors) == 20
    rewritten(parts[1], {"split.tensors.count": 21})
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf is of another model: m-00001.* 20 tensors.* part 21"):
        GgufFile(parts[0])
    rewritten(parts[1], {"split.tensors.count": 20}, gguf.GGUFReader(parts[2]))
    with pytest.raises(UserError, match=r"m-00003-of-00003\.gguf: tensor .* is in another part as well"):
        GgufFile(parts[0])
    parts[1].write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf is not a complete GGUF file"):
        GgufFile(parts[0])
    (tmp_path / "two").mkdir()
    parts = split_gguf(tmp_path / "m.gguf", tmp_path / "two")
    for part in parts:
        rewritten(part, {"split.tensors.count": 21})
    with pytest.raises(UserError, match="its parts have 20 tensors, and 21 are announced"):
        GgufFile(parts[0])


def test_names(tmp_path):
    """Ollama's blobs, an upper-case suffix, a folder with one model and a projector."""
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder" / "m.gguf")
    content = (tmp_path / "folder" / "m.gguf").read_bytes()
    for name in ("sha256-00ff", "M.GGUF", "folder/mmproj-m.gguf"):
        (tmp_path / name).write_bytes(content)
    assert resolve_model(tmp_path / "sha256-00ff").name == "model.onnx"
    assert resolve_model(tmp_path / "M.GGUF").name == "model.onnx"
    assert find_model(tmp_path / "folder") == tmp_path / "folder" / "m.gguf"
    (tmp_path / "folder" / "other.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"holds 2 GGUF models \(m\.gguf, other\.gguf\): name one of them"):
        find_model(tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page, not a model"),
        (b"PK\x03\x04rest", "is a PyTorch or zip file"),
        (b"\x80\x02}q\x00", "is a pickle"),
        (b"tjgg\x01\x00\x00\x00", "in GGML's format from before GGUF"),
    ],
)
@pytest.mark.parametrize("name", ["m", "m.onnx", "m.gguf"])
def test_files_that_are_not_models(content, problem, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        resolve_model(tmp_path / name)


def test_missing_pre_tokenizer_warns(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", pre="default", changes={"tokenizer.chat_template": "{{ messages[0].content }}"})
    data = (tmp_path / "m.gguf").read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer_ggml_pre", 1)
    (tmp_path / "m.gguf").write_bytes(data)
    for _ in range(2):
        options = ["--device", "onnxruntime", "--prompt", "a", "--max-new-tokens", "1"]
        assert generate.main(["--model", str(tmp_path / "m.gguf"), *options]) == 0
        assert "warning: m.gguf does not say how its tokenizer splits text" in capsys.readouterr().err


def test_pre_tokenizers_split(tmp_path):
    """The words of a line for each pre-tokenizer; they are worked out by hand from llama.cpp's patterns."""
    text = "I'll pay 12345$ for HelloWorld  now\n\n!"
    expected = {
        "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", "$", " for", " HelloWorld", " ", " now", "\n\n", "!"],
        "qwen2": ["I", "'ll", " pay", " ", *"12345", "$", " for", " HelloWorld", " ", " now", "\n\n", "!"],
        "gpt-2": ["I", "'ll", " pay", " 12345", "$", " for", " HelloWorld", " ", " now", "\n", "\n", "!"],
        "smollm": ["I", "'ll", " pay", " ", *"12345", "$", " for", " HelloWorld", " ", " now", "\n", "\n", "!"],
        "tekken": ["I", "'ll", " pay", " ", *"12345", "$", " for", " Hello", "World", " ", " now", "\n\n", "!"],
        "gpt-4o": ["I'll", " pay", " ", "123", "45", "$", " for", " Hello", "World", " ", " now", "\n\n", "!"],
        "default": [
            "I", "'", "ll", " pay", " ", "123", "45", "$", " for", " HelloWorld", " ", " now", "\n\n", "!",
        ],
    }  # fmt: skip
    for name, words in expected.items():
        write_gguf(tmp_path / "m.gguf", pre=name, changes=START)
        splitter = read_gguf_tokenizer(GgufFile(tmp_path / "m.gguf")).tokenizer.pre_tokenizer
        found = [text[begin:end] for _, (begin, end) in splitter.pre_tokenize_str(text)]
        assert found == words, name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_text(name, tmp_path):
    write_gguf(tmp_path / "m.gguf", pre=name, changes=START | {"tokenizer.ggml.add_bos_token": False})
    tokenizer = read_gguf_tokenizer(GgufFile(tmp_path / "m.gguf")).tokenizer
    text = "Hé 日本語 1234 it's\n\n\t(x) 😀  I'LL"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def best_first(text, scores):
    """SentencePiece's BPE as in llama.cpp: the best pair of neighbours first, and of equal pairs the leftmost."""
    pieces: list[str | None] = list(text)
    while True:
        heap = []
        alive = [i for i, piece in enumerate(pieces) if piece is not None]
        for one, other in pairwise(alive):
            joined = f"{pieces[one]}{pieces[other]}"
            if joined in scores:
                heapq.heappush(heap, (-scores[joined], one, other, joined))
        if not heap:
            return [pieces[i] for i in alive]
        _, one, other, joined = heap[0]
        pieces[one], pieces[other] = joined, None


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_merges(seed):
    rng = random.Random(seed)
    letters = [*"abcd", SPACE]
    words = set(letters)
    while len(words) < 60:
        pool = sorted(words)
        words.add(rng.choice(pool) + rng.choice(pool))
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(words, key=lambda word: (len(word), word))]
    order = list(range(len(tokens)))
    rng.shuffle(order)
    scores = [float(-rank) for rank in order]
    tokenizer = sentencepiece(tokens, scores, [number > 256 for number in range(len(tokens))], "<unk>", True)
    by_text = dict(zip(tokens[257:], scores[257:]))
    for _ in range(50):
        text = "".join(rng.choice("abcd ") for _ in range(rng.randrange(1, 20)))
        expected = best_first(SPACE + text.replace(" ", SPACE), by_text)
        # Overlapping pairs of equal score, "aa" + "a" and "a" + "aa", are joined in another order.
        if len(set(expected)) == len(expected):
            assert tokenizer.encode(text).tokens == expected, f"seed {seed}, text {text!r}"
    assert tokenizer.decode(tokenizer.encode("ab é cd").ids) == "ab é cd"
    assert tokenizer.encode("é").tokens == [SPACE, "<0xC3>", "<0xA9>"]


def test_sentencepiece_model_runs(tmp_path):
    scores = {"tokenizer.ggml.scores": [-float(i) for i in range(len(TOKENS))]}
    write_gguf(tmp_path / "m.gguf", tokenizer="llama", changes=scores | START)
    source = gguf_source(GgufFile(tmp_path / "m.gguf"))
    assert Tokenizer.from_str(source.tokenizer_json).encode("ab").ids[0] == BOS
    assert resolve_model(tmp_path / "m.gguf").is_file()


FAMILIES_OF = {name: FAMILIES[configuration(name)["model_type"]].architecture for name in MODELS}


def llama_cpp_keys():
    """Every key in the gguf package that llama.cpp could use."""
    for group in vars(Keys).values():
        for key in vars(group).values() if isinstance(group, type) else ():
            if isinstance(key, str) and key.startswith(("{arch}.", "tokenizer.", "general.", "split.", "adapter.")):
                yield key.replace("{id}", "0").replace("{name}", "tool").replace("{dense}", "dense_2")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("key", sorted(set(llama_cpp_keys())))
def test_no_key_is_ignored(key, family, tmp_path):
    """A key of llama.cpp is honoured, refused by name, or harmless; no key of the architecture is unknown."""
    name = key.replace("{arch}", family)
    found = status(name, family)
    assert found in ("honoured", "refused", "harmless")
    if found == "refused":
        write_gguf(tmp_path / "m.gguf", family, changes={name: 77})
        with pytest.raises(UserError, match=f"metadata {name.replace('.', '[.]')} = 77 .*is not supported"):
            gguf_source(GgufFile(tmp_path / "m.gguf"))
    elif found == "harmless" and not name.startswith("tokenizer.chat_template") and name != "general.alignment":
        write_gguf(tmp_path / "m.gguf", family, changes={name: 77})
        gguf_source(GgufFile(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", [name for name in MODELS if FAMILIES_OF[name] not in ("llama", "qwen2")])
def test_no_key_of_other_families_is_ignored(name, tmp_path):
    """The same, with metadata that is changed after the file is read."""
    write_family_gguf(tmp_path / "m.gguf", name)
    model, family = GgufFile(tmp_path / "m.gguf"), FAMILIES_OF[name]
    plain, found = dict(model._fields), []
    for key in sorted(set(llama_cpp_keys())):
        key = key.replace("{arch}", family)
        model._fields = plain | {key: 77}
        found.append(status(key, family))
        if found[-1] == "refused":
            with pytest.raises(UserError, match=f"metadata {key.replace('.', '[.]')} = 77 .*is not supported"):
                decoder_config(model)
        elif found[-1] == "harmless":
            decoder_config(model)
    assert set(found) == {"honoured", "refused", "harmless"}


def test_key_tables():
    assert not HONOURED & set(NEUTRAL)
    for family, keys in HONOURED_BY.items():
        assert not HONOURED & set(keys) and not set(keys) & set(NEUTRAL_BY.get(family, {}))
    assert general("llama.rope.freq_base", "llama") == "{arch}.rope.freq_base"
    assert status("llama.made_up", "llama") == status("tokenizer.ggml.made_up", "llama") == "refused"
    assert status("qwen2.made_up", "llama") == status("mradermacher.note", "llama") == "harmless"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"general.type": "adapter"}, "is a LoRA adapter, not a language model"),
        ({"general.type": "mmproj"}, "is a projector of a vision model, not a language model"),
        ({"llama.vocab_size": 7}, "vocab_size is 7, and the tokenizer has"),
        ({"llama.attention.value_length": 8}, "values of 8 elements beside keys of 16"),
        ({"tokenizer.ggml.eos_token_id": 100000}, "eos_token_id is 100000, and there are"),
        (
            {"tokenizer.ggml.add_eos_token": True},
            r"add_eos_token = True is not supported \(EOS at the end of every text\)",
        ),
        ({"llama.attention.sliding_window": 512}, r"\(attention with a sliding window\), only 0"),
    ],
)
def test_refused_by_name(changes, problem, tmp_path):
    write_gguf(tmp_path / "m.gguf", changes=changes)
    with pytest.raises(UserError, match=problem):
        gguf_source(GgufFile(tmp_path / "m.gguf"))


def test_big_endian_and_unknown_tensors(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"is big-endian, which is not read \(`gguf-convert-endian"):
        GgufFile(tmp_path / "b.gguf")
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes().replace(b"attn_norm", b"attn_mist", 1)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"tensor blk\.0\.attn_mist\.weight does not belong to a 2-block model"):
        gguf_source(GgufFile(tmp_path / "m.gguf"))


def test_other_formats_name_the_command(tmp_path):
    """The message for a format that cannot be run names the command that converts it."""
    write_gguf(tmp_path / "m.gguf", kind="MXFP4")
    with pytest.raises(UserError, match=r"is MXFP4; layers may be .* \(python -m sw\.quantize makes a model"):
        resolve_model(tmp_path / "m.gguf")


def test_special_tokens_of_phi_3(tmp_path):
    """By the name of the model, as in llama.cpp: most special tokens take the white space after them."""
    scores = {"tokenizer.ggml.scores": [-float(i) for i in range(len(TOKENS))]} | START
    found = {}
    for name in ("Phi-3 mini", "Llama 2"):
        write_gguf(tmp_path / "m.gguf", tokenizer="llama", changes=scores | {"general.name": name})
        found[name] = raw_ids(tmp_path / "m.gguf", "<|im_end|> \n<|im_end|>")
    assert found["Phi-3 mini"] == [BOS, len(TOKENS) - 1, len(TOKENS) - 1]
    assert len(found["Llama 2"]) > 3


def test_unknown_token_in_a_text(tmp_path):
    """The unknown token's own text is this token, as in llama.cpp, and not its letters."""
    unknown = TOKENS.index("ab")
    types = [2 if number == unknown else 1 for number in range(len(TOKENS))]
    changes = {"tokenizer.ggml.scores": [0.0] * len(TOKENS), "tokenizer.ggml.unknown_token_id": unknown} | START
    write_gguf(tmp_path / "m.gguf", tokenizer="llama", changes=changes)
    model = GgufFile(tmp_path / "m.gguf")
    model._fields["tokenizer.ggml.token_type"] = types
    assert read_gguf_tokenizer(model).tokenizer.encode("ab").ids == [BOS, unknown]


def test_end_tokens(tmp_path):
    """Tokens that llama.cpp recognises by their text end an answer, and are not shown."""
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes().replace(b"<|im_start|>", b"<|file_sep|>")
    (tmp_path / "m.gguf").write_bytes(data)
    text = read_gguf_tokenizer(GgufFile(tmp_path / "m.gguf"))
    assert set(text.stop_ids) == {len(TOKENS) - 2, len(TOKENS) - 1}
    assert text.tokenizer.decode(text.stop_ids, skip_special_tokens=True) == ""


def test_docs_list_every_pre_tokenizer():
    text = (ROOT / "docs" / "models.md").read_text()
    assert not [name for name in PRE_TOKENIZERS if f"`{name}`" not in text]
