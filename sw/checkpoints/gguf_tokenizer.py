# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a GGUF file as a Hugging Face tokenizers object (byte-level BPE)."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sw.checkpoints.gguf_reader import GgufFile
from sw.common.errors import UserError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2 splits numbers into single digits, Llama 3 into threes; the patterns are the same otherwise.
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def build_tokenizer(source: GgufFile) -> Tokenizer:
    """Raises UserError for tokenizers other than byte-level BPE and for unknown ways of splitting text into words."""
    kind = source.meta("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(f"{source.path}: tokenizer {kind!r} is not supported, only byte-level BPE ('gpt2')")
    tokens, types = _tokens(source)
    merges = [(one, other) for one, _, other in (pair.partition(" ") for pair in source.texts("tokenizer.ggml.merges"))]
    vocab = {token: i for i, token in enumerate(tokens)}
    words = str(source.meta("tokenizer.ggml.pre", "default"))
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words == "llama-bpe"))
    except Exception as error:
        raise UserError(f"{source.path}: the tokenizer's merges do not fit its tokens ({error})") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(words, source)
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type == CONTROL, normalized=False)])
    if source.meta("tokenizer.ggml.add_bos_token", False):
        bos = source.integer("tokenizer.ggml.bos_token_id")
        text = special_token(source, bos)
        if text is None:
            raise UserError(f"{source.path}: bos_token_id is {bos}, and there are {len(tokens)} tokens")
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{text} $A", special_tokens=[(text, bos)])
    return tokenizer


def special_token(source: GgufFile, token: int | None) -> str | None:
    """The text of a token; None for no token and for ids that are none."""
    tokens, _ = _tokens(source)
    return tokens[token] if token is not None and token < len(tokens) else None


def stop_tokens(source: GgufFile) -> list[int]:
    """The tokens that end an answer: the declared ones first, then control tokens known to end one."""
    declared = [source.integer(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")]
    tokens, types = _tokens(source)
    known = {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"}
    named = [i for i, (token, kind) in enumerate(zip(tokens, types)) if token in known and kind == CONTROL]
    return list(dict.fromkeys([token for token in declared if token is not None] + named))


def _tokens(source: GgufFile) -> tuple[list[str], list[int]]:
    """All tokens and their types."""
    tokens = source.texts("tokenizer.ggml.tokens")
    types = source.meta("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        found = len(types) if isinstance(types, list) else "no list of"
        raise UserError(f"{source.path}: the tokenizer has {len(tokens)} tokens and {found} token types")
    return tokens, types


def _pre_tokenizer(words: str, source: GgufFile) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel
    if words in ("default", "gpt-2"):
        return byte_level(add_prefix_space=False, use_regex=True)
    if words == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False, use_regex=True)]
        )
    patterns = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
    if words not in patterns:
        known = ", ".join(["default", "gpt-2", "smollm", *patterns])
        raise UserError(f"{source.path}: pre-tokenizer {words!r} is not supported ({known} are)")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(patterns[words]), behavior="isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    )
