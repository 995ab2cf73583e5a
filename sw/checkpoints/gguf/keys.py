# SPDX-License-Identifier: Apache-2.0
"""Every metadata key of a GGUF file that changes what llama.cpp computes: it is honoured, or refused by name.

Source: the keys that src/llama-model.cpp, src/llama-vocab.cpp and src/llama-hparams.h of llama.cpp read for the
supported architectures, and the list of keys in the Python package gguf (gguf.constants.Keys). {arch} stands for
the architecture. A key that is in none of the tables is refused if it begins with the architecture or with
``tokenizer.ggml.``, because llama.cpp reads its settings there. Any other key is a note that no program reads.
"""

from typing import Any

from sw.checkpoints.gguf.reader import GgufFile
from sw.common.errors import UserError

HONOURED = frozenset(
    {
        "general.architecture",
        "general.type",
        "general.name",
        "split.no",
        "split.count",
        "split.tensors.count",
        "{arch}.context_length",
        "{arch}.embedding_length",
        "{arch}.block_count",
        "{arch}.feed_forward_length",
        "{arch}.attention.head_count",
        "{arch}.attention.head_count_kv",
        "{arch}.attention.key_length",
        "{arch}.attention.value_length",
        "{arch}.attention.layer_norm_rms_epsilon",
        "{arch}.rope.dimension_count",
        "{arch}.rope.freq_base",
        "{arch}.rope.scaling.type",
        "{arch}.rope.scaling.factor",
        "{arch}.rope.scale_linear",
        "{arch}.vocab_size",
        "tokenizer.chat_template",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.eom_token_id",
        "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.fim_pad_token_id",
        "tokenizer.ggml.fim_rep_token_id",
        "tokenizer.ggml.fim_sep_token_id",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_space_prefix",
    }
)
"""Keys whose value is used here."""

EXPERTS = ("{arch}.expert_count", "{arch}.expert_used_count", "{arch}.expert_feed_forward_length")
HONOURED_BY: dict[str, tuple[str, ...]] = {
    "llama": EXPERTS[:2],
    "qwen3moe": EXPERTS,
    "granite": (
        "{arch}.attention.scale",
        "{arch}.embedding_scale",
        "{arch}.residual_scale",
        "{arch}.logit_scale",
    ),
    "phi3": (
        "{arch}.attention.sliding_window",
        "{arch}.rope.scaling.original_context_length",
        "{arch}.rope.scaling.attn_factor",
    ),
    "gemma3": (
        "{arch}.attention.sliding_window",
        "{arch}.attention.sliding_window_pattern",
        "{arch}.rope.freq_base_swa",
    ),
}
"""Architecture -> further keys whose value is used in its models."""

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "{arch}.expert_count": ((0,), "mixture-of-experts models"),
    "{arch}.expert_used_count": ((0,), "mixture-of-experts models"),
    "{arch}.tensor_data_layout": (("Meta AI original pth",), "another order of the tensors' rows"),
    "{arch}.use_parallel_residual": ((False,), "attention and MLP side by side"),
    "{arch}.logit_scale": ((0.0, 1.0), "scaled logits"),
    "{arch}.embedding_scale": ((0.0, 1.0), "a scaled embedding"),
    "{arch}.residual_scale": ((0.0, 1.0), "a scaled residual"),
    "{arch}.attn_logit_softcapping": ((0.0,), "soft-capped scores"),
    "{arch}.final_logit_softcapping": ((0.0,), "soft-capped logits"),
    "{arch}.attention.causal": ((True,), "attention to later tokens"),
    "{arch}.attention.clamp_kqv": ((0.0,), "clamped q, k and v"),
    "{arch}.attention.max_alibi_bias": ((0.0,), "ALiBi"),
    "{arch}.attention.scale": ((0.0,), "another scale of scores"),
    "{arch}.attention.sliding_window": ((0,), "attention with a sliding window"),
    "{arch}.attention.temperature_scale": ((0.0,), "scores scaled by position"),
    "{arch}.nextn_predict_layers": ((0,), "layers that predict several tokens"),
    "{arch}.leading_dense_block_count": ((0,), "mixture-of-experts models"),
    "{arch}.pooling_type": ((0,), "embedding models"),
    "{arch}.rope.scaling.attn_factor": ((1.0,), "scores scaled with the rotary embedding"),
    "tokenizer.ggml.add_eos_token": ((False,), "EOS at the end of every text"),
    "tokenizer.ggml.add_sep_token": ((False,), "SEP at the end of every text"),
    "tokenizer.ggml.suppress_tokens": (([],), "tokens that are never chosen"),
}
"""Keys that are supported only with these values, which change nothing, and the meaning of other values."""

NEUTRAL_BY: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "granite": {"{arch}.rope.scaling.finetuned": ((True,), "no rotation")},
}
"""The same for one architecture."""

HARMLESS: dict[str, str] = {
    "general.": "describes the file; general.sampling.* are defaults of llama.cpp's own command lines",
    "tokenizer.huggingface.json": "a copy of the tokenizer, which llama.cpp does not read",
    "tokenizer.chat_template.": "further templates by name; llama.cpp takes the one without a name",
    "tokenizer.chat_templates": "their names",
    "tokenizer.ggml.token_type_count": "of BERT",
    "tokenizer.ggml.seperator_token_id": "of BERT",
    "tokenizer.ggml.cls_token_id": "of BERT",
    "tokenizer.ggml.padding_token_id": "fills batches of several sequences",
    "tokenizer.ggml.mask_token_id": "of masked language models",
    "tokenizer.ggml.remove_extra_whitespaces": "of T5's tokenizer",
    "tokenizer.ggml.precompiled_charsmap": "of T5's tokenizer",
    "tokenizer.ggml.normalizer.": "of BERT's tokenizer",
    "tokenizer.ggml.fim_pre_token_id": "for programs that fill gaps in code",
    "tokenizer.ggml.fim_suf_token_id": "for programs that fill gaps in code",
    "tokenizer.ggml.fim_mid_token_id": "for programs that fill gaps in code",
    "tokenizer.ggml.prefix_token_id": "for programs that fill gaps in code",
    "tokenizer.ggml.suffix_token_id": "for programs that fill gaps in code",
    "tokenizer.ggml.middle_token_id": "for programs that fill gaps in code",
    "{arch}.features_length": "of models with a vocoder",
    "{arch}.attention.layer_norm_epsilon": "of norms with a mean, which these families do not have",
    "{arch}.rope.scaling.finetuned": "a note; llama.cpp prints it",
    "{arch}.rope.scaling.original_context_length": "of YaRN scaling, which is refused by its type",
    "{arch}.rope.scaling.yarn_": "of YaRN scaling, which is refused by its type",
}
"""Keys, or prefixes of keys, that cannot change a result of these families, and the reason."""

TYPES = {"adapter": "a LoRA adapter", "mmproj": "a projector of a vision model", "imatrix": "an importance matrix"}
"""Values of general.type for files that are not a model."""


def check_keys(model: GgufFile, families: tuple[str, ...]) -> None:
    """Raises UserError, with the key and its value, for metadata that would change a result and is not supported.

    families: supported architectures.
    """
    kind = model.meta("general.type", "model")
    if kind != "model":
        raise UserError(f"{model.path} is {TYPES.get(str(kind), f'of type {str(kind)[:40]!r}')}, not a language model")
    family = model.meta("general.architecture")
    if family not in families:
        raise UserError(f"{model.path}: architecture {str(family)[:80]!r} is not supported ({', '.join(families)} are)")
    for key in model.keys:
        if status(key, family) == "refused":
            value = model.meta(key)
            name = general(key, family)
            neutral, meaning = (NEUTRAL | NEUTRAL_BY.get(family, {})).get(name, ((), ""))
            if value not in neutral:
                only = f" ({meaning}), only {' and '.join(map(str, neutral))}" if neutral else ""
                raise UserError(f"{model.path}: metadata {key} = {str(value)[:80]} is not supported{only}")


def general(key: str, family: str) -> str:
    """A key in the form of the tables."""
    return "{arch}." + key.removeprefix(f"{family}.") if key.startswith(f"{family}.") else key


def status(key: str, family: str) -> str:
    """The status of a key: honoured, refused (unless its value is neutral), or harmless."""
    name = general(key, family)
    if name in HONOURED or name in HONOURED_BY.get(family, ()):
        return "honoured"
    if name in NEUTRAL or name in NEUTRAL_BY.get(family, {}):
        return "refused"
    if any(name == known or (name.startswith(known) and known[-1] in "._") for known in HARMLESS):
        return "harmless"
    return "refused" if name.startswith(("{arch}.", "tokenizer.ggml.", "adapter.", "split.")) else "harmless"
