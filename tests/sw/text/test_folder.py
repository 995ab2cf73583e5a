# SPDX-License-Identifier: Apache-2.0
"""Prompts become the tokens that a model expects, for all places of settings, and streamed text is complete."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sw.common.errors import UserError
from sw.common.text_files import read_text
from sw.text.chat_template import ChatTemplate
from sw.text.folder import TextFolder

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS, END = 257, 258, 259
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "naïve café 日本語 😀 👩‍👩‍👧 \u0301x\ufffd done"


def byte_level(bos=False):
    """Bytes and one merge, with three special tokens; `bos`: the tokenizer puts <s> before every text."""
    vocab = {letter: index for index, letter in enumerate(ALPHABET)} | {"ab": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text) for text in ("<s>", "</s>", "<|end|>")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def byte_fallback():
    """Words in SentencePiece's form, and a token for each byte of any other text."""
    vocab = {"<unk>": 0, "▁": 1, "▁Hello": 2, "lo": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[arg-type]
    return tokenizer


def folder(path, tokenizer=None, template=None, **files):
    """A folder with a tokenizer and JSON files."""
    (tokenizer or byte_level()).save(str(path / "tokenizer.json"))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return TextFolder(path)


def decoded(found, ids):
    """The tokens' text, including special tokens."""
    return found.tokenizer.decode(ids, skip_special_tokens=False)


def test_chat_template(tmp_path):
    found = folder(tmp_path, template=CHAT, config={"bos_token_id": BOS})
    ids = found.prompt_ids("Hi", "Be kind.")
    assert decoded(found, ids) == "<s><system>Be kind.<|end|><user>Hi<|end|><assistant>"
    # The text of a special token in a template becomes that token.
    assert (ids[0], ids.count(END), ids.count(BOS)) == (BOS, 2, 1)
    assert decoded(found, found.prompt_ids("Hi")) == "<s><user>Hi<|end|><assistant>"
    assert decoded(found, found.prompt_ids("Hi", raw=True)) == "Hi"


@pytest.mark.parametrize("writes", [True, False], ids=["template writes BOS", "template does not"])
def test_beginning_is_not_doubled(writes, tmp_path):
    template = CHAT if writes else CHAT.removeprefix("{{ bos_token }}")
    found = folder(tmp_path, byte_level(bos=True), template, config={"bos_token_id": BOS})
    # With a template, only the template decides which special tokens there are.
    assert found.prompt_ids("Hi").count(BOS) == writes
    assert decoded(found, found.prompt_ids("Hi", raw=True)) == "<s>Hi"
    assert decoded(found, found.prompt_ids("<s>Hi", raw=True)) == "<s>Hi"
    assert found.beginning() == [BOS]


def test_beginning(tmp_path):
    assert folder(tmp_path).beginning() == []
    tokenizer = byte_level()
    pieces = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> <s> $A </s>", special_tokens=pieces)
    assert folder(tmp_path, tokenizer).beginning() == [BOS, BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=pieces)
    assert folder(tmp_path, tokenizer).beginning() == []


def test_places_of_the_template(tmp_path):
    """The newest place has priority."""
    tokens = {"chat_template": "from tokens"}
    found = folder(tmp_path, config={"chat_template": "from config"})
    assert decoded(found, found.prompt_ids("Hi")) == "from config"
    found = folder(tmp_path, tokenizer_config=tokens)
    assert decoded(found, found.prompt_ids("Hi")) == "from tokens"
    found = folder(tmp_path, template="from file")
    assert decoded(found, found.prompt_ids("Hi")) == "from file"


@pytest.mark.parametrize("place", ["config", "tokenizer_config"])
def test_no_template(place, tmp_path):
    found = folder(tmp_path, **{place: {"chat_template": None}})
    assert decoded(found, found.prompt_ids("Hi")) == "Hi"
    with pytest.raises(UserError, match=r"a system message needs a chat template, and .* has none"):
        found.prompt_ids("Hi", "Be kind.")


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    found = folder(tmp_path, tokenizer_config={"chat_template": named})
    assert decoded(found, found.prompt_ids("Hi")) == "plain"
    found = folder(tmp_path, tokenizer_config={"chat_template": named[:1]})
    assert decoded(found, found.prompt_ids("Hi")) == "tools"
    for templates, names in (
        ([named[0], {"name": "rag", "template": ""}], "tool_use, rag"),
        ([], "none"),
        ([1], "none"),
    ):
        with pytest.raises(UserError, match=f"one is named default, and here are {names}"):
            folder(tmp_path, tokenizer_config={"chat_template": templates})


RENDERED = {
    "block lines take no room": ("  {% if true %}\nyes\n  {% endif %}\nno", "yes\nno"),
    "loop controls": ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    "generation": ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
    "tojson": ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
    "tojson indented": ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
    "strftime_now": ("{{ strftime_now('%Y')[:2] }}", "20"),
    "no tools": ("{% if tools is none and documents is none %}none{% endif %}", "none"),
    "unknown names": ("[{{ thinking }}]", "[]"),
    "special tokens": ("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}", "<s></s>pad"),
}


@pytest.mark.parametrize(("template", "expected"), RENDERED.values(), ids=RENDERED)
def test_rendered(template, expected, tmp_path):
    """Templates are rendered as in transformers."""
    tokens = {"eos_token": {"content": "</s>", "lstrip": False}, "unk_token": None, "pad_token": "pad"}
    found = folder(tmp_path, template=template, config={"bos_token_id": BOS}, tokenizer_config=tokens)
    assert decoded(found, found.prompt_ids("Hi")) == expected


def test_special_token_that_is_none(tmp_path):
    """Null in tokenizer_config.json means no token; config.json's id is used only if the key is missing."""
    files = {"template": "[{{ bos_token }}]", "config": {"bos_token_id": BOS}}
    found = folder(tmp_path, tokenizer_config={}, **files)
    assert decoded(found, found.prompt_ids("Hi")) == "[<s>]"
    found = folder(tmp_path, tokenizer_config={"bos_token": None}, **files)
    assert decoded(found, found.prompt_ids("Hi")) == "[]"


def test_stop_tokens(tmp_path):
    """All tokens that any file names are stop tokens."""
    assert folder(tmp_path).stop_ids == set()
    assert folder(tmp_path, config={"eos_token_id": EOS}).stop_ids == {EOS}
    assert folder(tmp_path, generation_config={"eos_token_id": [1, END]}).stop_ids == {EOS, 1, END}
    assert folder(tmp_path, genai_config={"model": {"eos_token_id": [7]}}).stop_ids == {EOS, 1, END, 7}
    assert folder(tmp_path, config={}, genai_config={}, tokenizer_config={"eos_token": "ab"}).stop_ids == {1, END, 256}


def test_context(tmp_path):
    assert folder(tmp_path).context is None
    assert folder(tmp_path, config={"max_position_embeddings": 64}).context == 64
    assert folder(tmp_path, genai_config={"model": {"context_length": 48}}).context == 48
    assert folder(tmp_path, genai_config={"model": {"context_length": 99}}).context == 64


def test_tokenizer_does_not_truncate(tmp_path):
    """Truncation and padding in a tokenizer.json are for training, and are ignored."""
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    found = folder(tmp_path, tokenizer)
    assert [len(found.prompt_ids("x" * length)) for length in (1, 100)] == [1, 100]


def streamed(found, ids):
    """The text of tokens, piece by piece; each piece is checked to be complete text."""
    stream, pieces = found.stream(), []
    for token in ids:
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1] or "\ufffd" in found.decode(ids)
    return [*pieces, stream.finish()]


def test_stream_of_bytes(tmp_path):
    """Every token is a byte: a character appears with its last byte."""
    found = folder(tmp_path)
    text = TEXT.replace("\ufffd", "")
    ids = found.prompt_ids(text)
    pieces = streamed(found, ids)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    # A replacement character in the model's own text is shown; it may come one token late.
    assert "".join(streamed(found, found.prompt_ids(TEXT))) == TEXT


def test_stream_of_random_tokens(tmp_path):
    """Random tokens, most of them not UTF-8, and some of them special."""
    found = folder(tmp_path)
    rng = np.random.default_rng(3)
    for _ in range(200):
        ids = rng.integers(0, 261, rng.integers(1, 40)).tolist()
        assert "".join(streamed(found, ids)) == found.decode(ids)


def test_stream_of_words(tmp_path):
    """Text that depends on neighbours: the first word has no space before it, and bytes are tokens."""
    found = folder(tmp_path, byte_fallback())

    def fallback(text):
        return [4 + byte for byte in text.encode()]

    ids = [2, 2, 3, 1, *fallback("é€😀"), 2, *fallback("ü")]
    pieces = streamed(found, ids)
    assert pieces[:3] == ["Hello", " Hello", "lo"]
    assert "".join(pieces) == found.decode(ids) == "Hello Hellolo é€😀 Helloü"


def test_stream_continues_after_bad_bytes(tmp_path):
    """The decoder removes a character if the next byte belongs to no character; text that was shown is kept."""
    found = folder(tmp_path, byte_fallback())
    pieces = streamed(found, [4 + 0xC3, 4 + 0xA9, 4 + 0xE2, 3, 2])
    assert pieces[:3] == ["", "é", ""]
    assert "".join(pieces).startswith("é")
    assert "".join(pieces).endswith("lo Hello")
    # The end of the text is not lost either.
    assert streamed(found, [2, 4 + 0xE2]) == ["Hello", "", "\ufffd"]


def test_unknown_tokens(tmp_path):
    """A model's vocabulary may be larger than its tokenizer's: a token without text adds no text."""
    found = folder(tmp_path)
    assert streamed(found, [9999, 0, 5000]) == ["", ALPHABET[0], "", ""]


def test_read_text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("é\r\n".encode())
    assert read_text(path) == "é\r\n"
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="text is not UTF-8"):
        read_text(path)
    for name in (tmp_path / "missing", tmp_path, "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            read_text(name)


DAMAGED = {
    "no tokenizer": ("tokenizer.json", None, "has no tokenizer.json, and a model's text needs one"),
    "tokenizer": ("tokenizer.json", "{", r"tokenizer\.json cannot be read \(.*\)"),
    "other tokenizer": ("tokenizer.json", '{"version": "1.0"}', r"tokenizer\.json cannot be read \(.*\)"),
    "no JSON": ("config.json", "{", r"config\.json is not JSON"),
    "no object": ("generation_config.json", "[1]", r"generation_config\.json is not a JSON object"),
    "deep": ("config.json", "[" * 100_000, r"config\.json is not JSON"),
    "no text": ("config.json", "\udcff", r"config\.json is not UTF-8"),
    "stop token": (
        "config.json",
        '{"eos_token_id": "</s>"}',
        r"config\.json: eos_token_id is a token id or .*, not </s>",
    ),
    "stop tokens": (
        "genai_config.json",
        '{"model": {"eos_token_id": [1, -2]}}',
        r"genai_config\.json: eos_token_id .*",
    ),
    "context": (
        "config.json",
        '{"max_position_embeddings": 0}',
        r"max_position_embeddings is a number of tokens, not 0",
    ),
    "template": ("chat_template.jinja", "{% if %}", r"chat_template\.jinja: the chat template is damaged \(.*\)"),
    "template's type": ("config.json", '{"chat_template": {"a": 1}}', r"config\.json: the chat template is not text"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged(name, content, message, tmp_path):
    folder(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as refused:
        TextFolder(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


REFUSES = {
    "its own refusal": ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    "undefined": ("{{ messages[5].content + 1 }}", "list object has no element 5"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", ".*unsafe.*"),
    "immutable": ("{{ messages.append(1) }}", ".*"),
    "large": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big.*"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
}


@pytest.mark.parametrize(("template", "message"), REFUSES.values(), ids=REFUSES)
def test_template_refuses(template, message, tmp_path):
    found = folder(tmp_path, template=template)
    with pytest.raises(UserError, match=rf"chat_template\.jinja: the chat template refuses the messages \({message}\)"):
        found.prompt_ids("Hi")


def test_no_unicode(tmp_path):
    """Python represents argument bytes that are not UTF-8 like this."""
    with pytest.raises(UserError, match="the text is not UTF-8"):
        folder(tmp_path).prompt_ids("caf\udce9")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after 2,000,000"),
        ("{% macro f() %}{% for a in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}", "template"),
        ("{{ 'a' * 10000000000 }}", "repeats a value 10000000000 times"),
        ("{{ 10 * ([0] * 999999) }}", "repeats a value 10 times"),
        ("{{ 9 ** 999999999 }}", r"computes 9 \*\* 999999999"),
    ],
)
def test_template_without_end(template, problem, tmp_path):
    with pytest.raises(UserError, match=problem) as error:
        ChatTemplate(template, tmp_path / "t").render([{"role": "user", "content": "hi"}], {})
    assert "\n" not in str(error.value)
