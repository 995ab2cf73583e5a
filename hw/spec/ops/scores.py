# SPDX-License-Identifier: Apache-2.0
"""Scores of one KV head: a linear layer whose weights are the keys. They stay on chip, in one of two banks.

``s[r, n] = float32(q[r] k[n]) * factor`` for every slot n of the cache that row r sees, and -infinity for the others.
Rows are query heads of one token, or tokens of one query head: then a row sees one position more than the row before.

The last row sees the slots below ``turn``, which hold the latest positions in ascending order. A cache that is full
begins again at slot 0: the slots from ``turn`` on hold the positions before these, and a row sees only those in its
``window``, the number of positions that it sees at most. If ``causal`` is set, a row sees the positions of the row
after it but for the last one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hw.spec.config import SCORE_UNIT, AcceleratorConfig, ConfigError
from hw.spec.memory.geometry import ceil_div
from hw.spec.memory.kv_cache import LONGEST_CONTEXT, PLANE_COUNTS, KeyCache
from hw.spec.memory.operands import FLOAT_BYTES
from hw.spec.numerics.float32 import mul
from hw.spec.numerics.linear import linear, quantize_activations
from hw.spec.ops.append import ROW_FIELDS, SLOT_BITS, SLOTS_FIELD
from hw.spec.ops.base import (
    COMMON_FIELDS,
    STREAM_FIELDS,
    WEIGHT_FIELDS,
    AttentionOp,
    Banks,
    DescriptorField,
    DescriptorWords,
    Memory,
    Opcode,
    State,
    Wait,
    float_rows,
    in_order,
    opcode_field,
    read_stream,
)
from hw.spec.ops.command import stream_bounds
from hw.spec.ops.epilogue import MAX_HEAD

_TITLE = "scores of attention"
BANKS = 2
"""Banks of scores on chip: the array computes the scores of one KV head while another one's are read."""
_COUNT_BITS = SLOT_BITS + 1
FIELDS: tuple[DescriptorField, ...] = in_order(
    (opcode_field(Opcode.SCORES, _TITLE),),
    COMMON_FIELDS,
    STREAM_FIELDS,
    WEIGHT_FIELDS,
    ROW_FIELDS,
    (
        DescriptorField("bank", 8, 1, "bank of the scores"),
        DescriptorField("causal", 12, 1, "each row sees one position more than the row before"),
        DescriptorField("planes", 20, 3, "planes of a mantissa: 1, 2 or 4"),
        DescriptorField("turn", 256, _COUNT_BITS, "the last row sees the slots below it"),
        DescriptorField("window", 288, _COUNT_BITS, "positions that a row sees; 0: all"),
        SLOTS_FIELD,
        DescriptorField("score_factor", 480, 32, "the bits of a float32"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ScoresDescriptor(DescriptorWords):
    """The descriptor; the attributes are those of :data:`FIELDS`. Addresses and pitches in bytes."""

    op_fields = FIELDS

    tokens: int
    out_features: int
    groups: int
    group_slices: int
    header_beats: int
    body_words: int
    planes: int
    activations: int
    activation_pitch: int
    weights: int
    weights_stride: int
    turn: int
    slots: int
    score_factor: int
    window: int = 0
    causal: int = 0
    bank: int = 0
    interrupt: int = 0
    wait: int = Wait.NOTHING
    opcode: int = Opcode.SCORES

    @classmethod
    def from_cache(cls, cache: KeyCache, positions: int, **fields: int) -> "ScoresDescriptor":
        """The descriptor for the first slots of a cache. fields: those that do not follow from it."""
        layer = cache.layer
        return cls(
            out_features=positions,
            groups=layer.groups,
            group_slices=layer.group_slices,
            header_beats=layer.header_beats,
            body_words=layer.body_words,
            planes=cache.planes,
            weights_stride=cache.stride,
            slots=cache.positions,
            **fields,
        )


class Scores(AttentionOp):
    """See the module, and :class:`hw.spec.ops.base.Op`."""

    opcode = Opcode.SCORES
    title = _TITLE
    fields = FIELDS

    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """See :class:`Op`."""
        return {
            "wait": (min(Wait), max(Wait)),
            "tokens": (1, config.max_tokens),
            "out_features": (1, LONGEST_CONTEXT),
            "planes": (1, max(PLANE_COUNTS)),
            "turn": (1, LONGEST_CONTEXT),
            "slots": (1, LONGEST_CONTEXT),
            "window": (0, LONGEST_CONTEXT),
            **stream_bounds(config),
        }

    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """See :class:`Op`."""
        if self.outside_bounds(config, fields):
            return True
        try:
            cache = self.cache(config, fields)
        except ConfigError:
            return True
        layer, size = cache.layer, self.head_size(config, fields)
        given = tuple(fields[name] for name in ("groups", "group_slices", "header_beats", "body_words"))
        return (
            given != (layer.groups, layer.group_slices, layer.header_beats, layer.body_words)
            or fields["planes"] != cache.planes
            or not max(fields["turn"], fields["out_features"]) <= fields["slots"]
            # Without a window no cache begins again.
            or (not fields["window"] and fields["out_features"] > fields["turn"])
            or cache.region_bytes > fields["weights_stride"]
            or (fields["tokens"] > 1 and fields["activation_pitch"] < FLOAT_BYTES * size)
            or bank_words(fields["tokens"], fields["out_features"]) > config.score_words
            or size > MAX_HEAD
        )

    def bank_is_wrong(self, fields: Mapping[str, int], banks: Banks) -> bool:
        """See :class:`AttentionOp`: no scores are overwritten that nothing has read."""
        return fields["bank"] in banks

    def use_bank(self, fields: Mapping[str, int], banks: Banks) -> None:
        """See :class:`AttentionOp`."""
        banks[fields["bank"]] = fields["tokens"], fields["out_features"]

    def head_size(self, config: AcceleratorConfig, fields: Mapping[str, int]) -> int:
        """Elements of a head."""
        return fields["groups"] * fields["group_slices"] * config.tile // fields["planes"]

    def cache(self, config: AcceleratorConfig, fields: Mapping[str, int]) -> KeyCache:
        """The part of the cache that is read. Raises ConfigError if there is none."""
        bits = fields["planes"] * config.weight_bits
        return KeyCache(config, self.head_size(config, fields), fields["out_features"], bits)

    def execute(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory, state: State) -> None:
        """See :class:`Op`."""
        d, cache = fields, self.cache(config, fields)
        rows = float_rows(memory, d["activations"], d["activation_pitch"], d["tokens"], cache.head_size)
        weights = read_stream(memory, cache.layer, d["weights"], d["weights_stride"], cache.paired)
        products = linear(config, weights, quantize_activations(config, cache.repeat(rows)))
        factor = np.uint32(d["score_factor"]).view(np.float32)
        state.activations = None
        state.scores[d["bank"]] = np.where(visible(fields), mul(products, factor), np.float32(-np.inf))


def visible(fields: Mapping[str, int]) -> np.ndarray:
    """Which slots each row sees: bool [rows, slots]."""
    window, rows, slot = fields["window"], fields["tokens"], np.arange(fields["out_features"])
    # The slots below it are visible to the last row, counted as if older ones followed the latest ones.
    end = fields["turn"] + fields["slots"] * (slot >= fields["turn"])
    place = slot + (rows - 1 - np.arange(rows))[:, None] * fields["causal"]
    return (place < end) & ((place + window >= end) | (window == 0))


def bank_words(rows: int, positions: int) -> int:
    """Scores of a bank that a descriptor takes."""
    return rows * ceil_div(positions, SCORE_UNIT) * SCORE_UNIT


SCORES = Scores()
