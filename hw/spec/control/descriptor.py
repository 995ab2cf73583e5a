# SPDX-License-Identifier: Apache-2.0
"""The descriptor: one layer of work for the accelerator, and how its operands lie in memory.

Memory layout of one linear layer:

- activations: float32 [M, K], rows one after the other, K padded with zeros to whole groups;
- weights: the stream of :mod:`hw.spec.memory.geometry`, striped over the ports; port p reads one contiguous region of
  ``beats * port_bytes`` from ``weights + p * weights_stride`` on;
- results: float32 [M, N], row m from ``results + m * result_pitch`` on.
"""

import enum
from dataclasses import dataclass

from hw.spec.config import FLOAT_BITS, AcceleratorConfig, ConfigError
from hw.spec.control.command import LayerCommand
from hw.spec.memory.geometry import LayerLayout, ceil_div

DESCRIPTOR_WORDS = 16
"""32-bit words of a descriptor."""
FLOAT_BYTES = FLOAT_BITS // 8
WEIGHT_ALIGNMENT = 4096
"""Bytes: of the weights and their stride. No burst crosses a multiple of it, so every burst is a long one."""
DATA_ALIGNMENT = 128
"""Bytes: of activations, results and the results' pitch; the largest array's K-slice of one token is as long, so none
straddles what is read at once."""
BANK_SPAN = 128 * 1024
"""Bytes after which DDR4 memory of 64 bits comes back to the same bank: 16 banks with rows of 8 KiB."""
ADDRESS_BITS = 40
"""What the memory ports of a Zynq UltraScale+ take."""
ADDRESS_LIMIT = (1 << ADDRESS_BITS) - (1 << 34)
"""Addresses in a descriptor are below this, so that no region can reach the end of the address space."""


class Opcode(enum.IntEnum):
    """What a descriptor asks for. There is room for other units."""

    LINEAR = 1


@dataclass(frozen=True)
class DescriptorField:
    """Bits ``low`` to ``low + width - 1`` of the descriptor, bit 0 being the lowest of word 0."""

    name: str
    low: int
    width: int
    text: str


FIELDS: tuple[DescriptorField, ...] = (
    DescriptorField("opcode", 0, 8, "1: linear layer"),
    DescriptorField("reuse", 8, 1, "take the activations of the descriptor before, which have the same shape"),
    DescriptorField("interrupt", 9, 1, "completion sets interrupt_pending.done"),
    DescriptorField("tokens", 16, 16, "M"),
    DescriptorField("groups", 32, 16, "groups along K"),
    DescriptorField("group_slices", 48, 16, "group size / tile"),
    DescriptorField("out_features", 64, 32, "N"),
    DescriptorField("header_beats", 96, 16, "beats of an output tile's header"),
    DescriptorField("body_words", 112, 16, "words of an output tile's body"),
    DescriptorField("activations", 128, 64, "address, a multiple of 128"),
    DescriptorField("results", 192, 64, "address, a multiple of 128"),
    DescriptorField("weights", 256, 64, "address of port 0's region, a multiple of 4096"),
    DescriptorField("weights_stride", 320, 32, "bytes from one port's region to the next, a multiple of 4096"),
    DescriptorField("result_pitch", 352, 24, "bytes from one row of results to the next, a multiple of 128"),
)
"""Every bit that is in no field is reserved and 0."""
FIELD_WIDTHS = {field.name: field.width for field in FIELDS}


def result_pitch(n: int) -> int:
    """Least bytes from one row of ``n`` results to the next."""
    return ceil_div(FLOAT_BYTES * n, DATA_ALIGNMENT) * DATA_ALIGNMENT


def region_bytes(layer: LayerLayout) -> int:
    """Bytes of one port's region of a layer's weights, in whole pages."""
    return ceil_div(layer.beats * layer.config.port_width // 8, WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT


def weights_stride(layer: LayerLayout) -> int:
    """Bytes from one port's region of a layer's weights to the next, so that the ports never meet in a DRAM bank.

    All ports read at the same pace. Were their regions a multiple of BANK_SPAN apart, they would all want another row
    of the same bank all the time; so the regions begin evenly spread over the banks.
    """
    apart = BANK_SPAN // layer.config.ports
    return apart + ceil_div(max(0, region_bytes(layer) - apart), BANK_SPAN) * BANK_SPAN


def weight_bytes(layer: LayerLayout) -> int:
    """Bytes of a layer's weights in memory, from the first port's region to the end of the last one's."""
    return (layer.config.ports - 1) * weights_stride(layer) + region_bytes(layer)


@dataclass(frozen=True)
class Descriptor:
    """One layer as the accelerator takes it; the attributes are those of :data:`FIELDS`."""

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
    ) -> "Descriptor":
        """The descriptor of ``layer`` for ``tokens`` tokens, with its weights' regions and its results' rows where
        :func:`weights_stride` and :func:`result_pitch` put them.

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
        )

    def to_words(self) -> list[int]:
        """The descriptor as DESCRIPTOR_WORDS 32-bit words.

        Raises
        ------
        ConfigError : a value does not fit its field
        """
        whole = 0
        for field in FIELDS:
            value = getattr(self, field.name)
            if not 0 <= value < 1 << field.width:
                raise ConfigError(f"descriptor field {field.name} holds {field.width} bits, not {value}")
            whole |= value << field.low
        return [whole >> 32 * index & 0xFFFF_FFFF for index in range(DESCRIPTOR_WORDS)]


def activation_beats(config: AcceleratorConfig, tokens: int, slices: int) -> int:
    """Beats of one port that hold a layer's activations."""
    return tokens * slices * (config.tile * FLOAT_BITS // config.port_width)
