# SPDX-License-Identifier: Apache-2.0
"""Which descriptors the accelerator refuses, and why: the definition that the RTL is tested against."""

from collections.abc import Sequence

from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.control.command import max_header_beats
from hw.spec.control.descriptor import ADDRESS_LIMIT, DATA_ALIGNMENT, FIELDS, FLOAT_BYTES, WEIGHT_ALIGNMENT, Opcode
from hw.spec.control.registers import ErrorCode
from hw.spec.memory.geometry import StreamLayout, ceil_div


def parse(words: Sequence[int]) -> tuple[dict[str, int], bool]:
    """The fields of a descriptor's words, and whether every reserved bit is 0."""
    whole = sum(word << 32 * index for index, word in enumerate(words))
    fields = {field.name: whole >> field.low & ((1 << field.width) - 1) for field in FIELDS}
    used = sum(value << field.low for field, value in zip(FIELDS, fields.values(), strict=True))
    return fields, used == whole


def refusal(config: AcceleratorConfig, words: Sequence[int], before: Sequence[int] | None = None) -> ErrorCode:
    """Why the descriptor is refused, or ErrorCode.NONE. before: the words of the last one that was accepted."""
    fields, clean = parse(words)
    if fields["opcode"] != Opcode.LINEAR or not clean:
        return ErrorCode.OPCODE
    if _shape_is_wrong(config, fields, None if before is None else parse(before)[0]):
        return ErrorCode.SHAPE
    aligned = {
        "activations": DATA_ALIGNMENT,
        "results": DATA_ALIGNMENT,
        "result_pitch": DATA_ALIGNMENT,
        "weights": WEIGHT_ALIGNMENT,
        "weights_stride": WEIGHT_ALIGNMENT,
    }
    if any(fields[name] % alignment for name, alignment in aligned.items()):
        return ErrorCode.ALIGNMENT
    if any(fields[name] >= ADDRESS_LIMIT for name in ("activations", "results", "weights")):
        return ErrorCode.ALIGNMENT
    return ErrorCode.NONE


def _shape_is_wrong(config: AcceleratorConfig, fields: dict[str, int], before: dict[str, int] | None) -> bool:
    stream = StreamLayout(config)
    tokens, groups, n = fields["tokens"], fields["groups"], fields["out_features"]
    slices = groups * fields["group_slices"]
    if not (1 <= tokens <= config.max_tokens and groups >= 1 and 1 <= n <= MAX_N):
        return True
    if not stream.min_group_slices <= fields["group_slices"] <= config.max_group_size // config.tile:
        return True
    if slices > config.max_k // config.tile:
        return True
    header_beats = ceil_div(stream.exponents_units + groups * stream.record_units, stream.beat_units)
    body_words = ceil_div(slices, stream.slices_per_word) * stream.words_per_slice
    if (fields["header_beats"], fields["body_words"]) != (header_beats, body_words):
        return True
    if header_beats > max_header_beats(config):
        return True
    if fields["reuse"]:
        shape = ("tokens", "groups", "group_slices")
        if before is None or any(fields[name] != before[name] for name in shape):
            return True
    beats = ceil_div(n, config.tile) * (header_beats + body_words * stream.beats_per_word)
    if beats * config.port_width // 8 > fields["weights_stride"]:
        return True
    return tokens > 1 and FLOAT_BYTES * n > fields["result_pitch"]
