# SPDX-License-Identifier: Apache-2.0
"""The fields of IEEE 754 binary32."""

FRACTION_BITS = 23
SIGNIFICAND_BITS = FRACTION_BITS + 1
"""Bits of the significand with its leading one."""
EXPONENT_FIELD_BITS = 8
EXPONENT_SPECIAL = (1 << EXPONENT_FIELD_BITS) - 1
"""The exponent field of infinities and NaNs."""
EXPONENT_BIAS = (1 << (EXPONENT_FIELD_BITS - 1)) - 1
EXPONENT_MIN, EXPONENT_MAX = 1 - EXPONENT_BIAS, EXPONENT_BIAS
"""Exponents of normal numbers."""
