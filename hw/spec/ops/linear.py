# SPDX-License-Identifier: Apache-2.0
"""The linear layer: ``y[m, n] = sum_k x[m, k] * w[n, k]``, then the epilogue."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.cycles import layer_cycles
from hw.spec.memory.geometry import LayerLayout, StreamLayout, ceil_div
from hw.spec.memory.operands import (
    DATA_ALIGNMENT,
    FLOAT_BYTES,
    result_pitch,
    weights_stride,
)
from hw.spec.numerics.linear import Activations, Weights, linear, quantize_activations
from hw.spec.ops.base import (
    COMMON_FIELDS,
    STREAM_FIELDS,
    WEIGHT_FIELDS,
    DescriptorField,
    Memory,
    Op,
    Opcode,
    State,
    Wait,
    float_rows,
    in_order,
    opcode_field,
    read_stream,
    units,
)
from hw.spec.ops.command import LayerCommand, stream_bounds
from hw.spec.ops.epilogue import ABSENT_FIELDS, EPILOGUE_FIELDS, EpilogueWords, epilogue_is_wrong, write_outputs

_TITLE = "linear layer"
FIELDS: tuple[DescriptorField, ...] = in_order(
    (opcode_field(Opcode.LINEAR, _TITLE),),
    COMMON_FIELDS,
    STREAM_FIELDS,
    WEIGHT_FIELDS,
    (
        DescriptorField(
            "reuse", 8, 1, "use the activations of the previous linear layer, which have the same shape, again"
        ),
        DescriptorField("activations", 128, 32, units(DATA_ALIGNMENT, "address"), DATA_ALIGNMENT),
        DescriptorField("results", 160, 32, units(DATA_ALIGNMENT, "address"), DATA_ALIGNMENT),
    ),
    EPILOGUE_FIELDS,
)


@dataclass(frozen=True, kw_only=True)
class Descriptor(EpilogueWords):
    """The descriptor of one linear layer, with the attributes of :data:`FIELDS`; addresses and pitches in bytes."""

    op_fields = FIELDS

    tokens: int
    groups: int
    group_slices: int
    out_features: int
    header_beats: int
    body_words: int
    activations: int
    results: int
    weights: int
    weights_stride: int
    reuse: int = 0
    interrupt: int = 0
    wait: int = Wait.NOTHING
    opcode: int = Opcode.LINEAR

    @classmethod
    def from_layer(
        cls,
        layer: LayerLayout,
        tokens: int,
        *,
        activations: int,
        weights: int,
        results: int = 0,
        reuse: bool = False,
        interrupt: bool = False,
        wait: Wait = Wait.NOTHING,
        **epilogue: int,
    ) -> "Descriptor":
        """The descriptor of ``layer`` for ``tokens`` tokens, with the stride of :func:`weights_stride`.

        epilogue: fields of :class:`EpilogueWords`; the pitch of the results is that of :func:`result_pitch` for as many
        columns as they have, unless it is given.

        Raises
        ------
        ConfigError : more tokens than the config holds, or fewer than 1
        """
        command = LayerCommand.from_layer(layer, tokens, reuse)
        pitch = result_pitch(layer.n >> epilogue.get("silu", 0))
        return cls(
            tokens=command.tokens,
            groups=command.groups,
            group_slices=command.group_slices,
            out_features=layer.n,
            header_beats=command.header_beats,
            body_words=command.body_words,
            activations=activations,
            results=results,
            weights=weights,
            weights_stride=weights_stride(layer),
            reuse=int(reuse),
            interrupt=int(interrupt),
            wait=wait,
            **{"result_pitch": pitch} | epilogue,
        )


class Linear(Op):
    """See the module, and :class:`hw.spec.ops.base.Op`."""

    opcode = Opcode.LINEAR
    title = _TITLE
    fields = FIELDS
    activation_shape = ("tokens", "groups", "group_slices")
    """Fields that determine the number of activations and the order of their use."""

    def fields_of(self, config: AcceleratorConfig) -> tuple[DescriptorField, ...]:
        """See :class:`Op`. Without the vector unit there is no epilogue."""
        absent = () if config.has_vector_unit else ABSENT_FIELDS
        return tuple(field for field in self.fields if field not in absent)

    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """See :class:`Op`."""
        bounds = {
            "tokens": (1, config.max_tokens),
            "out_features": (1, MAX_N),
            "wait": (min(Wait), max(Wait)),
            **stream_bounds(config),
        }
        # The generated hardware has its comparisons in this order.
        names = ("tokens", "groups", "group_slices", "out_features", "header_beats", "body_words", "wait")
        return {name: bounds[name] for name in names}

    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """See :class:`Op`."""
        if self.outside_bounds(config, fields):
            return True
        stream, n = StreamLayout(config), fields["out_features"]
        slices = fields["groups"] * fields["group_slices"]
        if slices > config.max_k // config.tile:
            return True
        header_units = stream.exponents_units + fields["groups"] * stream.record_units
        header_beats = ceil_div(header_units, stream.beat_units)
        body_words = ceil_div(slices, stream.slices_per_word) * stream.words_per_slice
        if (fields["header_beats"], fields["body_words"]) != (header_beats, body_words):
            return True
        if fields["reuse"] and (before is None or any(fields[name] != before[name] for name in self.activation_shape)):
            return True
        beats = ceil_div(n, config.tile) * (header_beats + body_words * stream.beats_per_word)
        return beats * config.port_width // 8 > fields["weights_stride"] or epilogue_is_wrong(config, fields)

    def layout(self, config: AcceleratorConfig, fields: Mapping[str, int]) -> LayerLayout:
        """The layout of the weights of an accepted descriptor."""
        size = fields["group_slices"] * config.tile
        return LayerLayout(config, fields["groups"] * size, fields["out_features"], size)

    def read_weights(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory) -> Weights:
        """The weights of an accepted descriptor."""
        return read_stream(memory, self.layout(config, fields), fields["weights"], fields["weights_stride"])

    def read_activations(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory) -> Activations:
        """The activations of an accepted descriptor. Raises NumericsError as :func:`quantize_activations`."""
        k = self.layout(config, fields).k
        rows = float_rows(memory, fields["activations"], FLOAT_BYTES * k, fields["tokens"], k)
        return quantize_activations(config, rows)

    def execute(self, config: AcceleratorConfig, fields: Mapping[str, int], memory: Memory, state: State) -> None:
        """See :class:`Op`."""
        if not fields["reuse"]:
            state.activations = self.read_activations(config, fields, memory)
        assert state.activations is not None
        values = self.compute(config, self.read_weights(config, fields, memory), state.activations)
        write_outputs(fields, values, memory, state)

    def compute(self, config: AcceleratorConfig, weights: Weights, activations: Activations) -> np.ndarray:
        """The results without an epilogue, float32 [M, N]; see :func:`hw.spec.numerics.linear`."""
        return linear(config, weights, activations)

    def cycles(self, layer: LayerLayout, tokens: int) -> int:
        """See :func:`hw.spec.cycles.layer_cycles`."""
        return layer_cycles(layer, tokens)


LINEAR = Linear()
