# SPDX-License-Identifier: Apache-2.0
"""Weights of more bits than the hardware's, as two planes; for the hardware they are additional groups.

With w = ``weight_bits``, a weight of up to 2w bits is ``q = 2^w * high + low``, and its zero point is split in the
same way. Both planes get the same activations; the scale mantissas of the high plane are ``2^w`` times those of the low
plane. So the integer result is exactly that of one weight of 2w bits with a scale of ``16 - w`` bits, and the hardware
needs no change.
"""

import numpy as np

from hw.spec.config import SCALE_BITS, AcceleratorConfig
from hw.spec.numerics.linear import NumericsError, Weights, check_zero_points, quantize_scales, round_zero_points


def plane_count(config: AcceleratorConfig, bits: int) -> int:
    """Number of planes for weights of ``bits`` bits: 1 or 2.

    Raises
    ------
    NumericsError : two planes cannot hold them
    """
    if bits > 2 * config.weight_bits:
        raise NumericsError(
            f"its weights have {bits} bits, and two planes of weight_bits ({config.weight_bits}) hold"
            f" {2 * config.weight_bits}"
        )
    return 1 if bits <= config.weight_bits else 2


def plane_zero_points(config: AcceleratorConfig, bits: int, zero_points: np.ndarray) -> list[np.ndarray]:
    """Zero points in steps of q, of any shape, as int64 in units of ``2**-f`` for each plane, the high plane first.

    Raises
    ------
    NumericsError : see ``plane_count`` and :func:`hw.spec.numerics.linear.quantize_zero_points`
    """
    whole = round_zero_points(config, zero_points)
    if plane_count(config, bits) == 1:
        planes = [whole]
    else:
        high = whole >> (config.weight_bits + config.fraction_bits) << config.fraction_bits
        planes = [high, whole - (high << config.weight_bits)]
    for plane in planes:
        check_zero_points(config, plane, whole)
    return planes


def quantize_weights(
    config: AcceleratorConfig, bits: int, q: np.ndarray, scales: np.ndarray, zero_points: np.ndarray
) -> list[Weights]:
    """A layer's weights in the hardware's formats, plane by plane, the high plane first.

    Parameters: uint8 ``q`` [N, K] below ``2**bits``; float ``scales`` and ``zero_points`` [N, G]. Two planes share
    their row exponents, so their sum over K is the layer.

    Raises
    ------
    NumericsError : see ``plane_zero_points`` and :func:`hw.spec.numerics.linear.quantize_scales`
    """
    zeros = plane_zero_points(config, bits, zero_points)
    if len(zeros) == 1:
        mantissas, exponents = quantize_scales(scales)
        return [Weights(q, zeros[0], mantissas, exponents)]
    width = config.weight_bits
    mantissas, exponents = quantize_scales(scales, SCALE_BITS - width)
    return [
        Weights(q >> np.uint8(width), zeros[0], mantissas << width, exponents),
        Weights(q & np.uint8(config.weight_max), zeros[1], mantissas, exponents),
    ]
