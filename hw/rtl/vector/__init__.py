# SPDX-License-Identifier: Apache-2.0
"""The vector unit's operators on float32, as `hw/spec/numerics` defines them."""
