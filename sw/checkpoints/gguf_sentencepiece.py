# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece tokenizer from a GGUF file (tokenizer.ggml.model "llama") as a Hugging Face tokenizers object.

Source: src/llama-vocab.cpp of llama.cpp. Text becomes pieces of one character; of all neighbours that make a token
together, the pair whose token has the highest score is joined, again and again. A piece that is no token becomes the
tokens of its bytes, <0xE2> and so on. Spaces are written as U+2581, and one stands before the text. As merges in the
order of the scores this is a BPE model, as transformers converts it too.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "\u2581"


def sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], mergeable: Sequence[bool], unknown: str | None, prefix: bool
) -> Tokenizer:
    """The tokenizer, special tokens not added yet.

    scores: of each token, the highest first. mergeable: whether a token can be a piece of text; control tokens and
    those of bytes cannot. unknown: the token for what has no other, not even of bytes. prefix: whether a space stands
    before the text.
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
    """Every pair of tokens that makes a token, by falling score of what it makes; of equal ones the longer first part
    first.
    """
    pairs = [
        (score, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1])))
    return [(first, second) for _, first, second in pairs]
