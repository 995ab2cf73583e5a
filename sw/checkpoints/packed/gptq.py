# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a GPTQ checkpoint, without any loss.

Format (github.com/ModelCloud/GPTQModel, gptqmodel/nn_modules/qlinear; the same in AutoGPTQ), tensors of one layer, with
F = 32 / bits fields in a word and groups of G features:
    qweight int32 [K / F, N]   field i of word [r, n] is q[n, F r + i]
    qzeros int32 [ceil(K / G), N / F]   field i of word [g, c] is z[F c + i, g], in version 1 less 1
    scales float16 or bfloat16 [ceil(K / G), N], g_idx int32 [K] (see sw.checkpoints.packed.order), bias [N] or absent
    w[n, k] = (q[n, k] - z[n, g_idx[k]]) * s[n, g_idx[k]]
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sw.checkpoints.packed.layers import has_words, read_bias
from sw.checkpoints.packed.order import read_order
from sw.checkpoints.packed.patterns import read_pattern
from sw.checkpoints.packed.words import (
    BITS,
    MIN_BLOCK,
    WORD_BITS,
    block_size,
    is_group,
    is_width,
    matrix,
    split_groups,
    unpack_rows,
)
from sw.checkpoints.safetensors_file import Checkpoint
from sw.checkpoints.settings import Settings
from sw.common.errors import UserError
from sw.model.linear import QuantizedLinear

VERSIONS = {"gptq": True, "gptq_v2": False}
"""Values of checkpoint_format that are read -> whether zero points are stored less 1."""
DEFAULT_GROUP = 128
REFUSED = ("adapter", "rotation", "is_marlin_format")
"""Settings of GPTQModel and AutoGPTQ that change a layer's result or its layout."""
WRITER = "gptqmodel"
"""The writer that stores zero points less 1 by one subtraction per word, as it reads them by one addition."""


@dataclass(frozen=True)
class GptqFormat:
    """Settings of quantization_config.

    Members
    -------
    bits: 4 or 8. group_size: 0 for all of K. less_one: whether zero points are stored less 1 (version 1). borrows:
    whether the writer subtracted 1 from all fields of a word at once, so that a field of 0 borrows from the next.
    overrides: patterns of layer names -> their own format, or None for float layers (GPTQModel's `dynamic`); the first
    match counts.
    """

    bits: int
    group_size: int
    less_one: bool
    borrows: bool
    overrides: tuple[tuple[re.Pattern[str], "GptqFormat | None"], ...] = ()

    def is_quantized(self, checkpoint: Checkpoint, name: str) -> bool:
        """By the tensors: lists of layers that stay float differ between programs."""
        return has_words(checkpoint, name)

    def read(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear:
        """See LayerFormat."""
        for pattern, form in self.overrides:
            if pattern.match(name):
                if form is None:
                    raise UserError(f"{checkpoint.folder}: layer {name} has qweight, and dynamic says that it is float")
                return form._read(checkpoint, name)
        return self._read(checkpoint, name)

    def _read(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear:
        q = unpack_rows(matrix(checkpoint, f"{name}.qweight").T, self.bits)
        n, k = q.shape
        group = min(self.group_size or k, k)
        groups, fields = -(-k // group), WORD_BITS // self.bits
        scales = np.ascontiguousarray(checkpoint.floats(f"{name}.scales").T)
        words = matrix(checkpoint, f"{name}.qzeros")
        for what, shape, wanted in (
            ("scales", scales.shape[::-1], (groups, n)),
            ("qzeros", words.shape, (groups, -(-n // fields))),
        ):
            if shape != wanted:
                problem = f"{what} is {list(shape)}, not {list(wanted)}: qweight holds {[k, n]} weights"
                rule = f"of {self.bits} bits in groups of {group}"
                raise UserError(f"{checkpoint.folder}: layer {name}: {problem} {rule}")
        zero_points = np.ascontiguousarray(self._zero_points(checkpoint, name, words)[:, :n].T)
        order, group = read_order(checkpoint, f"{name}.g_idx", k, group, groups)
        block = block_size(k, group)
        scales, zero_points = (split_groups(values[:, order], k, group, block) for values in (scales, zero_points))
        bias = read_bias(checkpoint, name)
        if bias is not None and not bias.any():
            # Older versions write a bias of zeros for every layer.
            bias = None
        return QuantizedLinear(name, q, scales, zero_points, block, self.bits, bias)

    def _zero_points(self, checkpoint: Checkpoint, name: str, words: np.ndarray) -> np.ndarray:
        """uint8 [ceil(K / G), fields]. Raises UserError for zero points that programs read in different ways.

        In version 1 a zero point of 0 becomes the largest number, and some programs subtract 1 from the word as a
        whole, which changes the next field, too; others do not. Where both readings agree there is no doubt.
        """
        if not self.less_one:
            return unpack_rows(words, self.bits)
        ones = np.uint32(sum(1 << shift for shift in range(0, WORD_BITS, self.bits)))
        by_word = unpack_rows((words.view(np.uint32) + ones).view(np.int32), self.bits)
        by_field = unpack_rows(words, self.bits) + np.uint8(1) & np.uint8((1 << self.bits) - 1)
        if not self.borrows and not np.array_equal(by_word, by_field):
            problem = f"a zero point is stored as {(1 << self.bits) - 1}, which programs read in different ways"
            hint = "GPTQModel writes checkpoint_format gptq_v2, which has no such numbers"
            raise UserError(f"{checkpoint.folder}: tensor {name}.qzeros: {problem} ({hint})")
        return by_word


def gptq_format(settings: Settings) -> GptqFormat:
    """The format of a folder. settings: its quantization_config. Raises UserError for what is not read."""
    for key in REFUSED:
        if settings.get(key):
            raise settings.wrong(f"quantization_config's {key}", "null or false", settings.get(key))
    named = {key: settings.get(key) for key in ("checkpoint_format", "format") if settings.get(key) is not None}
    version = next(iter(named.values()), "gptq")
    for key, value in named.items():
        if not isinstance(value, str) or value.lower() not in VERSIONS:
            raise settings.wrong(f"quantization_config's {key}", " or ".join(VERSIONS), value)
        if value.lower() != version.lower():
            raise settings.wrong("quantization_config's format", f"{version}, as checkpoint_format is", value)
    pack_type = settings.get("pack_dtype")
    if pack_type not in (None, "int32"):
        raise settings.wrong("quantization_config's pack_dtype", "int32", pack_type)
    writer = settings.part("meta").get("quantizer")
    writers = writer if isinstance(writer, list) else [writer]
    borrows = any(isinstance(item, str) and item.lower().startswith(WRITER) for item in writers)
    if settings.get("bits") is None:
        raise settings.wrong("quantization_config's bits", " or ".join(map(str, BITS)))
    default = GptqFormat(BITS[0], DEFAULT_GROUP, VERSIONS[version.lower()], borrows)
    form = _sizes(default, settings, "quantization_config's ")
    overrides = settings.part("dynamic").values
    return replace(form, overrides=tuple(_override(form, settings, key, overrides[key]) for key in overrides))


def _sizes(form: GptqFormat, settings: Settings, where: str) -> GptqFormat:
    """`form` with the bits and the group size of these settings, as far as they have them."""
    bits, group = settings.get("bits"), settings.get("group_size")
    if bits is not None and not is_width(bits):
        raise settings.wrong(f"{where}bits", " or ".join(map(str, BITS)), bits)
    if group is not None and group != -1 and not is_group(group):
        raise settings.wrong(f"{where}group_size", f"-1 or a multiple of {MIN_BLOCK}", group)
    return replace(form, bits=bits or form.bits, group_size=form.group_size if group is None else max(int(group), 0))


def _override(
    form: GptqFormat, settings: Settings, key: str, values: object
) -> tuple[re.Pattern[str], GptqFormat | None]:
    """One entry of `dynamic`: "-:pattern" are float layers, "+:pattern" or "pattern" have settings of their own."""
    where = f"quantization_config's dynamic {key[:80]}"
    pattern = read_pattern(settings.path, "quantization_config's dynamic", key.removeprefix("-:").removeprefix("+:"))
    if key.startswith("-:") or values is False:
        return pattern, None
    if not isinstance(values, Mapping):
        raise settings.wrong(where, "an object", values)
    return pattern, _sizes(form, Settings(settings.path, dict(values)), f"{where}'s ")
