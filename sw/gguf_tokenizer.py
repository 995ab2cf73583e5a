# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a GGUF file as a Hugging Face tokenizers object (byte-level BPE)."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sw.errors import UserError
from sw.gguf_reader import GgufFile

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
    tokens: list[str] = source.meta("tokenizer.ggml.tokens")
    types: list[int] = source.meta("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in source.meta("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    words = source.meta("tokenizer.ggml.pre", "default")
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
        bos = int(source.meta("tokenizer.ggml.bos_token_id"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def stop_tokens(source: GgufFile) -> list[int]:
    """The tokens that end an answer: the declared ones first, then control tokens known to end one."""
    declared = [source.meta(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")]
    tokens: list[str] = source.meta("tokenizer.ggml.tokens")
    types: list[int] = source.meta("tokenizer.ggml.token_type", [1] * len(tokens))
    known = {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"}
    named = [i for i, token in enumerate(tokens) if token in known and types[i] == CONTROL]
    return list(dict.fromkeys([int(token) for token in declared if token is not None] + named))


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
