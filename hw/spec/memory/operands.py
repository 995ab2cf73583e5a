# SPDX-License-Identifier: Apache-2.0
"""The layout of a layer's operands in memory.

- activations: float32 [M, K], rows one after the other, K padded with zeros to whole groups;
- weights: the stream of :mod:`hw.spec.memory.geometry`, striped over the ports; port p reads one contiguous region of
  ``beats * port_bytes`` that starts at ``weights + p * weights_stride``;
- results: float32 [M, N]; row m starts at ``results + m * result_pitch``.
"""

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.access import BURST_BOUNDARY
from hw.spec.memory.geometry import LayerLayout, ceil_div

FLOAT_BYTES = FLOAT_BITS // 8
WEIGHT_ALIGNMENT = BURST_BOUNDARY
"""Alignment in bytes of the weights and their stride. Bursts end at multiples of it, so every burst is long."""
DATA_ALIGNMENT = 128
"""Alignment in bytes of activations, results and the results' pitch. It is the size of one token's K-slice for the
largest array, so no slice is in two reads."""
BANK_SPAN = 128 * 1024
"""Bytes until 64-bit DDR4 memory uses the same bank again: 16 banks with rows of 8 KiB."""
ADDRESS_BITS = 40
"""Address bits of the memory ports, as in a Zynq UltraScale+."""
ADDRESS_LIMIT = DATA_ALIGNMENT << 32
"""Addresses in a descriptor are below this limit (512 GiB): a field of 32 bits in units of DATA_ALIGNMENT. No region that
starts below it can reach the end of the address space."""


def result_pitch(n: int) -> int:
    """Least number of bytes from one row of ``n`` results to the next."""
    return ceil_div(FLOAT_BYTES * n, DATA_ALIGNMENT) * DATA_ALIGNMENT


def region_bytes(layer: LayerLayout) -> int:
    """Bytes of one port's region of a layer's weights, in whole pages."""
    return ceil_div(layer.beats * layer.config.port_width // 8, WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT


def weights_stride(layer: LayerLayout) -> int:
    """Bytes from one port's region of a layer's weights to the next, so that the ports never meet in a DRAM bank.

    All ports read at the same pace. If their regions were a multiple of BANK_SPAN apart, they would always need
    different rows of the same bank. For this reason the starts of the regions are evenly spread over the banks.
    """
    apart = BANK_SPAN // layer.config.ports
    return apart + ceil_div(max(0, region_bytes(layer) - apart), BANK_SPAN) * BANK_SPAN


def weight_bytes(layer: LayerLayout) -> int:
    """Bytes of a layer's weights in memory, from the first port's region to the end of the last one's."""
    return (layer.config.ports - 1) * weights_stride(layer) + region_bytes(layer)


def activation_beats(config: AcceleratorConfig, tokens: int, slices: int) -> int:
    """Beats of one port that hold a layer's activations."""
    return tokens * slices * (config.tile * FLOAT_BITS // config.port_width)
