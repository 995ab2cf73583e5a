# SPDX-License-Identifier: Apache-2.0
"""From components to files: Verilog, netlists, wrappers, overlays, and the reports of other tools."""
