# SPDX-License-Identifier: Apache-2.0
"""The linear layer: ``y[m, n] = sum_k x[m, k] * w[n, k]``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hw.spec.config import MAX_N, AcceleratorConfig
from hw.spec.cycles import layer_cycles
from hw.spec.memory.geometry import LayerLayout, StreamLayout, ceil_div
from hw.spec.memory.operands import DATA_ALIGNMENT, FLOAT_BYTES, WEIGHT_ALIGNMENT, result_pitch, weights_stride
from hw.spec.numerics.linear import Activations, Weights, linear
from hw.spec.ops.base import DescriptorField, DescriptorWords, Op, Opcode, Wait, opcode_field
from hw.spec.ops.command import LayerCommand, max_header_beats

_TITLE = "linear layer"
_WAIT = (
    "until the results of all earlier descriptors are in memory, "
    f"{Wait.NOTHING}: nothing waits; {Wait.ACTIVATIONS}: the reads of activations wait; {Wait.WEIGHTS}: all reads wait"
)
_DATA, _PAGES = f"a multiple of {DATA_ALIGNMENT}", f"a multiple of {WEIGHT_ALIGNMENT}"
FIELDS: tuple[DescriptorField, ...] = (
    opcode_field(Opcode.LINEAR, _TITLE),
    DescriptorField("reuse", 8, 1, "use the activations of the previous descriptor, which have the same shape"),
    DescriptorField("interrupt", 9, 1, "completion sets interrupt_pending.done"),
    DescriptorField("wait", 10, 2, _WAIT),
    DescriptorField("tokens", 16, 16, "M"),
    DescriptorField("groups", 32, 16, "groups along K"),
    DescriptorField("group_slices", 48, 16, "group size / tile"),
    DescriptorField("out_features", 64, 32, "N"),
    DescriptorField("header_beats", 96, 16, "beats of an output tile's header"),
    DescriptorField("body_words", 112, 16, "words of an output tile's body"),
    DescriptorField("activations", 128, 64, f"address, {_DATA}"),
    DescriptorField("results", 192, 64, f"address, {_DATA}"),
    DescriptorField("weights", 256, 64, f"address of port 0's region, {_PAGES}"),
    DescriptorField(
        "weights_stride", 320, 32, f"bytes from one port's region to the next, a multiple of {WEIGHT_ALIGNMENT}"
    ),
    DescriptorField(
        "result_pitch", 352, 24, f"bytes from one row of results to the next, a multiple of {DATA_ALIGNMENT}"
    ),
)


@dataclass(frozen=True)
class Descriptor(DescriptorWords):
    """The descriptor of one linear layer; the attributes are those of :data:`FIELDS`."""

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
    result_pitch: int
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
        results: int,
        reuse: bool = False,
        interrupt: bool = False,
        wait: Wait = Wait.NOTHING,
    ) -> "Descriptor":
        """The descriptor of ``layer`` for ``tokens`` tokens, with the stride of :func:`weights_stride` and the pitch of
        :func:`result_pitch`.

        Raises
        ------
        ConfigError : more tokens than the config holds, or fewer than 1
        """
        command = LayerCommand.from_layer(layer, tokens, reuse)
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
            result_pitch=result_pitch(layer.n),
            reuse=int(reuse),
            interrupt=int(interrupt),
            wait=int(wait),
        )


class Linear(Op):
    """See the module, and :class:`hw.spec.ops.base.Op`."""

    opcode = Opcode.LINEAR
    title = _TITLE
    fields = FIELDS
    addresses = ("activations", "results", "weights")
    alignments = {
        "activations": DATA_ALIGNMENT,
        "results": DATA_ALIGNMENT,
        "result_pitch": DATA_ALIGNMENT,
        "weights": WEIGHT_ALIGNMENT,
        "weights_stride": WEIGHT_ALIGNMENT,
    }
    activation_shape = ("tokens", "groups", "group_slices")
    """Fields that determine the number of activations and the order of their use."""

    def bounds(self, config: AcceleratorConfig) -> dict[str, tuple[int, int]]:
        """See :class:`Op`."""
        stream, max_slices = StreamLayout(config), config.max_k // config.tile
        return {
            "tokens": (1, config.max_tokens),
            "groups": (1, max_slices),
            "group_slices": (stream.min_group_slices, config.max_group_size // config.tile),
            "out_features": (1, MAX_N),
            "header_beats": (1, max_header_beats(config)),
            "body_words": (1, max_slices * stream.words_per_slice),
            "wait": (min(Wait), max(Wait)),
        }

    def shape_is_wrong(
        self, config: AcceleratorConfig, fields: Mapping[str, int], before: Mapping[str, int] | None
    ) -> bool:
        """See :class:`Op`."""
        if any(not low <= fields[name] <= high for name, (low, high) in self.bounds(config).items()):
            return True
        stream, tokens, n = StreamLayout(config), fields["tokens"], fields["out_features"]
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
        if beats * config.port_width // 8 > fields["weights_stride"]:
            return True
        return tokens > 1 and FLOAT_BYTES * n > fields["result_pitch"]

    def from_layer(self, layer: LayerLayout, tokens: int, **places: Any) -> Descriptor:
        """See :meth:`Descriptor.from_layer`."""
        return Descriptor.from_layer(layer, tokens, **places)

    def compute(self, config: AcceleratorConfig, weights: Weights, activations: Activations) -> np.ndarray:
        """See :func:`hw.spec.numerics.linear`."""
        return linear(config, weights, activations)

    def cycles(self, layer: LayerLayout, tokens: int) -> int:
        """See :func:`hw.spec.cycles.layer_cycles`."""
        return layer_cycles(layer, tokens)


LINEAR = Linear()
