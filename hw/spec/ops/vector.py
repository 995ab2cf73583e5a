# SPDX-License-Identifier: Apache-2.0
"""The epilogue of rows in memory, without a linear layer: for norms and additions that follow no linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass

from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.memory.operands import DATA_ALIGNMENT, FLOAT_BYTES
from hw.spec.ops.base import (
    COMMON_FIELDS,
    DescriptorField,
    Memory,
    Op,
    Opcode,
    State,
    Wait,
    float_rows,
    in_order,
    opcode_field,
    units,
)
from hw.spec.ops.epilogue import EPILOGUE_FIELDS, PITCH_BITS, EpilogueWords, epilogue_is_wrong, write_outputs

_TITLE = "epilogue of rows in memory"
FIELDS: tuple[DescriptorField, ...] = in_order(
    (opcode_field(Opcode.VECTOR, _TITLE),),
    COMMON_FIELDS,
    (
        DescriptorField("activations", 128, 32, units(DATA_ALIGNMENT, "address of the rows"), DATA_ALIGNMENT),
        DescriptorField("results", 160, 32, units(DATA_ALIGNMENT, "address"), DATA_ALIGNMENT),
        DescriptorField(
            "source_pitch",
            224,
            PITCH_BITS,
            units(DATA_ALIGNMENT, "from one row to the next; 0: all tokens have one row"),
            DATA_ALIGNMENT,
        ),
    ),
    EPILOGUE_FIELDS,
)


@dataclass(frozen=True, kw_only=True)
class VectorDescriptor(EpilogueWords):
    """The descriptor; the attributes are those of :data:`FIELDS`. Addresses and pitches in bytes."""

    op_fields = FIELDS

    tokens: int
    out_features: int
    activations: int
    source_pitch: int
    results: int = 0
    interrupt: int = 0
    wait: int = Wait.NOTHING
    opcode: int = Opcode.VECTOR


class Vector(Op):
    """See the module, and :class:`hw.spec.ops.base.Op`."""

    opcode = Opcode.VECTOR
    title = _TITLE
    fields = FIELDS

    def exists(self, config: AcceleratorConfig) -> bool:
        """See :class:`Op`."""
        return config.has_vector_unit

    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """See :class:`Op`."""
        return {
            "wait": (Wait.NOTHING, Wait.WEIGHTS),
            "tokens": (1, config.max_tokens),
            "out_features": (1, MAX_N),
        }

    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """See :class:`Op`."""
        if self.outside_bounds(config, fields):
            return True
        short = fields["tokens"] > 1 and 0 < fields["source_pitch"] < FLOAT_BYTES * fields["out_features"]
        return short or epilogue_is_wrong(config, fields)

    def execute(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory, state: State) -> None:
        """See :class:`Op`."""
        rows = float_rows(
            memory, fields["activations"], fields["source_pitch"], fields["tokens"], fields["out_features"]
        )
        write_outputs(fields, rows.copy(), memory, state)


VECTOR = Vector()
