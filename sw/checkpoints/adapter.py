# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of the package PEFT (github.com/huggingface/peft): low-rank updates of linear layers.

Hu et al. 2021 (arXiv 2106.09685): y = W x + (alpha / r) B (A x). A folder holds
    adapter_config.json         peft_type LORA, r, lora_alpha, ...
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, K] and lora_B.weight [N, r]
With use_rslora the factor is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732). rank_pattern and alpha_pattern
have other values for some modules, by the rule of PEFT's get_pattern_key. Which modules are adapted is seen in the
tensors. Settings that change what a layer computes in another way are refused.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sw.checkpoints.packed.patterns import read_pattern
from sw.checkpoints.safetensors_file import FLOATS, SafetensorsFile
from sw.checkpoints.settings import Settings, read_settings
from sw.common.errors import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(r"(.+)\.lora_([AB])(\.default)?\.weight")
INITIALISERS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base's weights as they are; pissa, olora, corda and loftq change them."""
HARMLESS = frozenset(
    {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"}
    | {"eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"}
    | {"layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"}
    | {"peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"}
    | {"target_modules", "task_type", "use_rslora"}
)
"""Settings that are read, or that only training depends on. Others must be absent, null, false or empty."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one module. a: float32 [r, K]. b: float32 [N, r]. factor: what B (A x) is multiplied by."""

    a: np.ndarray
    b: np.ndarray
    factor: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)

    @property
    def weight(self) -> np.ndarray:
        """The update of the module's weight, float32 [N, K]."""
        return (np.float64(self.factor) * self.b @ self.a.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter. path: its folder. layers: module's name, such as model.layers.0.mlp.up_proj -> its update. digest: of
    both files.
    """

    path: Path
    layers: Mapping[str, LowRank]
    digest: str


def read_adapter(folder: Path) -> Adapter:
    """Reads a folder of PEFT. Raises UserError, in one line, for what is missing, damaged or not supported."""
    settings = read_settings(folder / CONFIG, required=True)
    _check(settings)
    file = SafetensorsFile(folder / TENSORS)
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name in file.names:
        match = NAME.fullmatch(name)
        if match is None or not name.startswith(PREFIX):
            raise UserError(f"{file.path}: tensor {name[:80]} is no lora_A or lora_B of a linear layer")
        halves.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = _floats(file, name)
    if not halves:
        raise UserError(f"{file.path} has no tensors")
    ranks, alphas = _pattern_values(settings, "rank_pattern"), _pattern_values(settings, "alpha_pattern")
    layers = {}
    for module, pair in sorted(halves.items()):
        rank = _value(ranks, module, settings.integer("r"))
        alpha = _value(alphas, module, settings.number("lora_alpha"))
        layers[module] = _layer(file, module, pair, int(rank), alpha, settings.flag("use_rslora", False))
    digest = hashlib.sha256((folder / CONFIG).read_bytes() + (folder / TENSORS).read_bytes()).hexdigest()
    return Adapter(folder, layers, digest)


def _check(settings: Settings) -> None:
    if settings.get("peft_type") != "LORA":
        raise settings.wrong("peft_type", '"LORA"')
    for key in ("r", "lora_alpha"):
        if settings.get(key) is None:
            raise settings.wrong(key, "a positive number")
    if settings.get("bias") not in (None, "none"):
        raise settings.wrong("bias", '"none"')
    if settings.get("init_lora_weights") not in INITIALISERS:
        raise settings.wrong("init_lora_weights", "one that keeps the base's weights, as true or gaussian does")
    if settings.flag("fan_in_fan_out", False):
        raise settings.wrong("fan_in_fan_out", "false: it is for weights [K, N]")
    for key in sorted(set(settings.values) - HARMLESS):
        if settings.get(key):
            raise settings.wrong(key, "absent, null or false: it is not supported")


def _pattern_values(settings: Settings, key: str) -> list[tuple[re.Pattern[str], float]]:
    """The patterns of a dictionary, in order, each with its positive number."""
    part = settings.part(key)
    found = []
    for text in part.values:
        read_pattern(settings.path, key, text)
        # PEFT's rule (get_pattern_key); the text was checked without the group around it.
        found.append((re.compile(rf"(.*\.)?({text})$"), part.number(text)))
    return found


def _value(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _floats(file: SafetensorsFile, name: str) -> np.ndarray:
    if file.kind(name) not in FLOATS:
        raise UserError(f"{file.path}: tensor {name} is {file.kind(name)}, not one of {', '.join(FLOATS)}")
    values = np.array(file.tensor(name), np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{file.path}: tensor {name} holds values that are not finite")
    return values


def _layer(
    file: SafetensorsFile, module: str, pair: Mapping[str, np.ndarray], rank: int, alpha: float, rslora: bool
) -> LowRank:
    if missing := {"A", "B"} - pair.keys():
        raise UserError(f"{file.path} has no tensor {PREFIX}{module}.lora_{missing.pop()}.weight")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        shapes = f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}"
        raise UserError(f"{file.path}: layer {module}: {shapes}, and its rank is {rank} in {CONFIG}")
    return LowRank(a, b, alpha / rank**0.5 if rslora else alpha / rank)
