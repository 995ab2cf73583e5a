# SPDX-License-Identifier: Apache-2.0
"""IEEE 754 binary32, by its fields."""

FRACTION_BITS = 23
SIGNIFICAND_BITS = FRACTION_BITS + 1
"""With the leading one."""
EXPONENT_FIELD_BITS = 8
EXPONENT_SPECIAL = (1 << EXPONENT_FIELD_BITS) - 1
"""The exponent field of infinities and of what is not a number."""
EXPONENT_BIAS = (1 << (EXPONENT_FIELD_BITS - 1)) - 1
EXPONENT_MIN, EXPONENT_MAX = 1 - EXPONENT_BIAS, EXPONENT_BIAS
"""Of normal numbers."""
