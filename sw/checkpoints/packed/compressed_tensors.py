# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a compressed-tensors checkpoint in the format pack-quantized, without any loss.

Format (the Python package compressed-tensors, compressors/pack_quantized), tensors of one layer with groups of G
features:
    weight_packed int32 [N, ceil(K * bits / 32)]   q[n, k] is in bits `bits * k` and up of row n, from the low bits of
        its first word; 3 bits may begin in one word and end in the next
    weight_scale float [N, ceil(K / G)]; weight_shape int64 [2], the values N and K
    weight_zero_point int32 [ceil(N * bits / 32), ceil(K / G)], if asymmetric   z[n, g] is in bits `bits * n` and up of
        column g; in early versions (0.6): int8 [N, ceil(K / G)], less 2^(bits - 1)
    weight_g_idx int32 [K] with actorder "group" (see sw.checkpoints.packed.order); bias [N] or absent
    w[n, k] = (q[n, k] - z[n, k // G]) * s[n, k // G], where symmetric layers have z = 2^(bits - 1)
Older versions (0.17) store 10 numbers of 3 bits in a word, and 2 free bits. The number of words shows which form a
layer has. Of less than 160 features both may have as many words; the layer is read in the newer form then.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sw.checkpoints.packed.layers import has_words, read_bias
from sw.checkpoints.packed.order import read_order
from sw.checkpoints.packed.targets import Target, Targets, read_targets
from sw.checkpoints.packed.words import (
    MIN_BLOCK,
    WIDTHS,
    WORD_BITS,
    block_size,
    is_group,
    is_width,
    matrix,
    split_groups,
    unpack_rows,
    unpack_separate,
    word_count,
)
from sw.checkpoints.safetensors_file import Checkpoint
from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear

FORMAT = "pack-quantized"
MIXED = "mixed-precision"
"""The folder's format if every group has its own."""
ACTIVATIONS = ("input_activations", "output_activations")
IN_ORDER = (None, False, "weight", "static")
"""Values of actorder with which groups are neighbours. With others there is a g_idx."""
FIXED: dict[str, tuple[object, ...]] = {
    "type": ("int", None),
    "dynamic": (False, None),
    "block_structure": (None,),
}
"""Settings of weights, and the values that are read."""
HARMLESS = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
"""Settings of weights that cannot change a result: of the quantizer, or types that the tensors have themselves."""


@dataclass(frozen=True)
class Scheme:
    """How the layers of one group are packed. group_size: 0 for all of K. ordered: whether there must be a g_idx."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool


@dataclass(frozen=True)
class CompressedFormat:
    """The groups of a folder: which modules have which scheme."""

    targets: Targets[Scheme]

    def is_quantized(self, checkpoint: Checkpoint, name: str) -> bool:
        """By config_groups and ignore. Raises UserError if the tensors contradict them."""
        wanted = self.targets.scheme(name) is not None
        if has_words(checkpoint, name, "weight_packed") != wanted:
            found = "has weight_packed" if not wanted else "has a float weight"
            said = "is a target of config_groups" if wanted else "is ignored or no target of config_groups"
            raise UserError(f"{checkpoint.folder}: layer {name} {found}, and it {said}")
        return wanted

    def read(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear:
        """See LayerFormat."""
        scheme = self.targets.scheme(name)
        assert scheme is not None, "it is quantized"
        words = matrix(checkpoint, f"{name}.weight_packed")
        n, k = _shape(checkpoint, f"{name}.weight_shape")
        older = -(-k // (WORD_BITS // scheme.bits))
        separate = words.shape[1] == older != word_count(k, scheme.bits)
        count = older if separate else word_count(k, scheme.bits)
        group = min(scheme.group_size or k, k)
        scales = checkpoint.floats(f"{name}.weight_scale")
        for what, shape, wanted in (
            ("weight_packed", words.shape, (n, count)),
            ("weight_scale", scales.shape, (n, -(-k // group))),
        ):
            if shape != wanted:
                problem = f"{what} is {list(shape)}, not {list(wanted)}: weight_shape is {[n, k]}"
                raise _wrong(checkpoint, name, f"{problem}, of {scheme.bits} bits in groups of {group}")
        zero_points = _zero_points(checkpoint, name, scheme, scales.shape, separate)
        if scheme.ordered and f"{name}.weight_g_idx" not in checkpoint:
            raise UserError(f"{checkpoint.folder} has no tensor {name}.weight_g_idx, and actorder needs it")
        order, group = read_order(checkpoint, f"{name}.weight_g_idx", k, group, scales.shape[1])
        block = block_size(k, group)
        scales, zero_points = (split_groups(values[:, order], k, group, block) for values in (scales, zero_points))
        q = np.ascontiguousarray(_unpack(words, scheme.bits, separate)[:, :k])
        return QuantizedLinear(name, q, scales, zero_points, block, scheme.bits, read_bias(checkpoint, name))


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    values = checkpoint.integers(name, ("I64", "I32"))
    if values.shape != (2,) or values.min() < 1:
        raise UserError(f"{checkpoint.folder}: tensor {name} is {str(values.tolist())[:80]}, not a layer's shape")
    return int(values[0]), int(values[1])


def _unpack(words: np.ndarray, bits: int, separate: bool) -> np.ndarray:
    return unpack_separate(words, bits) if separate else unpack_rows(words, bits)


def _zero_points(
    checkpoint: Checkpoint, name: str, scheme: Scheme, shape: tuple[int, ...], separate: bool
) -> np.ndarray:
    """uint8 [N, groups]. separate: whether every word holds whole numbers."""
    tensor, middle = f"{name}.weight_zero_point", 1 << (scheme.bits - 1)
    if scheme.symmetric:
        if tensor in checkpoint:
            raise _wrong(checkpoint, name, "it has weight_zero_point, and symmetric is true")
        return np.full(shape, middle, np.uint8)
    values = checkpoint.integers(tensor, ("I32", "I8"))
    n = shape[0]
    count = -(-n // (WORD_BITS // scheme.bits)) if separate else word_count(n, scheme.bits)
    wanted = (n if values.dtype == np.int8 else count, shape[1])
    if values.shape != wanted:
        raise _wrong(checkpoint, name, f"weight_zero_point is {list(values.shape)}, not {list(wanted)}")
    if values.dtype == np.int8:
        if values.min() < -middle or values.max() >= middle:
            raise _wrong(checkpoint, name, f"a zero point is outside {-middle} to {middle - 1}")
        return (values.astype(np.int16) + middle).astype(np.uint8)
    return np.ascontiguousarray(_unpack(values.T, scheme.bits, separate)[:, :n].T)


def _wrong(checkpoint: Checkpoint, name: str, problem: str) -> UserError:
    return UserError(f"{checkpoint.folder}: layer {name}: {problem}")


def compressed_format(settings: Settings) -> CompressedFormat:
    """The format of a folder. settings: its quantization_config. Raises UserError for what is not read."""
    refused = {
        "kv_cache_scheme": settings.get("kv_cache_scheme"),
        "sparsity_config": _sparsity(settings),
        "transform_config": settings.part("transform_config").get("config_groups"),
    }
    for key, value in refused.items():
        if value:
            raise settings.wrong(f"quantization_config's {key}", "null", value)
    groups = settings.part("config_groups").values
    if not groups:
        raise settings.wrong("quantization_config's config_groups", "an object with groups", groups)
    schemes: dict[Target, Scheme] = {}
    for key, values in groups.items():
        where = f"config_groups.{key[:80]}"
        if not isinstance(values, Mapping):
            raise settings.wrong(where, "an object", values)
        group = Settings(settings.path, dict(values))
        _check_format(group, settings, where)
        scheme = _scheme(group, where)
        schemes |= dict.fromkeys(read_targets(group, "targets", f"{where}.targets"), scheme)
    return CompressedFormat(Targets(schemes, read_targets(settings, "ignore", "quantization_config's ignore")))


def _sparsity(settings: Settings) -> object:
    """The format of sparse weights, if there is one."""
    form = settings.part("sparsity_config").get("format")
    return None if form == "dense" else form


def _check_format(group: Settings, settings: Settings, where: str) -> None:
    form = group.get("format")
    if form is not None and form != FORMAT:
        raise group.wrong(f"{where}.format", FORMAT, form)
    whole = settings.get("format")
    if form is None and whole != FORMAT:
        raise settings.wrong("quantization_config's format", FORMAT, whole)
    if whole not in (FORMAT, MIXED):
        raise settings.wrong("quantization_config's format", f"{FORMAT} or {MIXED}", whole)


def _scheme(group: Settings, where: str) -> Scheme:
    for key in ACTIVATIONS:
        if group.get(key) is not None:
            raise group.wrong(f"{where}.{key}", "null (only weights may be quantized)", group.get(key))
    if group.get("weights") is None:
        raise group.wrong(f"{where}.weights", "an object")
    weights, where = group.part("weights"), f"{where}.weights"
    for key, values in FIXED.items():
        if weights.get(key) not in values:
            raise weights.wrong(f"{where}.{key}", str(values[0]).lower().replace("none", "null"), weights.get(key))
    known = {"num_bits", "symmetric", "strategy", "group_size", "actorder", *FIXED, *HARMLESS}
    if unknown := sorted(key for key in set(weights.values) - known if weights.get(key) is not None):
        raise weights.wrong(f"{where}.{unknown[0][:80]}", "absent: it is unknown", weights.get(unknown[0]))
    bits = weights.get("num_bits")
    if not is_width(bits):
        raise weights.wrong(f"{where}.num_bits", WIDTHS, bits)
    actorder = weights.get("actorder")
    if actorder not in (*IN_ORDER, True, "group", "dynamic"):
        raise weights.wrong(f"{where}.actorder", "null, static, weight or group", actorder)
    return Scheme(bits, _group_size(weights, where), weights.flag("symmetric", True), ordered=actorder not in IN_ORDER)


def _group_size(weights: Settings, where: str) -> int:
    """0 for all of K. Without a strategy the group size decides, as in the package."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "channel" and size in (None, -1):
        return 0
    if strategy != "group":
        raise weights.wrong(f"{where}.strategy", "group, or channel without group_size", strategy)
    if not is_group(size):
        raise weights.wrong(f"{where}.group_size", f"a multiple of {MIN_BLOCK}", size)
    return size
