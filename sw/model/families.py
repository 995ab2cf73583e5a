# SPDX-License-Identifier: Apache-2.0
"""The families of decoders that checkpoints may have: their names in files, and what programs can compute of them.

What a family's config.json and metadata mean is in sw.checkpoints.families and sw.export.gguf.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertModules:
    """Names of a checkpoint's modules in a layer.

    router, experts: of the mixture; the number of an expert follows the latter.
    names: gate_proj, up_proj and down_proj of an expert.
    """

    router: str
    experts: str
    names: tuple[str, str, str]


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face.

    Members
    -------
    models: examples of its models, for pages. class_name: transformers' class, in config.json's architectures.
    architecture: general.architecture of GGUF files; several families may have one.
    neighbours: whether the rows of q and k in GGUF files are ordered for a rotation of neighbouring elements.
    bias_keys: keys of config.json that say whether attention and mlp have biases. qkv_bias: q, k and v always have one.
    head_size: elements of a head without head_dim; 0: hidden_size / heads. theta: rotary base if config.json has none.
    tied: whether the head is the embedding if config.json does not say.
    fused: qkv_proj and gate_up_proj are one layer each.
    hybrid_because: the part of the reason that `sw.generate` prints why its graphs have no programs; "" if they have.
    autoawq: whether sw.quantize can write it as an AutoAWQ folder.
    experts: the modules of a layer's experts; None: the family has none.
    """

    models: str
    class_name: str
    architecture: str
    neighbours: bool = False
    bias_keys: tuple[str, ...] = ()
    qkv_bias: bool = False
    head_size: int = 0
    theta: float = 10000.0
    tied: bool = False
    fused: bool = False
    hybrid_because: str = ""
    autoawq: bool = False
    experts: ExpertModules | None = None


ATTENTION_BIAS, MLP_BIAS = "attention_bias", "mlp_bias"
MIXTURE = "a mixture of experts"
FAMILIES = {
    "llama": Family(
        "Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama",
        "LlamaForCausalLM",
        "llama",
        neighbours=True,
        bias_keys=(ATTENTION_BIAS, MLP_BIAS),
        autoawq=True,
    ),
    "qwen2": Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", "qwen2", qkv_bias=True, autoawq=True),
    "qwen3": Family("Qwen3 0.6B to 32B", "Qwen3ForCausalLM", "qwen3", bias_keys=(ATTENTION_BIAS,), head_size=128),
    "mistral": Family("Mistral 7B, Ministral 8B", "MistralForCausalLM", "llama", neighbours=True),
    "ministral": Family("Ministral in transformers 5", "MinistralForCausalLM", "llama", neighbours=True),
    "smollm3": Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "smollm3",
        neighbours=True,
        bias_keys=(ATTENTION_BIAS, MLP_BIAS),
        theta=2e6,
        tied=True,
    ),
    "granite": Family(
        "Granite 3.0 to 3.3", "GraniteForCausalLM", "granite", neighbours=True, bias_keys=(ATTENTION_BIAS, MLP_BIAS)
    ),
    "phi3": Family("Phi-3, Phi-3.5 mini, Phi-4, Phi-4-mini", "Phi3ForCausalLM", "phi3", fused=True),
    "gemma3_text": Family(
        "Gemma 3 270M and 1B",
        "Gemma3ForCausalLM",
        "gemma3",
        bias_keys=(ATTENTION_BIAS,),
        head_size=256,
        tied=True,
        hybrid_because="a norm between o_proj and the residual",
    ),
    "mixtral": Family(
        "Mixtral 8x7B and 8x22B",
        "MixtralForCausalLM",
        "llama",
        neighbours=True,
        theta=1e6,
        hybrid_because=MIXTURE,
        experts=ExpertModules("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    ),
    "qwen3_moe": Family(
        "Qwen3 30B-A3B and 235B-A22B",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        bias_keys=(ATTENTION_BIAS,),
        hybrid_because=MIXTURE,
        experts=ExpertModules("mlp.gate", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ),
}
"""model_type -> its family."""


def of_architecture(architecture: str) -> tuple[str, Family]:
    """The model_type and family of a GGUF architecture; the first if several families have it. Raises KeyError."""
    for name, family in FAMILIES.items():
        if family.architecture == architecture:
            return name, family
    raise KeyError(architecture)


def table() -> list[str]:
    """The families as the lines of a table in Markdown, which docs/models.md has."""
    lines = [
        "| model_type | models | GGUF architecture | checkpoints, packed or float, and GGUF | hybrid | whole token | "
        "`sw.quantize` | AutoAWQ folder |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        whole = "no" if family.hybrid_because else "yes"
        awq = "yes" if family.autoawq else "no"
        lines.append(f"| `{name}` | {family.models} | `{family.architecture}` | yes | yes | {whole} | yes | {awq} |")
    return lines


ARCHITECTURES = tuple(dict.fromkeys(family.architecture for family in FAMILIES.values()))
