# SPDX-License-Identifier: Apache-2.0
"""How the operands of a layer lie in memory.

- activations: float32 [M, K], rows one after the other, K padded with zeros to whole groups;
- weights: the stream of :mod:`hw.spec.memory.geometry`, striped over the ports; port p reads one contiguous region of
  ``beats * port_bytes`` from ``weights + p * weights_stride`` on;
- results: float32 [M, N], row m from ``results + m * result_pitch`` on.
"""

from hw.spec.config import FLOAT_BITS, AcceleratorConfig
from hw.spec.memory.access import BURST_BOUNDARY
from hw.spec.memory.geometry import LayerLayout, ceil_div

FLOAT_BYTES = FLOAT_BITS // 8
WEIGHT_ALIGNMENT = BURST_BOUNDARY
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


def activation_beats(config: AcceleratorConfig, tokens: int, slices: int) -> int:
    """Beats of one port that hold a layer's activations."""
    return tokens * slices * (config.tile * FLOAT_BITS // config.port_width)
