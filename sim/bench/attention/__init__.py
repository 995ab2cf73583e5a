# SPDX-License-Identifier: Apache-2.0
"""The library of the benches: streams, packing, layers, monitors, drivers."""
