# SPDX-License-Identifier: Apache-2.0
"""Values of one KV head, weighted with the softmax of the scores in a bank, and summed: float32 [rows, head].

The definition is :func:`hw.spec.numerics.attention.weighted_values`. On the array it is a linear layer for every chunk
of 256 positions and every ``tile`` columns, whose activations are the probabilities times the values' powers of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hw.spec.config import AcceleratorConfig, ConfigError
from hw.spec.memory.kv_cache import LONGEST_CONTEXT, ValueCache
from hw.spec.memory.operands import DATA_ALIGNMENT, FLOAT_BYTES
from hw.spec.numerics.attention import probabilities, weighted_values
from hw.spec.numerics.block_float import BlockFloat
from hw.spec.ops.append import EXPONENT_FIELDS, SLOT_BITS, SLOTS_FIELD
from hw.spec.ops.base import (
    COMMON_FIELDS,
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
    units,
)
from hw.spec.ops.epilogue import MAX_HEAD, PITCH_BITS
from hw.spec.ops.scores import bank_words

_TITLE = "softmax and values of attention"
FIELDS: tuple[DescriptorField, ...] = in_order(
    (opcode_field(Opcode.VALUES, _TITLE),),
    COMMON_FIELDS,
    WEIGHT_FIELDS,
    EXPONENT_FIELDS,
    (
        DescriptorField("bank", 8, 1, "bank of the scores"),
        DescriptorField("results", 160, 32, units(DATA_ALIGNMENT, "address"), DATA_ALIGNMENT),
        DescriptorField(
            "result_pitch",
            256,
            PITCH_BITS,
            units(DATA_ALIGNMENT, "from one row of results to the next"),
            DATA_ALIGNMENT,
        ),
        SLOTS_FIELD,
        DescriptorField("positions", 448, SLOT_BITS + 1, "scores of a row: the slots of the cache that are read"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ValuesDescriptor(DescriptorWords):
    """The descriptor; the attributes are those of :data:`FIELDS`. Addresses and pitches in bytes."""

    op_fields = FIELDS

    tokens: int
    out_features: int
    positions: int
    slots: int
    weights: int
    weights_stride: int
    exponents: int
    results: int
    result_pitch: int
    bank: int = 0
    interrupt: int = 0
    wait: int = Wait.NOTHING
    opcode: int = Opcode.VALUES


class Values(AttentionOp):
    """See the module, and :class:`hw.spec.ops.base.Op`."""

    opcode = Opcode.VALUES
    title = _TITLE
    fields = FIELDS

    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """See :class:`Op`."""
        return {
            "wait": (min(Wait), max(Wait)),
            "tokens": (1, config.max_tokens),
            "out_features": (1, MAX_HEAD),
            "positions": (1, LONGEST_CONTEXT),
            "slots": (1, LONGEST_CONTEXT),
        }

    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """See :class:`Op`."""
        if self.outside_bounds(config, fields):
            return True
        try:
            self.cache(config, fields)
        except ConfigError:
            return True
        return (
            fields["positions"] > fields["slots"]
            or (fields["tokens"] > 1 and fields["result_pitch"] < FLOAT_BYTES * fields["out_features"])
            or bank_words(fields["tokens"], fields["positions"]) > config.score_words
        )

    def bank_is_wrong(self, fields: Mapping[str, int], banks: Banks) -> bool:
        """See :class:`AttentionOp`: the bank has scores of as many rows and positions."""
        return banks.get(fields["bank"]) != (fields["tokens"], fields["positions"])

    def use_bank(self, fields: Mapping[str, int], banks: Banks) -> None:
        """See :class:`AttentionOp`: the scores are used up."""
        del banks[fields["bank"]]

    def cache(self, config: AcceleratorConfig, fields: Mapping[str, int]) -> ValueCache:
        """The whole cache. Raises ConfigError if there is none."""
        return ValueCache(config, fields["out_features"], fields["slots"])

    def execute(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory, state: State) -> None:
        """See :class:`Op`. The bank has the scores of an earlier descriptor with as many rows and positions."""
        d, cache, positions = fields, self.cache(config, fields), fields["positions"]
        weights = read_stream(memory, cache.layer, d["weights"], d["weights_stride"])
        exponents = cache.exponents(memory.view(d["exponents"], cache.exponent_bytes), positions)
        values = BlockFloat(cache.mantissas(weights, positions), exponents)
        outputs = weighted_values(config, probabilities(state.scores[d["bank"]]), values)
        state.activations = None
        float_rows(memory, d["results"], d["result_pitch"], *outputs.shape)[:] = outputs


VALUES = Values()
