# SPDX-License-Identifier: Apache-2.0
"""The files beside a model.onnx that describe its text: tokenizer, chat template, tokens that end an answer.

    tokenizer.json           the tokenizer, as Hugging Face's tokenizers package writes it
    config.json              eos_token_id, bos_token_id, max_position_embeddings; chat_template in exports of
                             sw.gguf_export
    generation_config.json   eos_token_id
    genai_config.json        model.eos_token_id and model.context_length, as onnxruntime-genai's builder writes it
    tokenizer_config.json    chat_template, bos_token, eos_token and other special tokens, as transformers writes it
    special_tokens_map.json  special tokens, as older versions of transformers wrote it
    chat_template.jinja      the chat template, as current versions of transformers write it
Only tokenizer.json is required.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from sw.common.errors import UserError, one_line
from sw.common.text_files import WARNINGS, read_json, read_text, text_directory
from sw.text.chat_template import ChatTemplate

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
"""Values of tokenizer_class for which transformers uses add_bos_token."""
INCOMPLETE = "\ufffd"
"""A tokenizer decodes the first bytes of a character to this while the rest is missing."""


class TextFolder:
    """The folder of a model.onnx.

    Members
    -------
    tokenizer: text to token ids and back.
    stop_ids: tokens that end an answer, from all files that name some; may be empty.
    context: maximum number of tokens of one sequence, the smallest that a file names; None if no file names it.
    warnings: messages for the user, one line each.
    template: the chat template, or None. chat_template.jinja is preferred to tokenizer_config.json (as in
        transformers), and tokenizer_config.json to config.json.

    Raises UserError if there is no tokenizer or a file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{self.folder} has no tokenizer.json, and a model's text needs one")
        self.tokenizer = read_tokenizer(path)
        files = ("config", "generation_config", "genai_config", "special_tokens_map", "tokenizer_config")
        config, generation, genai, special, tokens = (read_json(self.folder / f"{name}.json") for name in files)
        model = genai.get("model")
        apply_settings(self.tokenizer, special | tokens, self.folder / "tokenizer_config.json")
        self._config, self._generation, self._tokens = config, generation, special | tokens
        self._genai: dict[str, Any] = model if isinstance(model, dict) else {}
        self._special = {name: text for name in SPECIAL_TOKENS if (text := self._special_token(name)) is not None}
        self.stop_ids = self._stop_ids()
        self.context = self._context()
        warnings = config.get(WARNINGS)
        self.warnings = [str(text) for text in warnings] if isinstance(warnings, list) else []
        self.template = self._template()

    def prompt_ids(self, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
        """Token ids of one user message, up to the beginning of the answer.

        With a chat template, the template's text contains all special tokens. The tokenizer adds none, so that the
        first token of a sequence is never doubled. Without a template, or if `raw`, the model continues the prompt
        itself; the tokenizer then adds the tokens that it adds to any text, unless the prompt begins with them already.
        system: a system message before it. Raises UserError if the template refuses the messages, for a system
        message without a template, and for text that is not valid Unicode.
        """
        template = None if raw else self.template
        if template is None:
            if system is not None:
                why = "--raw uses none" if raw else f"{self.folder} has none"
                raise UserError(f"a system message needs a chat template, and {why}")
            return self._encode_plain(prompt)
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = encode(self.tokenizer, template.render(messages, self._special), False)
        if not ids:
            raise UserError(
                f"the prompt is empty: the chat template in {template.path} renders nothing (--raw uses none)"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """See TextStream."""
        return TextStream(self.decode)

    def beginning(self) -> list[int]:
        """The tokens that the tokenizer puts before every text (usually BOS); may be empty."""
        added, alone = encode(self.tokenizer, "a", True), encode(self.tokenizer, "a", False)
        # Some tokenizers also put tokens after a text.
        starts = (start for start in range(len(added)) if alone and added[start:][: len(alone)] == alone)
        return added[: next(starts, 0)]

    def _encode_plain(self, text: str) -> list[int]:
        first = self.beginning()
        plain = encode(self.tokenizer, text, False)
        return plain if first and plain[: len(first)] == first else encode(self.tokenizer, text, True)

    def _special_token(self, name: str) -> str | None:
        """A special token's text. Files give it as text, as an object with content, or by its id in config.json."""
        if name in self._tokens:
            value = self._tokens[name]
            value = value.get("content") if isinstance(value, dict) else value
            return value if isinstance(value, str) else None
        number = self._config.get(f"{name}_id")
        if isinstance(number, list):
            number = next(iter(number), None)
        return self.tokenizer.id_to_token(number) if isinstance(number, int) and _is_id(number) else None

    def _stop_ids(self) -> frozenset[int]:
        found: set[int] = set()
        files = {"config.json": self._config, "generation_config.json": self._generation}
        for name, values in {**files, "genai_config.json": self._genai}.items():
            value = values.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(map(_is_id, ids)):
                path = self.folder / name
                raise UserError(f"{path}: eos_token_id is a token id or a list of them, not {str(value)[:80]}")
            found |= set(ids)
        eos = self._special.get("eos_token")
        number = None if eos is None else self.tokenizer.token_to_id(eos)
        return frozenset(found if number is None else found | {number})

    def _context(self) -> int | None:
        found = []
        places = (("config.json", self._config, "max_position_embeddings"),)
        for name, values, key in (*places, ("genai_config.json", self._genai, "context_length")):
            value = values.get(key)
            if value is not None:
                if not _is_id(value) or value < 1:
                    raise UserError(f"{self.folder / name}: {key} is a number of tokens, not {str(value)[:80]}")
                found.append(value)
        return min(found, default=None)

    def _template(self) -> ChatTemplate | None:
        path = self.folder / "chat_template.jinja"
        if path.exists():
            return ChatTemplate(read_text(path), path)
        for name, values in (("tokenizer_config.json", self._tokens), ("config.json", self._config)):
            text, path = values.get("chat_template"), self.folder / name
            if isinstance(text, list):
                text = _default_template(text, path)
            if text is not None:
                return ChatTemplate(text, path)
        return None


class TextStream:
    """The text of tokens that come one by one: it only grows, and never contains part of a character.

    decode: token ids to text. A window of the last tokens is decoded with and without the new ones, because the text
    of a token may depend on its neighbours; the first part of the window was shown before. (tokenizers' own
    DecodeStream raises an exception if bytes that are not UTF-8 follow a character made of byte tokens.)
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._shown: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that a token completes; empty while a character is incomplete."""
        self._new.append(token)
        return self._take(False)

    def finish(self) -> str:
        """The text that was held back: bytes of a character that no further token completes."""
        return self._take(True)

    def _take(self, everything: bool) -> str:
        shown, text = self._decode(self._shown), self._decode(self._shown + self._new)
        if len(text) <= len(shown) or (text.endswith(INCOMPLETE) and not everything):
            return ""
        self._shown, self._new = self._new, []
        return text[len(shown) :]


def open_text(model: Path) -> TextFolder:
    """The text files of an ONNX file; prints their warnings on stderr.

    Raises UserError as TextFolder does.
    """
    folder = TextFolder(text_directory(model))
    for text in folder.warnings:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return folder


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without truncation and padding. Raises UserError for a damaged file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def apply_settings(tokenizer: Tokenizer, values: Mapping[str, Any], path: Path) -> bool:
    """Applies settings of tokenizer_config.json to the tokenizer, as transformers does. Returns whether it changed.

    For Llama's tokenizer classes add_bos_token decides whether BOS begins a text; for others tokenizer.json decides.
    Raises UserError for settings that would change tokens and are not supported.
    """
    if values.get("split_special_tokens"):
        raise UserError(f"{path}: split_special_tokens is not supported: special tokens in a text are single tokens")
    if values.get("tokenizer_class") not in LLAMA_CLASSES:
        return False
    if values.get("add_eos_token"):
        raise UserError(f"{path}: add_eos_token is not supported: an answer would follow the end of the text")
    wanted, text = values.get("add_bos_token"), values.get("bos_token")
    text = text.get("content") if isinstance(text, dict) else text
    if not isinstance(wanted, bool) or not isinstance(text, str):
        return False
    bos = tokenizer.token_to_id(text)
    starts = [number for number in encode(tokenizer, "a", True)[:1] if number == bos]
    if bos is None or wanted == bool(starts):
        return False
    begin_with(tokenizer, text if wanted else None, bos)
    return True


def begin_with(tokenizer: Tokenizer, text: str | None, number: int) -> None:
    """Makes every text begin with a token, given by its text and its id; with no token if the text is None."""
    # The token has the name BEGIN here, because a $ in the token's own text would mean a variable.
    pieces = [{"id": "BEGIN", "ids": [number], "tokens": [text or ""]}]
    single = ["$A"] if text is None else ["BEGIN", "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text; the text of a special token becomes that special token.

    Raises UserError for text that is not valid Unicode or for which the tokenizer has no tokens.
    """
    try:
        text.encode()
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except UnicodeEncodeError:
        raise UserError("the text is not UTF-8") from None
    except Exception as error:
        raise UserError(f"the tokenizer refuses the text ({one_line(error)})") from None


def _default_template(templates: list, path: Path) -> str:
    """Chooses one of several named templates, as transformers does; a single template needs no name."""
    named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
    text = next(iter(named.values())) if len(named) == 1 else named.get("default")
    if text is None:
        names = ", ".join(map(str, named)) or "none"
        raise UserError(f"{path}: of several chat templates one is named default, and here are {names}")
    return text


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
