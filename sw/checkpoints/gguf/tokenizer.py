# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a GGUF file as a Hugging Face tokenizers object: byte-level BPE or SentencePiece.

Source: src/llama-vocab.cpp of llama.cpp, also for the token that begins a text and the tokens that end an answer.
"""

from dataclasses import dataclass, field

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sw.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from sw.checkpoints.gguf.reader import GgufFile
from sw.checkpoints.gguf.sentencepiece import sentencepiece
from sw.common.errors import UserError
from sw.text.folder import begin_with

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
END_TOKENS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<|flush|>",
        "<|calls|>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    }
)
"""Texts of tokens that always end an answer in llama.cpp, independent of the metadata."""
FILL_TOKENS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Tokens of models that fill gaps in code, by key or by text; they end an answer, too."""

STRIPPING = ("phi-3", "phi3")
"""Parts of general.name of models whose special tokens take the white space after them, as in llama.cpp."""
NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of these models that do not."""


@dataclass
class GgufTokenizer:
    """A GGUF file's tokenizer and special tokens.

    Members
    -------
    tokenizer: text to token ids; a text begins with BOS if it does so in llama.cpp.
    tokens: the text of each token.
    bos_id: the token that begins a text; None if the file names none.
    stop_ids: tokens that end an answer, first those that the metadata declares.
    warnings: messages for the user, one line each.
    """

    tokenizer: Tokenizer
    tokens: list[str]
    bos_id: int | None
    stop_ids: list[int]
    warnings: list[str] = field(default_factory=list)

    def text(self, token: int | None) -> str | None:
        """The text of a token; None for no token."""
        return None if token is None else self.tokens[token]


def read_gguf_tokenizer(source: GgufFile) -> GgufTokenizer:
    """The tokenizer of a file.

    Raises UserError for tokenizers other than byte-level BPE and SentencePiece, for unknown ways of splitting text into
    words, and for damaged metadata.
    """
    kind = source.meta("tokenizer.ggml.model")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        known = f"{BYTE_LEVEL!r} (byte-level BPE) and {SENTENCEPIECE!r} (SentencePiece) are"
        raise UserError(f"{source.path}: tokenizer {str(kind)[:80]!r} is not supported, {known}")
    tokens, types = _tokens(source)
    warnings: list[str] = []
    if kind == SENTENCEPIECE:
        tokenizer, add_bos, default_bos, default_eos = _sentencepiece(source, tokens, types), True, 1, 2
    else:
        words = _words(source, warnings)
        tokenizer, add_bos, default_bos, default_eos = _byte_level(source, tokens, words), words.add_bos, None, None
    stop_ids = _stop_ids(source, tokens, default_eos)
    ends = set(stop_ids)
    strips = any(word in str(source.meta("general.name", "")).lower() for word in STRIPPING)
    added = []
    for number, (token, token_type) in enumerate(zip(tokens, types)):
        is_special = token_type in (CONTROL, UNKNOWN) or number in ends
        if is_special or token_type == USER_DEFINED:
            rstrip = strips and token not in NOT_STRIPPING
            added.append(AddedToken(token, special=is_special, normalized=False, rstrip=rstrip))
    # All in one call: each call builds the search for added tokens again.
    tokenizer.add_tokens(added)
    bos = _token_id(source, "bos", len(tokens), default_bos)
    if source.meta("tokenizer.ggml.add_bos_token", add_bos):
        if bos is None:
            raise UserError(
                f"{source.path}: a text begins with BOS, and metadata tokenizer.ggml.bos_token_id is missing"
            )
        begin_with(tokenizer, tokens[bos], bos)
    return GgufTokenizer(tokenizer, tokens, bos, stop_ids, warnings)


def _byte_level(source: GgufFile, tokens: list[str], words: PreTokenizer) -> Tokenizer:
    merges = [(one, other) for one, _, other in (pair.partition(" ") for pair in source.texts("tokenizer.ggml.merges"))]
    vocab = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words.ignore_merges))
    except Exception as error:
        raise UserError(f"{source.path}: the tokenizer's merges do not fit its tokens ({error})") from error
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words(source: GgufFile, warnings: list[str]) -> PreTokenizer:
    name = source.meta("tokenizer.ggml.pre", None)
    if name is None:
        warnings.append(
            f"{source.path.name} does not say how its tokenizer splits text (tokenizer.ggml.pre): it is split as"
            " llama.cpp's default does, which may not be what the model was trained on"
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{source.path}: pre-tokenizer {str(name)[:80]!r} is not supported (docs/models.md lists those that are)"
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece(source: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    # Without scores, all scores are equal, as in llama.cpp.
    scores = source.meta("tokenizer.ggml.scores", [0.0] * len(tokens))
    if not isinstance(scores, list) or len(scores) < len(tokens) or not all(isinstance(s, int | float) for s in scores):
        raise UserError(
            f"{source.path}: metadata tokenizer.ggml.scores is a list of {len(tokens)} numbers, one a token"
        )
    unknown = _token_id(source, "unknown", len(tokens), 0)
    mergeable = [kind not in (UNKNOWN, CONTROL, BYTE) for kind in types]
    prefix = source.meta("tokenizer.ggml.add_space_prefix", True)
    return sentencepiece(tokens, scores[: len(tokens)], mergeable, None if unknown is None else tokens[unknown], prefix)


def _stop_ids(source: GgufFile, tokens: list[str], default_eos: int | None) -> list[int]:
    declared = [_token_id(source, "eos", len(tokens), default_eos)]
    declared += [_token_id(source, name, len(tokens), None) for name in ("eot", "eom")]
    ends = set(END_TOKENS)
    for name, texts in FILL_TOKENS.items():
        declared.append(_token_id(source, name, len(tokens), None))
        # They are found by their text only if the metadata does not give them.
        ends.update(texts if declared[-1] is None else ())
    named = [number for number, token in enumerate(tokens) if token in ends]
    return list(dict.fromkeys([token for token in declared if token is not None] + named))


def _token_id(source: GgufFile, name: str, count: int, default: int | None) -> int | None:
    """A special token's id. Raises UserError if no token has this id."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = source.integer(key, None)
    if value is None:
        return default if default is not None and default < count else None
    if value >= count:
        raise UserError(f"{source.path}: metadata {key} is {value}, and there are {count} tokens")
    return value


def _tokens(source: GgufFile) -> tuple[list[str], list[int]]:
    """All tokens and their types. Raises UserError for two tokens with the same text."""
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(source.texts("tokenizer.ggml.tokens"))]
    types = source.meta("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) < len(tokens):
        found = len(types) if isinstance(types, list) else "no list of"
        raise UserError(f"{source.path}: the tokenizer has {len(tokens)} tokens and {found} token types")
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise UserError(f"{source.path}: the tokenizer has token {twice[:80]!r} twice")
    return tokens, types[: len(tokens)]
