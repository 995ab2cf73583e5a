# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece tokenizer from a GGUF file (tokenizer.ggml.model "llama") as a Hugging Face tokenizers object.

Source: src/llama-vocab.cpp of llama.cpp. Text is split into pieces of one character. Among all neighbouring pieces that
form a token together, the pair whose token has the highest score is joined; this is repeated. A piece that is not a
token becomes the tokens of its bytes, <0xE2> and so on. Spaces are written as U+2581, and there is one before the text.
This equals a BPE model with merges in the order of scores; transformers converts it in the same way.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "\u2581"


def sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], mergeable: Sequence[bool], unknown: str | None, prefix: bool
) -> Tokenizer:
    """The tokenizer, without special tokens.

    scores: the score of each token; a higher score is joined earlier. mergeable: whether a token can be a piece of
    text; control tokens and byte tokens cannot. unknown: the token for text that has no other token, not even byte
    tokens. prefix: whether there is a space before the text.
    """
    vocab = {token: number for number, token in enumerate(tokens)}
    known = {token: score for token, score, able in zip(tokens, scores, mergeable, strict=True) if able}
    model = models.BPE(
        vocab=vocab, merges=_merges(known), unk_token=unknown, fuse_unk=unknown is not None, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that forms a token, by falling score of this token; among equal scores, pairs with a longer
    first part come first.
    """
    pairs = [
        (score, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1])))
    return [(first, second) for _, first, second in pairs]
