# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a GPTQ checkpoint, without any loss.

Format (github.com/ModelCloud/GPTQModel, gptqmodel/nn_modules/qlinear; the same in AutoGPTQ), tensors of one layer, with
groups of G features:
    qweight int32 [K * bits / 32, N]   q[n, k] is in bits `bits * k` and up of column n, from the low bits of its first
        word; 3 bits may begin in one word and end in the next
    qzeros int32 [ceil(K / G), ceil(N * bits / 32)]   z[n, g] is in bits `bits * n` and up of row g, in version 1 less 1
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
    WIDTHS,
    WORD_BITS,
    block_size,
    is_group,
    is_width,
    matrix,
    split_groups,
    unpack_rows,
    word_count,
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
WIDE = 3
"""Bits of numbers that begin in one word and end in the next."""
WRITER = "gptqmodel"
"""The writer that stores zero points less 1 by one subtraction per word, as it reads them by one addition."""


@dataclass(frozen=True)
class GptqFormat:
    """Settings of quantization_config.

    Members
    -------
    bits: one of BITS. group_size: 0 for all of K. less_one: whether zero points are stored less 1 (version 1). borrows:
    whether the writer subtracted 1 from all fields of a word at once, so that a field of 0 borrows from the next.
    symmetric: whether all zero points are in the middle.
    overrides: patterns of layer names -> their own format, or None for float layers (GPTQModel's `dynamic`); the first
    match counts.
    """

    bits: int
    group_size: int
    less_one: bool
    borrows: bool
    symmetric: bool = False
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
        packed = matrix(checkpoint, f"{name}.qweight")
        if len(packed) * WORD_BITS % self.bits:
            problem = f"qweight has {len(packed)} words for each output, which hold no whole number of {self.bits} bits"
            raise UserError(f"{checkpoint.folder}: layer {name}: {problem}")
        q = unpack_rows(packed.T, self.bits)
        n, k = q.shape
        group = min(self.group_size or k, k)
        groups = -(-k // group)
        scales = np.ascontiguousarray(checkpoint.floats(f"{name}.scales").T)
        words = matrix(checkpoint, f"{name}.qzeros")
        for what, shape, wanted in (
            ("scales", scales.shape[::-1], (groups, n)),
            ("qzeros", words.shape, (groups, word_count(n, self.bits))),
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
        """uint8 [ceil(K / G), numbers]. Raises UserError for zero points that programs read in different ways.

        In version 1 a zero point of 0 becomes the largest number, and some programs subtract 1 from the word as a
        whole, which changes the next field, too; others do not. Where both readings agree there is no doubt. Numbers of
        3 bits are in several words, so programs subtract 1 from each; but older versions of GPTQModel subtracted wrong
        constants from whole words. The numbers of symmetric layers are known, and so are checked.
        """
        numbers, top = unpack_rows(words, self.bits), (1 << self.bits) - 1
        if not self.less_one:
            return numbers
        by_field = numbers + np.uint8(1) & np.uint8(top)
        if self.bits == WIDE:
            by_word, doubtful = by_field, bool((numbers == top).any())
        else:
            ones = np.uint32(sum(1 << shift for shift in range(0, WORD_BITS, self.bits)))
            by_word = unpack_rows((words.view(np.uint32) + ones).view(np.int32), self.bits)
            doubtful = not np.array_equal(by_word, by_field)
        problem = ""
        if doubtful and not self.borrows:
            problem = f"a zero point is stored as {top}, which programs read in different ways"
        elif self.bits == WIDE and self.symmetric and (by_field != 1 << (self.bits - 1)).any():
            problem = "a zero point is not 4, and sym is true: older versions of GPTQModel wrote 3 bits so"
        if problem:
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
        raise settings.wrong("quantization_config's bits", WIDTHS)
    symmetric = settings.flag("sym", False)
    default = GptqFormat(BITS[0], DEFAULT_GROUP, VERSIONS[version.lower()], borrows, symmetric)
    form = _sizes(default, settings, "quantization_config's ")
    overrides = settings.part("dynamic").values
    return replace(form, overrides=tuple(_override(form, settings, key, overrides[key]) for key in overrides))


def _sizes(form: GptqFormat, settings: Settings, where: str) -> GptqFormat:
    """`form` with the bits and the group size of these settings, as far as they have them."""
    bits, group = settings.get("bits"), settings.get("group_size")
    if bits is not None and not is_width(bits):
        raise settings.wrong(f"{where}bits", WIDTHS, bits)
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
