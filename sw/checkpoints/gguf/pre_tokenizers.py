# SPDX-License-Identifier: Apache-2.0
"""The patterns with which byte-level BPE tokenizers of GGUF files split text, by the value of tokenizer.ggml.pre.

Source: src/llama-vocab.cpp of llama.cpp. A text is split by each pattern in turn. Both the matches of a pattern and the
text between two matches are pieces for the next pattern.
"""

from dataclasses import dataclass, replace

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
HAN = r"[一-龥぀-ゟ゠-ヿ]+"


def _qwen2(numbers: str) -> str:
    return rf"{CONTRACTIONS}|{WORDS}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def _cased(numbers: str, ending: str = "") -> str:
    """Words are split between a lower-case letter and an upper-case letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{UPPER}*{LOWER}+{ending}|{start}{UPPER}+{LOWER}*{ending}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """A way of splitting, and llama.cpp's settings for the tokenizers that use it.

    patterns: regular expressions (Oniguruma). ignore_merges: a word that is in the vocabulary becomes this token, even
    if the merges give another result. add_bos: a text begins with BOS if the file has no add_bos_token. nfc: text is
    normalised first, as Hugging Face does for this tokenizer; llama.cpp expects normalised text.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2 = PreTokenizer((GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", GPT2))
_QWEN2 = PreTokenizer((_qwen2(r"\p{N}"),))
_THREES = PreTokenizer((_qwen2(r"\p{N}{1,3}"),))
_LLAMA3 = replace(_THREES, ignore_merges=True, add_bos=True)
_TEKKEN = PreTokenizer((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True)
_GPT4O = PreTokenizer((_cased(r"\p{N}{1,3}", CONTRACTIONS + "?"),))
_DEEPSEEK3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        HAN,
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
    )
)
_DEEPSEEK_CODER = PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"))
_QWEN35 = PreTokenizer(
    (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",)
)
_MINICPM5 = PreTokenizer((r"\p{N}{1,3}", _qwen2(r"\p{N}+")), ignore_merges=True)
_SEED_CODER = PreTokenizer((rf"{CONTRACTIONS}|{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",))
_BAILING = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)
_FALCON = PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"))

_NAMES: dict[PreTokenizer, tuple[str, ...]] = {
    _DEFAULT: ("default",),
    _GPT2: ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "olmo", "jais", "trillion", "mpt"),
    _DIGITS: ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    replace(_QWEN2, nfc=True): ("qwen2",),
    _QWEN2: ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    _LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    _THREES: ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"),
    _TEKKEN: ("tekken",),
    _GPT4O: ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    _DEEPSEEK3: ("deepseek-v3", "hunyuan-dense"),
    _DEEPSEEK_CODER: ("deepseek-coder",),
    _FALCON: ("falcon",),
    _QWEN35: ("qwen35",),
    _MINICPM5: ("minicpm5",),
    _SEED_CODER: ("seed-coder",),
    _BAILING: ("bailingmoe", "bailingmoe2", "llada-moe"),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for kind, names in _NAMES.items() for name in names}
"""Value of tokenizer.ggml.pre -> its way of splitting."""
